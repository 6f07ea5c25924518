"""Replays an exported plan, as the Swift package does it."""

import json

import mlx.core as mx

from mlx_flashhead.head.plan import METADATA_KEY


def read_plan(path):
    """The arrays and the plan of a file."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    return arrays, json.loads(metadata[METADATA_KEY])


def replay(arrays, plan, rows, hidden, path="logits", **settings):
    """Full logits, or tokens, as FlashHead.swift computes them from the model's own rows (V, …)."""
    last = arrays["slot_of"].size - 1
    order = mx.minimum(arrays["token_ids"].flatten().astype(mx.int32), last)
    arrays = arrays | {f"rows_{name}": rows.arrays()[name][order] for name in plan["rows"]}
    n_positions = hidden.shape[0]
    arrays |= settings
    arrays["hidden"] = hidden.astype(getattr(mx, plan["dtype"]))
    for name in plan[path]:
        launch = plan["launches"][name]
        kernel = mx.fast.metal_kernel(
            name=launch["name"],
            input_names=launch["inputNames"],
            output_names=launch["outputNames"],
            source=launch["source"],
            header=launch["header"],
        )
        x, y, z = launch["grid"]
        results = kernel(
            inputs=[arrays[name] for name in launch["arrays"]],
            template=[(each["name"], _argument(each["value"])) for each in launch["template"]],
            grid=(x, y * n_positions, z),
            threadgroup=tuple(launch["threadGroup"]),
            output_shapes=[(n * n_positions, *rest) for n, *rest in launch["outputShapes"]],
            output_dtypes=[getattr(mx, name) for name in launch["outputDTypes"]],
        )
        arrays |= zip(launch["outputNames"], results, strict=True)
    return arrays[launch["outputNames"][0]]


def _argument(value):
    return getattr(mx, value) if isinstance(value, str) else value
