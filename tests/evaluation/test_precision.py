"""Quality against precision, beside heads that really hold rows of so many bits."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.evaluation import precision
from mlx_flashhead.evaluation.precision import DENSE, evaluate_precisions
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.models import cpu_products
from mlx_flashhead.models.install import get_flash_head, install
from mlx_flashhead.models.locate import find_head
from model_folders import VOCAB_SIZE, write_model
from tiny_models import fitted, random_clusters, tiny_model

TEXT = "Sphinx of black quartz, judge my vow. The five boxing wizards jump quickly. " * 2
CLUSTER_SIZE = 8  # does not divide V


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))[1]


class Installed:
    """A model with a FlashHead, and what a test needs to make the same head at other bits."""

    def __init__(self, arch="llama", *, n_probes=5, eos_token_ids=(), **kwargs):
        self.model = tiny_model(arch, **({"vocab_size": VOCAB_SIZE} | kwargs))
        rows = find_head(self.model).rows()
        self.weight, self.bias = rows.weight, rows.bias
        self.token_ids = random_clusters(np.random.default_rng(0), VOCAB_SIZE, CLUSTER_SIZE)
        self.centroids = fitted(rows, self.token_ids)
        self.settings = {"n_probes": n_probes, "eos_token_ids": eos_token_ids, "backend": "mlx"}
        install(self.model, self.token_ids, self.centroids, **self.settings)

    def states(self, tokenizer):
        """(N, D) float32 states that enter the head, and the (N,) true next tokens."""
        token_ids = np.array(tokenizer.encode(TEXT))
        tokens = mx.array(token_ids[None, :-1])
        inner = getattr(self.model, "model", None) or self.model.transformer
        return inner(tokens, None)[0].astype(mx.float32), token_ids[1:]

    def head(self, bits, group_size):
        """A FlashHead over rows of so many bits, made anew."""
        if bits == 32:
            rows = Matrix(self.weight, bias=self.bias)
        else:
            weight = self.weight
            if weight.dtype == mx.float32:
                weight = weight.astype(mx.bfloat16)
            rows = Matrix(weight.astype(mx.float32), bias=self.bias)
            if bits < 16:
                arrays = mx.quantize(weight, group_size=group_size, bits=bits)
                arrays = (arrays[0], *(a.astype(mx.float32) for a in arrays[1:]))
                rows = Matrix(*arrays, bias=self.bias, group_size=group_size, bits=bits)
        return FlashHead(rows, self.token_ids, self.centroids, max_positions=1000, **self.settings)


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def by_form(found):
    return {(m.head, m.bits, m.n_probes): m for m in found.measures}


CASES = [
    ("llama", {}, 64),
    ("llama", {"tied": False, "eos_token_ids": (3, 77), "n_probes": 4}, 64),
    ("llama", {"dtype": mx.bfloat16}, 64),
    ("llama", {"dtype": mx.float16, "n_probes": 1}, 64),
    ("qwen3", {"hidden_size": 96, "n_probes": 32}, 32),
    ("phi", {"tied": False}, 64),  # a head with a bias
]


@pytest.mark.parametrize("arch, kwargs, group_size", CASES)
def test_each_form_is_what_such_a_head_computes(tokenizer, monkeypatch, arch, kwargs, group_size):
    monkeypatch.setattr(precision, "CHUNK_LOGITS", 20 * VOCAB_SIZE)  # many chunks, the last short
    # the states of 16-bit models differ in their last bits
    monkeypatch.setattr(cpu_products, "numpy_is_faster", lambda: False)
    installed = Installed(arch, **kwargs)
    own = get_flash_head(installed.model).n_probes
    found = evaluate_precisions(
        installed.model, tokenizer, TEXT, probe_counts=[own, 7], progress=False
    )
    stored = 8 * installed.weight.dtype.size
    all_bits = [32, 16, 8, 4] if stored == 32 else [16, 8, 4]
    kinds = [(DENSE, None), *(("FlashHead", p) for p in sorted({own, 7}))]
    assert list(by_form(found)) == [(name, b, p) for name, p in kinds for b in all_bits]

    states, next_ids = installed.states(tokenizer)
    assert found.positions == len(next_ids) > 100
    rows = np.arange(len(next_ids))
    reference = log_softmax(installed.head(stored, group_size).dense_logits(states))
    for (name, bits, n_probes), measured in by_form(found).items():
        head = installed.head(bits, group_size)
        if name == DENSE:
            log_q = log_softmax(head.dense_logits(states))
        else:
            head.n_probes = n_probes
            log_q = log_softmax(head(states))
        agreement = (log_q.argmax(axis=1) == reference.argmax(axis=1)).mean()
        kl = (np.exp(reference) * (reference - log_q)).sum(axis=1).mean()
        assert measured.agreement == pytest.approx(agreement, abs=1.01 / len(rows))
        assert measured.kl == pytest.approx(kl, rel=2e-3, abs=1e-6)
        perplexity = np.exp(-log_q[rows, next_ids].mean())
        assert measured.perplexity == pytest.approx(perplexity, rel=1e-4)


def test_the_first_is_the_reference(tokenizer):
    installed = Installed()
    found = evaluate_precisions(installed.model, tokenizer, TEXT, progress=False)
    reference = found.reference
    assert (reference.head, reference.bits) == (DENSE, 32)
    assert reference.agreement == 1
    assert reference.kl == pytest.approx(0, abs=1e-12)
    dense = [m for m in found.measures if m.head == DENSE]
    assert [m.kl for m in dense] == sorted(m.kl for m in dense)
    assert dense[-1].kl > 1e-3


def test_all_clusters_are_the_dense_head(tokenizer):
    found = by_form(
        evaluate_precisions(Installed().model, tokenizer, TEXT, probe_counts=[33], progress=False)
    )
    for bits in (32, 16, 8, 4):
        dense, flash = found[DENSE, bits, None], found["FlashHead", bits, 33]
        for field in ("agreement", "kl", "perplexity"):
            assert getattr(flash, field) == pytest.approx(getattr(dense, field), abs=1e-12)


@pytest.mark.parametrize("hidden_size, group_size", [(64, 64), (96, 32)])
def test_bytes_by_hand(tokenizer, hidden_size, group_size):
    installed = Installed("qwen3", hidden_size=hidden_size)
    found = by_form(evaluate_precisions(installed.model, tokenizer, TEXT, progress=False))
    groups = 4 * hidden_size // group_size  # a 16-bit scale and offset for each
    row = {32: 4 * hidden_size, 16: 2 * hidden_size}
    row |= {8: hidden_size + groups, 4: hidden_size // 2 + groups}
    centroids = installed.centroids
    arrays = (*centroids.matrix.arrays().values(), centroids.bias)
    stage_1 = sum(array.nbytes for array in arrays)
    for bits, size in row.items():
        dense, flash = found[DENSE, bits, None], found["FlashHead", bits, 5]
        assert dense.bytes_read == VOCAB_SIZE * size
        assert flash.bytes_read == stage_1 + 5 * CLUSTER_SIZE * size
        for measured in (dense, flash):
            share = measured.bytes_read / (VOCAB_SIZE * 2 * hidden_size)
            assert measured.bytes_share == pytest.approx(share)


def test_json_and_positions(tokenizer):
    found = evaluate_precisions(Installed().model, tokenizer, TEXT, positions=30, progress=False)
    as_dict = found.to_dict()
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict
    assert (as_dict["positions"], as_dict["n_clusters"]) == (30, 33)
    assert as_dict["measures"][0]["bits"] == 32


def test_a_quantized_head_is_refused(tokenizer):
    model = Installed(bits=8).model
    with pytest.raises(ValueError, match=r"head has 8 bits already.* --head-bits 16\.$"):
        evaluate_precisions(model, tokenizer, TEXT, progress=False)


def test_a_narrow_head_is_refused(tokenizer):
    model = Installed("qwen3", hidden_size=48).model
    with pytest.raises(
        ValueError, match=r"width 48 is not a multiple of 32.* without --precisions"
    ):
        evaluate_precisions(model, tokenizer, TEXT, progress=False)


def test_probes_and_models_that_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"--probes 34 is not possible"):
        evaluate_precisions(Installed().model, tokenizer, TEXT, probe_counts=[34], progress=False)
    with pytest.raises(ValueError, match="has no FlashHead"):
        evaluate_precisions(tiny_model(vocab_size=VOCAB_SIZE), tokenizer, TEXT, progress=False)


def test_bars(tokenizer, capsys):
    model = Installed().model
    evaluate_precisions(model, tokenizer, TEXT)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Measuring: 100%" in shown.err
    evaluate_precisions(model, tokenizer, TEXT, progress=False)
    assert capsys.readouterr().err == ""
