"""Conversion: from an mlx-lm or Hugging Face model to a folder with its FlashHead, or nothing.

Everything that may refuse it comes before the long work: the user's account, the licence and the
repository are checked, and the model is loaded and changed lazily. Nothing of it is evaluated yet.
"""

import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common.new_folder import new_folder
from ..common.repositories import full_name
from ..common.tables import megabytes
from ..head.matrix import Matrix
from ..index import files
from ..index.flash_head_config import FlashHeadConfig
from ..models.compat import mlx_lm
from ..models.fetch import resolve
from ..models.finer_head import give_fine_head
from ..models.loading import load_dense
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing.card import CARD_FILE, Provenance, card_metadata, find_provenance
from ..publishing.licence import check_licence, licence_files
from ..publishing.publish import add_documents, publish, reserve, sign_in
from . import run_task
from .build import index_nbytes, model_index
from .calibration import read_text
from .options import ConvertOptions
from .precision import head_bits, precision_label, set_bits, set_dtype
from .recipe import make_recipe
from .report import report_lines

# The recipe's entry with the names of the files that a conversion has written.
FILES_KEY = "folder"


class _Preparation(NamedTuple):
    """A conversion that nothing refuses. Nothing of its model is evaluated yet.

    Attributes:
        source: The model's folder.
        base: The model, its card and its licence.
        name: The result's name.
        repo_id: The repository that it is uploaded to, if one is named or it is uploaded.
        model: The model with its new bits.
        tokenizer: Its tokenizer.
        config: Its configuration.
        location: Its head.
        original: The head's rows before they were quantized, if weights are written.
    """

    source: Path
    base: Provenance
    name: str
    repo_id: str | None
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    location: HeadLocation
    original: Matrix | None


def convert(*arguments: Any, progress: bool = True, **options: Any) -> FlashHeadConfig:
    """Converts a model. Takes ``mlx_lm.convert``'s arguments in its order, then FlashHead's.

    Args:
        arguments: The fields of `options.ConvertOptions`, as ``mlx_flashhead.convert --help``
            describes them.
        progress: Show bars, and what is done.
        options: More of them, by name; ``quant_predicate`` may be a function, as mlx-lm takes it.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would reject an
            upload: nothing is written. If the upload itself fails, the checkpoint is kept.
        OSError: If the checkpoint cannot be written. Nothing is left behind.
    """
    say = None
    if progress:
        say = print
    return convert_model(ConvertOptions(*arguments, **options), say=say)


_parameters = [*inspect.signature(ConvertOptions).parameters.values()]
_parameters.append(inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=True))
convert.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]


def convert_model(options: ConvertOptions, say: Callable[[str], None] | None) -> FlashHeadConfig:
    """Converts a model as `convert` does.

    Args:
        options: The conversion's options.
        say: Takes a line for each thing that is done; None shows nothing, and no bars.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model, the target or an upload is not valid.
        OSError: If the checkpoint cannot be written.
    """
    progress = say is not None
    say = say or (lambda _: None)
    target = Path(options.mlx_path).expanduser()
    check_target(target, options.overwrite)
    if options.source == "file":
        # A text that cannot be read is refused before the long work.
        read_text(options.calibration)
    with new_folder(target) as folder:
        prepared = _prepare(options, target, folder, say, progress=progress)
        recipe = make_recipe(options, prepared.base.origin, prepared.name)
        mx.eval(prepared.model.parameters())
        task = model_index(
            prepared.model,
            prepared.tokenizer,
            prepared.location,
            options,
            original=prepared.original,
        )
        index = run_task(task, progress=progress)
        say("\n".join(report_lines(index.config)))
        say(f"Writing {target}")
        try:
            names = {files.SETTINGS_NAME}
            if not options.index_only:
                prepared.config.pop(files.CONFIG_KEY, None)
                mlx_lm.save(
                    folder,
                    str(prepared.source),
                    prepared.model,
                    prepared.tokenizer,
                    prepared.config,
                    donate_model=False,
                )
                names = {file.name for file in folder.iterdir()}
            recipe[FILES_KEY] = sorted(names | {files.FILE_NAME})
            index = replace(index, config=replace(index.config, recipe=recipe))
            if options.index_only:
                files.write_companion(folder, index)
            else:
                files.write_index(folder, index)
            add_documents(folder, prepared.base, index.config, target)
        except RuntimeError as error:
            # MLX raises it for a full disk.
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "`mlx_path`."
            ) from error
    if options.uploads:
        address = publish(target, prepared.repo_id, private=options.private, say=say)
        say(f"Uploaded to {address}")
    return index.config


def _prepare(
    options: ConvertOptions,
    target: Path,
    folder: Path,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> _Preparation:
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
    user = ""
    if options.uploads:
        user = sign_in()
    repo_id = _named_repository(options, user)
    source = resolve(options.hf_path, options.revision)
    check_outside(source, target)
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
            give_fine_head(
                location,
                source,
                options.fine_head,
                bits=options.head_bits,
                say=say,
                progress=progress,
            )
            _declare_head(config, location)
        set_dtype(model, config, source, options)
        location = _located_again(location, model)
        original = location.rows()
        bits = head_bits(original, options)
        if location.tied and bits is not None:
            say(f"The head is tied to the embedding: both get {bits} bits.")
        model, config = set_bits(model, config, location, options)
        location = _located_again(location, model)
        label = precision_label(options, config, location.rows())
        weights: Any = tree_flatten(model.parameters())
        nbytes += sum(array.nbytes for _, array in weights)
    check_space(target, folder, nbytes)
    prefix = ""
    if base.licence is not None:
        prefix = base.licence.prefix
    name = base.origin.result_name(label, prefix)
    if options.uploads:
        repo_id = repo_id or full_name(name, user)
        reserve(repo_id, user, options.private)
    return _Preparation(
        source=source,
        base=base,
        name=name,
        repo_id=repo_id,
        model=model,
        tokenizer=tokenizer,
        config=config,
        location=location,
        original=original,
    )


def _named_repository(options: ConvertOptions, user: str) -> str | None:
    """The repository that the options name, with its owner; None if they name none."""
    name = options.upload_repo
    if isinstance(options.upload, str):
        name = options.upload
    if not name:
        return None
    return full_name(name, user)


def _declare_head(config: dict[str, Any], location: HeadLocation) -> None:
    """Says in a configuration which bits the head has, by both of mlx-lm's keys."""
    quantization = location.rows().quantization or False
    for key in ("quantization", "quantization_config"):
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
    own = {CARD_FILE}
    own |= {file.name for file in licence_files(target)}
    if recipe is not None:
        own |= {name for name in recipe.get(FILES_KEY) or () if isinstance(name, str)}
    others = sorted(names - own)
    if others:
        raise ValueError(
            f"{target} holds {', '.join(others[:3])}, which no conversion has written: move that "
            "away, or choose another `mlx_path`."
        )


def check_outside(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it.

    `check_target` refuses one around it.

    Args:
        source: The model's folder.
        target: The folder to write.

    Raises:
        ValueError: If it is or lies there.
    """
    for folder in (target, *target.resolve().parents):
        if folder.exists() and os.path.samefile(folder, source):
            raise ValueError(
                f"`mlx_path` {target} is the folder of the model itself, or lies in it: choose "
                "another one."
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
