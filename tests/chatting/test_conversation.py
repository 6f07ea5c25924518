"""Conversations: however an answer ended, the next one is that of a model without a cache."""

import json

import mlx.core as mx
import pytest

import mlx_flashhead
from mlx_flashhead.chatting import conversation as module
from mlx_flashhead.chatting.conversation import (
    LENGTH,
    STOPPED,
    Conversation,
    read_conversation,
    write_conversation,
)
from model_folders import VOCAB_SIZE, write_tokenizer
from tiny_models import tiny_model

LIMIT = {"max_tokens": 12}
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"


@pytest.fixture(scope="module")
def loaded(converted):
    """A model with a FlashHead of 4 probes, and its tokenizer."""
    return mlx_flashhead.load(str(converted))


@pytest.fixture
def conversation(loaded):
    return Conversation(*loaded)


def answer(conversation, text, **options):
    return "".join(conversation.ask(text, **LIMIT | options))


def expected(conversation, text, **options):
    """The answer of a model that reads the whole conversation anew."""
    messages = [*conversation.messages, {"role": "user", "content": text}]
    tokenizer = conversation.tokenizer
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_flashhead.generate(conversation.model, tokenizer, prompt, **LIMIT | options)


def check_next_answer(conversation, text="Go on"):
    """The next answer is that of a model without a cache, and the cache is right."""
    check_cache(conversation)
    right = expected(conversation, text)
    assert answer(conversation, text) == right
    check_cache(conversation)


def check_cache(conversation):
    """The cache's keys are those of the tokens it is said to hold."""
    token_ids = conversation.cached_ids
    fresh = module.make_prompt_cache(conversation.model)
    if token_ids:
        conversation.model(mx.array([token_ids]), cache=fresh)
    for held, right in zip(conversation.cache, fresh, strict=True):
        assert held.offset == right.offset == len(token_ids)
        if token_ids:
            for one, other in zip(held.keys_and_values(), right.keys_and_values(), strict=True):
                assert mx.allclose(one, other, atol=1e-4)


def test_answers_are_those_without_a_cache(conversation):
    for number, text in enumerate(("Hello", "And then?", "Why")):
        right = expected(conversation, text)
        pieces = list(conversation.ask(text, **LIMIT))
        assert len(pieces) > 3
        assert all(pieces)
        assert "".join(pieces) == right
        question, reply = conversation.messages[-2:]
        assert question == {"role": "user", "content": text}
        assert reply == {"role": "assistant", "content": right}
        last = conversation.answers[number]
        assert (last.text, last.n_tokens, last.finish) == (right, 12, LENGTH)
        assert (last.n_cached > 0) == (number > 0)
        assert last.n_cached < last.n_prompt
        check_cache(conversation)


@pytest.mark.parametrize("n_pieces", [1, 5])
def test_a_stopped_answer_stays_as_far_as_it_came(conversation, n_pieces):
    right = expected(conversation, "Hello")
    seen = []
    for piece in conversation.ask("Hello", stopping=lambda: len(seen) == n_pieces, **LIMIT):
        seen.append(piece)
    text = "".join(seen)
    assert len(seen) == n_pieces
    assert right.startswith(text)
    assert text != right
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert conversation.answers[-1].finish == STOPPED
    check_next_answer(conversation)


@pytest.mark.parametrize("calls", [1, 3])
def test_a_question_stopped_in_the_prompt_is_forgotten(conversation, calls):
    answer(conversation, "Hello")
    before = list(conversation.messages)
    stops = iter([False] * (calls - 1) + [True])
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "Another", stopping=lambda: next(stops), prefill_step_size=8)
    assert conversation.messages == before
    assert len(conversation.answers) == 1
    check_next_answer(conversation)


def test_an_error_amid_a_step_leaves_no_half_filled_cache(conversation):
    answer(conversation, "Hello")
    draws = iter([False] * 60 + [True])

    def fails(logprobs):
        if next(draws):
            raise KeyboardInterrupt
        return mx.argmax(logprobs, axis=-1)

    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "Then", sampler=fails, max_tokens=100)
    assert conversation.messages[-2]["content"] == "Then"
    check_next_answer(conversation)


def test_a_full_cache_forgets_the_oldest_and_is_made_anew_where_it_cannot_be_trimmed(loaded):
    # mlx-lm makes its cache.
    model = tiny_model("qwen3", vocab_size=VOCAB_SIZE)
    conversation = Conversation(model, loaded[1], max_kv_size=24)
    for text in ("A question of some length", "Another one"):
        answer(conversation, text)
        assert all(cache.size() == 24 for cache in conversation.cache)
    conversation.replace(conversation.messages[:2])
    again = answer(conversation, "Another one")
    assert conversation.answers[-1].n_cached == 0
    fresh = Conversation(model, loaded[1], max_kv_size=24)
    fresh.replace(conversation.messages[:2])
    assert answer(fresh, "Another one") == again


def test_a_prompt_that_is_cached_completely_is_answered_up_to_the_end_of_text(conversation):
    right = answer(conversation, "Hello")
    conversation.replace([])
    assert answer(conversation, "Hello") == right
    last = conversation.answers[-1]
    # One is left to go through the model.
    assert last.n_cached == last.n_prompt - 1
    check_cache(conversation)
    biased = mx.zeros((conversation.tokenizer.vocab_size,))
    # 1 is the end-of-text token.
    biased[1] = 1e4
    assert answer(conversation, "Hello", sampler=lambda p: mx.argmax(p + biased, axis=-1)) == ""
    assert conversation.answers[-1].finish == "stop"
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}
    check_cache(conversation)


def test_errors_of_templates_are_named_and_nothing_changes(loaded, tmp_path):
    model, _ = loaded
    for template, text in ((None, "no chat template"), (STRICT, "No system role")):
        write_tokenizer(tmp_path, template)
        tokenizer = loaded[1].__class__(
            type(loaded[1]._tokenizer).from_pretrained(tmp_path), eos_token_ids=[1]
        )
        with pytest.raises(ValueError, match=text):
            Conversation(model, tokenizer, system_prompt="Be brief.")
    conversation = Conversation(model, tokenizer)
    with pytest.raises(ValueError, match="No system role"):
        conversation.replace([{"role": "system", "content": "Be brief."}])
    assert conversation.messages == []


SAVED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Grüße\n"zitiert"'},
    {"role": "assistant", "content": "[bold]\x1b �"},
]


def test_a_conversation_is_written_and_read_and_replaces_nothing_else(tmp_path):
    file = tmp_path / "chat.json"
    for messages in (SAVED[1:], SAVED[:1], [], SAVED):
        write_conversation(file, messages, "a model")
        assert read_conversation(file) == messages
    assert json.loads(file.read_text())["model"] == "a model"
    assert "Grüße" in file.read_text()
    file.write_text(json.dumps([message | {"name": "x"} for message in SAVED]))
    # The file holds a list alone, without other keys.
    assert read_conversation(file) == SAVED


USER, ANSWER = SAVED[1:]
NONE = [3, {"talk": []}, ["hello"], [{"role": "user"}], [USER | {"content": [1]}, ANSWER]]
NONE += [[USER], [ANSWER], [USER, ANSWER, *SAVED], [USER, USER]]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\ud800", *map(json.dumps, NONE)])
def test_files_without_a_conversation(tmp_path, text):
    file = tmp_path / "chat.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"does not hold a conversation \(.*\): choose") as caught:
        read_conversation(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
