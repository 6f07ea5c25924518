"""Two architectures' Metal kernels, which have no other path, by plain operations.

Only the tests and `scripts/architectures.py` run them so, to look at their heads. So norms and
gates leave out weights that change no shape.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from unittest import mock

import mlx.core as mx

MODULES = {
    "mlx_lm": ("bitlinear_layers", "muse_spark"),
    "mlx_vlm": ("bitnet.bitlinear", "muse_spark.language"),
}


@contextmanager
def emulated(library: str = "mlx_lm") -> Iterator[None]:
    """Within the block, all architectures of mlx_lm or mlx_vlm run on this machine."""
    modules = MODULES[library]
    if mx.metal.is_available():
        modules = ()
    with ExitStack() as stack:
        for name in modules:
            with suppress(ImportError):
                module = import_module(f"{library}.models.{name}")
                owner = getattr(module, "BitLinear", module)
                for function in REPLACEMENTS:
                    # Versions of mlx-lm differ.
                    if hasattr(owner, function.__name__):
                        stack.enter_context(mock.patch.object(owner, function.__name__, function))
        yield


def execute_matmul_kernel(self, x: mx.array, packed: mx.array) -> mx.array:
    """x (..., D) times four rows of two bits a byte (rows/4, D), minus one: (..., rows)."""
    rows = mx.concatenate([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
    product = x @ (rows[: self.out_features].astype(x.dtype) - 1).T
    if self.invert_weight_scales:
        return product / self.weight_scale
    return product * self.weight_scale


def expert_routing(logits, expert_bias, *, top_k, **_):
    scores = mx.sigmoid(logits)
    experts = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    return experts, mx.take_along_axis(scores, experts, axis=-1)


def norm_add_norm(branch, stream, *, next_norm, **_):
    stream = stream + mx.fast.rms_norm(branch, None, 1e-5)
    if next_norm is None:
        normed = None
    else:
        normed = pre_norm(stream, next_norm, dtype=branch.dtype)
    return stream, normed


def pre_norm(stream, norm, *, dtype):
    return mx.fast.rms_norm(stream, norm.weight, norm.eps).astype(dtype)


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(axis=-2)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, **_):
    heads = qkvg.reshape(*qkvg.shape[:-1], -1, head_dim)[..., : n_heads + n_kv_heads, :]
    return mx.split(mx.fast.rms_norm(heads, None, eps), [n_heads], axis=-2)


def qk_norm_rope(qkvg, *, head_dim, rope_base, offset, **kwargs):
    rope = {"traditional": True, "base": rope_base, "scale": 1.0, "offset": offset}
    return [
        mx.fast.rope(heads.transpose(0, 2, 1, 3), head_dim, **rope).transpose(0, 2, 1, 3)
        for heads in qk_norm(qkvg, head_dim=head_dim, **kwargs)
    ]


def rms_norm_sigmoid_gate(x, gate, *, eps):
    # It is (B, L, H, D).
    normed = mx.fast.rms_norm(x, None, eps).transpose(0, 2, 1, 3)
    return normed.reshape(gate.shape) * mx.sigmoid(gate)


REPLACEMENTS = (
    execute_matmul_kernel,
    expert_routing,
    norm_add_norm,
    pre_norm,
    post_expert_norm_combine,
    qk_norm,
    qk_norm_rope,
    rms_norm_sigmoid_gate,
)
