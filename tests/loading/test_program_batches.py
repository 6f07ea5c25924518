"""mlx-lm's ``BatchGenerator`` in a program under ``run``, in this process."""

import inspect

import mlx.core as mx
import pytest

from mlx_flashhead.decoding.phase import VERIFIED
from mlx_flashhead.loading.program_batches import CHANGED_BATCHES
from mlx_flashhead.models.compat import other_programs
from mlx_flashhead.models.compat.recognised import digest
from under_run import CACHES, N_TOKENS, OWN, texts


def subclassed(cls, monkeypatch):
    class Mine(cls):
        def next(self):
            self.n_calls = getattr(self, "n_calls", 0) + 1
            return super().next()

    return Mine


def patched_class(cls, monkeypatch):
    before = cls.next_generated
    monkeypatch.setattr(cls, "next_generated", lambda self: before(self))
    return cls


def patched_step(cls, monkeypatch):
    before = OWN["GenerationBatch"]._step

    def step(self):
        calls.append(len(self.uids))
        return before(self)

    monkeypatch.setattr(OWN["GenerationBatch"], "_step", step)
    return cls


def patched_instance(cls, monkeypatch):
    def make(model):
        batches = cls(model)
        before = batches._next

        def step():
            calls.append(1)
            return before()

        batches._next = step
        return batches

    return make


def other_sampler(cls, monkeypatch):
    def make(model):
        batches = cls(model)
        batches.sampler = lambda logprobs: mx.argmax(logprobs, axis=-1)
        return batches

    return make


calls = []


class Rule:
    """A processor that is told each chosen token, as oMLX's grammars are. It forbids some."""

    def __init__(self):
        self.accepted = []

    def accept_token(self, token):
        self.accepted.append(token)

    def __call__(self, tokens, logits):
        forbidden = mx.arange(logits.shape[-1]) % 3 == len(self.accepted) % 3
        return mx.where(forbidden, -mx.inf, logits)


def step_of_omlx(self):
    """mlx-lm's step, after which each grammar is told what was chosen: oMLX's, in short."""
    result = OWN_STEP(self)
    for token, processors in zip(self._next_tokens.tolist(), self.logits_processors, strict=False):
        # A text without processors may have None.
        if processors is None:
            processors = []
        for rule in processors:
            if isinstance(rule, Rule):
                rule.accept_token(token)
    return result


OWN_STEP = OWN["GenerationBatch"]._step


def beside_each_other(make, model, prompts):
    """Two plain texts and one with a grammar between them, and another one added later.

    The grammar is told what was chosen for its text.
    """
    batches = make(model)
    rule = Rule()
    uids = []
    # As oMLX, one by one.
    for prompt, processors in zip(prompts, ([], [rule], []), strict=True):
        uids += batches.insert([prompt], [N_TOKENS], logits_processors=[processors])
    found = {uid: [] for uid in uids}
    ends = {}

    def take(responses):
        for response in responses:
            found[response.uid].append(response.token)
            if response.finish_reason is not None:
                ends[response.uid] = response.finish_reason, response.prompt_cache[0].offset

    for _ in range(4):
        take(batches.next_generated())
    held = batches.extract_cache(uids[1:2])[uids[1]]
    (more,) = batches.insert([prompts[0]], [N_TOKENS], logits_processors=[[Rule()]])
    found[more] = []
    caches, tokens = batches.remove(uids[2:], return_prompt_caches=True)[uids[2]]
    n_unread = caches[0].offset - len(tokens)
    responses = batches.next_generated()
    while responses:
        take(responses)
        responses = batches.next_generated()
    texts_found = [found[uid] for uid in (*uids[:2], more)]
    # mlx-lm is a token ahead.
    assert rule.accepted[: N_TOKENS - 1] == found[uids[1]][:-1]
    return uids, texts_found, ends, held[0][0].offset, n_unread


def test_grammars_of_omlx_are_told_what_was_chosen(under, plain, monkeypatch):
    """They and the texts beside them are as in mlx-lm's batches, and the others are verified."""
    model, prompts, _ = plain
    step = {"GenerationBatch._step": (__name__, digest(step_of_omlx))}
    monkeypatch.setitem(other_programs.REPLACEMENTS, "oMLX", step)
    monkeypatch.setitem(other_programs.GRAMMARS, "oMLX", (__name__, "Rule"))
    monkeypatch.setattr(OWN["GenerationBatch"], "_step", step_of_omlx)
    found = beside_each_other(under.batch_generator, under.model, prompts)
    assert found == beside_each_other(OWN["BatchGenerator"], model, prompts)
    reason = "dense: its sampler, or one of its processors, cannot be verified"
    assert sorted(under.lines()) == [f"model: {reason}.", "model: verified."]


@pytest.mark.parametrize(
    "change", [subclassed, patched_class, patched_step, patched_instance, other_sampler]
)
def test_a_program_that_changes_batches_gets_its_own(under, plain, monkeypatch, change):
    """Its functions are called as without us, and the line says dense."""
    model, prompts, expected = plain
    calls.clear()
    made = change(under.batch_generator, monkeypatch)(under.model)
    assert texts(made, prompts) == expected
    assert under.lines() == [f"model: {CHANGED_BATCHES}."]
    n_calls = len(calls)
    if change in (patched_step, patched_instance):
        calls.clear()
        own = OWN["BatchGenerator"]
        if change is patched_instance:
            own = patched_instance(own, monkeypatch)
        texts(own(model), prompts)
        assert n_calls == len(calls) > 0


def test_a_program_that_looks_for_texts_in_mlx_lms_batches_finds_ours(under, plain):
    model, prompts, expected = plain
    batches = under.batch_generator(under.model)
    uids = batches.insert(prompts, [N_TOKENS] * 3)
    found = {uid: [] for uid in uids}
    while len(batches._generation_batch):
        for response in batches.next()[1]:
            found[response.uid].append(response.token)
        texts_in_progress = batches._generation_batch.uids
        if texts_in_progress:
            assert len(batches._generation_batch.extract_cache(0)) == len(model.layers)
    assert list(found.values()) == expected


def test_what_decodes_is_chosen_when_no_text_is_in_progress(under, plain, monkeypatch):
    """A change in the middle of texts counts from the next ones on, and so does its end."""
    _, prompts, expected = plain
    batches = under.batch_generator(under.model)
    uids = batches.insert(prompts[:1], [N_TOKENS])
    batches.next_generated()
    with monkeypatch.context() as patch:
        patch.setattr(CACHES, "make_prompt_cache", lambda *_: pytest.fail("called"))
        uids += batches.insert(prompts[1:2], [N_TOKENS])
        while batches.next_generated():
            pass
        assert under.lines() == ["model: verified."]
        patch.undo()
        patch.setattr(OWN["GenerationBatch"], "_step", lambda self: OWN_STEP(self))
        assert texts(batches, prompts) == expected
        assert under.lines()[1:] == [f"model: {CHANGED_BATCHES}."]
    counts = under.patches.models.use_of(under.model)._n_tokens
    n_verified = counts[VERIFIED]
    assert texts(batches, prompts) == expected
    assert counts[VERIFIED] > n_verified and uids == [0, 1]
    assert batches.insert(prompts, [1] * 3) == [8, 9, 10]


def test_what_mlx_lms_own_batch_has_begun_it_ends(under, plain, monkeypatch):
    """A text that is added meanwhile is decoded beside it, though nothing is changed any more."""
    _, prompts, expected = plain
    batches = under.batch_generator(under.model)
    with monkeypatch.context() as patch:
        patch.setattr(OWN["GenerationBatch"], "_step", lambda self: OWN_STEP(self))
        (first,) = batches.insert(prompts[:1], [N_TOKENS])
        found = {first: [response.token for response in batches.next_generated()]}
    (second,) = batches.insert(prompts[1:2], [N_TOKENS])
    found[second] = []
    responses = batches.next_generated()
    while responses:
        for response in responses:
            found[response.uid].append(response.token)
        responses = batches.next_generated()
    assert list(found.values()) == expected[:2]
    assert under.lines() == [f"model: {CHANGED_BATCHES}."]


def test_attributes_that_are_nothing_to_mlx_lm_change_nothing(under, plain):
    """A callback of the program's own, and a number that mlx-lm reads."""
    _, prompts, expected = plain
    batches = under.batch_generator(under.model)
    batches.prompt_progress_callback = print
    batches.prefill_step_size = 2
    assert texts(batches, prompts) == expected
    batches.max_tokens = 3
    (uid,) = batches.insert(prompts[:1])
    found = []
    responses = batches.next_generated()
    while responses:
        found += [(response.uid, response.token) for response in responses]
        responses = batches.next_generated()
    assert found == [(uid, token) for token in expected[0][:3]]
    assert under.lines() == ["model: verified."]


def test_a_program_may_ask_for_parameters(under):
    ours = inspect.signature(under.batch_generator.__init__)
    assert ours == inspect.signature(OWN["BatchGenerator"].__init__)
