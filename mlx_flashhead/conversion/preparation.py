"""What a conversion does before the long work: everything that may refuse it.

The user's account, the licence and the repository are checked here and not later. The model is
loaded and changed lazily: nothing of it is evaluated yet.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common.repositories import full_name
from ..common.tables import megabytes
from ..head.matrix import Matrix
from ..index import files
from ..models.fetch import resolve
from ..models.finer_head import give_fine_head
from ..models.loading import load_dense
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing.card import CARD_FILE, Provenance, card_metadata, find_provenance
from ..publishing.licence import check_licence, licence_files
from ..publishing.publish import reserve, sign_in
from .build import index_nbytes
from .options import ConvertOptions
from .precision import head_bits, precision_label, set_bits, set_dtype

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written


class Preparation(NamedTuple):
    """A conversion that nothing refuses. Nothing of its model is evaluated yet."""

    source: Path  # the model's folder
    base: Provenance  # the model, its card and its licence
    name: str  # of the result
    repo_id: str | None  # where it is uploaded to
    model: nn.Module  # with its new bits
    tokenizer: Any
    config: dict[str, Any]
    location: HeadLocation
    original: Matrix | None  # the head's rows before they were quantized, if weights are written


def prepare(
    options: ConvertOptions,
    target: Path,
    folder: Path,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> Preparation:
    """Checks a conversion, and loads its model.

    An upload's account, licence and repository are checked, since the Hub would object only at the
    end of the long work.

    Args:
        options: The conversion's options.
        target: The folder to write.
        folder: A folder on the same disk.
        say: Takes a line for each thing that is done.
        progress: Show bars.

    Returns:
        What the conversion needs.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would reject an
            upload.
    """
    user = sign_in() if options.uploads else ""
    named = options.upload if isinstance(options.upload, str) else options.upload_repo
    repo_id = full_name(named, user) if named else None
    source = resolve(options.hf_path, options.revision)
    check_apart(source, target)
    base = find_provenance(options.hf_path, source, options.base_model, options.license)
    if options.uploads:
        check_licence(
            card_metadata(base),
            [*base.files, *licence_files(target)],
            repo_id,
            model=base.origin.known_as,
            where=f"{target}, made without `upload`",
        )
    say(f"Loading {options.hf_path}")
    model, tokenizer, config = load_dense(
        source,
        tokenizer_config={"trust_remote_code": options.trust_remote_code},
        lazy=True,
        trust_remote_code=options.trust_remote_code,
    )
    location = find_head(model)
    check_plain_product(location)
    rows = location.rows()
    options.check_size(rows.n_rows)
    nbytes = index_nbytes(rows)
    original = None
    label = None
    if not options.index_only:
        if options.fine_head:
            _give_fine_head(config, location, source, options, say, progress=progress)
        set_dtype(model, config, source, options)
        location = _located_again(location, model)
        original = location.rows()
        if location.tied and (bits := head_bits(original, options)) is not None:
            say(f"The head is tied to the embedding: both get {bits} bits.")
        model, config = set_bits(model, config, location, options)
        location = _located_again(location, model)
        label = precision_label(options, config, location.rows())
        weights: Any = tree_flatten(model.parameters())
        nbytes += sum(array.nbytes for _, array in weights)
    check_space(target, folder, nbytes)
    name = base.origin.result_name(label, base.licence.prefix if base.licence else "")
    if options.uploads:
        repo_id = repo_id or full_name(name, user)
        reserve(repo_id, user, options.private)
    return Preparation(source, base, name, repo_id, model, tokenizer, config, location, original)


def _give_fine_head(
    config: dict[str, Any],
    location: HeadLocation,
    source: Path,
    options: ConvertOptions,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> None:
    """Gives a model the finer head that the options choose, and tells its configuration."""
    give_fine_head(
        location, source, options.fine_head, bits=options.head_bits, say=say, progress=progress
    )
    quantization = location.rows().quantization or False
    for key in ("quantization", "quantization_config"):  # as mlx-lm's
        if key in config:
            config[key] = config[key] | {location.path: quantization}


def _located_again(location: HeadLocation, model: nn.Module) -> HeadLocation:
    """The head's location after its module may have been replaced."""
    return replace(location, module=dict(model.named_modules())[location.path])


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that may not be replaced.

    Args:
        target: The folder to write.
        overwrite: Whether an earlier conversion may be replaced.

    Raises:
        ValueError: If it is there and may not be replaced, or if it holds files that no conversion
            has written.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another `mlx_path`.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another `mlx_path`, or `overwrite` to replace it."
        )
    names = {file.name for file in target.iterdir()}
    recipe = files.stored_recipe(target)
    if names and recipe is None:
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so `overwrite` does not replace "
            "it: choose another `mlx_path`, or delete it yourself."
        )
    written = {name for name in (recipe or {}).get(FILES_KEY) or [] if isinstance(name, str)}
    licences = {file.name for file in licence_files(target)}
    others = sorted(names - written - licences - {CARD_FILE})
    if others:
        raise ValueError(
            f"{target} holds {', '.join(others[:3])}, which no conversion has written: move that "
            "away, or choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it.

    `check_target` refuses one around it.

    Args:
        source: The model's folder.
        target: The folder to write.

    Raises:
        ValueError: If it is or lies there.
    """
    folders = [path for path in (target, *target.resolve().parents) if path.exists()]
    if any(os.path.samefile(folder, source) for folder in folders):
        raise ValueError(
            f"`mlx_path` {target} is the folder of the model itself, or lies in it: choose another "
            "one."
        )


def check_space(target: Path, folder: Path, nbytes: int, named: str = "mlx_path") -> None:
    """Checks that a result fits on the disk.

    Args:
        target: The folder to write, for the message.
        folder: A folder on the same disk.
        nbytes: The size of the result.
        named: The parameter that chooses the target.

    Raises:
        ValueError: If it does not fit.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"{target} needs {megabytes(nbytes)}, but only {megabytes(free)} are free there: "
            f"free some space or choose another `{named}`."
        )
