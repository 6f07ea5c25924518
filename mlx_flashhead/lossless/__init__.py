"""Lossless decoding: the head proposes, the dense rows decide.

Hidden states depend on the tokens alone. While the proposals are the dense model's choices, every
state is the dense model's own. One product over k waiting states reads the rows once for k tokens.

    state    ← model(token, cache)                 the body, by mlx-lm's loop
    proposal ← head.propose(state)                 from the scored tokens alone   proposals.py
    waiting  += (state, proposal)                                                 text.py
    when it is time:                                                              pace.py
        logits ← dense product of the waiting states                              check.py
        certain: the proposal is the choice whatever rounding does                screen.py
        in doubt: the dense logits of that position by itself decide
        as proposed → confirmed, and given out
        else        → the choice is confirmed; the caches go back                 way_back.py

`loop.py` drives one text, `batch.py` several. Nothing unconfirmed leaves this room. The number of
probes, the pace and the index decide about speed; none of them decides about a token.
"""
