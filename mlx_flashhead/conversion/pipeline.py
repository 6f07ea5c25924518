"""Conversion: from an mlx-lm or Hugging Face model to a folder with its FlashHead, or nothing."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.new_folder import new_folder
from ..index import files
from ..index.flash_head_index import FlashHeadIndex
from ..index.settings import FlashHeadConfig
from ..models.compat import mlx_lm
from ..publishing.publish import add_documents, publish
from . import run_task
from .build import model_index
from .calibration import read_text
from .options import ConvertOptions
from .preparation import FILES_KEY, Preparation, check_target, prepare
from .recipe import make_recipe
from .report import report_lines


def convert(*arguments: Any, progress: bool = True, **options: Any) -> FlashHeadConfig:
    """Converts a model. Takes ``mlx_lm.convert``'s arguments in its order, then FlashHead's.

    Args:
        arguments: The fields of `options.ConvertOptions`, as ``mlx_flashhead.convert --help``
            describes them.
        progress: Show bars and steps.
        options: More of them, by name; ``quant_predicate`` may be a function, as mlx-lm takes it.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would reject an
            upload: nothing is written. If the upload itself fails, the checkpoint is kept.
        OSError: If the checkpoint cannot be written. Nothing is left behind.
    """
    return convert_model(ConvertOptions(*arguments, **options), say=print if progress else None)


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
        read_text(options.calibration)  # before the long work, if it is none
    with new_folder(target) as folder:
        prepared = prepare(options, target, folder, say, progress=progress)
        recipe = make_recipe(options, prepared.base.origin, prepared.name)
        model = prepared.model
        mx.eval(model.parameters())
        task = model_index(
            model, prepared.tokenizer, prepared.location, options, original=prepared.original
        )
        index = run_task(task, progress=progress)
        say("\n".join(report_lines(index.config)))
        say(f"Writing {target}")
        try:
            config = _write(folder, target, prepared, index, recipe, options)
        except RuntimeError as error:  # MLX raises this for a full disk
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "`mlx_path`."
            ) from error
    if options.uploads:
        address = publish(target, prepared.repo_id, private=options.private, say=say)
        say(f"Uploaded to {address}")
    return config


def _write(
    folder: Path,
    target: Path,
    prepared: Preparation,
    index: FlashHeadIndex,
    recipe: dict[str, Any],
    options: ConvertOptions,
) -> FlashHeadConfig:
    """Writes the model, the index, the card and the licence's files into a folder.

    The folder then takes the place of ``target``. Returns the stored settings.
    """
    config = prepared.config
    config.pop(files.CONFIG_KEY, None)
    if options.index_only:
        names = {files.SETTINGS_NAME}
    else:
        mlx_lm.save(
            folder,
            str(prepared.source),
            prepared.model,
            prepared.tokenizer,
            config,
            donate_model=False,
        )
        names = {file.name for file in folder.iterdir()}
    recipe = recipe | {FILES_KEY: sorted(names | {files.FILE_NAME})}
    index = replace(index, config=replace(index.config, recipe=recipe))
    if options.index_only:
        files.write_companion(folder, index)
        add_documents(folder, prepared.base, index.config, "adapter", target)
    else:
        files.write_index(folder, index)
        add_documents(folder, prepared.base, index.config, "quantized", target)
    return index.config
