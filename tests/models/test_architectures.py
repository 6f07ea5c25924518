"""Every language-model architecture of mlx-lm through FlashHead.

The cases are those that docs/architectures.md names, and that document is compared with what the
installed mlx-lm gives: an architecture that is new there makes the comparison fail.
"""

import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from architecture_models import (
    architectures,
    quantized,
    tiny_architecture,
    write_architecture,
)
from emulated_mlx_lm import emulated
from flash_loops import Flash
from form_checks import CLUSTER_SIZE, check_form
from mlx_flashhead import make_sampler
from mlx_flashhead.conversion.pipeline import convert
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.install import get_flash_head, install
from mlx_flashhead.models.locate import find_head


def own_part() -> str:
    """The document's part about mlx-lm."""
    return script.DOCUMENT.read_text(encoding="utf-8").partition(f"\n{script.VLM_HEADING}")[0]


def documented_cells() -> dict[tuple[str, bool], str]:
    """(architecture, tied) → its cell in the document's table."""
    cells = {}
    for line in own_part().splitlines():
        if line.startswith("| ") and not line.startswith("| architecture"):
            name, untied, tied, _ = line.strip("| ").split(" | ")
            cells |= {(name, False): untied, (name, True): tied}
    return cells


CELLS = documented_cells()
SERVED = [form for form, cell in CELLS.items() if cell.startswith(script.SERVED)]
REFUSED = [form for form, cell in CELLS.items() if cell == script.REFUSED]
form_ids = {"ids": lambda value: {True: "tied", False: "untied"}.get(value)}


@pytest.fixture(autouse=True, scope="module")
def _on_this_machine():
    """Without compilation, which takes a second for some of the models and changes no result."""
    mx.disable_compile()
    with emulated():
        yield
    mx.enable_compile()


def test_document_is_what_the_script_writes():
    written = script.document(script.survey(progress=False))
    assert own_part() == written, (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/helpers/architecture_configs.py"
    )


def test_nearly_all_architectures_are_served():
    assert {name for name, _ in CELLS} == set(architectures())
    assert len({name for name, _ in SERVED}) >= 120
    assert script.UNTESTED not in CELLS.values()


def steps(model, tokens) -> list[mx.array]:
    """Logits of a whole prompt without a cache, and of a prompt and two tokens with one."""
    cache = make_prompt_cache(model)
    inputs = (tokens[:, :-2], tokens[:, -2:-1], tokens[:, -1:])
    return [model(tokens), *(model(part, cache=cache) for part in inputs)]


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4-bit"])
@pytest.mark.parametrize("name, tied", SERVED, **form_ids)
def test_flash_head(name, tied, bits):
    model = tiny_architecture(name, tied=tied)
    model = model if bits is None else quantized(model)
    location = find_head(model)
    assert location.tied == tied
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(0, VOCAB_SIZE, (2, 9)))

    check_form(model, location, lambda: steps(model, tokens))

    # whatever it does with its head's logits, and whatever its caches are
    flash, prompt = Flash(model), tokens[0].tolist()
    sampler = make_sampler(temp=2.0, seed=1)
    assert flash.tokens(prompt=prompt, max_tokens=6, sampler=sampler) == flash.tokens(
        prompt=prompt, max_tokens=6, sampler=sampler, dense=True
    )


IMPORTED = [form for form in REFUSED if form[0] != "olmo"]  # whose code mlx-lm cannot import here


@pytest.mark.parametrize("name, tied", IMPORTED, **form_ids)
def test_refused_model_stays_as_it_was(name, tied):
    model = tiny_architecture(name, tied=tied)
    before = [(path, type(module), dict(module)) for path, module in model.named_modules()]
    token_ids = np.arange(-VOCAB_SIZE % CLUSTER_SIZE + VOCAB_SIZE).reshape(-1, CLUSTER_SIZE)
    with pytest.raises(UnsupportedHeadError):
        install(model, token_ids, None, n_probes=1)
    assert get_flash_head(model) is None
    after = [(path, type(module), dict(module)) for path, module in model.named_modules()]
    assert after == before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers on configuration keys
@pytest.mark.parametrize("name, tied", REFUSED, **form_ids)
def test_refused_model_is_one_sentence_and_no_folder(name, tied, tmp_path):
    source = write_architecture(tmp_path / "source", name, tied=tied)
    with pytest.raises(ValueError) as raised:
        convert(str(source), str(tmp_path / "found"), calibration="none", progress=False)
    assert re.fullmatch(r"[^\n]+[^.]\.", str(raised.value))
    assert re.search(r"FlashHead|mlx-lm cannot load", str(raised.value))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
