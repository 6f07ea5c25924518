"""Steps of several tokens beside single ones, part by part."""

import pytest

import wide_parts
from architecture_models import quantized, tiny_architecture
from flash_loops import make_flash
from mlx_flashhead.wide import trial
from mlx_flashhead.wide import twin as twins
from mlx_flashhead.wide.step import WideSteps
from wide_parts import compared, wide_figures

PROMPT = [5, 17, 3, 99, 42, 7, 5, 17, 3, 21]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_5"])
def test_parts_of_each_kind_have_the_same_bits(name):
    model = quantized(tiny_architecture(name, tied=False))
    parts = compared(WideSteps.of(model), PROMPT, 4)
    assert all(each["equal"] == each["of"] > 0 for each in parts.values())
    kinds = " ".join(parts)
    for expected in ("QuantizedLinear", "RMSNorm", "bits", "Attention", "Model"):
        assert expected in kinds
    assert type(model).__name__ == "Model" and type(model.layers[0]).__module__.startswith("mlx_lm")


def test_a_part_that_differs_is_found(monkeypatch):
    """It alone, and what comes after it."""
    model = quantized(tiny_architecture("llama", tied=False))

    def product(layer, single, x):
        made = single(x)
        if x.shape[-2] > 1 and layer is twin.lm_head:
            return made + 1e-3
        return made

    steps = WideSteps.of(model)
    twin = steps.twin(apart=False)
    monkeypatch.setattr(twins, "product", product)
    parts = compared(steps, PROMPT, 2)
    wrong = {kind for kind, each in parts.items() if each["equal"] < each["of"]}
    assert {kind.split()[0] for kind in wrong} == {"QuantizedLinear", "Model"}
    assert parts["RMSNorm 64"]["equal"] == parts["RMSNorm 64"]["of"]


def test_all_figures(monkeypatch):
    monkeypatch.setattr(wide_parts, "N_TOKENS", 12)
    monkeypatch.setattr(trial, "LONG", (60,))
    flash = make_flash(num_hidden_layers=2)
    fed = []
    feed = WideSteps.feed

    def noted(self, tokens, caches):
        fed.append(tokens.shape[1])
        return feed(self, tokens, caches)

    monkeypatch.setattr(WideSteps, "feed", noted)
    found = wide_figures(flash.model, PROMPT)
    assert found["established"] == [2, 3, 4, 8]
    assert list(found["costs"]) == list(found["parts"]) == [2, 3, 4, 8]
    assert list(found["texts"]) == ["greedy", "top-p", "penalty"]
    assert all(text["same"] for text in found["texts"].values())
    # Texts take as many tokens as they can.
    assert set(fed) == {8}


def test_a_model_without_such_steps_says_which_parts_differ(monkeypatch):
    flash = make_flash()
    monkeypatch.setattr(trial, "_is_worth_it", lambda model: False)
    found = wide_figures(flash.model, PROMPT)
    assert (found["established"], found["costs"], found["texts"]) == ([], {}, {})
    assert found["parts"][2]
