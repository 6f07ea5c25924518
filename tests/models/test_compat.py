"""What a model is loaded with: its folder, the versions of mlx-lm, functions in others' place."""

import ast
import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest

import mlx_flashhead
from mlx_flashhead.index.files import FILE_NAME, write_companion
from mlx_flashhead.interop.replace import put_in_place
from mlx_flashhead.models.compat import mlx_lm as mlx_lm_names
from mlx_flashhead.models.compat import recognised
from mlx_flashhead.models.compat.recognised import mlx_lm_is_as_imported
from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.models.loading import load_dense
from refusals import refused
from tiny_models import tiny_index, tiny_model


@pytest.mark.newest
def test_a_program_that_loads_imports_no_other_program():
    code = "import sys; from mlx_flashhead import load; print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "mlx_lm" in modules
    assert not modules & {"mlx_lm.chat", "mlx_lm.server", "mlx_lm.evaluate", "rich"}


def test_a_function_is_replaced_wherever_it_is(tmp_path, monkeypatch):
    """Twice, in modules that have taken it already and in those that will; a user's own module
    that has imported it keeps it."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "defines.py").write_text("def function():\n    return 'original'\n")
    for name in ("uses", "later"):
        (folder / f"{name}.py").write_text("from .defines import function\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("some_package.uses").function

    def surround(mark, original):
        return lambda: f"{mark} {original()}"

    for mark in ("first", "second"):
        put_in_place("some_package.defines.function", partial(surround, mark))
    for name in ("uses", "defines", "later"):
        assert importlib.import_module(f"some_package.{name}").function() == "second first original"
    assert own() == "original"


@pytest.mark.newest
def test_the_names_of_mlx_lms_loops_are_there():
    for table in (recognised.LOOPS, recognised.BATCHES):
        for module, names in table.items():
            assert not set(names) - vars(importlib.import_module(module)).keys()


INNER_NAMES = {
    *("_chat_template", "_generation_batch", "_idx", "_old_wired_limit", "_prompt_batch"),
    *("_temporal_order", "_uid_count", "_unprocessed_sequences"),
    *("__code__", "co_consts", "co_filename", "co_names", "co_varnames"),
}


def test_inner_names_are_touched_in_compat_alone():
    package = Path(mlx_flashhead.__file__).parent
    found = set()
    touched = set()
    for file in package.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & INNER_NAMES
        if file.parent == package / "models" / "compat":
            found |= names
        elif names:
            touched.add((file.relative_to(package), *names))
    assert not touched
    assert found | {"_old_wired_limit"} == INNER_NAMES


@pytest.mark.parametrize(
    "name",
    [
        "generate.maybe_quantize_kv_cache",
        "sample_utils.apply_top_k",
        "models.cache.KVCache",
        "models.cache.make_prompt_cache",
    ],
)
def test_a_name_that_mlx_lms_loops_look_up_is_replaced(name, monkeypatch):
    assert mlx_lm_is_as_imported()
    original = importlib.import_module(f"mlx_lm.{name.rpartition('.')[0]}")
    with monkeypatch.context() as patch:
        patch.setattr(original, name.rpartition(".")[2], Mock())
        assert not mlx_lm_is_as_imported()
        assert set(recognised.replaced_names()) == {f"mlx_lm.{name}"}
    assert not recognised.replaced_names()


def test_a_function_of_mlx_lms_batches_is_replaced(monkeypatch):
    batches = mlx_lm_names.GenerationBatch
    with monkeypatch.context() as patch:
        patch.setattr(batches, "_step", lambda batch: ([], []))
        # The loop of one text does not call it.
        assert mlx_lm_is_as_imported()
        assert set(recognised.replaced_names()) == {"GenerationBatch._step"}
    with monkeypatch.context() as patch:
        patch.delattr(mlx_lm_names.BatchGenerator, "close")
        assert set(recognised.replaced_names()) == {"BatchGenerator.close"}
    assert not recognised.replaced_names()


def test_no_such_folder(tmp_path, monkeypatch):
    # The Hub is not contacted.
    monkeypatch.setattr(mlx_lm_names, "download", pytest.fail)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere/at/all", "one/two/three"):
        refused(partial(resolve, name), f"There is no folder {name}: check")
    (tmp_path / "file").touch()
    refused(lambda: resolve(str(tmp_path / "file")), "file is a file: name its folder")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path


def test_what_the_hub_says_is_one_short_sentence(hub, monkeypatch):
    hub.put("owner/name", {"config.json": b"{}", FILE_NAME: b"x"})
    assert {file.name for file in resolve("owner/name").iterdir()} == {"config.json", FILE_NAME}
    refused(lambda: resolve("owner/name", "v9"), "owner/name has no revision 'v9'")
    refused(lambda: resolve("owner/other"), "no such repository on the Hugging Face Hub: check")
    refused(lambda: resolve("owner other"), "it cannot be a repository: give a folder or OWNER/")
    refused(lambda: resolve(""), "The name of the model is empty")
    with monkeypatch.context() as patch:
        patch.setattr(mlx_lm_names, "download", Mock(side_effect=OSError("no\nanswer.\n")))
        said = r"no folder 'owner/name' here.*\(no answer\): check the name and the network"
        refused(lambda: resolve("owner/name"), said)
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()
    refused(lambda: resolve("owner/other"), "the Hugging Face Hub cannot be reached: check the net")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: resolve("owner/other"), "not downloaded before: .* unset HF_HUB_OFFLINE")
    assert resolve("owner/name").is_dir()


def test_a_flash_head_alone_is_no_model(tmp_path):
    write_companion(tmp_path, tiny_index(tiny_model()))
    refused(lambda: load_dense(tmp_path), "is a FlashHead without its model: give it as `flash")
