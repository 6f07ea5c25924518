"""Conversion: from an mlx-lm or Hugging Face model to a folder with its FlashHead, or nothing."""

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
from ..head.matrix import AFFINE, Matrix, affine_group
from ..index import files
from ..index.settings import FlashHeadConfig
from ..models.compat import mlx_lm
from ..models.fetch import resolve
from ..models.finer_head import give_fine_head
from ..models.loading import load_dense
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing import card as cards
from ..publishing.publish import add_documents, publish, reserve, sign_in
from . import take_all
from .build import index_nbytes, model_index
from .calibration import read_text
from .measures import report_lines
from .options import DTYPES, ConvertOptions, make_recipe

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written
DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}
DEFAULT_HEAD_BITS = 8  # of a quantized model: docs/converting.md has what 4 bits cost
# Bits and group sizes of mlx-lm's modes.
DEFAULT_FORMS = {AFFINE: (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}

Say = Callable[[str], None]


def convert(*arguments: Any, progress: bool = True, **options: Any) -> FlashHeadConfig:
    """Converts a model: ``mlx_lm.convert``'s arguments, in its order, and those of FlashHead.

    Args:
        arguments, options: Those of `options.ConvertOptions`, which ``mlx_flashhead.convert
            --help`` describes; ``quant_predicate`` may be a function, as mlx-lm takes it.
        progress: Show bars and steps.

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


def convert_model(options: ConvertOptions, say: Say | None) -> FlashHeadConfig:
    """The same; what is done goes to ``say``. Without it there is no progress to be seen."""
    progress = say is not None
    say = say or (lambda _: None)
    target = Path(options.mlx_path).expanduser()
    check_target(target, options.overwrite)
    if options.source == "file":
        read_text(options.calibration)  # before the long work, if it is none
    with new_folder(target) as folder:
        # before the long work, since the Hub would object only at its end
        user = sign_in() if options.uploads else ""
        named = options.upload if isinstance(options.upload, str) else options.upload_repo
        repo_id = full_name(named, user) if named else None
        source = resolve(options.hf_path, options.revision)
        check_apart(source, target)
        base = cards.find_provenance(options.hf_path, source, options.base_model, options.license)
        if options.uploads:
            texts = [*base.files, *cards.licence_files(target)]
            model_name, place = base.origin.known_as, f"{target}, made without `upload`"
            cards.check_licence(
                cards.card_metadata(base), texts, repo_id, model=model_name, place=place
            )

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
            set_dtype(model, config, source, options)
            location = replace(location, module=dict(model.named_modules())[location.path])
            original = location.rows()
            model, config = set_bits(model, config, location, options, say)
            location = replace(location, module=dict(model.named_modules())[location.path])
            label = precision_label(options, config, location.rows())
            weights: Any = tree_flatten(model.parameters())
            nbytes += sum(array.nbytes for _, array in weights)
        name = base.origin.result_name(label, base.licence.prefix if base.licence else "")
        free = shutil.disk_usage(folder).free
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
        steps = model_index(model, tokenizer, location, options, original=original)
        index = take_all(steps, progress=progress)
        say("\n".join(report_lines(index.config)))

        say(f"Writing {target}")
        config.pop(files.CONFIG_KEY, None)
        relation, write, names = "adapter", files.write_companion, [files.SETTINGS_NAME]
        try:
            if not options.index_only:
                relation, write = "quantized", files.write_index
                mlx_lm.save(folder, str(source), model, tokenizer, config, donate_model=False)
                names = [file.name for file in folder.iterdir()]
            recipe[FILES_KEY] = sorted({*names, files.FILE_NAME})
            index = replace(index, config=replace(index.config, recipe=recipe))
            write(folder, index)
            add_documents(folder, base, index.config, relation, target)
        except RuntimeError as error:  # MLX raises this for a full disk
            remedy = "free some space or choose another `mlx_path`"
            raise OSError(f"{target} cannot be written ({error}): {remedy}.") from error
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
    licence_names = (file.name for file in cards.licence_files(target))
    others = sorted(names - {*written, cards.CARD_FILE, *licence_names})
    if others:
        raise ValueError(
            f"{target} holds {', '.join(others[:3])}, which no conversion has written: move that "
            "away, or choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it; `check_target` one around it."""
    places = (place for place in (target, *target.resolve().parents) if place.exists())
    if any(os.path.samefile(place, source) for place in places):
        place = f"`mlx_path` {target} is the folder of the model itself, or lies in it"
        raise ValueError(f"{place}: choose another one.")


def set_dtype(model: nn.Module, config: dict, source: Path, options: ConvertOptions) -> None:
    """Gives a model its final dtype, that of ``mlx_lm.convert``, and removes its quantization if
    that is to go; not evaluated. Weights that MLX has stored keep their dtype."""
    dtype = options.dtype
    load: Any = partial(mx.load, return_metadata=True)
    formats = (load(str(file))[1].get("format") for file in source.glob("model*.safetensors"))
    if dtype is None and "mlx" not in formats:
        named = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
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
        mlx_lm.dequantize_model(model)


def precision_label(options: ConvertOptions, config: dict, rows: Matrix) -> str:
    """The precision as models' names have it: "4bit", "mxfp4", "bf16", a recipe of mixed bits."""
    if isinstance(options.quant_predicate, str):
        return options.quant_predicate
    form = rows.quantization
    if options.quantize:
        form = config["quantization"] | {"mode": options.q_mode}
    if not form:
        return DTYPE_LABELS[rows.weight.dtype]
    return f"{form['bits']}bit" if form["mode"] == AFFINE else form["mode"]


def set_bits(
    model: nn.Module, config: dict, location: HeadLocation, options: ConvertOptions, say: Say
) -> tuple[nn.Module, dict]:
    """Quantizes the body by its recipe, if it has one, and the head to bits of its own: as chosen,
    or 8 in a model that is quantized, since FlashHead reads few of its rows.

    ValueError if the head has fewer bits, or its width fits no group.
    """
    quantizes, affine, rows = options.quantize, options.q_mode == AFFINE, location.rows()
    width, stored_bits = rows.hidden_size, rows.bits or 16
    mode_bits, mode_group = DEFAULT_FORMS[options.q_mode]
    body_bits, body_group = options.q_bits or mode_bits, options.q_group_size or mode_group
    head_group = (options.q_group_size if affine else None) or affine_group(width)
    bits = None if options.fine_head else options.head_bits
    # a function chooses for the head too, and mlx-lm leaves a width that fits no group as it is
    by_function = callable(options.quant_predicate)
    if quantizes and not (bits or by_function or rows.quantized or width % body_group):
        bits = DEFAULT_HEAD_BITS
    if not affine and bits == mode_bits:
        bits = None  # other modes have one number of bits
    if bits is not None and location.tied:
        say(f"The head is tied to the embedding: both get {bits} bits.")
    if not quantizes and bits in (None, stored_bits):
        return model, config
    if bits is not None and bits > stored_bits:
        raise ValueError(
            f"`head_bits` {bits} is more than the {stored_bits} bits that this model's head has: "
            "convert from a checkpoint with a finer head, or leave the option out."
        )
    if bits is not None and bits < stored_bits:
        group = body_group if quantizes and width % body_group else head_group
        if group is None or width % group:
            raise ValueError(
                f"The head's width {width} is not a multiple of the quantization group "
                f"({group or '64 or 32'}): leave `head_bits` out."
            )
        if rows.quantized:
            head = mlx_lm.dequantize_model(nn.Sequential(location.module)).layers[0]
            model.update_modules(tree_unflatten([(location.path, head)]))
    body: Any = options.quant_predicate or getattr(model, "quant_predicate", None)
    if isinstance(body, str):
        body = mlx_lm.mixed_quant_predicate_builder(body, model, body_group)
    form = (body_group, body_bits) if quantizes else (head_group, bits)
    same = quantizes and affine and body is None and (head_group, bits) == form

    def predicate(path: str, module: nn.Module) -> Any:
        if path != location.path or bits is None or same:
            return quantizes and (body is None or body(path, module))
        return bits < 16 and {"group_size": head_group, "bits": bits, "mode": AFFINE}

    with redirect_stdout(StringIO()):  # mlx-lm prints a line of its own
        return mlx_lm.quantize_model(
            model, config, *form, mode=options.q_mode, quant_predicate=predicate
        )
