"""Lossless decoding: speculative decoding within the head (docs/lossless.md).

    state    ← model(token, cache)       taken where the head is called     proposer.py
    proposal ← head.propose(state)       from the scored tokens alone       proposer.py
    pending  += proposal                                                    text.py
    when verification is due:                                               schedule.py
        logits ← dense product of the pending states; certain or not        verification.py
        accepted → handed out
        rejected → the dense choice is handed out, the caches roll back     caches.py

A text that decodes alone may take several tokens a step:

    guess    ← the offer that gains most, of a grammar, a lookup, a model   guessing/
    states   ← twin(latest token and guess, stand-ins for the caches)       wide/
    accepted as far as the guess is what is chosen                          decoder.py

`loop.py` drives one text, `batch.py` several, `generation.py` puts them under mlx-lm's
functions. `policy.py` has the settings for a head on this machine,
`measuring/` measures once what the machine gains, and `pace.py` goes by the text at hand.
`sampler.py` says which samplers and processors can be verified; all others are decoded by the
normal (dense) head.
"""
