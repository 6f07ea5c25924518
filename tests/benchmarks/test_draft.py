"""Drafts: acceptance is counted right, and texts are the target's."""

import pytest

from mlx_flashhead.benchmarks.draft import DENSE_DRAFT, NO_DRAFT, draft_benchmark
from mlx_flashhead.models.install import get_flash_head, install
from tiny_models import tiny_index, tiny_model


class Tokenizer:
    has_chat_template = False

    def encode(self, text):
        return [1, len(text) % 200, 9]


def flash_model(seed=0):
    model = tiny_model(seed=seed)
    index = tiny_index(model)
    install(model, index.token_ids, index.centroids, n_probes=20)
    return model


def run(target, draft, **options):
    options = {"probes": (1, 4, 999), "tokens": 17, "rounds": 1, "progress": False} | options
    found = draft_benchmark(target, draft, Tokenizer(), **options)
    return found, {form["name"]: form for form in found["forms"]}


@pytest.mark.parametrize("n_draft", [1, 3])
def test_draft_of_the_same_weights(n_draft):
    found, forms = run(tiny_model(), flash_model(), num_draft_tokens=n_draft)
    assert list(forms) == [NO_DRAFT, DENSE_DRAFT, "1 probes", "4 probes"]  # there are 26 clusters
    assert (found["num_draft_tokens"], found["answers"], found["n_clusters"]) == (n_draft, 4, 26)
    assert forms[NO_DRAFT]["acceptance"] is None
    assert forms[DENSE_DRAFT]["acceptance"] == 1
    few, more = forms["1 probes"]["acceptance"], forms["4 probes"]["acceptance"]
    assert few <= more < 1
    for form in forms.values():
        assert form["same_answers"] == 1
        assert form["tokens_per_second"]["median"] > 0 and form["tokens_per_second"]["runs"] == 1


def test_draft_that_knows_nothing_of_the_target():
    _, forms = run(tiny_model(), flash_model(seed=5), rounds=2)
    assert all(form["acceptance"] < 0.5 for form in forms.values() if form["acceptance"])
    assert forms[DENSE_DRAFT]["tokens_per_second"]["runs"] == 2


def test_settings_stay():
    draft = flash_model()
    run(tiny_model(), draft)
    assert get_flash_head(draft).n_probes == 20
