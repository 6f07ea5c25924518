"""Every architecture of mlx-vlm that takes text through FlashHead, and pictures through towers.

The cases are those that scripts/architectures.py has recorded, as in `test_architectures.py`.
"""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from emulated_mlx_lm import emulated
from form_checks import by_form, check_form, check_refused
from mlx_flashhead.models.libraries import embeddings
from mlx_flashhead.models.locate import find_head
from vlm_configs import PICTURES
from vlm_models import picture, tiny_vlm, vlm_architectures

FOUND = script.recorded("mlx_vlm")


@pytest.fixture(autouse=True, scope="module")
def _on_this_machine():
    mx.disable_compile()
    with emulated("mlx_vlm"):
        yield
    mx.enable_compile()


def test_every_architecture_is_recorded():
    """Each of its forms is looked at below."""
    assert list(FOUND) == vlm_architectures(), (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/helpers/vlm_configs.py"
    )
    assert sum(any(form.served for form in forms) for forms in FOUND.values()) >= 190


@by_form(FOUND, lambda form: not form.served)
def test_other_forms_are_as_documented(name, tied):
    assert script.examine(name, tied, tiny_vlm, "vlm_configs.py") == FOUND[name][tied]


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


@by_form(FOUND, lambda form: form.served)
def test_flash_head(name, tied):
    quantized = tied or not FOUND[name][True].served  # half of them, to keep this short
    model = tiny_vlm(name, tied=tied, bits=4 if quantized else None)
    location = find_head(model)
    assert (f"`{location.path}`", location.tied) == (FOUND[name][tied].cell, tied)
    tokens = mx.array(np.random.default_rng(1).integers(0, VOCAB_SIZE - 1, (1, 9)))
    check_form(model, location, lambda: steps(model, tokens, lambda ids: embeddings(model, ids)))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    """A picture's embeddings come from its tower, and the logits after it from the FlashHead."""
    model = tiny_vlm(name, tied=not FOUND[name][False].served)

    def given(seed):
        tokens, pixels = picture(name, seed)
        found = model.get_input_embeddings(tokens, **pixels)
        return {key: value for key, value in vars(found).items() if value is not None}

    tokens, _ = picture(name)
    check_form(model, find_head(model), lambda: steps(model, tokens, lambda ids: given(0)))
    one, other = (steps(model, tokens, lambda _, seed=seed: given(seed))[0] for seed in (0, 1))
    # whose language model, in mlx-vlm up to 0.7.10, does not read the embeddings
    assert mx.array_equal(one, other) == (name == "mistral_large3")


@by_form(FOUND, lambda form: form.cell == script.REFUSED)
def test_refused_model_stays_as_it_was(name, tied):
    check_refused(tiny_vlm(name, tied=tied), FOUND[name][tied].reason)
