"""What the Metal kernels cost, in dispatches and bytes."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels, make_centroids, make_clustered, make_rows, on_gpu, plain_clusters
from mlx_flashhead.head import metal_operations
from mlx_flashhead.head.adjustment import Adjustment, ChangedTokens
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import best_draws
from mlx_flashhead.head.draws.noise import Noise
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.logit_map import LogitMap
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.proposal import Proposal, Tolerance
from mlx_flashhead.index.flash_head_config import FlashHeadConfig
from retrieval import best_token
from tiny_models import random_clusters

emulator_only = pytest.mark.skipif(on_gpu(), reason="counts and checks of the emulator")
LINE = 128


class TestGraph:
    """What stands between hidden states and result, in MLX's own graph.

    Exporting records custom kernels on a machine without Metal too, and lists every primitive: so
    MLX itself answers, with the text and the arguments that a Mac would get.
    """

    @staticmethod
    def primitives(function, *inputs) -> Counter:
        events = []
        mx.export_function(events.append, function, *inputs)
        return Counter(event["name"] for event in events if event["type"] == "primitive")

    @staticmethod
    def head(monkeypatch, dtype, bits) -> FlashHead:
        rng = np.random.default_rng(0)
        rows = make_rows(rng, 157, 128, bits=bits, group_size=64, dtype=dtype)
        rows = replace(rows, bias=mx.array(rng.normal(size=157)).astype(dtype))
        parts = random_clusters(rng, 157, 8), make_centroids(rng, 20, 128, group_size=64)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(metal_operations, "MATRIX_FROM", 1000)
        head = FlashHead(rows, *parts, n_probes=6, eos_token_ids=(3,), backend="metal")
        mx.eval(head.arrays())
        return head

    @pytest.mark.parametrize("shape", [(1, 1), (4, 8)])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
    @pytest.mark.parametrize("bits", [4, 16])
    def test_four_kernels_and_views(self, monkeypatch, shape, dtype, bits):
        """Nothing else: no cast, copy, fill, sort, gather or scatter."""
        head = self.head(monkeypatch, mx.bfloat16, bits)
        hidden = mx.zeros((*shape, 128), dtype=dtype)
        draws = Draws.of([(Noise(1.0, top_p=0.9), (1, 2))] * math.prod(shape))
        mx.eval(draws.inputs)

        def propose(of):
            return lambda states: list(head.propose(states.reshape(-1, 128), of))

        for function in (
            head.unverified_logits,
            partial(best_token, head),
            propose(None),
            propose(draws),
        ):
            found = self.primitives(function, hidden)
            assert found.pop("CustomKernel") == 4
            # Views cost nothing.
            assert set(found) <= {"Reshape", "Slice"}, found

    @pytest.mark.parametrize("softcap", [0.0, 30.0])
    @pytest.mark.parametrize("penalties, masked", [(True, False), (False, True), (True, True)])
    def test_penalties_and_masks_add_at_most_three(self, monkeypatch, penalties, masked, softcap):
        """One kernel, and copies of what is short. Other settings are the same trace."""
        head = self.head(monkeypatch, mx.bfloat16, 4)
        # No export knows `mx.contiguous`.
        monkeypatch.setattr(mx, "contiguous", lambda array: -array)
        hidden = mx.zeros((1, 128), mx.bfloat16)
        allowed = None
        if masked:
            allowed = mx.full((1, 5), 7, mx.uint32)
        change = None
        for top_k, occurrences in ((0, 1), (5, 1), (7, 9)):
            if penalties:
                tokens = ChangedTokens(frequency=0.1, occurrences={4: occurrences})
                change = Adjustment.of([tokens], mx.zeros(1, mx.uint32), 157)
            draws = Draws.of([(Noise(1.0, top_k=top_k), (1, 2))])
            how = {"adjustment": change, "allowed": allowed, "logit_map": LogitMap(cap=softcap)}
            mx.eval(draws.inputs, *(each for each in (change, allowed) if each is not None))
            found = self.primitives(lambda h: list(head.propose(h, draws, **how)[1:]), hidden)  # noqa: B023
            assert found.pop("CustomKernel") == 5
            assert found.pop("Negative") == penalties + masked
            # Views cost nothing.
            assert set(found) <= {"Reshape", "Slice", "Broadcast", "ExpandDims"}, found
        assert head.n_traced == 1

    @pytest.mark.parametrize("draws", [best_draws(32), Draws.of([(Noise(1.0, 0.9), (1, 2))] * 32)])
    def test_a_verification_is_three_kernels_beside_the_product(self, monkeypatch, draws):
        """The last join, screen and certain; a join for each 7 tokens that wait came before."""
        head = self.head(monkeypatch, mx.bfloat16, 4)
        tolerance = Tolerance(mx.zeros(32), mx.zeros(32))
        mx.eval(tolerance[:2], draws.inputs)

        def verify(hidden, probes, logits):
            parts = [Proposal(hidden[:n], None, probes[:n], logits[:n], None) for n in (31, 1)]
            one = head.joined(parts, [(0, i) for i in range(31)] + [(1, 0)], [0] * 32)
            slots = head.operations.verifying_product(one.hidden)
            return list(head.operations.screen(slots, one, draws, tolerance, 0.0))

        inputs = mx.zeros((32, 128), mx.bfloat16), mx.zeros((32, 8), mx.uint32)
        found = self.primitives(verify, *inputs, mx.zeros((32, 8, 8), mx.bfloat16))
        assert found.pop("CustomKernel") == 3 and found.pop("QuantizedMatmul") == 1
        # The bias is added, and views cost nothing.
        assert set(found) <= {"Reshape", "Slice", "Squeeze", "Broadcast", "Add"}, found


def dispatches_of(clustered, n_positions, n_probes, setting=(1.0, 0.95, 0.02, 20)):
    """The emulator's records of each kernel in a step, which has six, by name."""
    hidden = mx.random.normal((n_positions, clustered.rows.hidden_size), mx.bfloat16)
    drawing = Draws.of([(Noise(*setting), (0, 0))] * n_positions)
    with kernels() as emulator:
        operations = MetalOperations(clustered)
        scores = operations.route(hidden)
        selection = operations.select(scores, n_probes, words=False)
        candidates = operations.score(hidden, selection)
        operations.choose(selection, candidates, drawing)
        operations.expand(scores, operations.select(scores, n_probes), candidates)
    found = {d.name.removeprefix("flash_head_"): d for d in emulator.dispatches}
    assert list(found) == ["route", "select", "score", "sample", "select_words", "expand"]
    return found


def stored_lines(dispatch) -> int:
    """Bytes of the distinct lines of weights, scales and biases that were read."""
    stored = [dispatch.buffers.get(name) for name in ("weight", "scales", "biases")]
    return LINE * sum(traffic.lines_read for traffic in stored if traffic)


@emulator_only
def test_neither_probes_nor_positions_compile_anything():
    """Seven kernels serve a head: route has one for one position and one for several, select one
    for tokens and one for full logits.

    MLX compiles a text once for each set of template arguments, dtypes and small arrays.
    """
    rng = np.random.default_rng(5)
    n_clusters = 600
    made = make_clustered(rng, n_clusters, 2, 64)
    parts = made.token_rows(), np.array(made.token_ids), made.centroids
    with kernels(check=False) as emulator:
        head = FlashHead(*parts, n_probes=1, backend="metal")
        for head.n_probes in (1, 17, n_clusters - 1):
            for n_positions in (1, 2, 12):
                hidden = mx.zeros((n_positions, 64), mx.bfloat16)
                mx.eval(head.unverified_logits(hidden), best_token(head, hidden))
    names = Counter(text.partition("custom_kernel_flash_head_")[2][:3] for text in emulator.built)
    assert names == {"rou": 2, "sel": 2, "sco": 1, "exp": 1, "sam": 1}


@emulator_only
class TestTraffic:
    @pytest.mark.parametrize(
        ("hidden_size", "cluster_size", "bits", "group_size", "limit"),
        [
            *((576, 16, 4, 64, 1.05), (1024, 16, 8, 64, 1.05), (576, 16, 16, 0, 1.05)),
            *((2048, 16, 4, 128, 1.05), (1152, 16, 4, 32, 1.05), (1024, 8, 4, 64, 1.05)),
            # A cluster has 96 bytes of scales: less than a line.
            (384, 8, 4, 64, 1.25),
        ],
    )
    def test_bytes_of_route_and_score(self, hidden_size, cluster_size, bits, group_size, limit):
        rng = np.random.default_rng(1)
        n_clusters = 128
        n_probes = 24
        form = {"bits": bits, "group_size": group_size}
        clustered = make_clustered(rng, n_clusters, cluster_size, hidden_size, **form)
        found = dispatches_of(clustered, 1, n_probes)
        row_bytes = clustered.rows.nbytes * n_probes // n_clusters
        needed = {"route": clustered.centroids.matrix.nbytes, "score": row_bytes}
        for name, n_bytes in needed.items():
            assert stored_lines(found[name]) <= limit * n_bytes, name
            weight = found[name].buffers["weight"]
            assert weight.reads == weight.distinct_bytes_read

    def test_positions_share_one_reading_of_the_centroids(self):
        clustered = make_clustered(np.random.default_rng(2), 32, 16, 576)
        for n_positions, readings in ((1, 1), (4, 1), (5, 2), (12, 3)):
            found = dispatches_of(clustered, n_positions, 4)["route"].buffers
            assert found["weight"].reads == readings * found["weight"].bytes
            assert found["hidden"].distinct_bytes_read == n_positions * 576 * 2

    def test_threadgroup_memory_and_barriers(self):
        """As metal/flash_head.metal states them, and fewer where nothing is filtered."""
        clustered = make_clustered(np.random.default_rng(3), 40, 16, 64)
        found = dispatches_of(clustered, 2, 9)
        assert [dispatch.barriers for dispatch in found.values()] == [0, 6, 1, 13, 6, 1]
        assert max(dispatch.threadgroup_bytes for dispatch in found.values()) == 16784
        for setting, barriers in (((0.0, 0.9, 0.0, 9), 2), ((1.0,), 3), ((1.0, 0.9), 9)):
            found = dispatches_of(clustered, 2, 9, setting)
            assert found["sample"].barriers == barriers

    @pytest.mark.parametrize("n_clusters", [3072, 16384, 16388])
    def test_select_reads_the_scores_once(self, n_clusters):
        rng = np.random.default_rng(4)
        clustered = plain_clusters(rng, n_clusters)
        scores = mx.array(rng.normal(size=(1, n_clusters)).astype(np.float32))
        with kernels() as emulator:
            mx.eval(MetalOperations(clustered).select(scores, n_clusters // 10, words=False))
        assert emulator.dispatches[0].buffers["scores"].reads == scores.nbytes


@pytest.mark.parametrize("n_clusters, cluster_size", [(3072, 16), (2048, 16), (1000, 32)])
def test_a_draft_reads_a_tenth_of_the_head(n_clusters, cluster_size):
    """Rows and centroids of equal bits, beside the latest tokens of the text."""
    config = FlashHeadConfig(n_clusters * cluster_size, n_clusters, cluster_size, 64, 64, "")
    assert 0.085 <= 1 / cluster_size + config.draft_probes / n_clusters <= 0.1
