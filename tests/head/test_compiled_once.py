"""Nothing is compiled after an installation: each kernel that settings can reach has its text then.

MLX compiles a kernel anew for other template arguments, and for arrays of fewer than 8 elements.
"""

from itertools import cycle, islice

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels, make_centroids, make_rows, on_gpu
from mlx_flashhead.head.adjustment import Adjustment, ChangedTokens
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.logit_map import IDENTITY, LogitMap
from mlx_flashhead.head.proposal import Tolerance
from retrieval import best_token
from tiny_models import random_clusters

VOCAB_SIZE = 157
HIDDEN_SIZE = 64
N_CLUSTERS = 20
SOFTCAP = LogitMap(cap=30.0)
SETTINGS = (
    Greedy(),
    Noise(1.0),
    Noise(0.8, top_p=0.9),
    Noise(1.2, min_p=0.05, top_k=7),
)

pytestmark = pytest.mark.skipif(on_gpu(), reason="texts are counted on the emulator")


def make_head(n_probes: int) -> FlashHead:
    rng = np.random.default_rng(0)
    rows = make_rows(rng, VOCAB_SIZE, HIDDEN_SIZE, bits=4, group_size=64, dtype=mx.bfloat16)
    centroids = make_centroids(rng, N_CLUSTERS, HIDDEN_SIZE, group_size=64)
    token_ids = random_clusters(rng, VOCAB_SIZE, 8)
    return FlashHead(rows, token_ids, centroids, n_probes=n_probes, backend="metal")


def draws_of(n: int) -> list[Draws]:
    """Greedy draws, draws with each filter, and all at once."""

    def alike(settings):
        return [(settings, position_key(1, i)) for i in range(n)]

    mixed = [(SETTINGS[i % 4], position_key(0, i)) for i in range(n)]
    return [*(Draws.of(alike(each)) for each in SETTINGS), Draws.of(mixed)]


def changes_of(n: int) -> Adjustment:
    change = ChangedTokens(biases={3: 1.0}, repetition=1.2, repeated=[3, 9])
    return Adjustment.of([change] * n, mx.zeros(n, mx.uint32), VOCAB_SIZE)


def propose(head: FlashHead, logit_map: LogitMap, n: int) -> list[mx.array]:
    """All kinds of proposals of ``n`` states, and draws from all tokens."""
    hidden = mx.random.normal((n, HIDDEN_SIZE)).astype(mx.bfloat16)
    n_words = -(-VOCAB_SIZE // 32)
    allowed = mx.full((n, n_words), 0xFFFFFFFF, mx.uint32)
    made = []
    for draws in draws_of(n):
        for change in (None, changes_of(n)):
            for mask in (None, allowed):
                proposal = head.propose(
                    hidden, draws, logit_map=logit_map, adjustment=change, allowed=mask
                )
                made.append(proposal.tokens)
    made += [head.unverified_logits(hidden), best_token(head, hidden)]
    positions = [(settings, position_key(0, 0)) for settings in islice(cycle(SETTINGS), n)]
    made.append(Draws.of(positions).choose(mx.random.normal((len(positions), VOCAB_SIZE))))
    return made


def verify(head: FlashHead, logit_map: LogitMap, k: int) -> list[mx.array]:
    """All kinds of verifications of ``k`` states, joined from single ones."""
    hidden = mx.random.normal((k, HIDDEN_SIZE)).astype(mx.bfloat16)
    single = [head.propose(hidden[i : i + 1], None, logit_map=logit_map) for i in range(min(k, 8))]
    positions = [(i % len(single), 0) for i in range(k)]
    joined = head.joined(single, positions, [5] * k)
    slots = head.operations.verifying_product(joined.hidden)
    tolerance = Tolerance(mx.full((k,), 0.01), mx.zeros(k), relative=0.01)
    allowed = mx.full((k, -(-VOCAB_SIZE // 32)), 0xFFFFFFFF, mx.uint32)
    made = []
    for draws in draws_of(k):
        for mask in (None, allowed):
            screen = head.operations.screen(slots, joined, draws, tolerance, 0.01, logit_map, mask)
            made.append(screen.certain)
    return made


@pytest.mark.parametrize("n_probes, logit_map", [(3, SOFTCAP), (9, IDENTITY)])
def test_no_text_is_new_after_the_installation(logit_map, n_probes):
    with kernels(check=False) as emulator:
        head = make_head(n_probes)
        head.check_kernels(mx.bfloat16)
        assert head.backend == "metal"
        if not logit_map.identity:
            assert head.applies(logit_map, mx.bfloat16)
            head.check_kernels(mx.bfloat16, logit_map=logit_map)
            assert head.backend == "metal"
        built = set(emulator.built)
        for n in (1, 2, 3, 4, 5, 8):
            mx.eval(propose(head, logit_map, n))
            assert not emulator.built - built, n
        for k in (1, 2, 3, 4, 7, 8, 9, 32):
            mx.eval(verify(head, logit_map, k))
            assert not emulator.built - built, k
