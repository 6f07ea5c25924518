"""The kernels of a decode step before its head, counted in the graphs that mlx-lm's code makes.

    python scripts/figures/kernels.py            # prints them for each model of models.csv
    python scripts/figures/kernels.py --write    # puts them into models.csv

A model has the layers of the real one, and tiny ones. MLX's graph of its second token has an
operation for each kernel that Metal would run: what a GPU has as one kernel (norms, rotary
embeddings, attention, gated delta rules) is replaced by one operation while the graph is made, and
views cost nothing. *Dependent* kernels are those of the longest path: the rest can run beside them.
"""

import csv
import importlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache

from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command

TABLE = Path(__file__).with_name("apple_estimates") / "models.csv"
# These operations change shapes alone.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
PRODUCTS = ("Matmul", "QuantizedMatmul")
# Rows that are gathered are dequantized by one more kernel.
EMBEDDING = 1

# Sizes that all architectures share; the layers' number and kinds follow below.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 64,
    "sliding_window": 32,
    "rms_norm_eps": 1e-6,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_dim": 64,
    "block_ff_dim": 64,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "num_experts": 0,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "num_local_experts": 16,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "moe_router_enable_expert_bias": True,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}


def attention_every(n: int, n_layers: int) -> list[int]:
    """The layers with attention, of LFM2: spread evenly, as many as there are."""
    return [int((i + 0.5) * n_layers / n) for i in range(n)]


# What an architecture, and a model of it, has beside the sizes.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {"sliding_window_pattern": 6},
    "gemma-3-1b": {"sliding_window_pattern": 6},
    "gemma-3-4b": {"sliding_window_pattern": 6},
    "gemma-4-e2b": {
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 20,
        "sliding_window_pattern": 5,
    },
    "gemma-4-e4b": {
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 18,
        "sliding_window_pattern": 6,
    },
    "gemma-4-26b-a4b": {
        "enable_moe_block": True,
        "num_experts": 16,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "sliding_window_pattern": 6,
    },
    "gemma-4-31b": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "sliding_window_pattern": 6,
    },
    "qwen3.5-9b": {"tie_word_embeddings": False},
    "qwen3.8-27b": {"tie_word_embeddings": False},
    "qwen3-30b-a3b": {"num_experts": 16},
    "qwen3.5-35b-a3b": {"num_experts": 16, "tie_word_embeddings": False},
    "ling-mini": {
        "num_experts": 16,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 1,
        "moe_router_enable_shared_expert": True,
        "tie_word_embeddings": False,
    },
    "lfm2.5-1.2b": {"full_attn_idxs": attention_every(6, 16)},
    "lfm2.5-2.6b": {"full_attn_idxs": attention_every(8, 30)},
    "lfm2-8b-a1b": {
        "full_attn_idxs": attention_every(6, 24),
        "num_experts": 16,
        "num_dense_layers": 2,
    },
}


class Kernels(NamedTuple):
    """Of a step before its head, the final norm included."""

    dependent: int
    dispatches: int


def after(value: mx.array, others: list[mx.array]) -> mx.array:
    """An operation on ``value`` that depends on ``others`` as well."""
    return mx.arccosh(mx.depends([value], others)[0])


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *rest: Any, **options: Any
) -> tuple[mx.array, mx.array]:
    """One kernel, with an output and a state of their shapes."""
    if len(rest) > 2:
        state = rest[2]
    else:
        state = options.get("state")
    if state is None:
        state = mx.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]))
    inputs = [q, k, a, b]
    return after(v, [*inputs, state]), after(state, inputs)


@contextmanager
def kernels_as_operations(module: ModuleType) -> Iterator[None]:
    """Replaces what is one kernel on a GPU, and several operations elsewhere, by one operation."""
    one_operation = {
        "rms_norm": lambda x, weight, eps, **_: mx.erfinv(x),
        "rope": lambda x, *_, **__: mx.arctanh(x),
        "scaled_dot_product_attention": lambda q, k, v, **_: after(q, [k, v]),
    }
    with ExitStack() as stack:
        for name, function in one_operation.items():
            stack.enter_context(patch.object(mx.fast, name, function))
        if hasattr(module, "gated_delta_update"):
            stack.enter_context(patch.object(module, "gated_delta_update", gated_delta))
        yield


def count(architecture: str, config: dict[str, Any]) -> Kernels:
    """The kernels of a 4-bit model of one of mlx-lm's architectures."""
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    with kernels_as_operations(module):
        model = module.Model(module.ModelArgs.from_dict(SIZES | config))
        nn.quantize(model, 32, 4, class_predicate=_is_quantized)
        model.set_dtype(mx.bfloat16)
        model.eval()
        mx.eval(model.parameters())
        prompt_cache = cache.make_prompt_cache(model)
        for _ in range(2):
            logits = model(mx.array([[1]]), cache=prompt_cache)
            mx.eval(logits, [layer.state for layer in prompt_cache])
        return _count(model(mx.array([[1]]), cache=prompt_cache))


def _is_quantized(path: str, module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and hasattr(module, "to_quantized")


def _count(logits: mx.array) -> Kernels:
    """Counts in MLX's graph, up to the head's product."""
    names, inputs = _graph(logits)
    longest: dict[str, tuple[str, ...]] = {}
    for node in TopologicalSorter(inputs).static_order():
        paths = (longest[before] for before in inputs.get(node, ()))
        path = max(paths, key=len, default=())
        name = names.get(node)
        if name is None or name in VIEWS:
            longest[node] = path
        else:
            longest[node] = (*path, name)
    path = max(longest.values(), key=len)
    before_head = max(place for place, name in enumerate(path) if name in PRODUCTS)
    kernels = sum(name not in VIEWS for name in names.values()) - (len(path) - before_head)
    return Kernels(before_head + EMBEDDING, kernels + EMBEDDING)


def _graph(array: mx.array) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The names of the operations, and what each operation and each array follows."""
    names: dict[str, str] = {}
    inputs: dict[str, list[str]] = defaultdict(list)
    # Two operations may have the same address, one after the other.
    latest: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), array)
        lines = file.read_text(encoding="utf-8").splitlines()
    for text in lines:
        label = re.match(r'\{ (\d+) \[label ="([^"]+)"', text)
        arrow = re.match(r"(\S+) -> (\S+)$", text)
        if label is not None:
            latest[label[1]] = f"{label[1]}, {len(names)}"
            names[latest[label[1]]] = label[2]
        elif arrow is not None:
            before, node = (end.strip('"') for end in arrow.groups())
            inputs[latest.get(node, node)].append(latest.get(before, before))
    return names, inputs


def rows() -> list[dict[str, str]]:
    """The rows of the table, by heading."""
    with TABLE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def kernels_of(row: dict[str, str]) -> Kernels:
    """The kernels of a model of models.csv."""
    n_layers = int(row["n_layers"])
    config = {"model_type": row["architecture"], "num_hidden_layers": n_layers}
    return count(row["architecture"], config | SHAPES.get(row["shape"], {}))


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="Put them into models.csv.")
    write = parser.parse_args().write
    table = rows()
    for row in table:
        kernels = kernels_of(row)
        row.update({name: str(value) for name, value in kernels._asdict().items()})
        print(row["shape"], *kernels)
    if write:
        with TABLE.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
