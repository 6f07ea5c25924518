"""Conversion: from an mlx-lm or Hugging Face model to a folder of it and its FlashHead, or
nothing."""

import inspect
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ..common.new_folder import new_folder
from ..common.repositories import full_name
from ..head.matrix import AFFINE, DEFAULT_GROUP, Matrix, affine_group
from ..index import files
from ..index.settings import FlashHeadConfig
from ..models.compat import mlx_lm
from ..models.fetch import resolve
from ..models.finer_head import give_fine_head
from ..models.libraries import load_dense
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing.card import (
    CARD_FILE,
    card_metadata,
    check_licence,
    find_provenance,
    licence_files,
)
from ..publishing.publish import add_documents, publish, reserve, sign_in
from . import take_all
from .build import index_nbytes, model_index
from .calibration import read_text
from .measures import report_lines
from .options import DTYPES, ConvertOptions, make_recipe

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written
LISTED = 3  # names of other files in a message
DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}
DEFAULT_HEAD_BITS = 8  # of a quantized model: docs/converting.md has what 4 bits cost
DEFAULT_BITS, DEFAULT_GROUPS = 4, {AFFINE: DEFAULT_GROUP, "nvfp4": 16}  # mlx-lm's, else 32

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
        ValueError: If an option, the model or the target is not valid, or the Hub would reject an
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
        # before the long work, since the Hub would object only at its end
        user = sign_in() if options.uploads else ""
        named = options.upload if isinstance(options.upload, str) else options.upload_repo
        repo_id = full_name(named, user) if named else None
        source = resolve(options.hf_path, options.revision)
        check_apart(source, target)
        base = find_provenance(options.hf_path, source, options.base_model, options.license)
        if options.uploads:
            texts = [*base.files, *licence_files(target)]
            model_name, place = base.origin.known_as, f"{target}, made without `upload`"
            check_licence(card_metadata(base), texts, repo_id, model=model_name, place=place)

        say(f"Loading {options.hf_path}")
        trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
        model, tokenizer, config = load_dense(source, tokenizer_config=trust, lazy=True, **trust)
        location = find_head(model)
        check_plain_product(location)
        options.check_size(location.rows().n_rows)
        nbytes, label, original = index_nbytes(location.rows()), None, None
        if not options.index_only:
            if options.fine_head:
                how: dict[str, Any] = {"bits": options.head_bits, "say": say, "progress": progress}
                give_fine_head(location, source, options.fine_head, **how)
                quantization = location.rows().quantization or False
                for key in {"quantization", "quantization_config"} & config.keys():  # as mlx-lm's
                    config[key] = config[key] | {location.path: quantization}
            model, config = set_dtype(model, config, source, options)
            location = replace(location, module=dict(model.named_modules())[location.path])
            original = location.rows()
            model, config = set_bits(model, config, location, options, say)
            location = replace(location, module=dict(model.named_modules())[location.path])
            label = precision_label(options, config, location.rows())
            weights: Any = tree_flatten(model.parameters())
            nbytes += sum(array.nbytes for _, array in weights)
        name = base.origin.result_name(label, base.licence.prefix if base.licence else "")
        disk = next(parent for parent in target.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(disk).free
        if free < nbytes:
            raise ValueError(
                f"{target} needs {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free "
                "there: free some space or choose another `mlx_path`."
            )
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
        config.pop(files.CONFIG_KEY, None)
        relation, settings, write = "quantized", files.CONFIG_NAME, files.write_index
        if options.index_only:
            relation, settings, write = "adapter", files.SETTINGS_NAME, files.write_companion
        try:
            if not options.index_only:
                mlx_lm.save(folder, str(source), model, tokenizer, config, donate_model=False)
            names = {*(file.name for file in folder.iterdir()), files.FILE_NAME, settings}
            recipe = index.config.recipe | {FILES_KEY: sorted(names)}
            index = replace(index, config=replace(index.config, recipe=recipe))
            write(folder, index)
            add_documents(folder, base, index.config, relation, target)
        except RuntimeError as error:  # MLX raises this for a full disk
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "`mlx_path`."
            ) from error
    if options.uploads:
        say(f"Uploaded to {publish(target, repo_id, private=options.private, say=say)}")
    return index.config


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
    recipe = files.stored_recipe(target)
    if names and recipe is None:
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so `overwrite` does not replace "
            "it: choose another `mlx_path`, or delete it yourself."
        )
    written = [name for name in (recipe or {}).get(FILES_KEY) or [] if isinstance(name, str)]
    licence_names = (file.name for file in licence_files(target))
    others = sorted(names - {*written, CARD_FILE, *licence_names})
    if others:
        some = ", ".join(others[:LISTED]) + (", …" if len(others) > LISTED else "")
        raise ValueError(
            f"{target} holds {some}, which no conversion has written: move that away, or "
            "choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it; `check_target` one around it."""
    places = (place for place in (target, *target.resolve().parents) if place.exists())
    if any(os.path.samefile(place, source) for place in places):
        raise ValueError(
            f"`mlx_path` {target} is the folder of the model itself, or lies in it: choose another "
            "one."
        )


def set_dtype(
    model: nn.Module, config: dict, source: Path, options: ConvertOptions
) -> tuple[nn.Module, dict]:
    """The model with its final dtype, without its quantization if that is to go; not evaluated.

    The dtype is that of ``mlx_lm.convert``; weights that MLX has stored keep theirs.
    """
    dtype = options.dtype
    load: Any = partial(mx.load, return_metadata=True)
    formats = (load(str(file))[1].get("format") for file in source.glob("model*.safetensors"))
    if dtype is None and "mlx" not in formats:
        inner = config.get("text_config")
        inner = inner.get("dtype") if isinstance(inner, dict) else None
        named = config.get("torch_dtype") or inner
        dtype = named if named in DTYPES else None
    if dtype is not None:
        may_cast = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, array: mx.array) -> mx.array:
            floating = mx.issubdtype(array.dtype, mx.floating)
            return array.astype(getattr(mx, dtype)) if floating and may_cast(name) else array

        model.update(tree_map_with_path(cast, model.parameters()))
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        model = mlx_lm.dequantize_model(model)
    return model, config


def precision_label(options: ConvertOptions, config: dict, rows: Matrix) -> str:
    """The precision as models' names have it: "4bit", "mxfp4", "bf16", a recipe of mixed bits."""
    if isinstance(options.quant_predicate, str):
        return options.quant_predicate
    if not options.quantize and not rows.quantized:
        return DTYPE_LABELS[rows.weight.dtype]
    bits, mode = rows.bits, rows.mode
    if options.quantize:
        bits, mode = config["quantization"]["bits"], options.q_mode
    return f"{bits}bit" if mode == AFFINE else mode


def set_bits(
    model: nn.Module, config: dict, location: HeadLocation, options: ConvertOptions, say: Say
) -> tuple[nn.Module, dict]:
    """Quantizes the body by its recipe, if it has one, and the head to bits of its own: as chosen,
    or 8 in a model that is quantized, since FlashHead reads few of its rows.

    ValueError if the head has fewer bits, or its width fits no group.
    """
    quantizes, group_size = options.quantize, options.q_group_size
    rows, stored_bits = location.rows(), _bits_of(location.module)
    bits = None if options.fine_head else options.head_bits
    if (
        bits is None
        and quantizes
        and not callable(options.quant_predicate)  # which chooses for the head too
        and not rows.quantized
        # else mlx-lm leaves the head as it is
        and rows.hidden_size % (group_size or DEFAULT_GROUPS.get(options.q_mode, 32)) == 0
    ):
        bits = DEFAULT_HEAD_BITS
    if options.q_mode != AFFINE and bits == int(options.q_mode[-1]):
        bits = None  # other modes have one number of bits
    if bits is not None and location.tied:
        say(f"The head is tied to the embedding: both get {bits} bits.")
    if not quantizes and bits in (None, stored_bits):
        return model, config
    affine = options.q_mode == AFFINE
    head_group = group_size if affine else None
    if bits is not None:
        if bits > stored_bits:
            raise ValueError(
                f"`head_bits` {bits} is more than the {stored_bits} bits that this model's "
                "head has: convert from a checkpoint with a finer head, or leave the option out."
            )
        if bits < stored_bits < 16:
            head = mlx_lm.dequantize_model(nn.Sequential(location.module)).layers[0]
            model.update_modules(tree_unflatten([(location.path, head)]))
        if bits < min(stored_bits, 16):
            width = rows.hidden_size
            head_group = affine_group(width) if head_group is None else head_group
            if head_group is None or width % head_group:
                raise ValueError(
                    f"The head's width {width} is not a multiple of a quantization group "
                    f"({head_group or '64 or 32'}): leave `head_bits` out."
                )
    body: Any = options.quant_predicate or getattr(model, "quant_predicate", None)
    if isinstance(body, str):
        if not affine:
            raise ValueError("Mixed-bit recipes (`quant_predicate`) need the affine `q_mode`.")
        body = mlx_lm.mixed_quant_predicate_builder(body, model, group_size or DEFAULT_GROUP)
    body_form = (options.q_bits or DEFAULT_BITS, group_size or DEFAULT_GROUP)
    same = affine and body is None and (bits, head_group) == body_form

    def predicate(path: str, module: nn.Module) -> Any:
        if path != location.path or bits is None or (quantizes and same):
            return quantizes and (body is None or body(path, module))
        return bits < 16 and {"group_size": head_group, "bits": bits, "mode": AFFINE}

    with redirect_stdout(StringIO()):  # mlx-lm prints a line of its own
        model, config = mlx_lm.quantize_model(
            model,
            config,
            group_size if quantizes else head_group,
            options.q_bits if quantizes else bits,
            mode=options.q_mode,
            quant_predicate=predicate,
        )
    if bits is not None and bits != _bits_of(dict(model.named_modules())[location.path]):
        raise ValueError(
            "The head's width is not a multiple of the body's quantization group, so mlx-lm leaves "
            "it out: choose a smaller `q_group_size`, or leave `head_bits` out."
        )
    return model, config


def _bits_of(module: Any) -> int:
    return module.bits if "scales" in module else 16
