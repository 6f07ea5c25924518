"""Choices under masks, biases and penalties, of a tiny model."""

import json

import mlx_lm
import pytest

from mlx_flashhead.evaluation.masks import MaskEvaluation, evaluate_masks
from mlx_flashhead.models import exact
from mlx_flashhead.models.install import get_flash_head, install, installed_head
from model_folders import VOCAB_SIZE, write_model
from tiny_models import tiny_index, tiny_model

TEXT = 'Sphinx of black quartz, {"judge": [1, 23]} my vow. '
CHANGES = [
    "10 random tokens",
    "100 random tokens",
    "digits only",
    "JSON punctuation only",
    "logit_bias near the limit",
    "penalties",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))[1]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=VOCAB_SIZE)
    index = tiny_index(model)
    install(model, index.token_ids, index.centroids, n_probes=2)
    return model


def run(model, tokenizer, **kwargs) -> MaskEvaluation:
    return evaluate_masks(model, tokenizer, TEXT, progress=False, **kwargs)


def test_second_look_makes_every_choice_the_dense_heads(model, tokenizer):
    found = run(model, tokenizer, positions=40)
    assert [choice.change for choice in found.choices] == CHANGES
    assert (found.positions, found.n_probes) == (40, 2)
    for choice in found.choices:
        assert choice.exact == 1 and choice.differing == 0
    assert all(choice.estimates < 1 for choice in found.choices[:-1])
    assert json.loads(json.dumps(found.to_dict()))["choices"][0]["change"] == CHANGES[0]


def test_a_limit_of_positions_does_not_make_it_a_comparison_with_itself(model, tokenizer):
    head, usual = installed_head(model), run(model, tokenizer, positions=20)
    with head.settings(max_positions=1):
        assert run(model, tokenizer, positions=20) == usual
        assert head.max_positions == 1
    assert head.max_positions > 1


def test_too_short_a_second_look_shows(model, tokenizer, monkeypatch):
    monkeypatch.setattr(exact, "MORE_CLUSTERS", 1)
    found = run(model, tokenizer)
    assert any(choice.exact < 1 for choice in found.choices)
    for choice in found.choices:
        assert choice.differing == round((1 - choice.exact) * found.positions)


def test_all_probes_need_no_second_look(model, tokenizer):
    head = get_flash_head(model)
    with head.dense():
        found = run(model, tokenizer, positions=20)
    assert all(choice.estimates == choice.exact == 1 for choice in found.choices)


def test_seed_draws_the_masks(model, tokenizer, monkeypatch):
    monkeypatch.setattr(exact, "MORE_CLUSTERS", 1)
    first, again, other = (run(model, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
