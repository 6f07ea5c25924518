"""The Swift package on Linux: built by scripts/check_swift.sh, its kernels run by the emulator."""

import json
import os
import subprocess

import mlx.core as mx
import pytest

from kernel_cases import kernels
from mlx_flashhead.head import dense_kernels
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.plan import READER, export_plan
from test_plan import FORMS, HIDDEN_SIZE, VOCAB_SIZE, dtype_of, make_head, make_rows, states

PROGRAM = os.environ.get("MLX_FLASHHEAD_SWIFT")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="runs by scripts/check_swift.sh")

# There are 13 clusters.
N_PROBES = 4
LIMIT = 3
TOKENS = mx.array([[0, 7, VOCAB_SIZE - 1], [7, 3, 3]])
SEED = 2**63 + 11
SETTINGS = [Greedy(), Noise(0.7, top_p=0.9), Noise(1.3, min_p=0.05, top_k=20)]
FIELDS = {"temperature": "temperature", "topP": "top_p", "minP": "min_p", "topK": "top_k"}


def fields_of(settings):
    """Settings of a draw as the Swift package reads them."""
    fields = {name: getattr(settings, own) for name, own in FIELDS.items()}
    return fields | {"seed": SEED}


def run(folder, form, *, tied=False, refused=False):
    """What the package says, and the arrays that it gives. It ends without an error."""
    rows = make_rows(form)
    dtype = dtype_of(form)
    path = "model.embed_tokens" if tied else "lm_head"
    export_plan(make_head(rows, N_PROBES), path, dtype, folder / "head.safetensors")
    mx.save_safetensors(str(folder / "layer.safetensors"), rows.arrays())
    inputs = {"hidden": states(20, dtype)[None], "tokens": TOKENS}
    mx.save_safetensors(str(folder / "inputs.safetensors"), inputs)
    quantization = {"groupSize": rows.group_size, "bits": rows.bits, "mode": rows.mode}
    settings = [fields_of(each) for each in SETTINGS]
    case = {"isTied": tied, "shape": [VOCAB_SIZE, HIDDEN_SIZE], "settings": settings}
    case["quantization"] = None
    if rows.quantized:
        case["quantization"] = quantization
    (folder / "case.json").write_text(json.dumps(case))
    kernels_are = "refused" if refused else ""
    environment = {"TMPDIR": str(folder), "FLASH_KERNELS": kernels_are}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | environment}
    program = subprocess.Popen([PROGRAM, str(folder)], text=True, **options)
    with kernels() as emulator, program:
        for line in program.stdout:
            program.stdin.write(f"{launch(line.split()[1])}\n")
            program.stdin.flush()
    assert program.returncode == 0
    arrays, said = mx.load(str(folder / "results.safetensors"), return_metadata=True)
    return said, arrays, emulator.dispatches


def launch(path):
    """Runs a kernel that the program asks for; the file of its results."""
    arrays, metadata = mx.load(path, return_metadata=True)
    asked = json.loads(metadata["launch"])
    call = asked["call"]
    call["template"] = [(name, getattr(mx, str(v), v)) for name, v in call["template"]]
    call["output_dtypes"] = [getattr(mx, name) for name in call["output_dtypes"]]
    results = mx.fast.metal_kernel(**asked["kernel"])(
        inputs=[arrays[str(i)] for i in range(len(arrays))], **call
    )
    path = path.replace(".safetensors", "-results.safetensors")
    mx.save_safetensors(path, dict(zip(asked["kernel"]["output_names"], results, strict=True)))
    return path


def near(found, expected):
    return mx.allclose(found, expected, rtol=2e-2, atol=2e-2)


TIED = [("bfloat16", True), ("4-bit", True), ("mxfp4", True)]


@pytest.mark.parametrize("form, tied", [*((form, False) for form in FORMS), *TIED])
def test_swift_gives_what_python_gives(tmp_path, monkeypatch, form, tied):
    monkeypatch.setattr(dense_kernels, "mlx_version", lambda: READER)
    said, arrays, _ = run(tmp_path, form, tied=tied)
    assert said == {"trouble": ""}
    rows = make_rows(form)
    dtype = dtype_of(form)
    hidden = states(20, dtype)
    with kernels():
        head = make_head(rows, N_PROBES)
        expected = mx.concatenate([head.unverified_logits(hidden[i : i + 1]) for i in range(LIMIT)])
        for length in (1, LIMIT):
            assert mx.array_equal(arrays[f"logits_{length}"][0], expected[:length])
        assert mx.array_equal(arrays["logits_after"][0], expected[:1])
        # These are more positions than scored rows pay for.
        assert near(arrays["logits_5"], arrays["dense"][:, :5])
        # Of a prompt the last position alone is scored.
        assert mx.array_equal(arrays["logits_20"][0], head.unverified_logits(hidden[19:20]))
        operations = MetalOperations(head.clustered)
        keys = [position_key(SEED, position) for position in range(6)]
        for i, settings in enumerate(SETTINGS):
            draws = Draws.of([(settings, key) for key in keys])
            for name, array in zip(("settings", "top_k", "keys"), draws.inputs, strict=True):
                # There are 8 or more, since MLX has another kernel for fewer.
                found = arrays[f"{name}_{i}"][:4]
                assert mx.array_equal(found, array[:4]), name
            selection = operations.select(operations.route(hidden[:6]), N_PROBES, words=False)
            candidates = operations.score(hidden[:6], selection)
            tokens, _ = operations.choose(selection, candidates, draws)
            found = [arrays[f"token_{i}_{step}"].item() for step in range(4)]
            assert found == tokens.tolist()[2:]
    if tied:
        assert mx.array_equal(arrays["rows"], arrays["dense_rows"])


@pytest.mark.parametrize("form, tied", [("bias", False), ("4-bit", False), ("8-bit-float16", True)])
def test_a_device_that_refuses_the_kernels_reads_all_rows(tmp_path, form, tied):
    said, arrays, dispatches = run(tmp_path, form, tied=tied, refused=True)
    assert "No Metal back-end" in said["trouble"]
    assert said["sampler"].startswith("FlashHead's kernels do not run on this device: MLX Error")
    assert dispatches == []
    for length in (1, LIMIT):
        assert near(arrays[f"logits_{length}"], arrays["dense"][:, :length])
    assert near(arrays["logits_20"], arrays["dense"][:, -1:])
    if tied:
        assert mx.array_equal(arrays["rows"], arrays["dense_rows"])
