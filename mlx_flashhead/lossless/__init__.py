"""Lossless decoding: the head proposes, the dense rows decide (docs/lossless.md).

    state    ← model(token, cache)                 the body, by mlx-lm's loop
    proposal ← head.propose(state)                 from the scored tokens alone   proposals.py
    waiting  += (state, proposal)                                                 text.py
    when it is time:                                                              check.py
        logits ← dense product of the waiting states                              check.py
        certain, whatever rounding does, or decided by that position's own logits screen.py
        as proposed → confirmed, and given out
        else        → the choice is confirmed; the caches go back                 way_back.py

`loop.py` drives one text, `batch.py` several. Nothing unconfirmed leaves this room.
"""
