"""What takes the places of mlx-lm's functions under ``run``, in this process."""

import copy
import gc
import importlib
import inspect
import math
import pickle
import sys
import threading
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from mlx_flashhead.decoding.phase import DRAFTED, REPLACED, TRAINED
from mlx_flashhead.index.files import write_companion
from mlx_flashhead.interop import replace
from mlx_flashhead.loading import programs, use
from mlx_flashhead.loading.batches import CHANGED
from mlx_flashhead.loading.head_options import BUILD, DENSE, LATER, HeadOptions
from mlx_flashhead.models.compat import other_programs
from mlx_flashhead.models.compat.recognised import digest
from mlx_flashhead.models.install import get_flash_head
from model_folders import write_model
from tiny_models import tiny_index

generate = importlib.import_module("mlx_lm.generate")
# where mlx-lm's loops look make_prompt_cache up
CACHES = generate if hasattr(generate, "make_prompt_cache") else mlx_lm.models.cache
N_TOKENS = 12
# mlx-lm's own, before anything takes their places
OWN = {
    name: getattr(generate, name)
    for name in ("BatchGenerator", "generate_step", "GenerationBatch", "PromptProcessingBatch")
}


class Under:
    """A model under ``run``, and what was said of it."""

    def __init__(self, folder):
        self.said = []
        options = HeadOptions(flash_head=str(folder / "head"), always=True, check=False)
        object.__setattr__(options, "say", self.said.append)
        self.patches = programs._Patches(options)
        self.model, self.tokenizer = mlx_lm.load(str(folder / "model"))
        self.patches._attach(self.model, lambda: self.tokenizer, folder / "model")
        self.batch_generator = self.patches.batches(OWN["BatchGenerator"])
        self.steps = self.patches.loop(self.patches.text_loop, OWN["generate_step"])
        self.said.clear()

    def lines(self):
        """What was said of texts."""
        return [line.removeprefix("Text of ") for line in self.said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    model = write_model(folder / "model")
    (folder / "head").mkdir()
    write_companion(folder / "head", tiny_index(mlx_lm.load(str(model))[0]))
    return folder


@pytest.fixture
def under(folder):
    return Under(folder)


@pytest.fixture(scope="module")
def plain(folder):
    """The dense model, and its texts in a batch of mlx-lm."""
    model, tokenizer = mlx_lm.load(str(folder / "model"))
    prompts = [tokenizer.encode(f"{i} One day") for i in range(3)]
    return model, prompts, texts(OWN["BatchGenerator"](model), prompts)


def texts(batches, prompts, **options):
    """The tokens of prompts in a batch, as a program that keeps to its public face."""
    uids = batches.insert(prompts, [N_TOKENS] * len(prompts), **options)
    found = {uid: [] for uid in uids}
    while responses := batches.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    return list(found.values())


def steps_of(loop, model, prompt, **options):
    return [int(token) for token, _ in loop(mx.array(prompt), model, max_tokens=8, **options)]


def test_tokens_are_counted_by_how_they_were_decoded(under, plain):
    model, prompts, expected = plain
    assert texts(under.batch_generator(under.model), prompts) == expected
    assert under.lines() == ["model: verified."]
    unknown = lambda logprobs: mx.argmax(logprobs, axis=-1)  # noqa: E731
    found = steps_of(under.steps, under.model, prompts[0], sampler=unknown)
    assert found == steps_of(OWN["generate_step"], model, prompts[0], sampler=unknown)
    again = steps_of(under.steps, under.model, prompts[0], sampler=unknown)
    assert again == found
    reason = "dense: its sampler, or one of its processors, cannot be verified"
    assert under.lines() == ["model: verified.", f"model: {reason}."]
    n_batch = sum(map(len, expected))
    n_all = n_batch + 2 * len(found)
    assert under.patches._use_of(under.model).summary() == (
        f"Checked model: {n_all} tokens: {n_batch - 3} verified ({(n_batch - 3) / n_all:.0%}); "
        f"3 the first of their texts, by their prompts; {2 * len(found)} {reason}."
    )


def test_a_text_says_how_it_is_decoded_before_its_first_token(under, plain):
    steps = under.steps(mx.array(plain[1][0]), under.model, max_tokens=4)
    assert under.lines() == []
    next(steps)
    assert under.lines() == ["model: verified."]
    steps.close()


USED = (
    "model: dense: between tokens the program uses the text's caches, processors or random state."
)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_in_the_middle_of_a_text_waits_on_a_terminal(under, plain, monkeypatch, terminal):
    """For the next text, or the end of the process."""
    monkeypatch.setattr(use.sys, "stderr", Mock(isatty=lambda: terminal))
    processors = []
    prompt = mx.array(plain[1][0])
    steps = under.steps(prompt, under.model, max_tokens=8, logits_processors=processors)
    for _ in range(3):
        next(steps)
    processors.append(lambda tokens, logits: logits)
    assert len(list(steps)) == 5
    later = [] if terminal else [USED]
    assert under.lines() == ["model: verified.", *later]
    steps_of(under.steps, under.model, plain[1][0])
    assert under.lines() == ["model: verified.", USED]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_loop_of_its_own_is_said_after_its_text_on_a_terminal(
    under, plain, monkeypatch, terminal
):
    monkeypatch.setattr(use.sys, "stderr", Mock(isatty=lambda: terminal))
    under.patches._use_of(under.model)
    said = []
    for _ in range(2):
        cache = CACHES.make_prompt_cache(under.model)
        tokens = mx.array([plain[1][0]])
        for _ in range(6):
            tokens = mx.argmax(under.model(tokens, cache=cache)[:, -1], axis=-1)[None]
        said.append(under.lines())
    line = f"model: {use.DENSE_LOOP}."
    assert said == [[] if terminal else [line], [line]]


def test_a_program_gets_what_is_built_while_it_writes_nothing(folder, plain, quick, monkeypatch):
    """Its texts are mlx-lm's before, between and after."""
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    model, prompts, expected = plain
    said = []
    options = HeadOptions(missing=LATER, always=True)
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    patches = programs._Patches(options)
    loaded, tokenizer = mlx_lm.load(str(folder / "model"))
    patches._attach(loaded, lambda: tokenizer, folder / "model")
    (first_use,) = patches._builds.values()
    build = first_use.build
    batches = patches.batches(OWN["BatchGenerator"])(loaded)
    steps = patches.loop(patches.text_loop, OWN["generate_step"])
    single = steps_of(OWN["generate_step"], model, prompts[0])
    assert type(loaded) is type(model)
    assert steps_of(steps, loaded, prompts[0]) == single
    while get_flash_head(loaded) is None and build.under_way:
        assert texts(batches, prompts) == expected
    assert texts(batches, prompts) == expected
    assert steps_of(steps, loaded, prompts[0]) == single
    assert not patches._builds and get_flash_head(loaded) is not None
    building, *others = said
    assert "Building the FlashHead of model while the model is idle, which takes" in building
    assert others[0] == f"Text of model: {use.BUILDING}."
    assert others[-2].startswith("With FlashHead: model, ")
    assert others[-1] == "Text of model: verified."
    assert "build" not in [thread.name for thread in threading.enumerate()]


def test_a_smaller_model_is_left_to_the_program(folder, monkeypatch):
    """It was loaded again and again, since each load of a model looked for its drafter."""
    said = []
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    name = str(folder / "model")
    patches = programs._Patches(HeadOptions(missing=DENSE, draft_model=name))
    monkeypatch.setattr("mlx_flashhead.loading.drafts.load_with_head", pytest.fail)
    patches.load(mlx_lm.load)(name)
    assert [text for text in said if text.startswith("Without drafts")] == [
        f"Without drafts: {name} is a model of its own: name it to the program, which drafts with "
        "it."
    ]


def test_another_models_trained_drafter_ends_the_text_with_a_sentence(plain):
    """Mlx-lm's own loop could not take it."""
    pytest.importorskip("mlx_vlm")
    trained_drafters = importlib.import_module("trained_drafters")
    patches = programs._Patches(HeadOptions(missing=DENSE))
    steps = patches.loop(patches.drafted_loop, generate.speculative_generate_step)
    drafter = trained_drafters.tiny_drafter("qwen3_5")
    with pytest.raises(ValueError, match="give the drafter that was trained with it"):
        next(steps(mx.array([5, 9, 77]), plain[0], drafter, max_tokens=8))


def test_a_drafted_text_is_the_same_before_its_flash_head_is_built_and_after(
    folder, plain, quick, monkeypatch
):
    """One loop takes it, whose text is the one without a draft model."""
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    model, prompts, _ = plain
    said = []
    options = HeadOptions(missing=LATER, always=True)
    patches = programs._Patches(options)
    draft, tokenizer = mlx_lm.load(str(folder / "model"))
    patches._attach(draft, lambda: tokenizer, folder / "model")
    (first_use,) = patches._builds.values()
    steps = patches.loop(patches.drafted_loop, generate.speculative_generate_step)
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    for is_built in (False, True):
        assert (get_flash_head(draft) is not None) == is_built
        found = steps(mx.array(prompts[0]), model, draft, max_tokens=8)
        assert [token for token, *_ in found] == expected
        ways = [line for line in said if line.startswith("Text of")]
        assert ways[0] == f"Text of model: {DRAFTED}."  # from the first text on
        batches = patches.batches(OWN["BatchGenerator"])(draft)
        while get_flash_head(draft) is None and first_use.build.under_way:
            texts(batches, prompts)
        texts(batches, prompts)


@pytest.mark.parametrize("vision", [True, False])
def test_models_of_mlx_vlm_are_built_first(folder, plain, monkeypatch, vision):
    seen = []

    def attach_head(model, tokenizer, stored, source, options):
        seen.append(options.missing)
        raise ValueError("enough")

    monkeypatch.setattr(programs, "attach_head", attach_head)
    monkeypatch.setattr(programs, "is_vlm", lambda _: vision)
    patches = programs._Patches(HeadOptions(missing=LATER, progress=False))
    patches._attach(plain[0], lambda: None, folder / "model")
    assert seen == [BUILD if vision else LATER]


def test_a_model_that_a_program_drops_ends_its_build(folder, quick, monkeypatch):
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", math.inf)
    patches = programs._Patches(HeadOptions(missing=LATER, progress=False))
    loaded, tokenizer = mlx_lm.load(str(folder / "model"))
    patches._attach(loaded, lambda: tokenizer, folder / "model")
    (first_use,) = patches._builds.values()
    build = first_use.build
    del loaded
    gc.collect()
    assert not patches._builds
    build._thread.join()
    assert not build.under_way
    assert build._parts.gi_frame is None  # which has let the copy go


def test_a_build_that_fails_is_one_line(folder, plain, quick, monkeypatch):
    said = []
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("mlx_flashhead.loading.building.model_index", fails)
    patches = programs._Patches(HeadOptions(missing=LATER))
    loaded, tokenizer = mlx_lm.load(str(folder / "model"))
    patches._attach(loaded, lambda: tokenizer, folder / "model")
    (first_use,) = patches._builds.values()
    build = first_use.build
    build._thread.join()
    assert texts(patches.batches(OWN["BatchGenerator"])(loaded), plain[1]) == plain[2]
    assert said[1:] == ["Without FlashHead: [metal] out of memory"]


def test_copies_of_a_model(under, plain):
    """One in the same process is verified as well, and a pickled one is dense."""
    _, prompts, expected = plain
    for copied, lines in (
        (pickle.loads(pickle.dumps(under.model)), []),
        (copy.deepcopy(under.model), ["model: verified."]),
    ):
        assert texts(under.batch_generator(copied), prompts) == expected
        assert under.lines() == lines


class Around(nn.Module):
    """A module around a model that forbids a token."""

    def __init__(self, model, forbidden):
        super().__init__()
        self.model = model
        self.forbidden = forbidden

    def __call__(self, tokens, cache=None):
        logits = self.model(tokens, cache=cache)
        logits[..., self.forbidden] = -mx.inf
        return logits

    @property
    def layers(self):
        return self.model.layers


def test_what_is_around_a_model_is_mlx_lm_s(under, plain):
    """A module, a plain object and a function: their texts are those without us."""
    model, prompts, expected = plain
    forbidden = expected[0][2]
    around = Around(under.model, forbidden), Around(model, forbidden)
    assert texts(under.batch_generator(around[0]), prompts) == texts(
        OWN["BatchGenerator"](around[1]), prompts
    )
    assert under.lines() == [
        "model: dense: the model is wrapped or changed, so nothing is known of its text."
    ]

    class Plain:
        def __init__(self, inner):
            self.inner = inner
            self.layers = inner.layers

        def __call__(self, tokens, cache=None):
            return self.inner(tokens, cache=cache)

    cached = [mlx_lm.models.cache.make_prompt_cache(model) for _ in range(2)]
    functions = [
        lambda tokens, cache=None, m=m: m(tokens, cache=cache) for m in (under.model, model)
    ]
    for made in (Plain(under.model), Plain(model)), functions:
        caches = [mlx_lm.models.cache.make_prompt_cache(model) for _ in cached]
        found = [
            steps_of(loop, each, prompts[0], prompt_cache=cache)
            for loop, each, cache in zip(
                (under.steps, OWN["generate_step"]), made, caches, strict=True
            )
        ]
        assert found[0] == found[1]


def test_what_converts_or_trains_keeps_the_normal_head(folder, monkeypatch):
    """By its module, imported or run, and by a function of mlx-lm's that loads for itself."""
    patches = programs._Patches(HeadOptions(flash_head=str(folder / "head"), progress=False))
    load = patches.load(mlx_lm.load)
    model_of = lambda load: load(str(folder / "model"))[0]  # noqa: E731
    main = sys.modules["__main__"]
    assert get_flash_head(model_of(load)) is not None
    assert get_flash_head(model_of(programs.plainly()(load))) is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlx_lm.lora", ModuleType("mlx_lm.lora"))
        assert get_flash_head(model_of(load)) is None
    for name, dense in (("mlx_lm.convert", True), ("mlx_lm.server", False)):
        monkeypatch.setattr(main, "__spec__", Mock(), raising=False)
        main.__spec__.name = name
        assert (get_flash_head(model_of(load)) is None) == dense
    load_model = patches.load_model(mlx_lm.utils.load_model)
    assert get_flash_head(load_model(folder / "model")[0]) is not None
    with programs.plainly():
        assert get_flash_head(load_model(folder / "model")[0]) is None


def fails(*_, **__):
    raise RuntimeError("[metal] out of memory\nand more")


def test_whatever_goes_wrong_in_attaching_is_one_line(folder, plain, monkeypatch):
    """Before the installation or after it: the model is mlx-lm's, and so is each later one."""
    model, prompts, expected = plain
    for place in (
        "mlx_flashhead.loading.programs.attach_head",
        "mlx_flashhead.loading.installing.tune_head",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            said = []
            options = HeadOptions(flash_head=str(folder / "head"))
            object.__setattr__(options, "say", said.append)
            patches = programs._Patches(options)
            for _ in range(2):
                loaded, tokenizer = mlx_lm.load(str(folder / "model"))
                patches._attach(loaded, lambda: tokenizer, folder / "model")  # noqa: B023
                assert get_flash_head(loaded) is None
                found = texts(patches.batches(OWN["BatchGenerator"])(loaded), prompts)
                assert found == expected and type(loaded) is type(model)
        assert said == ["Without FlashHead: [metal] out of memory"]


def test_a_hook_that_does_not_fit_is_one_line(monkeypatch, capsys):
    """As with a later version of a library, whose names this package does not find."""

    class Module(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"no {name}")

    file = Path(replace.__file__).parent / "hook" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("hook", file)
    hook = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])  # without another one, which it would run
        spec.loader.exec_module(hook)
    monkeypatch.setitem(sys.modules, "mlx_flashhead.loading.programs", Module("programs"))
    hook.patch("mlx_vlm")
    said = capsys.readouterr().err
    assert said.startswith("Without FlashHead: it does not fit these libraries (RuntimeError: no ")
    assert said.count("\n") == 1


def test_what_fails_when_a_text_begins_leaves_it_to_mlx_lm(under, plain, monkeypatch):
    model, prompts, expected = plain
    monkeypatch.setattr("mlx_flashhead.decoding.proposer.logit_map_of", fails)
    assert texts(under.batch_generator(under.model), prompts) == expected
    assert under.lines() == ["model: dense: [metal] out of memory."]
    found = steps_of(under.steps, under.model, prompts[0])
    assert found == steps_of(OWN["generate_step"], model, prompts[0])
    assert under.said[1] == "Without FlashHead: [metal] out of memory"


def test_the_head_takes_a_single_state(under, plain):
    hidden = mx.random.normal((64,), key=mx.random.key(1))
    expected = plain[0].model.embed_tokens.as_linear(hidden)
    for found in (
        under.model.model.embed_tokens.as_linear(hidden),
        get_flash_head(under.model).unverified_logits(hidden, n_probes=33),
    ):
        assert found.shape == expected.shape
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


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
        for rule in processors or ():
            if isinstance(rule, Rule):
                rule.accept_token(token)
    return result


OWN_STEP = OWN["GenerationBatch"]._step


def beside_each_other(make, model, prompts):
    """Two plain texts and one with a grammar between them, and another one added later."""
    batches = make(model)
    rule = Rule()
    uids = []
    for prompt, processors in zip(prompts, ([], [rule], []), strict=True):  # as oMLX, one by one
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
    removed = batches.remove(uids[2:], return_prompt_caches=True)[uids[2]]
    removed = removed[0][0].offset, removed[1]
    while responses := batches.next_generated():
        take(responses)
    texts_found = [found[uid] for uid in (*uids[:2], more)]
    assert rule.accepted[: N_TOKENS - 1] == found[uids[1]][:-1]  # mlx-lm is a token ahead
    return uids, texts_found, ends, held[0][0].offset, removed[0] - len(removed[1])


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
    assert under.lines() == [f"model: {CHANGED}."]
    n_calls = len(calls)
    if change in (patched_step, patched_instance):
        calls.clear()
        own = OWN["BatchGenerator"]
        own = own if change is patched_step else patched_instance(own, monkeypatch)
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
        assert under.lines()[1:] == [f"model: {CHANGED}."]
    counts = under.patches._use_of(under.model)._n_tokens
    n_verified = counts["verified"]
    assert texts(batches, prompts) == expected
    assert counts["verified"] > n_verified and uids == [0, 1]
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
    while responses := batches.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    assert list(found.values()) == expected[:2]
    assert under.lines() == [f"model: {CHANGED}."]


def test_a_replaced_name_of_mlx_lms_loop_is_called(under, plain, monkeypatch):
    model, prompts, _ = plain
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    made = []
    original = CACHES.make_prompt_cache

    def make_prompt_cache(*arguments, **options):
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(CACHES, "make_prompt_cache", make_prompt_cache)
    assert steps_of(under.steps, under.model, prompts[0]) == expected
    assert len(made) == 1 and made[0][0].offset > len(prompts[0])
    assert under.lines() == [f"model: {REPLACED}."]


def test_mlx_lms_loop_decodes_a_model_in_training(folder, plain, monkeypatch):
    """The program's name for that loop is ours, which must not be taken for it."""
    model, prompts, _ = plain
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    under = Under(folder)
    under.model.dropout = nn.Dropout(0.3)
    under.model.train()
    monkeypatch.setattr(generate, "generate_step", under.steps)
    assert steps_of(under.steps, under.model, prompts[0]) == expected
    assert under.lines() == [f"model: {TRAINED}."]


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
    while responses := batches.next_generated():
        found += [(response.uid, response.token) for response in responses]
    assert found == [(uid, token) for token in expected[0][:3]]
    assert under.lines() == ["model: verified."]


def test_a_program_may_ask_for_parameters(under):
    ours = inspect.signature(under.batch_generator.__init__)
    assert ours == inspect.signature(OWN["BatchGenerator"].__init__)
