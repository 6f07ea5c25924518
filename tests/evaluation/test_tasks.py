"""Tasks of lm-eval: which head makes which figure, and that the figures are right."""

import math
from itertools import pairwise

import mlx.core as mx
import mlx_lm
import pytest
from lm_eval.api.instance import Instance

from local_tasks import CHOICE, DOCUMENTS, GENERATE, GROUP, PERPLEXITY, TOKENS, write_tasks
from mlx_flashhead import convert, generate, get_flash_head, load
from mlx_flashhead.evaluate import make_parser
from mlx_flashhead.evaluation import lm_eval_tasks as tasks
from mlx_flashhead.evaluation.lm_eval_tasks import DENSE, FLASH_HEAD, evaluate_tasks, find_tasks
from model_folders import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    return write_model(folder, hidden_size=128, seed=4, chat_template=None)


@pytest.fixture(scope="module")
def flash(folder):
    """``(model, tokenizer)`` with a FlashHead of few probes."""
    place = str(folder.with_name("converted"))
    convert(str(folder), place, n_probes=3, calibration="none", progress=False)
    return load(place)


@pytest.fixture(scope="module")
def dense(folder):
    """``(model, tokenizer)`` before conversion."""
    return mlx_lm.load(str(folder))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "local")


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def measured(flash, task_folder, *names, **options):
    args = make_parser().parse_args(["tasks", "--model", "m", "--tasks", *names])
    vars(args).update(options)
    found = evaluate_tasks(*flash, names, find_tasks(names, str(task_folder)), args)
    return {(m["task"], m["head"], m["metric"]): m for m in found}


def log_probability(model, tokens, first):
    """Sum over tokens[first:] in one pass of the whole, in nats."""
    logits = model(mx.array([tokens]))[0, first - 1 : -1].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logprobs, mx.array(tokens[first:])[:, None], axis=-1).sum().item()


def step_by_step(model, tokens):
    """The same with one position at a time, so that every one goes through FlashHead."""
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    total = 0.0
    for token, following in pairwise(tokens):
        logits = model(mx.array([[token]]), cache=cache)[0, 0].astype(mx.float32)
        total += (logits[following] - mx.logsumexp(logits)).item()
    return total


def perplexity_per_byte(totals):
    return math.exp(-sum(totals) / sum(len(document["text"]) for document in DOCUMENTS))


@pytest.mark.parametrize("max_tokens", [None, 2])
def test_log_likelihoods_are_the_dense_model_s(flash, dense, max_tokens):
    """A limit of tokens does not cut the questions."""
    lm = tasks.TaskModel(*flash, max_tokens=max_tokens)
    requests = [
        Instance("loglikelihood", {}, (document["question"], choice), 0)
        for document in DOCUMENTS
        for choice in document["choices"]
    ]
    model, tokenizer = dense
    for (found, _), request in zip(lm.loglikelihood(requests), requests, strict=True):
        question, choice = request.args
        tokens = tokenizer.encode(question + choice)
        expected = log_probability(model, tokens, len(tokenizer.encode(question)))
        assert found == pytest.approx(expected, rel=1e-4)


def test_text_is_generated_with_the_check(flash, dense):
    questions = [document["question"] for document in DOCUMENTS]
    options = {"until": ["\n\n"], "max_gen_toks": TOKENS}
    requests = [Instance("generate_until", {}, (question, options), 0) for question in questions]
    said = tasks.TaskModel(*flash).generate_until(requests)
    assert said == [mlx_lm.generate(*dense, question, max_tokens=TOKENS) for question in questions]
    unchecked = {"verify": False, "max_tokens": TOKENS}
    assert said != [generate(*flash, question, **unchecked) for question in questions]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_both_ways(flash, dense, task_folder, batch_size):
    texts = [dense[1].encode(document["text"]) for document in DOCUMENTS]
    assert max(map(len, texts)) > get_flash_head(flash[0]).max_positions
    found = measured(flash, task_folder, PERPLEXITY, batch_size=batch_size)
    by_dense = perplexity_per_byte(log_probability(dense[0], tokens, 1) for tokens in texts)
    by_flash = perplexity_per_byte(step_by_step(flash[0], tokens) for tokens in texts)
    assert by_dense != pytest.approx(by_flash, rel=1e-2)
    for head, expected in ((DENSE, by_dense), (FLASH_HEAD, by_flash)):
        perplexity = found[PERPLEXITY, head, "byte_perplexity"]["value"]
        assert perplexity == pytest.approx(expected, rel=1e-4)
        bits = found[PERPLEXITY, head, "bits_per_byte"]["value"]
        assert bits == pytest.approx(math.log2(expected), rel=1e-3)
    assert len(found) == 4


def test_shots_and_limit(flash, task_folder):
    found = measured(flash, task_folder, CHOICE, num_shots=1, limit=2)[CHOICE, DENSE, "acc"]
    assert (found["n_shots"], found["samples"]) == (1, 2)
    usual = measured(flash, task_folder, CHOICE)[CHOICE, DENSE, "acc"]
    assert (usual["n_shots"], usual["samples"]) == (0, len(DOCUMENTS))


def test_groups_name_the_heads_of_their_tasks(flash, task_folder):
    found = measured(flash, task_folder, GROUP)
    assert (CHOICE, DENSE, "acc") in found
    assert (GENERATE, FLASH_HEAD, "exact_match") in found
    assert (GROUP, f"{FLASH_HEAD} + {DENSE}", "acc") in found


def test_chat_template(flash, monkeypatch):
    assert not tasks.TaskModel(*flash).use_chat_template
    template = "{% for m in messages %}{{ mood }}: {{ m.content }}{% endfor %}"
    monkeypatch.setattr(flash[1]._tokenizer, "chat_template", template)
    lm = tasks.TaskModel(*flash, chat_template_args={"mood": "glad"})
    assert lm.use_chat_template
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "glad: hi"


def test_own_tasks_come_without_lm_eval_s(task_folder, monkeypatch):
    listed = []
    original = tasks.TaskManager

    def recorded(include_path=None, include_defaults=True):
        listed.append(include_defaults)
        return original(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", recorded)
    assert CHOICE in find_tasks([CHOICE, GROUP], str(task_folder)).all_tasks
    assert listed == [False]
    said = "no task 'local_choise' .*near it: local_choice.*lm-eval ls tasks.*--include-path"
    with pytest.raises(ValueError, match=said):
        find_tasks([CHOICE, "local_choise"], str(task_folder))
    assert listed == [False, False, True]


def test_a_batch_above_the_limit_of_positions_goes_through_flash_head(flash, task_folder):
    usual = measured(flash, task_folder, PERPLEXITY, batch_size=3)
    head = get_flash_head(flash[0])
    with head.settings(max_positions=1):
        assert measured(flash, task_folder, PERPLEXITY, batch_size=3) == usual
        assert head.max_positions == 1


def test_figures_are_numbers_in_json():
    assert [tasks._finite(x) for x in (2, 0.5, math.nan, math.inf, "N/A")] == [2, 0.5] + 3 * [None]
