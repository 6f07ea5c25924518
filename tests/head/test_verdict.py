"""What a head says of proposed tokens, by its dense rows: accepted, or in doubt."""

import mlx.core as mx
import pytest

from flash_loops import make_flash
from mlx_flashhead.head import rounded_product
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import best_draws
from mlx_flashhead.head.draws.noise import Noise, position_key

K = 6


@pytest.fixture(params=[False, True], ids=["lazily", "in a thread"])
def head(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(rounded_product, "WORTH_A_THREAD", 0)
    return make_flash(num_hidden_layers=1).head


def drawn():
    return Draws.of([(Noise(0.8, top_p=0.9), position_key(1, place)) for place in range(K)])


@pytest.mark.parametrize("draws", [best_draws(K), drawn()], ids=["greedy", "drawn"])
def test_what_is_accepted_is_the_dense_choice(head, draws):
    hidden = mx.random.normal((K, head.hidden_size), key=mx.random.key(3))
    dense = mx.concatenate([head.dense_logits(state[None]) for state in hidden])
    expected = draws.choose(dense).tolist()
    seen = set()
    for n_probes in (1, 4, head.n_clusters):
        proposal = head.propose(hidden, draws, n_probes=n_probes)
        verdict = head.verify(proposal, draws)
        tokens = proposal.tokens.tolist()
        right = [token == choice for token, choice in zip(tokens, expected, strict=True)]
        judged = set(zip(right, verdict.in_doubt(), strict=True))
        assert verdict.ready and (False, False) not in judged
        seen |= judged
        for i in range(K):
            assert mx.allclose(verdict.logits(i), dense[i : i + 1], atol=1e-4)
    assert seen >= {(True, False), (False, True)}


def test_a_mask_rules_out_what_would_win(head):
    """The best token of all may not be chosen, so that the next best one is sure."""
    hidden = mx.random.normal((1, head.hidden_size), key=mx.random.key(4))
    best = mx.argmax(head.dense_logits(hidden), axis=-1).item()
    bits = mx.array([[0xFFFFFFFF] * -(-head.vocab_size // 32)], mx.uint32)
    bits[0, best // 32] -= mx.array(1 << best % 32, mx.uint32)
    proposal = head.propose(hidden, n_probes=head.n_clusters, allowed=bits)
    assert proposal.tokens.item() != best
    assert head.verify(proposal, best_draws(1), allowed=bits).in_doubt() == [False]
    few = head.propose(hidden, n_probes=1, allowed=bits)
    if few.tokens.item() != proposal.tokens.item():
        assert head.verify(few, best_draws(1), allowed=bits).in_doubt() == [True]
