"""Every language-model architecture of mlx-lm through FlashHead, as scripts/architectures.py has
recorded it. One that is new in the installed mlx-lm makes the comparison fail."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from architecture_models import architectures, quantized, tiny_architecture
from flash_loops import Flash
from form_checks import by_form, check_form, check_other, on_this_machine
from mlx_flashhead.models.locate import find_head
from wide_checks import same_as_single

FOUND = script.recorded("mlx_lm")
STEPS = script.recorded_steps()
_on_this_machine = on_this_machine("mlx_lm")
NAMED = "llama qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_moe gemma3 gemma3_text "
NAMED += "gemma4 gemma4_text gpt_oss ministral3 mistral3 mixtral glm4 glm4_moe lfm2 lfm2_moe"


def test_the_page_is_what_the_script_writes():
    assert list(FOUND) == architectures(), (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/helpers/architecture_configs.py"
    )
    page = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.document(FOUND, script.recorded("mlx_vlm"), STEPS) == page
    assert script.UNTESTED not in page
    assert sum(any(form.served for form in forms) for forms in FOUND.values()) >= 120
    assert sum(cell != "no" for cell in STEPS.values()) >= 120


@by_form(FOUND, lambda form: not form.served)
def test_other_forms_are_as_documented(name, tied):
    check_other(FOUND[name][tied], name, tied, tiny_architecture, "architecture_configs.py")


def steps(model, tokens) -> list[mx.array]:
    """Logits of a prompt, and of a token after it."""
    cache = make_prompt_cache(model)
    return [model(part, cache=cache) for part in (tokens[:, :-1], tokens[:, -1:])]


def cases():
    """Each form, every second one of them in 4 bits, for architectures of one form, too. One form
    of each architecture writes a text: its caches are those of the other form."""
    for i, (name, forms) in enumerate(FOUND.items()):
        is_odd = i % 2 == 1
        served = [tied for tied in (False, True) if forms[tied].served]
        if len(served) == 1:
            yield name, served[0], is_odd, True
        elif len(served) == 2:
            for tied in served:
                yield name, tied, tied, tied == is_odd


@pytest.mark.parametrize("name, tied, in_4_bits, writes", [*cases()])
def test_flash_head(name, tied, in_4_bits, writes):
    model = tiny_architecture(name, tied=tied)
    if in_4_bits:
        model = quantized(model)
    location = find_head(model)
    form = FOUND[name][tied]
    assert (f"`{location.path}`", location.tied) == (form.cell, tied)
    if in_4_bits:
        # An architecture without bits does not quantize its head.
        bits = 0 if form.bits is None else form.bits
        assert location.rows().bits == bits
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 9)))
    check_form(model, location, lambda: steps(model, tokens))
    # Whatever it does with its head's logits, and whatever its caches are.
    if writes:
        Flash(model).checked({"temp": 2.0, "seed": 1}, prompt=tokens[0].tolist(), max_tokens=5)


@pytest.mark.parametrize("name", [name for name, cell in STEPS.items() if cell != "no"])
def test_several_tokens_a_step(name):
    """A window of 8 tokens ends within the first step, and is past its end at the second one."""
    model = tiny_architecture(name, tied=False)
    # Every second one is in 4 bits.
    if [*STEPS].index(name) % 2:
        model = quantized(model)
    apart = STEPS[name] == "apart"
    assert all(same_as_single(model, length, 3, apart=apart) for length in (6, 13))


@pytest.mark.parametrize("name", NAMED.split())
def test_models_of_the_list_take_several_tokens_a_step(name):
    assert STEPS[name] == "yes"
