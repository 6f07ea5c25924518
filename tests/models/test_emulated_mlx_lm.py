"""The plain operations that stand for mlx-lm's Metal kernels compute what those kernels say."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.cache import make_prompt_cache

import emulated_mlx_lm as plain
from architecture_models import tiny_architecture

RNG = np.random.default_rng(0)


def normed(x, eps=1e-5):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("inverted", [True, False])
def test_ternary_product(inverted):
    """Byte (r, d) holds rows r, r + R, r + 2R and r + 3R of column d, two bits each."""
    weight = RNG.integers(-1, 2, (12, 8))
    packed = sum((weight[3 * i : 3 * i + 3] + 1) << (2 * i) for i in range(4))
    layer = BitLinear(8, 12, bias=False, invert_weight_scales=inverted)
    layer.weight, layer.weight_scale = mx.array(packed.astype(np.uint8)), mx.array([0.5])
    x = random(2, 3, 8)
    found = plain.ternary_product(layer, mx.array(x), layer.weight)
    scale = 2 if inverted else 0.5
    np.testing.assert_allclose(found, x @ weight.T * scale, rtol=1e-5, atol=1e-5)


def test_expert_routing():
    logits, bias = random(3, 6), random(6)
    experts, weights = plain.expert_routing(
        mx.array(logits),
        mx.array(bias),
        top_k=2,
        multiplier=0.5,
        score_eps=0.1,
        route_scale=3.0,
    )
    scores = 1 / (1 + np.exp(-0.5 * logits))
    for row in range(3):
        chosen = np.argsort(-(scores[row] + bias))[:2]
        assert np.array(experts)[row].tolist() == chosen.tolist()
        expected = 3 * scores[row, chosen] / (scores[row, chosen].sum() + 0.1)
        np.testing.assert_allclose(np.array(weights)[row], expected, rtol=1e-5)


def test_norms_between_layers():
    branch, stream, alpha, beta, post, pre = (random(*s) for s in [(2, 8)] * 2 + [(8,)] * 4)
    norm = nn.RMSNorm(8, eps=1e-5)
    norm.weight = mx.array(pre)
    for weight in (post, None):
        total, after = plain.norm_add_norm(
            mx.array(branch),
            mx.array(stream),
            alpha=mx.array(alpha),
            beta=mx.array(beta),
            post_weight=None if weight is None else mx.array(weight),
            post_eps=1e-5,
            next_norm=norm,
        )
        scaled = branch if weight is None else branch * weight
        expected = alpha * stream + beta * normed(scaled)
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after, normed(expected) * pre, rtol=1e-4, atol=1e-5)


def test_experts_are_combined():
    experts, weights, norm = random(3, 2, 8), random(3, 2), random(8)
    found = plain.post_expert_norm_combine(
        mx.array(experts), mx.array(weights), norm_weight=mx.array(norm), eps=1e-5
    )
    expected = (normed(experts * norm) * weights[..., None]).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gate_of_attention():
    x, gate = random(1, 2, 3, 4), random(1, 3, 8)
    found = plain.rms_norm_sigmoid_gate(mx.array(x), mx.array(gate), eps=1e-5)
    for position in range(3):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            expected = normed(x[0, head, position]) / (1 + np.exp(-gate[0, position, part]))
            np.testing.assert_allclose(np.array(found)[0, position, part], expected, rtol=1e-4)


def test_rotation_begins_after_the_cache():
    tokens = mx.array([[3, 1, 200, 7, 5], [9, 9, 0, 202, 5]])
    with plain.emulated():
        model = tiny_architecture("muse_spark", tied=False)
        cache = make_prompt_cache(model)
        model(tokens[:, :3], cache=cache)
        found, expected = model(tokens[:, 3:], cache=cache), model(tokens)[:, 3:]
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4)
