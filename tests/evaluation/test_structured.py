"""Answers within schemas, of a tiny model that knows nothing."""

import json

import jsonschema
import mlx_lm
import pytest

from mlx_flashhead.evaluation import structured
from mlx_flashhead.evaluation.structured import evaluate_structured, usual_cases
from mlx_flashhead.models.install import install
from mlx_flashhead.structured.grammar import Grammar
from model_folders import VOCAB_SIZE, write_model
from tiny_models import tiny_index, tiny_model

CASES = [
    {"request": "One", "schema": {"enum": ["red", "green", 4]}},
    {"request": "Two", "schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    {"request": "Three", "schema": {"type": "string", "minLength": 40}},
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


def run(model, tokenizer):
    return evaluate_structured(
        model, tokenizer, cases=CASES, sampled=2, max_tokens=30, progress=False
    )


def test_answers_are_counted(model, tokenizer):
    found = run(model, tokenizer)
    assert (found.schemas, found.answers, found.n_probes) == (3, 9, 2)
    assert (found.cut, found.valid, found.invalid) == (3, 6, [])  # the third has no room to end
    assert found.same_as_dense == 3
    assert found.mask_us["runs"] > 30 and found.mask_us["median"] > 0
    assert json.loads(json.dumps(found.to_dict()))["valid"] == 6


def test_invalid_answers_and_others_than_the_dense_models_show(model, tokenizer, monkeypatch):
    monkeypatch.setattr(structured, "_validates", lambda validator, text: text == "[]")
    usual = structured.batch_generate

    def altered(*arguments, dense=False, **options):
        answer = usual(*arguments, dense=dense, **options)
        answer.texts = [text + " " * dense for text in answer.texts]
        return answer

    monkeypatch.setattr(structured, "batch_generate", altered)
    found = run(model, tokenizer)
    assert found.invalid and found.valid + len(found.invalid) + found.cut == 9
    assert found.same_as_dense == 0


@pytest.mark.parametrize(
    ("form", "valid", "invalid"),
    [("time", "20:10:10.5-22:05", "20:10"), ("date", "2024-02-29", "2023-02-29")],
)
def test_formats_are_those_of_the_schemas_draft(form, valid, invalid):
    schema = {"type": "string", "format": form}
    validator = structured._validator(jsonschema, schema)
    assert structured._validates(validator, json.dumps(valid))
    assert not structured._validates(validator, json.dumps(invalid))


def test_usual_cases_are_sound():
    cases = usual_cases()
    assert len(cases) * (1 + structured.SAMPLED) >= 200
    assert len({json.dumps(case["schema"]) for case in cases}) == len(cases)
    for case in cases:
        jsonschema.Draft202012Validator.check_schema(case["schema"])
        assert Grammar.from_json_schema(case["schema"])
