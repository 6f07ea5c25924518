"""Every architecture of mlx-vlm that takes text through FlashHead, and pictures through towers.

The cases are those that docs/architectures.md names, as in `test_architectures.py`.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from emulated_mlx_lm import emulated
from form_checks import CLUSTER_SIZE, check_form
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.install import get_flash_head, install
from mlx_flashhead.models.libraries import embeddings
from mlx_flashhead.models.locate import find_head
from vlm_configs import PICTURES
from vlm_models import picture, tiny_vlm, vlm_architectures


def own_part() -> str:
    """The document's part about mlx-vlm."""
    before, heading, after = script.DOCUMENT.read_text(encoding="utf-8").partition(
        f"\n{script.VLM_HEADING}"
    )
    assert before and heading
    return heading + after


def documented_cells() -> dict[tuple[str, bool], str]:
    """(architecture, tied) → its cell in the document's table."""
    cells = {}
    for line in own_part().splitlines():
        if line.startswith("| ") and not line.startswith("| architecture"):
            name, untied, tied = line.strip("| ").split(" | ")
            cells |= {(name, False): untied, (name, True): tied}
    return cells


CELLS = documented_cells()
SERVED = [form for form, cell in CELLS.items() if cell.startswith(script.SERVED)]
REFUSED = [form for form, cell in CELLS.items() if cell == script.REFUSED]
form_ids = {"ids": lambda value: {True: "tied", False: "untied"}.get(value)}


@pytest.fixture(autouse=True, scope="module")
def _on_this_machine():
    mx.disable_compile()
    with emulated("mlx_vlm"):
        yield
    mx.enable_compile()


def test_document_is_what_the_script_writes():
    written = script.vlm_document(script.vlm_survey(progress=False))
    assert own_part() == written, (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/helpers/vlm_configs.py"
    )


def test_nearly_all_architectures_are_served():
    assert {name for name, _ in CELLS} == set(vlm_architectures())
    assert len({name for name, _ in SERVED}) >= 190
    assert script.UNTESTED not in CELLS.values()


def steps(model, tokens, given) -> list[mx.array]:
    """Logits of a prompt without a cache, and of a prompt and two tokens with one."""
    text = model.thinker.language_model if hasattr(model, "thinker") else model.language_model
    cache = make_prompt_cache(text)
    outputs = [
        text(tokens, **given(tokens)),
        text(tokens, cache=cache, **given(tokens)),
        text(mx.array([[3]]), cache=cache),
        text(mx.array([[201]]), cache=cache),
    ]
    return [getattr(output, "logits", output) for output in outputs]


@pytest.mark.parametrize("name, tied", SERVED, **form_ids)
def test_flash_head(name, tied):
    model = tiny_vlm(name, tied=tied)
    if tied or (name, True) not in SERVED:  # half of them quantized, to keep this short
        module = find_head(model).module
        if hasattr(module, "to_quantized") and name != "muse_spark":  # whose head stays as it was
            nn.quantize(model, 32, 4, class_predicate=lambda _, other: other is module)
    location = find_head(model)
    assert location.tied == tied
    tokens = mx.array(np.random.default_rng(1).integers(0, VOCAB_SIZE - 1, (1, 9)))
    check_form(model, location, lambda: steps(model, tokens, lambda ids: embeddings(model, ids)))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    """A picture's embeddings come from its tower, and the logits after it from the FlashHead."""
    (tied,) = [tied for served, tied in SERVED if served == name][:1]
    model = tiny_vlm(name, tied=tied)

    def given(seed):
        tokens, pixels = picture(name, seed)
        found = model.get_input_embeddings(tokens, **pixels)
        return {key: value for key, value in vars(found).items() if value is not None}

    tokens, _ = picture(name)
    _, dense = check_form(
        model, find_head(model), lambda: steps(model, tokens, lambda ids: given(0))
    )
    other = steps(model, tokens, lambda ids: given(1))
    assert not mx.allclose(other[0][:, -1], dense[0][:, -1], atol=1e-4)


@pytest.mark.parametrize("name, tied", REFUSED, **form_ids)
def test_refused_model_stays_as_it_was(name, tied):
    model = tiny_vlm(name, tied=tied)
    before = [(path, type(module), dict(module)) for path, module in model.named_modules()]
    token_ids = np.arange(-VOCAB_SIZE % CLUSTER_SIZE + VOCAB_SIZE).reshape(-1, CLUSTER_SIZE)
    with pytest.raises(UnsupportedHeadError, match=r"^[^\n]+[^.]\.$"):
        install(model, token_ids, None, n_probes=1)
    assert get_flash_head(model) is None
    after = [(path, type(module), dict(module)) for path, module in model.named_modules()]
    assert after == before
