"""Conversion: from an mlx-lm or Hugging Face model to a folder of it and its FlashHead, or
nothing."""

import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..common.new_folder import new_folder
from ..common.repositories import full_name
from ..index.files import (
    CONFIG_KEY,
    CONFIG_NAME,
    FILE_NAME,
    SETTINGS_NAME,
    stored_recipe,
    write_companion,
    write_index,
)
from ..index.settings import FlashHeadConfig
from ..models.compat.mlx_lm import dequantize_model, save
from ..models.fetch import resolve
from ..models.finer_head import give_fine_head
from ..models.libraries import load_dense
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing import licences
from ..publishing.card import CARD_FILE, card_metadata, find_provenance
from ..publishing.publish import add_documents, publish, reserve, sign_in
from . import take_all
from .build import index_nbytes, model_index
from .calibration import read_text
from .measures import report_lines
from .options import DTYPES, ConvertOptions, make_recipe
from .quantization import chosen_head_bits, precision_label, set_bits

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written
LISTED = 3  # names of other files in a message

Say = Callable[[str], None]


def convert(*arguments: Any, progress: bool = True, **options: Any) -> FlashHeadConfig:
    """Converts a model: ``mlx_lm.convert``'s arguments, in its order, and those of FlashHead.

    Args:
        arguments, options: Those of `options.ConvertOptions`, ``hf_path`` and ``mlx_path`` first;
            ``mlx_flashhead.convert --help`` describes them. ``quant_predicate`` may be a function,
            as mlx-lm takes it.
        progress: Show bars and steps.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would refuse an
            upload. Nothing is written then. Also if the upload itself fails. The checkpoint is
            kept then.
        OSError: If the checkpoint cannot be written. Nothing is left behind.
    """
    return convert_model(ConvertOptions(*arguments, **options), say=print if progress else None)


_parameters = [*inspect.signature(ConvertOptions).parameters.values()]
_parameters.append(inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=True))
convert.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]


def convert_model(options: ConvertOptions, say: Say | None) -> FlashHeadConfig:
    """The same; what is done goes to ``say``. Without it there is no progress to be seen."""
    progress = say is not None
    say = say or (lambda _: None)
    text = read_text(options.calibration) if options.source == "file" else None
    target = Path(options.mlx_path).expanduser()
    check_target(target, options.overwrite)
    with new_folder(target) as folder:
        # before the long work, since the Hub would refuse only at its end
        user = sign_in() if options.uploads else ""
        named = options.upload if isinstance(options.upload, str) else options.upload_repo
        repo_id = full_name(named, user) if named else None
        source = resolve(options.hf_path, options.revision)
        check_apart(source, target)
        base = find_provenance(options.hf_path, source, options.base_model, options.license)
        if options.uploads:
            licences.check(
                card_metadata(base),
                [*base.files, *licences.licence_files(target)],
                repo_id,
                model=base.origin.known_as,
                place=f"{target}, made without `upload`",
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
        options.check_size(location.rows().n_rows)
        label = original = None
        nbytes = index_nbytes(location.rows())
        if not options.index_only:
            if options.fine_head:
                bits, fine = options.head_bits, options.fine_head
                give_fine_head(location, source, fine, bits=bits, say=say, progress=progress)
                _record_head(config, location)
            model, config = _with_dtype(model, config, source, options)
            location = replace(location, module=_module(model, location.path))
            original = location.rows()
            bits = None if options.fine_head else chosen_head_bits(options, original)
            if bits is not None and location.tied:
                say(f"The head is tied to the embedding: both get {bits} bits.")
            model, config = set_bits(model, config, location.path, options, bits)
            location = replace(location, module=_module(model, location.path))
            label = precision_label(options, config, location.rows())
            weights: Any = tree_flatten(model.parameters())
            nbytes += sum(array.nbytes for _, array in weights)
        prefix = base.licence.prefix if base.licence else ""
        name = base.origin.result_name(label, prefix)
        check_room(target, nbytes)
        if options.uploads:
            repo_id = repo_id or full_name(name, user)
            reserve(repo_id, user, options.private)

        mx.eval(model.parameters())
        recipe = make_recipe(options, base.origin, name)
        about: dict[str, Any] = {"text": text, "original": original, "recipe": recipe}
        steps = model_index(model, tokenizer, location, options, **about)
        index = take_all(steps, progress=progress)
        say("\n".join(report_lines(index.config)))

        say(f"Writing {target}")
        config.pop(CONFIG_KEY, None)
        try:
            if not options.index_only:
                save(folder, str(source), model, tokenizer, config, donate_model=False)
            recipe = index.config.recipe | {FILES_KEY: _files_of(folder)}
            index = replace(index, config=replace(index.config, recipe=recipe))
            (write_companion if options.index_only else write_index)(folder, index)
            relation = "adapter" if options.index_only else "quantized"
            add_documents(folder, base, index.config, relation, target)
        except RuntimeError as error:  # MLX raises this for a full disk
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "`mlx_path`."
            ) from error
    if options.uploads:
        say(f"Uploaded to {publish(target, repo_id, private=options.private, say=say)}")
    return index.config


def _module(model: nn.Module, path: str) -> nn.Module:
    return dict(model.named_modules())[path]


def _record_head(config: dict, location: HeadLocation) -> None:
    """Writes the head's own quantization into the model's configuration, as mlx-lm reads it."""
    rows = location.rows()
    for key in ("quantization", "quantization_config"):
        if key in config:
            config[key] = config[key] | {location.path: rows.quantization or False}


def _with_dtype(
    model: nn.Module, config: dict, source: Path, options: ConvertOptions
) -> tuple[nn.Module, dict]:
    """The model with its final dtype, without its quantization if that is to go; not evaluated."""
    dtype = options.dtype or _named_dtype(source, config)
    if dtype is not None:
        may_cast = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, array: mx.array) -> mx.array:
            floating = mx.issubdtype(array.dtype, mx.floating)
            return array.astype(getattr(mx, dtype)) if floating and may_cast(name) else array

        model.update(tree_map_with_path(cast, model.parameters()))
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        model = dequantize_model(model)
    return model, config


def _named_dtype(source: Path, config: dict) -> str | None:
    """The dtype of ``mlx_lm.convert``; None for weights that MLX has stored."""
    for file in source.glob("model*.safetensors"):
        loaded: Any = mx.load(str(file), return_metadata=True)
        if loaded[1].get("format") == "mlx":
            return None
    text_config = config.get("text_config")
    inner = text_config.get("dtype") if isinstance(text_config, dict) else None
    name = config.get("torch_dtype") or inner
    return name if name in DTYPES else None


def _files_of(folder: Path) -> list[str]:
    """Names of the files of a conversion, from its folder while it is written."""
    settings = CONFIG_NAME if (folder / CONFIG_NAME).exists() else SETTINGS_NAME
    return sorted({*(file.name for file in folder.iterdir()), FILE_NAME, settings})


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that may not be replaced, or holds what no conversion has written."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another `mlx_path`.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another `mlx_path`, or `overwrite` to replace it."
        )
    names = {file.name for file in target.iterdir()}
    if not names:
        return
    recipe = stored_recipe(target)
    if recipe is None:
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so `overwrite` does not replace "
            "it: choose another `mlx_path`, or delete it yourself."
        )
    written = [name for name in recipe.get(FILES_KEY) or [] if isinstance(name, str)]
    licence_names = (file.name for file in licences.licence_files(target))
    others = sorted(names - {*written, CARD_FILE, *licence_names})
    if others:
        some = ", ".join(others[:LISTED]) + (", …" if len(others) > LISTED else "")
        raise ValueError(
            f"{target} holds {some}, which no conversion has written: move that away, or "
            "choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it, or the other way round."""

    def same(path: Path, other: Path) -> bool:
        return path.exists() and other.exists() and os.path.samefile(path, other)

    if same(source, target):
        raise ValueError(
            f"`mlx_path` {target} is the folder of the model itself: choose another one."
        )
    pairs = ((source, target), (target, source))
    if any(same(parent, outer) for inner, outer in pairs for parent in inner.resolve().parents):
        raise ValueError(
            f"The model's folder {source} and `mlx_path` {target} lie one inside the other: choose "
            "a place beside it."
        )


def check_room(target: Path, nbytes: int) -> None:
    """Refuses a disk without room for about ``nbytes``."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"{target} needs {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are "
            "free there: free some space or choose another `mlx_path`."
        )
