"""A finer output head for a quantized model: the rows of its original, checked and rounded.

Training moves a row by more than rounding does. So the original rows are rounded as the model's
are: where that gives the model's rows, they are the same head (measured in docs/finer-head.md).
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..common.new_folder import new_file
from ..common.tables import megabytes
from ..head.matrix import ARRAYS, Matrix, affine_group
from .fetch import FINE_HEADS, home, kept_in
from .locate import HeadLocation
from .origin import local_origin
from .original import base_model, name_of_source, shown_name
from .tensor_files import ENDING, Tensor, tensor_files

DEFAULT_BITS = 8
# The share of their length that rows may have moved by, beyond rounding: all of them, and few.
MAX_DRIFT = 0.017
SKETCH_DRIFT = 3 * MAX_DRIFT
# The same of a single row, relative to its rounding.
MAX_ROW_ERROR = 2.0
# So many rows are fetched by themselves before all are.
SKETCH_ROWS = 8
# So many rows are compared and rounded at once, in float32.
PIECE_ROWS = 2048

Say = Callable[[str], None]


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
        location: The model's head.
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
    check_is_coarse(location, bits)
    cached = home() / FINE_HEADS / f"{coarse.fingerprint[:24]}-{bits}{ENDING}"
    with kept_in(cached.parent, "The finer head"):
        rows, original = _cached_rows(cached, coarse)
        if rows is None or (source is not True and name_of_source(source) != original):
            rows, original = _fetch(location, folder, source, bits, cached, say, progress)
    replace_rows(location.module, rows)
    say(f"With the finer head of {original}, in {rows.bits or 16} bits.")


def _cached_rows(cached: Path, coarse: Matrix) -> tuple[Matrix | None, str]:
    """The finer rows in the cache, if they can be read, and the source that they are from."""
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        arrays, metadata = cast(Any, mx.load(str(cached), return_metadata=True))
        bits = int(metadata["bits"])
        group_size = int(metadata["group_size"])
        rows = Matrix(**arrays, bias=coarse.bias, bits=bits, group_size=group_size)
        if rows.n_rows == coarse.n_rows and rows.hidden_size == coarse.hidden_size:
            return rows, metadata["original"]
    return None, ""


def check_is_coarse(location: HeadLocation, bits: int | None = None) -> None:
    """Checks that a head can have rows of more bits.

    Raises:
        ValueError: If it has as many already, or is of another kind.
    """
    coarse = location.rows()
    cls = type(location.module)
    if not coarse.quantized:
        raise ValueError("The head's rows are floats already: leave `fine_head` out.")
    if cls not in (nn.QuantizedEmbedding, nn.QuantizedLinear):
        raise ValueError(f"A {cls.__name__} cannot be made finer: leave `fine_head` out.")
    if coarse.bits >= (bits or DEFAULT_BITS):
        raise ValueError(
            f"The head has {coarse.bits} bits already: choose more `head_bits`, or no `fine_head`."
        )


def _fetch(
    location: HeadLocation,
    folder: Path,
    source: str | Path | bool,
    bits: int,
    cached: Path,
    say: Say,
    progress: bool,
) -> tuple[Matrix, str]:
    """Fetches the finer rows and keeps them: the rows, and the source that they are from."""
    coarse = location.rows()
    group_size: int | None = 0
    if bits < 16:
        group_size = affine_group(coarse.hidden_size)
    if group_size is None:
        raise ValueError(
            f"Rows of width {coarse.hidden_size} fit no group of 32: add `head_bits` 16."
        )
    if source is True:
        original = base_model(folder, "fine_head")
    else:
        original = name_of_source(source)
    tensor, names = find_original_head(location, folder, original)
    say(f"Fetching {tensor.name} of {original} ({megabytes(tensor.nbytes)}) for a finer head.")
    with tqdm(
        total=tensor.nbytes, unit="B", unit_scale=True, desc="Finer head", disable=not progress
    ) as bar:
        content = tensor.fetch(cached.parent, bar)
    rows = _checked_rows(location, tensor, content, bits, group_size, names)
    about = {
        "model": local_origin(folder).known_as,
        "original": original,
        "bits": str(rows.bits),
        "group_size": str(rows.group_size),
    }
    arrays = {name: array for name, array in rows.arrays().items() if name in ARRAYS}
    # The file is there whole or not at all.
    with new_file(cached) as file:
        mx.save_safetensors(str(file), arrays, metadata=about)
    return rows, original


def find_original_head(
    location: HeadLocation, folder: Path, original: str, keyword: str = "fine_head"
) -> tuple[Tensor, str]:
    """Finds the head of a model's original, and compares a few of its rows with the model's.

    So another head is rejected before much is fetched.

    Args:
        location: The model's head.
        folder: The model's folder.
        original: A repository, a folder or a file.
        keyword: The argument by which a user names another one, for an error.

    Returns:
        The rows' tensor, and what an error begins with if they turn out to be others.

    Raises:
        ValueError: If there are none, or they are others.
    """
    rows = location.rows()
    tensor = _find(original, location)
    names = f"{original} is not the original of {shown_name(folder)}"
    ids = np.linspace(0, rows.n_rows - 1, SKETCH_ROWS).astype(int).tolist()
    fine = tensor.rows(ids).astype(mx.float32)
    compared = distances(rows.take(mx.array(ids)), fine)
    check_same([compared], names, SKETCH_DRIFT, keyword)
    return tensor, names


def _checked_rows(
    location: HeadLocation,
    tensor: Tensor,
    content: np.ndarray,
    bits: int,
    group_size: int,
    names: str,
) -> Matrix:
    """The rows of a fetched tensor, rounded.

    Args:
        location: The model's head, whose rows they are to be.
        tensor: What was fetched.
        content: Its bytes, (nbytes,) uint8.
        bits: Of the rows.
        group_size: Of the rounding; 0 keeps floats.
        names: What an error begins with.

    Raises:
        ValueError: If they are other rows, or trained further.
    """
    coarse = location.rows()
    scales: Any = coarse.scales
    dtype = scales.dtype
    if dtype == mx.uint8:
        dtype = location.hidden_dtype
    compared = []
    pieces = []
    size = tensor.nbytes // coarse.n_rows
    for start in range(0, coarse.n_rows, PIECE_ROWS):
        rows = tensor.array(content[start * size : (start + PIECE_ROWS) * size])
        stored = coarse.take(mx.arange(start, start + len(rows)))
        compared.append(distances(stored, rows.astype(mx.float32)))
        fine = Matrix(rows.astype(dtype))
        if group_size:
            fine = fine.quantize(bits=bits, group_size=group_size)
        mx.eval(*fine.arrays().values())
        pieces.append(fine.arrays())
    check_same(compared, names, MAX_DRIFT)
    joined: dict[str, Any] = {}
    for name in pieces[0]:
        joined[name] = mx.concatenate([piece[name] for piece in pieces])
    return Matrix(**joined, bias=coarse.bias, group_size=fine.group_size, bits=fine.bits)


def distances(coarse: Matrix, fine: mx.array) -> np.ndarray:
    """Measures how far rows are from their finer forms.

    Args:
        coarse: Rows (n, D), quantized or floats.
        fine: The finer ones (n, D), float32.

    Returns:
        For each row four lengths (n, 4), float32: of its movement beyond rounding, of its rounding,
        of both together, and of the finer row itself.
    """
    dtype = coarse.weight.dtype
    if coarse.scales is not None:
        dtype = coarse.scales.dtype
    if dtype == mx.uint8:
        dtype = mx.bfloat16
    form = Matrix(fine.astype(dtype))
    if coarse.quantized:
        form = form.quantize(**coarse.quantization)
    rounded = form.dequantized(mx.float32)
    stored = coarse.dequantized(mx.float32)
    differences = (stored - rounded, rounded - fine, stored - fine, fine)
    lengths = [mx.linalg.norm(difference, axis=1) for difference in differences]
    return np.array(mx.stack(lengths, axis=1))


def check_same(
    compared: list[np.ndarray], names: str, max_drift: float, keyword: str = "fine_head"
) -> None:
    """Compares the `distances` of all rows with those that rounding explains.

    Args:
        compared: `distances` (n, 4) of parts of the rows.
        names: What the error begins with.
        max_drift: Share of the rows' length that they may have moved by, beyond rounding.
        keyword: The argument by which a user names another one, for the error.

    Raises:
        ValueError: If they are not those of the same rows.
    """
    moved, rounding, error, length = np.concatenate(compared).T.astype(np.float64)
    whole = float(np.linalg.norm(length)) or 1.0
    total = float(np.linalg.norm(moved)) / whole
    rounded = float(np.linalg.norm(rounding)) / whole
    # Noise e moves a share e·√(2/π)/step of the weights by a step, which is √12 roundings.
    drift = total**2 / (math.sqrt(24 / math.pi) * max(rounded, 1e-9))
    # Rows of padding have no length.
    floor = 1e-3 * length.mean() + 1e-30
    allowed = MAX_ROW_ERROR * rounding + floor
    worst = int(np.argmax(error / allowed))
    if not drift <= max_drift or error[worst] > allowed[worst]:
        raise ValueError(
            f"{names}, or was trained further: beyond rounding, rows are {100 * min(drift, 1):.1f} "
            f"% of their length apart, row {worst} the most. Choose another `{keyword}`."
        )


def _find(source: str, location: HeadLocation) -> Tensor:
    """The tensor of a source's finer head, by its name and shape, else by its shape alone."""
    coarse = location.rows()
    shape = (coarse.n_rows, coarse.hidden_size)
    *_, leaf = location.path.split(".")
    fitting = []
    for file in tensor_files(source):
        matrices = [matrix for matrix in file.matrices() if matrix.shape == shape]
        named = [matrix for matrix in matrices if matrix.name.endswith(f"{leaf}.weight")]
        if named:
            return named[0]
        fitting += matrices
    if len(fitting) != 1:
        raise ValueError(
            f"{source} has no {leaf}.weight of {shape[0]:,} rows of width {shape[1]:,} as floats, "
            "as the model's head needs it: choose another source."
        )
    return fitting[0]


def replace_rows(module: nn.Module, rows: Matrix) -> None:
    """Gives a quantized layer other rows in place. `restore_rows` gives the old ones back."""
    before = (type(module), dict(module), dict(vars(module)))
    for name in ARRAYS:
        module.pop(name, None)
    dict.update(module, rows.arrays())
    vars(module).update(rows.quantization)
    if not rows.quantized:
        cls: Any = nn.Linear
        if isinstance(module, nn.QuantizedEmbedding):
            cls = nn.Embedding
        module.__class__ = cls
    vars(module)["_coarse_head"] = before


def restore_rows(model: nn.Module) -> bool:
    """Gives a model the rows back that it had before its finer head; False if it has none."""
    for module in model.modules():
        before = vars(module).get("_coarse_head")
        if before is not None:
            module.__class__, arrays, attributes = before
            module.clear()
            dict.update(module, arrays)
            vars(module).clear()
            vars(module).update(attributes)
            return True
    return False
