"""The exported plan: replayed as metal/swift does it, it gives what the head gives."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels
from mlx_flashhead.head import dense_kernels
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy
from mlx_flashhead.head.draws.noise import Noise
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.plan import METADATA_KEY, READER, export_plan
from pages import CHECKOUT
from tiny_models import FORMS as HEAD_FORMS
from tiny_models import fitted, random_clusters, random_rows

SWIFT = Path(__file__).parents[2] / "metal" / "swift" / "Sources" / "FlashHead"
VOCAB_SIZE = 203
HIDDEN_SIZE = 64
CLUSTER_SIZE = 16
N_CLUSTERS = 13
N_PROBES = 9
FORMS = HEAD_FORMS | {"bias": {"bias": True}}


def make_rows(form):
    return random_rows(np.random.default_rng(0), VOCAB_SIZE, HIDDEN_SIZE, **FORMS[form])


def make_head(rows, n_probes=N_PROBES):
    token_ids = random_clusters(np.random.default_rng(1), VOCAB_SIZE, CLUSTER_SIZE)
    centroids = fitted(rows, token_ids)
    return FlashHead(rows, token_ids, centroids, n_probes=n_probes, eos_token_ids=(3,))


def states(n_positions, dtype):
    values = np.random.default_rng(2).normal(size=(n_positions, HIDDEN_SIZE))
    return mx.array(values.astype(np.float32)).astype(dtype)


def dtype_of(form):
    return FORMS[form].get("dtype", mx.float32)


def exported(head, dtype, path):
    """The file's arrays and plan."""
    export_plan(head, "lm_head", dtype, path)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    return arrays, json.loads(metadata[METADATA_KEY])


def replay(arrays, plan, rows, hidden, path="logits", **settings):
    """Full logits, or tokens, as FlashHead.swift computes them from the model's own rows (V, …)."""
    order = mx.minimum(arrays["token_ids"].flatten().astype(mx.int32), rows.n_rows - 1)
    arrays = arrays | {f"rows_{name}": rows.arrays()[name][order] for name in plan["rows"]}
    arrays |= settings | {"hidden": hidden.astype(getattr(mx, plan["dtype"]))}
    n_positions = hidden.shape[0]
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
        template = []
        for each in launch["template"]:
            value = each["value"]
            # A text names a dtype.
            if isinstance(value, str):
                value = getattr(mx, value)
            template.append((each["name"], value))
        results = kernel(
            inputs=[arrays[name] for name in launch["arrays"]],
            template=template,
            grid=(x, y * n_positions, z),
            threadgroup=tuple(launch["threadGroup"]),
            output_shapes=[(n * n_positions, *rest) for n, *rest in launch["outputShapes"]],
            output_dtypes=[getattr(mx, name) for name in launch["outputDTypes"]],
        )
        arrays |= zip(launch["outputNames"], results, strict=True)
    return arrays[launch["outputNames"][0]]


@pytest.mark.parametrize(
    "form, n_probes", [*((form, N_PROBES) for form in FORMS), ("4-bit", 1), ("4-bit", 12)]
)
def test_the_plan_gives_the_kernels_logits(tmp_path, monkeypatch, form, n_probes):
    """With the sums of the MLX that reads it."""
    monkeypatch.setattr(dense_kernels, "mlx_version", lambda: READER)
    rows = make_rows(form)
    dtype = dtype_of(form)
    arrays, plan = exported(make_head(rows, n_probes), dtype, tmp_path / "head.safetensors")
    assert arrays["n_probes"].item() == n_probes
    hidden = states(3, dtype)
    settings = Greedy(), Noise(1.0, 0.9, top_k=20), Noise(1.4, min_p=0.05)
    draws = Draws.of(list(zip(settings, [(0, 1), (0, 2), (5, 3)], strict=True)))
    arguments = dict(zip(("settings", "top_k", "keys"), draws.inputs, strict=True))
    with kernels(check=False):
        head = make_head(rows, n_probes)
        expected = mx.concatenate([head.unverified_logits(hidden[i : i + 1]) for i in range(3)])
        found = replay(arrays, plan, rows, hidden)
        tokens = replay(arrays, plan, rows, hidden, "tokens", **arguments)
        assert mx.array_equal(tokens, head.propose(hidden, draws).tokens)
    assert head.backend == "metal" and found.dtype == expected.dtype
    assert mx.array_equal(found, expected) and tokens[0] == mx.argmax(found[0])


@pytest.mark.parametrize(
    "form, sums, words",
    [("4-bit", "float32", 1), ("4-bit-bfloat16", "bfloat16", 1), ("8-bit-float16", "float32", 1)],
)
def test_the_sums_are_those_of_the_mlx_that_reads_it(tmp_path, form, sums, words):
    """MLX 0.31.1, which mlx-swift 0.31.6 contains, adds four values of a state in their dtype."""
    head = make_head(make_rows(form))
    _, plan = exported(head, dtype_of(form), tmp_path / "head.safetensors")
    template = plan["launches"]["flash_head_score"]["template"]
    values = {each["name"]: each["value"] for each in template}
    assert (values["SUM"], values["WORDS"]) == (sums, words)
    page = (CHECKOUT / "docs" / "ipad.md").read_text(encoding="utf-8")
    assert f"MLX {'.'.join(map(str, READER))}" in page


def test_the_arrays_have_names_shapes_and_dtypes(tmp_path):
    rows = make_rows("4-bit")
    head = make_head(rows)
    arrays, plan = exported(head, mx.float16, tmp_path / "head.safetensors")
    stored = head.clustered.centroids.matrix.arrays()
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "token_ids": ((N_CLUSTERS, CLUSTER_SIZE), mx.uint32),
        "slot_of": ((VOCAB_SIZE,), mx.uint32),
        "route_bias": ((N_CLUSTERS,), mx.float32),
        "tail_offset": ((N_CLUSTERS,), mx.float32),
        "n_probes": ((), mx.uint32),
        "depth": ((), mx.float32),
        "fit": ((4,), mx.float32),
        **{f"centroids_{name}": (array.shape, array.dtype) for name, array in stored.items()},
    }
    assert (plan["head"], plan["dtype"]) == ("lm_head", "float16")
    assert plan["rows"] == {
        name: {"shape": list(array.shape), "dtype": str(array.dtype).rpartition(".")[-1]}
        for name, array in rows.arrays().items()
    }
    in_clusters = rows.weight[mx.minimum(arrays["token_ids"].flatten(), VOCAB_SIZE - 1)]
    assert mx.array_equal(in_clusters[arrays["slot_of"]], rows.weight)


def test_swift_reads_all_that_the_plan_holds(tmp_path):
    _, plan = exported(make_head(make_rows("4-bit")), mx.float32, tmp_path / "head.safetensors")
    sources = "".join(file.read_text(encoding="utf-8") for file in SWIFT.glob("*.swift"))
    assert "flash_head::" not in sources

    def fields(name):
        """The stored properties of a struct, by their indentation."""
        indent, body = re.search(rf"(?ms)^( *)struct {name}: \w+ {{\n(.*?)^\1}}", sources).groups()
        return set(re.findall(rf"(?m)^{indent}    let (\w+): ", body))

    launch = plan["launches"]["flash_head_route"]
    assert fields("Plan") == plan.keys()
    assert fields("Launch") == launch.keys()
    assert fields("Argument") == launch["template"][0].keys()
    assert fields("Rows") == plan["rows"]["weight"].keys()
    assert f'metadata["{METADATA_KEY}"]' in sources


def test_rows_that_the_kernels_do_not_read_are_refused(tmp_path):
    rows = random_rows(np.random.default_rng(0), VOCAB_SIZE, HIDDEN_SIZE, bits=3)
    with pytest.raises(ValueError, match="do not read 3-bit affine rows: export a model whose"):
        exported(make_head(rows), mx.float32, tmp_path / "head.safetensors")


def test_no_number_of_positions_makes_an_array_short(tmp_path):
    """MLX compiles another kernel for an input of fewer than 8 elements; the file has one."""
    _, plan = exported(make_head(make_rows("4-bit")), mx.float16, tmp_path / "head.safetensors")
    made = {}
    for launch in plan["launches"].values():
        made |= dict(zip(launch["outputNames"], launch["outputShapes"], strict=True))
    for launch in plan["launches"].values():
        for name in launch["arrays"]:
            assert name not in made or np.prod(made[name]) >= 8, name
