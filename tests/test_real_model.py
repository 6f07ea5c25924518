"""The real model once, end to end: convert it, load it, generate with it, measure it."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from kernel_cases import kernels
from mlx_flashhead import convert, generate, get_flash_head, grammar_processor, load
from mlx_flashhead.benchmarks.agreement import measure_agreement
from mlx_flashhead.conversion.calibration import read_text
from mlx_flashhead.decoding.policy import policy_of

pytestmark = [pytest.mark.real, pytest.mark.compiled]

TEXT = Path(__file__).parent / "data" / "heldout.txt"
PROMPT = "The capital of France is"
SCHEMA = {"type": "object", "required": ["city"], "additionalProperties": False}
SCHEMA["properties"] = {"city": {"type": "string", "maxLength": 20}}


@pytest.fixture(scope="module")
def converted(real_model_folder, tmp_path_factory):
    """The checkpoint, and what conversion reports."""
    folder = tmp_path_factory.mktemp("real") / "flash"
    # few positions, since reading them takes longest: the default is 12,000; but all of these, on a
    # busy machine too
    options = {"calibration_positions": 1_000, "calibration_seconds": 600, "quick": True}
    return folder, convert(str(real_model_folder), str(folder), progress=False, **options)


@pytest.fixture(scope="module")
def loaded(converted):
    return load(str(converted[0]))


def some_of_all(n_characters: int) -> str:
    """As much of each kind in the held-out text: prose, documentation, code and chat."""
    text = read_text(TEXT)
    beginnings = [(2 * part + 1) * len(text) // 8 for part in range(4)]
    return "\n\n".join(text[start : start + n_characters] for start in beginnings)


def test_conversion_reaches_the_goals_within_a_quarter_of_the_bytes(converted):
    _, config = converted
    assert (config.n_clusters, config.cluster_size) == (3072, 16)
    assert config.report["agreement"] >= 0.998 and config.report["kl"] <= 0.05
    assert config.n_probes <= config.n_clusters / 4


@pytest.mark.parametrize("as_json", [False, True])
def test_says_what_the_dense_model_says(loaded, as_json):
    texts = []
    n_tokens = 8
    if as_json:
        n_tokens = 16
    for dense in (False, True):
        processors = None
        if as_json:
            processors = [grammar_processor(loaded[1], json_schema=SCHEMA)]
        options = {"logits_processors": processors, "max_tokens": n_tokens, "dense": dense}
        texts.append(generate(*loaded, PROMPT, **options))
    assert texts[0] == texts[1]
    if as_json:
        assert json.loads(texts[0])["city"]
    else:
        assert "Paris" in texts[0]


def test_the_kernels_write_what_the_dense_model_writes(converted, loaded, monkeypatch):
    """On a Mac they run on the GPU, elsewhere on the emulator."""
    prompt = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"
    # The other tests rehearse, with tiny models.
    monkeypatch.setattr("mlx_flashhead.loading.installing.rehearse", lambda model: None)
    with kernels(check=False) as emulator:
        if emulator is not None:
            # Emulated kernels run at once, which they cannot in a trace.
            mx.disable_compile()
        model, tokenizer = load(str(converted[0]), backend="metal", n_probes=96)
        # This leaves clusters out.
        policy_of(get_flash_head(model)).depth = 6.0
        if emulator is not None:
            # They are those of the check on installation.
            emulator.dispatches.clear()
        found = generate(model, tokenizer, prompt, max_tokens=4)
    assert found == generate(*loaded, prompt, max_tokens=4, dense=True) and len(found) > 8
    if emulator is not None:
        names = {dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches}
        assert names >= {"route", "select", "score", "sample", "screen", "certain"}


def test_quality_on_a_text_that_calibration_has_not_seen(loaded):
    """The bounds leave room for the few positions; `evaluate` on the whole text is the measure."""
    evaluation = measure_agreement(*loaded, some_of_all(300), probe_counts=[256, 512])
    at_256, at_512 = evaluation["rows"]
    assert at_256["agreement"] >= 0.985 and at_512["agreement"] >= 0.995
    assert at_256["coverage"] >= 0.94 and at_512["kl"] <= 0.06
    assert at_256["perplexity"] <= 1.2 * evaluation["dense_perplexity"]
    assert at_512["perplexity"] <= 1.12 * evaluation["dense_perplexity"]
