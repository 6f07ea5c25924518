"""What a verification dispatches to a GPU, through the loop's own code, in MLX's own graph.

Exporting records custom kernels on a machine without Metal, too.
"""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

import step_times
from flash_loops import flash_of
from mlx_flashhead.decoding.caches import OwnCaches
from mlx_flashhead.decoding.measuring.rehearsal import rehearsed_texts
from mlx_flashhead.decoding.phase import Phase
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.text import PendingToken, Text
from mlx_flashhead.decoding.verification import Verification, join
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.proposal import Proposal
from mlx_flashhead.head.rounded_product import RoundedSums, Rounding
from pages import CHECKOUT
from tiny_models import tiny_model

pytestmark = pytest.mark.newest
N_PROBES = 12
VIEWS = ("Slice", "Reshape", "Squeeze", "ExpandDims", "Broadcast", "Transpose", "Flatten")
KINDS = [
    "the likeliest tokens",
    "a temperature",
    "top-p, min-p and top-k",
    "penalties",
    "a grammar",
    "penalties and a grammar",
]
# The second one has a softcap.
ARCHITECTURES = ["llama", "gemma2"]
# Bounds of scored logits are as on MLX's kernels or on others.
BOUNDS = {"exact": 0.0, "rounded": 1e-4}


@pytest.fixture(scope="module")
def flashes():
    """Models whose heads are on kernels that nothing runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FLASHHEAD_BACKEND", "metal")
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(FlashHead, "check_kernels", lambda *_, **__: None)
        made = {
            arch: flash_of(tiny_model(arch, dtype=mx.bfloat16, bits=4, num_hidden_layers=1))
            for arch in ARCHITECTURES
        }
        for flash in made.values():
            assert flash.head.backend == "metal"
            patch.setattr(flash.head, "applies", lambda *_: True)
            mx.eval(flash.head.arrays())
        yield made


def dispatches(flash, rehearsed, k: int) -> Counter:
    """The kernels of a verification of ``k`` tokens, and of the joins while they wait."""
    head = flash.head
    proposer = Proposer(flash.model)
    n_words = -(-head.vocab_size // 32)

    def verify(hidden, probes, logits):
        text = Text(*rehearsed, mx.array([0, 1, 0, 1]))
        text.enter(Phase.AHEAD, OwnCaches([], flash.model).marks([text])[0])
        masked = text.changes is not None and text.changes.mask is not None
        allowed = None
        if masked:
            allowed = np.full(n_words, 7, np.uint32)
        unjoined = []
        for i in range(k):
            row = slice(i, i + 1)
            proposal = Proposal(hidden[row], None, probes[row], logits[row], None)
            pending = PendingToken(proposal, token=1, is_read=True, allowed=allowed)
            text.pending.append(pending)
            unjoined.append(pending)
            if len(unjoined) == MetalOperations.joined_early and i + 1 < k:
                join(head, unjoined)
                unjoined = []
        return [Verification(proposer, [text], [None])._verdict.certain]

    states = mx.zeros((k, head.hidden_size), mx.bfloat16), mx.zeros((k, N_PROBES), mx.uint32)
    logits = mx.zeros((k, N_PROBES, head.cluster_size), mx.bfloat16)
    events = []
    mx.export_function(events.append, verify, *states, logits)
    found = Counter(event["name"] for event in events if event["type"] == "primitive")
    return Counter({name: n for name, n in found.items() if name not in VIEWS})


def dispatches_with(flash, name, k, monkeypatch, **rounding):
    """Those with such a rounding, and how many there are beside what the estimates count."""
    rehearsed = rehearsed_texts(flash.head.vocab_size)[name]
    bounds = Rounding(2.0**-7, longest=1.0, product=1e-3, **rounding)
    monkeypatch.setattr(FlashHead, "rounding", lambda *_: bounds)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    # No export knows `mx.contiguous`.
    monkeypatch.setattr(mx, "contiguous", lambda array: -array)
    found = dispatches(flash, rehearsed, k)
    n_joins = -(-k // step_times.JOINED)
    return found, sum(found.values()) - n_joins - step_times.VERIFY_LAUNCHES


@pytest.mark.parametrize("k", [8, 32])
def test_rounded_sums_of_older_versions_add_thirteen(flashes, monkeypatch, k):
    """MLX 0.32.1 to 0.32.3 round sums of hidden values: docs/speed.md says what that adds."""
    sums = RoundedSums(mx.bfloat16, added=4, group_size=32, longest=1.0)
    of = {"scored": 0.0, "sums": sums}
    _, n_more = dispatches_with(flashes["llama"], KINDS[0], k, monkeypatch, **of)
    page = (CHECKOUT / "docs" / "speed.md").read_text()
    assert f"With MLX 0.32.1 to 0.32.3 there are {n_more} more" in page


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("k", [8, 32])
@pytest.mark.parametrize("scored", BOUNDS.values(), ids=BOUNDS)
def test_as_many_as_the_estimates_count(flashes, monkeypatch, name, k, arch, scored):
    """The product, its bounds, screen and certain, and a join for each 7 tokens."""
    found, n_bounds = dispatches_with(flashes[arch], name, k, monkeypatch, scored=scored)
    n_joins = -(-k // MetalOperations.joined_early)
    assert MetalOperations.joined_early == step_times.JOINED
    # These steps are what the penalties make of bounds that are not zero.
    if "penalties" in name and scored:
        assert 0 < n_bounds <= 12
    else:
        assert n_bounds == 0 and found == {"QuantizedMatmul": 1, "CustomKernel": 3 + n_joins}
