"""A finer output head for a quantized model: the rows of its original, checked and rounded.

Training moves a row by more than rounding does. So the original rows are rounded as the model's
are: where that gives the model's rows, they are the same head (measured in docs/finer-head.md).
"""

import errno
import glob
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import ModelCard
from tqdm import tqdm

from ..common.new_folder import new_file
from ..common.tables import megabytes
from ..head.matrix import ARRAYS, Matrix, affine_group
from .fetch import FINE_HEADS, HOME_VARIABLE, home, hub_is_reachable, lock_of, small_file
from .locate import HeadLocation
from .origin import is_repository, local_origin
from .tensor_files import ENDING, Tensor, tensor_files

DEFAULT_BITS = 8
MAX_DRIFT = 0.017  # of the rows' length that they have moved by, beyond rounding
SKETCH_DRIFT = 3 * MAX_DRIFT  # of few rows
MAX_ROW_ERROR = 2.0  # of a single row, relative to its rounding
SKETCH_ROWS = 8  # fetched by themselves before all rows are
PIECE_ROWS = 2048  # compared and rounded at once, in float32
CARD = "README.md"

Say = Callable[[str], None]
Rows = dict[str, Tensor]  # weight, with scales and biases where it is quantized


def give_fine_head(
    location: HeadLocation,
    folder: Path,
    source: str | Path | bool,
    *,
    bits: int | None = None,
    say: Say = print,
    progress: bool = True,
) -> None:
    """Replaces the rows of a quantized head, in place, by finer ones of the same head.

    They are looked up in the cache, else fetched from the original, rounded and cached. A source
    that is named is not replaced by another one that is cached.

    Args:
        location: The place of the model's head.
        folder: The model's folder.
        source: The original's repository, folder or safetensors file, or True for the one that the
            model's folder names.
        bits: Of the finer rows; 16 keeps the original's floats.
        say: Hears where the finer head comes from.
        progress: Show a bar while it is fetched.

    Raises:
        ValueError: In one sentence, if there are no such rows.
    """
    coarse = location.rows()
    bits = bits or DEFAULT_BITS
    kind = type(location.module)
    if not coarse.quantized:
        raise ValueError("The head's rows are floats already: leave `fine_head` out.")
    if kind not in (nn.QuantizedEmbedding, nn.QuantizedLinear):
        raise ValueError(f"A {kind.__name__} cannot be made finer: leave `fine_head` out.")
    if coarse.bits >= bits:
        raise ValueError(
            f"The head has {coarse.bits} bits already: choose more `head_bits`, or no `fine_head`."
        )
    place = home() / FINE_HEADS / f"{coarse.fingerprint[:24]}-{bits}{ENDING}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(place)
        if not lock.is_locked:
            say("Another process is fetching this finer head: waiting for it.")
            lock.acquire()
        try:
            original = None if source is True else _name_of_source(source)
            if original is not None and Path(original).exists():
                _check_sketch(location, folder, source)  # its files may be others by now
            rows, known_as = _cached_rows(place, coarse)
            if rows is None or original not in (None, known_as):
                rows, known_as = _fetch(location, folder, source, bits, place, say, progress)
        finally:
            lock.release()
    except (OSError, RuntimeError) as error:  # MLX raises the latter where a disk is full
        raise ValueError(
            f"The finer head cannot be kept in {place.parent} "
            f"({getattr(error, 'strerror', None) or error}): free some space, or set "
            f"{HOME_VARIABLE} to another folder."
        ) from None
    replace_rows(location.module, rows)
    say(f"With the finer head of {known_as}, in {rows.bits or 16} bits.")


def _name_of_source(source: str | Path | bool) -> str:
    """A named source, as the cache knows it: its path from the root, or its repository."""
    path = Path(str(source)).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


def _cached_rows(place: Path, coarse: Matrix) -> tuple[Matrix | None, str]:
    """The finer rows in the cache, if they are these rows', and the source that they are from."""
    try:
        loaded: Any = mx.load(str(place), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        numbers: Any = {name: int(metadata[name]) for name in ("bits", "group_size")}
        rows = Matrix(**arrays, bias=coarse.bias, **numbers)
        if (rows.n_rows, rows.hidden_size) != (coarse.n_rows, coarse.hidden_size):
            return None, ""
        sample = rows.sample().dequantized(mx.float32)
        check_same([distances(coarse.sample(), sample)], "", SKETCH_DRIFT)
        return rows, str(metadata["original"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None, ""


def _fetch(
    location: HeadLocation,
    folder: Path,
    source: str | Path | bool,
    bits: int,
    place: Path,
    say: Say,
    progress: bool,
) -> tuple[Matrix, str]:
    """Fetches the finer rows and keeps them: the rows, and the source that they are from."""
    width = location.rows().hidden_size
    group_size = affine_group(width) if bits < 16 else 0
    if group_size is None:
        raise ValueError(f"Rows of width {width} fit no group of 32: add `head_bits` 16.")
    # a few rows first, so that another head is rejected before much is fetched
    tensors, original = _check_sketch(location, folder, source)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(place.parent).free < 2 * nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    say(f"Fetching {tensors['weight'].name} of {original} ({megabytes(nbytes)}) for a finer head.")
    bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc="Finer head", disable=not progress)
    with bar:
        maps = {
            name: tensor.fetch(place.parent, place.stem, bar) for name, tensor in tensors.items()
        }
    names = f"{original} is not the original of {_name(folder)}"
    try:
        rows = _checked_rows(location, tensors, maps, bits, group_size, names)
    except ValueError:
        _delete_parts(place)  # of a bad answer, which the next start would take for good
        raise
    about = {
        "model": local_origin(folder).known_as,
        "original": original,
        "bits": str(rows.bits),
        "group_size": str(rows.group_size),
    }
    arrays = {name: array for name, array in rows.arrays().items() if name in ARRAYS}
    with new_file(place) as file:  # whole or not at all
        mx.save_safetensors(str(file), arrays, metadata=about)
    _delete_parts(place)
    return rows, original


def _checked_rows(
    location: HeadLocation,
    tensors: Rows,
    maps: dict[str, np.memmap],
    bits: int,
    group_size: int,
    names: str,
) -> Matrix:
    """The rows of fetched tensors, rounded.

    Args:
        location: The place of the model's head, whose rows they are to be.
        tensors: What was fetched.
        maps: The bytes of each tensor, (nbytes,) uint8.
        bits: Of the rows; those that an original has in fewer stay.
        group_size: Of the rounding; 0 keeps floats.
        names: What an error begins with.

    Raises:
        ValueError: If they are other rows, or trained further.
    """
    coarse = location.rows()
    scales: Any = coarse.scales
    dtype = location.hidden_dtype if scales.dtype == mx.uint8 else scales.dtype
    compared = []
    pieces = []
    for start in range(0, coarse.n_rows, PIECE_ROWS):
        end = min(start + PIECE_ROWS, coarse.n_rows)
        arrays = {}
        for name, tensor in tensors.items():
            size = tensor.nbytes // coarse.n_rows
            arrays[name] = tensor.array(maps[name][start * size : end * size], end - start)
        fine = _matrix(arrays, coarse.hidden_size)
        stored = coarse.take(mx.arange(start, end))
        compared.append(distances(stored, fine.dequantized(mx.float32)))
        fine = fine.map(lambda array: array if array.dtype == mx.uint32 else array.astype(dtype))
        if group_size and not fine.quantized:
            fine = fine.quantize(bits=bits, group_size=group_size)
        mx.eval(*fine.arrays().values())
        pieces.append(fine.arrays())
    check_same(compared, names, MAX_DRIFT)
    joined: Any = {name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return Matrix(**joined, bias=coarse.bias, group_size=fine.group_size, bits=fine.bits)


def _delete_parts(place: Path) -> None:
    """Deletes what was fetched for a place of the cache."""
    for part in place.parent.glob(f".{glob.escape(place.stem)}.*.part"):
        part.unlink(missing_ok=True)


def _check_sketch(
    location: HeadLocation, folder: Path, source: str | Path | bool
) -> tuple[Rows, str]:
    """Compares a few rows of a source with those of the model's head.

    Returns:
        The source's tensors, and its name.

    Raises:
        ValueError: If there is no such source, or the rows are others.
    """
    coarse = location.rows()
    tensors, original = _original(location, folder, source)
    ids = np.linspace(0, coarse.n_rows - 1, SKETCH_ROWS).astype(int).tolist()
    arrays = {name: tensor.rows(ids) for name, tensor in tensors.items()}
    fine = _matrix(arrays, coarse.hidden_size).dequantized(mx.float32)
    names = f"{original} is not the original of {_name(folder)}"
    check_same([distances(coarse.take(mx.array(ids)), fine)], names, SKETCH_DRIFT)
    return tensors, original


def _matrix(arrays: dict[str, Any], width: int) -> Matrix:
    """Rows of so many weights, from their arrays as they are stored."""
    if "scales" not in arrays:
        return Matrix(**arrays)
    n_groups = arrays["scales"].shape[1]
    bits = arrays["weight"].shape[1] * 32 // width
    return Matrix(**arrays, bits=bits, group_size=width // n_groups)


def distances(coarse: Matrix, fine: mx.array) -> np.ndarray:
    """Measures how far rows are from their finer forms.

    Args:
        coarse: Quantized rows (n, D).
        fine: The finer ones (n, D), float32.

    Returns:
        For each row four lengths (n, 4), float32: of its movement beyond rounding, of its rounding,
        of both together, and of the finer row itself.
    """
    scales: Any = coarse.scales
    dtype = mx.bfloat16 if scales.dtype == mx.uint8 else scales.dtype
    quantized = Matrix(fine.astype(dtype)).quantize(**coarse.quantization)
    rounded = quantized.dequantized(mx.float32)
    stored = coarse.dequantized(mx.float32)
    differences = (stored - rounded, rounded - fine, stored - fine, fine)
    return np.array(mx.stack([mx.linalg.norm(d, axis=1) for d in differences], axis=1))


def check_same(compared: list[np.ndarray], names: str, max_drift: float) -> None:
    """Compares the `distances` of all rows with those that rounding explains.

    Args:
        compared: `distances` (n, 4) of parts of the rows.
        names: What the error begins with.
        max_drift: Share of the rows' length that they may have moved by, beyond rounding.

    Raises:
        ValueError: If they are not those of the same rows.
    """
    moved, rounding, error, length = np.concatenate(compared).T.astype(np.float64)
    whole = float(np.linalg.norm(length)) or 1.0
    total = float(np.linalg.norm(moved)) / whole
    rounded = float(np.linalg.norm(rounding)) / whole
    # noise e moves a share e·√(2/π)/step of the weights by a step, which is √12 roundings
    drift = total**2 / (math.sqrt(24 / math.pi) * max(rounded, 1e-9))
    floor = 1e-3 * length.mean() + 1e-30  # rows of padding have no length
    worst = int(np.argmax(error / (MAX_ROW_ERROR * rounding + floor)))
    if not drift <= max_drift or error[worst] > MAX_ROW_ERROR * rounding[worst] + floor:
        raise ValueError(
            f"{names}, or was trained further: beyond rounding, rows are {100 * min(drift, 1):.1f} "
            f"% of their length apart, row {worst} the most. Choose another `fine_head`."
        )


def _original(location: HeadLocation, folder: Path, source: str | Path | bool) -> tuple[Rows, str]:
    """The tensors of the finer rows, and the name of their source.

    Without a named source it is the first model without quantization on the way from a model to
    its base, to the base's base, and so on.
    """
    if source is not True:
        return _find(str(source), location), _name_of_source(source)
    name = _name(folder)
    in_cache = local_origin(folder).revision is not None
    card_is_here = (folder / CARD).exists()
    base = _base_model(name if in_cache and not card_is_here else folder)
    seen = {name}
    while base is not None and base not in seen:
        tensors = _find(base, location, any_bits=True)
        if "scales" not in tensors:
            return tensors, base
        seen.add(base)
        base = _base_model(base)
    if not hub_is_reachable():
        raise ValueError(
            f"The original of {name} is not known while the Hugging Face Hub cannot be reached: "
            "check the network, or name it with `fine_head`."
        )
    raise ValueError(
        f"{name} names no original with a finer head (`base_model` of its card): name one with "
        "`fine_head`."
    )


def _base_model(model: Path | str) -> str | None:
    """The one repository that a model's card, else its configuration, names as its base."""
    with suppress(Exception):  # cards and the Hub's client raise any type
        card = model / CARD if isinstance(model, Path) else Path(small_file(model, CARD))
        text = card.read_text(encoding="utf-8-sig")
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
        if len(bases) == 1 and is_repository(bases[0]):
            return bases[0]
    return local_origin(model).repo_id if isinstance(model, Path) else None


def _name(folder: Path) -> str:
    """A model's repository, else the name of its folder, which others need not know."""
    origin = local_origin(folder)
    return folder.resolve().name if origin.revision is None else origin.known_as


def _find(source: str, location: HeadLocation, any_bits: bool = False) -> Rows:
    """The tensors of a source's finer head, or of one of ``any_bits``, by path and shape."""
    coarse = location.rows()
    shape = (coarse.n_rows, coarse.hidden_size)
    *_, last = location.path.split(".")
    leaf = f"{last}.weight"
    fitting: list[Rows] = []
    unfit: list[tuple[int, ...]] = []  # shapes of what has the head's name
    for tensors in (file.tensors() for file in tensor_files(source)):
        named = [name for name in tensors if name.endswith(leaf)]
        rows_of = {name: rows for name in tensors if (rows := _rows(tensors, name, shape))}
        exact = [rows_of[name] for name in named if name in rows_of]
        if exact:
            fitting = exact[:1]
            unfit = []
            break
        fitting += rows_of.values()
        unfit += [tensors[name].shape for name in named]
    if unfit or len(fitting) != 1:
        there = f"rows of shape {unfit[0]}" if unfit else f"no {leaf} that can be read"
        raise ValueError(
            f"{source} has {there}, and the model's head needs {shape[0]:,} of width {shape[1]:,} "
            "as floats or affine rows: choose another source."
        )
    (rows,) = fitting
    stored = rows["weight"].shape[1] * 32 // shape[1] if "scales" in rows else 16
    if stored <= coarse.bits and not any_bits:
        raise ValueError(
            f"The head in {source} has {stored} bits, no more than the model's {coarse.bits}: "
            "choose another source."
        )
    return rows


def _rows(tensors: Rows, name: str, shape: tuple[int, int]) -> Rows | None:
    """A tensor, its scales and biases, if they are so many rows of floats or affine groups."""
    tensor = tensors[name]
    stem = name.removesuffix("weight")
    if tensor.dtype != "U32":
        return {"weight": tensor} if tensor.readable and tensor.shape == shape else None
    rows = {part: tensors[stem + part] for part in ARRAYS if stem + part in tensors}
    sized = all(t.readable and len(t.shape) == 2 and t.shape[0] == shape[0] for t in rows.values())
    return rows if sized and len(rows) == len(ARRAYS) else None


def replace_rows(module: nn.Module, rows: Matrix) -> None:
    """Gives a quantized layer other rows in place. `restore_rows` gives the old ones back."""
    own: Any = module
    base = type(module)
    old = {name: module.pop(name) for name in ARRAYS if name in module}
    attributes = {name: getattr(own, name) for name in ("group_size", "bits", "mode")}
    dict.update(module, rows.arrays())
    vars(module).update(rows.quantization)
    if not rows.quantized:
        module.__class__ = nn.Embedding if base is nn.QuantizedEmbedding else nn.Linear
    vars(module)["_coarse_head"] = (base, old, attributes)


def restore_rows(model: nn.Module) -> bool:
    """Gives a model the rows back that it had before its finer head; False if it has none."""
    for module in model.modules():
        before = vars(module).pop("_coarse_head", None)
        if before is not None:
            module.__class__, old, attributes = before
            for name in ARRAYS:
                module.pop(name, None)
            dict.update(module, old)
            vars(module).update(attributes)
            return True
    return False
