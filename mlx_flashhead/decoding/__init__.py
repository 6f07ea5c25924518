"""Lossless decoding: speculative decoding within the head (docs/lossless.md).

    state    ← model(token, cache)       taken where the head is called     proposer.py
    proposal ← head.propose(state)       from the scored tokens alone       proposer.py
    pending  += proposal                                                    text.py
    when verification is due:                                               verification.py
        logits ← dense product of the pending states; certain or not        verification.py
        accepted → handed out
        rejected → the dense choice is handed out, the caches roll back     caches.py

A text that decodes alone may take several tokens a step:

    guess    ← the offer that gains most, of a grammar, a lookup, a model   guessing/
    states   ← twin(latest token and guess, stand-ins for the caches)       wide/
    accepted as far as the guess is what is chosen                          decoder.py

`loop.py` drives one text, `batch.py` several, `generation.py` puts them under mlx-lm's
functions. `policy.py` has what a head gains on this machine, which `measuring/` measures once, and
in the text at hand. `sampling.py` says which samplers and processors can be verified. Text with
others is decoded by the normal (dense) head.
"""
