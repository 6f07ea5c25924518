"""Lossless decoding: speculative decoding within the head (docs/lossless.md).

    state    ← model(token, cache)                 taken where the head is called     policy.py
    proposal ← head.propose(state)                 from the scored tokens alone       policy.py
    pending  += proposal                                                              sequence.py
    when it is due:                                                                 schedule.py
        logits ← dense product of the pending states, then what is certain          verification.py
        accepted   → handed out
        rejected   → the dense choice is handed out, the caches roll back           caches.py

`loop.py` drives one sequence, `batch.py` several, `generation.py` puts them under mlx-lm's
functions. `sampler.py` says which samplers and processors can be verified; all others are decoded
by the normal (dense) head. `tuning.py` measures what a machine gains.
"""
