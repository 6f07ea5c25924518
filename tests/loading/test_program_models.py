"""The models of a program under ``run``, in this process: what each gets, and when."""

import gc
import math
import threading

import mlx_lm
import pytest

from mlx_flashhead.loading import program_models, programs, use
from mlx_flashhead.loading.head_options import BUILD, DENSE, LATER, HeadOptions
from mlx_flashhead.models.install import get_flash_head
from under_run import OWN, fails, steps_of, texts


def test_a_program_gets_what_is_built_while_it_writes_nothing(
    program_folder, plain, quick, monkeypatch
):
    """Its texts are mlx-lm's before, between and after."""
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    model, prompts, expected = plain
    said = []
    options = HeadOptions(missing=LATER, always=True)
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    patches = programs.Patches(options)
    loaded, tokenizer = mlx_lm.load(str(program_folder / "model"))
    patches.models.attach(loaded, lambda: tokenizer, program_folder / "model")
    (first_use,) = patches.models._first_uses.values()
    build = first_use.build
    batches = patches.loops.batches(OWN["BatchGenerator"])(loaded)
    steps = patches.loops.loop(patches.loops.text_loop, OWN["generate_step"])
    single = steps_of(OWN["generate_step"], model, prompts[0])
    assert type(loaded) is type(model)
    assert steps_of(steps, loaded, prompts[0]) == single
    while get_flash_head(loaded) is None and build.under_way:
        assert texts(batches, prompts) == expected
    assert texts(batches, prompts) == expected
    assert steps_of(steps, loaded, prompts[0]) == single
    assert not patches.models._first_uses and get_flash_head(loaded) is not None
    building, *others = said
    assert "Building the FlashHead of model while the model is idle, which takes" in building
    assert others[0] == f"Text of model: {use.BUILDING}."
    assert others[-2].startswith("With FlashHead: model, ")
    assert others[-1] == "Text of model: verified."
    assert "build" not in [thread.name for thread in threading.enumerate()]


def test_a_smaller_model_is_left_to_the_program(program_folder, monkeypatch):
    """It was loaded again and again, since each load of a model looked for its drafter."""
    said = []
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    name = str(program_folder / "model")
    patches = programs.Patches(HeadOptions(missing=DENSE, draft_model=name))
    monkeypatch.setattr("mlx_flashhead.loading.drafts.load_with_head", pytest.fail)
    patches.load(mlx_lm.load)(name)
    assert [text for text in said if text.startswith("Without drafts")] == [
        f"Without drafts: {name} is a model of its own: name it to the program, which drafts with "
        "it."
    ]


@pytest.mark.parametrize(("vision", "missing"), [(True, BUILD), (False, LATER)])
def test_models_of_mlx_vlm_are_built_first(program_folder, plain, monkeypatch, vision, missing):
    seen = []

    def attach_head(model, tokenizer, stored, source, options):
        seen.append(options.missing)
        raise ValueError("enough")

    monkeypatch.setattr(program_models, "attach_head", attach_head)
    monkeypatch.setattr(program_models, "is_vlm", lambda _: vision)
    patches = programs.Patches(HeadOptions(missing=LATER, progress=False))
    patches.models.attach(plain[0], lambda: None, program_folder / "model")
    assert seen == [missing]


def test_a_model_that_a_program_drops_ends_its_build(program_folder, quick, monkeypatch):
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", math.inf)
    patches = programs.Patches(HeadOptions(missing=LATER, progress=False))
    loaded, tokenizer = mlx_lm.load(str(program_folder / "model"))
    patches.models.attach(loaded, lambda: tokenizer, program_folder / "model")
    (first_use,) = patches.models._first_uses.values()
    build = first_use.build
    del loaded
    gc.collect()
    assert not patches.models._first_uses
    build._thread.join()
    assert not build.under_way
    # It has let the copy of the model go.
    assert build._parts.gi_frame is None


def test_a_build_that_fails_is_one_line(program_folder, plain, quick, monkeypatch):
    said = []
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("mlx_flashhead.loading.build_parts.model_index", fails)
    patches = programs.Patches(HeadOptions(missing=LATER))
    loaded, tokenizer = mlx_lm.load(str(program_folder / "model"))
    patches.models.attach(loaded, lambda: tokenizer, program_folder / "model")
    (first_use,) = patches.models._first_uses.values()
    build = first_use.build
    build._thread.join()
    assert texts(patches.loops.batches(OWN["BatchGenerator"])(loaded), plain[1]) == plain[2]
    assert said[1:] == ["Without FlashHead: [metal] out of memory"]


def test_whatever_goes_wrong_in_attaching_is_one_line(program_folder, plain, monkeypatch):
    """Before the installation or after it: the model is mlx-lm's, and so is each later one."""
    model, prompts, expected = plain
    for place in (
        "mlx_flashhead.loading.program_models.attach_head",
        "mlx_flashhead.loading.installing.tune_head",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            said = []
            options = HeadOptions(flash_head=str(program_folder / "head"))
            object.__setattr__(options, "say", said.append)
            patches = programs.Patches(options)
            for _ in range(2):
                loaded, tokenizer = mlx_lm.load(str(program_folder / "model"))
                patches.models.attach(loaded, lambda: tokenizer, program_folder / "model")  # noqa: B023
                assert get_flash_head(loaded) is None
                found = texts(patches.loops.batches(OWN["BatchGenerator"])(loaded), prompts)
                assert found == expected and type(loaded) is type(model)
        assert said == ["Without FlashHead: [metal] out of memory"]
