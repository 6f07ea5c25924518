"""Lossless decoding: speculative decoding within the head (docs/lossless.md).

    state    ← model(token, cache)                 taken where the head is called   proposer.py
    proposal ← head.propose(state)                 from the scored tokens alone     proposer.py
    pending  += proposal                                                            sequence.py
    when it is due:                                                                 scheduler.py
        logits ← dense product of the pending states, then what is certain          verify.py
        accepted   → handed out
        rejected   → the dense choice is handed out, the caches roll back           rollback.py

`loop.py` drives one sequence, `batch.py` several. `sampler.py` says which samplers and processors
can be verified. Everything else is decoded by the normal (dense) head.
"""
