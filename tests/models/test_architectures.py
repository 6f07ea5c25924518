"""Every language-model architecture of mlx-lm through FlashHead.

The cases are those that docs/architectures.md names, and that document is compared with what the
installed mlx-lm gives: an architecture that is new there makes the comparison fail.
"""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import models
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
from form_checks import CLUSTER_SIZE, check_form, close
from mlx_flashhead import make_sampler
from mlx_flashhead.conversion.pipeline import convert
from mlx_flashhead.loading.load import load
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


def test_new_architecture_of_mlx_lm(tmp_path, monkeypatch):
    """A later version's is found and served, or said to be untested: never passed over."""
    (tmp_path / "brand_new.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    (tmp_path / "strange.py").write_text(
        "from dataclasses import dataclass\n"
        "from mlx_lm.models.llama import Model\n"
        "from mlx_lm.models import llama\n"
        "@dataclass\n"
        "class ModelArgs(llama.ModelArgs):\n"
        "    unheard_of: int = None\n"
        "    def __post_init__(self):\n"
        "        self.unheard_of + 1\n"
    )
    (tmp_path / "helpers.py").write_text("def helper(): pass\n")
    monkeypatch.setattr(models, "__path__", [str(tmp_path)])
    found = script.survey(progress=False)
    assert list(found) == ["brand_new", "strange"]
    assert [form.cell for form in found["brand_new"]] == ["`lm_head`", "`model.embed_tokens`"]
    assert {form.cell for form in found["strange"]} == {script.UNTESTED}
    text = script.document(found)
    assert "serves 1 of its 2 language-model" in text
    assert "- strange: tests/helpers/architecture_configs.py has no small configuration" in text


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


UNKNOWN_ARCHITECTURE = """
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    width: int


class Decoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.read = nn.Embedding(args.vocab_size, args.width)
        self.write = nn.Linear(args.width, args.vocab_size)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.model_type = args.model_type
        self.layers = [nn.Linear(args.width, args.width)]
        self.parts = [Decoder(args)]

    def __call__(self, tokens, cache=None):
        hidden = mx.tanh(self.layers[0](self.parts[0].read(tokens)))
        if cache is not None:
            cache[0].update_and_fetch(hidden[:, None], hidden[:, None])
        return 3 * mx.sin(self.parts[0].write(hidden) / 3)
"""


def test_unknown_architecture_needs_no_code_of_ours(tmp_path):
    """A model's own code, with its head in a list and a curve after it that no model has."""
    source = write_architecture(tmp_path / "source", "llama", tied=False)
    (source / "unknown.py").write_text(UNKNOWN_ARCHITECTURE)
    own = {"model_type": "unknown", "model_file": "unknown.py", "vocab_size": VOCAB_SIZE}
    (source / "config.json").write_text(json.dumps(own | {"width": 64}))
    code = {}
    exec(UNKNOWN_ARCHITECTURE, code)
    model = code["Model"](code["ModelArgs"]("unknown", VOCAB_SIZE, 64))
    model.save_weights(str(source / "model.safetensors"))

    found, quick = str(tmp_path / "found"), {"calibration_positions": 100, "progress": False}
    convert(str(source), found, trust_remote_code=True, **quick)
    served, _ = load(found, trust_remote_code=True)
    tokens = mx.array([[3, 1, 200]])
    assert find_head(model).path == "parts.0.write"
    get_flash_head(served).n_probes = 1
    assert not close(served(tokens), model(tokens))
    get_flash_head(served).n_probes = get_flash_head(served).n_clusters
    assert close(served(tokens), model(tokens))
