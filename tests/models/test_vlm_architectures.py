"""Every architecture of mlx-vlm that takes text through FlashHead, and pictures through towers, as
scripts/architectures.py has recorded it."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from form_checks import by_form, check_form, check_other, on_this_machine
from mlx_flashhead.models.locate import find_head
from mlx_flashhead.models.vlm import embeddings
from vlm_configs import PICTURES
from vlm_models import picture, tiny_vlm, vlm_architectures

FOUND = script.recorded("mlx_vlm")
_on_this_machine = on_this_machine("mlx_vlm")


def test_every_architecture_is_recorded():
    assert list(FOUND) == vlm_architectures(), (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/helpers/vlm_configs.py"
    )
    assert sum(any(form.served for form in forms) for forms in FOUND.values()) >= 190


@by_form(FOUND, lambda form: not form.served)
def test_other_forms_are_as_documented(name, tied):
    check_other(FOUND[name][tied], name, tied, tiny_vlm, "vlm_configs.py")


def steps(model, tokens, given) -> list[mx.array]:
    """Logits of a prompt, and of a token after it."""
    if hasattr(model, "thinker"):
        text = model.thinker.language_model
    else:
        text = model.language_model
    cache = make_prompt_cache(text)
    outputs = [text(tokens, cache=cache, **given), text(mx.array([[201]]), cache=cache)]
    return [getattr(output, "logits", output) for output in outputs]


@by_form(FOUND, lambda form: form.served)
def test_flash_head(name, tied):
    # To keep this short, half of them are quantized.
    is_quantized = tied or not FOUND[name][True].served
    bits = 4 if is_quantized else None
    model = tiny_vlm(name, tied=tied, bits=bits)
    location = find_head(model)
    assert (f"`{location.path}`", location.tied) == (FOUND[name][tied].cell, tied)
    # Of an architecture with two forms, one is checked further: of every second one that with rows
    # of its own, of the others that with the embeddings' rows.
    if FOUND[name][not tied].served and tied == ([*FOUND].index(name) % 2 == 0):
        return
    tokens = mx.array(np.random.default_rng(1).integers(0, VOCAB_SIZE - 1, (1, 9)))
    check_form(model, location, lambda: steps(model, tokens, embeddings(model, tokens)))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    """A picture's embeddings come from its tower, and the logits after it from the FlashHead."""
    model = tiny_vlm(name, tied=not FOUND[name][False].served)

    def logits(seed=0):
        tokens, pixels = picture(name, seed)
        found = vars(model.get_input_embeddings(tokens, **pixels))
        given = {key: value for key, value in found.items() if value is not None}
        return steps(model, tokens, given)

    check_form(model, find_head(model), logits)
    # The language model of this one, in mlx-vlm up to 0.7.10, does not read the embeddings.
    assert mx.array_equal(logits(0)[0], logits(1)[0]) == (name == "mistral_large3")
