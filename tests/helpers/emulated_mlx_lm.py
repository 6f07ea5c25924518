"""What mlx-lm cannot do without Metal, by equal plain operations.

Two architectures have Metal kernels without another path. Only the tests and
`scripts/architectures.py` run them so: their kernels are mlx-lm's own business, and their heads are
looked at here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import mlx.core as mx
from mlx_lm.models import bitlinear_layers


@contextmanager
def emulated(library: str = "mlx_lm") -> Iterator[None]:
    """Within the block, all architectures of mlx_lm or mlx_vlm run on this machine.

    Replaces what the installed library has of these names; versions differ.
    """
    with ExitStack() as stack:
        if not mx.metal.is_available():
            for owner, replacements in _replacements(library):
                for name, replacement in replacements.items():
                    if hasattr(owner, name):
                        stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _replacements(library: str) -> list[tuple[object, dict[str, Callable]]]:
    fused = {name: globals()[name] for name in FUSED_KERNELS}
    ternary = {"execute_matmul_kernel": ternary_product}
    if library == "mlx_vlm":
        bitnet = import_module("mlx_vlm.models.bitnet.bitlinear")
        muse_spark = import_module("mlx_vlm.models.muse_spark.language")
        return [(bitnet.BitLinear, ternary), (muse_spark, fused)]
    found = [(bitlinear_layers.BitLinear, ternary)]
    if find_spec("mlx_lm.models.muse_spark"):
        found.append((import_module("mlx_lm.models.muse_spark"), fused))
    return found


def ternary_product(self, x: mx.array, packed: mx.array) -> mx.array:
    """x (..., D) times four rows of two bits a byte (rows/4, D), minus one: (..., rows)."""
    rows = mx.concatenate([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
    product = x @ (rows[: self.out_features].astype(x.dtype) - 1).T
    return product / self.weight_scale if self.invert_weight_scales else product * self.weight_scale


# muse_spark's kernels


FUSED_KERNELS = (
    "expert_routing",
    "norm_add_norm",
    "post_expert_norm_combine",
    "pre_norm",
    "qk_norm",
    "qk_norm_rope",
    "rms_norm_sigmoid_gate",
)


def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    experts = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    total = weights.sum(axis=-1, keepdims=True) + score_eps
    return experts, weights / total * route_scale


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    if post_weight is not None:
        branch = branch * post_weight
    stream = alpha * stream + beta * mx.fast.rms_norm(branch, None, post_eps)
    if next_norm is None:
        return stream, None
    return stream, pre_norm(stream, next_norm, dtype=branch.dtype)


def pre_norm(stream, norm, *, dtype):
    return mx.fast.rms_norm(stream, norm.weight, norm.eps).astype(dtype)


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(axis=-2)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    heads = qkvg.reshape(*qkvg.shape[:-1], -1, head_dim)[..., : n_heads + n_kv_heads, :]
    queries, keys = mx.split(mx.fast.rms_norm(heads, None, eps), [n_heads], axis=-2)
    return queries * query_scale, keys


def qk_norm_rope(qkvg, *, head_dim, rope_base, offset, **kwargs):
    def rotated(heads):  # (B, L, heads, head_dim)
        turned = mx.fast.rope(
            heads.transpose(0, 2, 1, 3),
            head_dim,
            traditional=True,
            base=rope_base,
            scale=1.0,
            offset=offset,
        )
        return turned.transpose(0, 2, 1, 3)

    return [rotated(heads) for heads in qk_norm(qkvg, head_dim=head_dim, **kwargs)]


def rms_norm_sigmoid_gate(x, gate, *, eps):
    normed = mx.fast.rms_norm(x, None, eps).transpose(0, 2, 1, 3)  # (B, L, H, D)
    return normed.reshape(gate.shape) * mx.sigmoid(gate)
