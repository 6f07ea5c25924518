"""What takes the places of the loads of mlx-lm under ``run``, in this process."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import mlx_lm

from mlx_flashhead.interop import replace
from mlx_flashhead.loading import programs
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.models.install import get_flash_head


def test_what_converts_or_trains_keeps_the_normal_head(program_folder, monkeypatch):
    """By its module, imported or run, and by a function of mlx-lm's that loads for itself."""
    patches = programs.Patches(HeadOptions(flash_head=str(program_folder / "head"), progress=False))
    load = patches.load(mlx_lm.load)
    model_of = lambda load: load(str(program_folder / "model"))[0]  # noqa: E731
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
    assert get_flash_head(load_model(program_folder / "model")[0]) is not None
    with programs.plainly():
        assert get_flash_head(load_model(program_folder / "model")[0]) is None


def test_a_hook_that_does_not_fit_is_one_line(monkeypatch, capsys):
    """As with a later version of a library, whose names this package does not find."""

    class Module(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"no {name}")

    file = Path(replace.__file__).parent / "hook" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("hook", file)
    hook = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        # Without another hook, which it would run.
        patch.setattr(sys, "path", [])
        spec.loader.exec_module(hook)
    monkeypatch.setitem(sys.modules, "mlx_flashhead.loading.programs", Module("programs"))
    hook.patch("mlx_vlm")
    said = capsys.readouterr().err
    assert said.startswith("Without FlashHead: it does not fit these libraries (RuntimeError: no ")
    assert said.count("\n") == 1
