"""Conversion: from an mlx-lm or Hugging Face model to a folder of it and its FlashHead, or
nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..common.new_folder import new_folder
from ..common.repositories import full_name
from ..index.files import CONFIG_KEY, write_companion, write_index
from ..index.settings import FlashHeadConfig
from ..models.compat.mlx_lm import MODEL_CONVERSION_DTYPES, dequantize_model, save
from ..models.dense import load_dense
from ..models.fetch import resolve
from ..models.locate import check_plain_product, find_head
from ..publishing import licences
from ..publishing.hub import reserve, sign_in
from ..publishing.origin import card_metadata, find_origin
from ..publishing.publish import add_documents, checkpoint_name, publish
from .build import index_nbytes, model_index
from .calibration import read_text
from .options import ConvertOptions
from .output_folder import FILES_KEY, check_apart, check_place, check_room, files_of
from .quantization import precision_label, set_bits
from .recipe import make_recipe
from .report import report_lines
from .steps import take_all


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: Callable | str | None = None,
    trust_remote_code: bool = False,
    *,
    head_bits: int | None = None,
    index_only: bool = False,
    quick: bool = False,
    cluster_size: int = 16,
    n_probes: int | None = None,
    target_agreement: float = 0.998,
    calibration: str = "given",
    calibration_positions: int = 12_000,
    calibration_seconds: float = 120.0,
    seed: int = 0,
    base_model: str | None = None,
    license: str | None = None,
    upload: bool | str = False,
    private: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> FlashHeadConfig:
    """Converts a model: ``mlx_lm.convert``'s arguments, in its order, and those of FlashHead.

    Args:
        hf_path: A local folder (Hugging Face or mlx-lm, also quantized) or a Hub repository.
        mlx_path: Folder to write.
        quantize: Quantize the model.
        q_group_size: Weights that share a scale; default: the mode's usual number.
        q_bits: Bits per weight; default: the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        dtype: Of the weights that are not quantized; default: an mlx-lm folder's own, else the
            configuration's ``torch_dtype``.
        upload_repo: Repository to upload the checkpoint to, as ``upload``.
        revision: Branch, tag or commit of the repository.
        dequantize: Undo the model's quantization.
        quant_predicate: One of mlx-lm's mixed-bit recipes, or a function as mlx-lm takes it.
        trust_remote_code: Allow the repository's own Python code.
        head_bits: Bits of the head's rows, apart from the body's; default: as the model has it.
        index_only: Make the FlashHead alone, a few MB that go beside the model in any of its
            precisions.
        quick: Less text and fewer passes: a fraction of the time, and a few more clusters per
            token.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token. Default: the number that is expected to be fastest.
        target_agreement: Share of positions that keep the dense head's best token without
            verification, measured on the held-out part of the calibration.
        calibration: Text to calibrate on: "given" text of many kinds, "none", or a file.
        calibration_positions: Positions to calibrate on.
        calibration_seconds: Seconds after which reading the given text is cut short.
        seed: Seed of the clustering.
        base_model: The model's repository, for a folder that does not name it: the card names it
            and has its licence and language.
        license: The model's licence as the Hub calls it, such as apache-2.0, for a card that does
            not name it.
        upload: Upload the checkpoint to the Hugging Face Hub, to this repository (without a name:
            USER/MODEL-FlashHead-PRECISION). It is made before the long work.
        private: Make the repository private if it is a new one.
        overwrite: Replace the target folder if a conversion has written it.
        progress: Show bars and steps.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would refuse an
            upload. Nothing is written then. Also if the upload itself fails. The checkpoint is
            kept then.
        OSError: If the checkpoint cannot be written. Nothing is left behind.
    """
    options = {name: value for name, value in locals().items() if name != "progress"}
    return _convert(ConvertOptions(**options), progress)


def _convert(options: ConvertOptions, progress: bool) -> FlashHeadConfig:
    say: Callable[[str], None] = print if progress else lambda _: None
    text = read_text(options.calibration) if options.source == "file" else None
    target = Path(options.mlx_path).expanduser()
    check_place(target, options.overwrite)
    with new_folder(target) as folder:
        # before the long work, since the Hub would refuse only at its end
        user = sign_in() if options.uploads else ""
        named = options.upload if isinstance(options.upload, str) else options.upload_repo
        repo_id = full_name(named, user) if named else None
        source = resolve(options.hf_path, options.revision)
        check_apart(source, target)
        origin = find_origin(options.hf_path, source, options.base_model, options.license)
        if options.uploads:
            licences.check(
                card_metadata(origin),
                [*origin.files, *licences.licence_files(target)],
                repo_id,
                model=origin.known_as,
                place=target,
                before="convert without `upload`, ",
            )
        say(f"Loading {options.hf_path}")
        model, tokenizer, config = _load(source, options, say)
        location = find_head(model)
        check_plain_product(location)
        label, nbytes = None, index_nbytes(location.rows())
        if not options.index_only:
            label = precision_label(options, config, location.rows())
            weights: Any = tree_flatten(model.parameters())
            nbytes += sum(array.nbytes for _, array in weights)
        name = checkpoint_name(origin, label)
        check_room(target, nbytes)
        if options.uploads:
            repo_id = repo_id or full_name(name, user)
            reserve(repo_id, user, options.private)
        mx.eval(model.parameters())
        recipe = make_recipe(options, origin, name)
        index = take_all(
            model_index(model, tokenizer, location, options, text=text, recipe=recipe),
            progress=progress,
        )
        say("\n".join(report_lines(index.config)))
        say(f"Writing {target}")
        config.pop(CONFIG_KEY, None)
        try:
            if not options.index_only:
                save(folder, str(source), model, tokenizer, config, donate_model=False)
            # `check_place` reads the names of the conversion's files again
            recipe = index.config.recipe | {FILES_KEY: files_of(folder)}
            index = replace(index, config=replace(index.config, recipe=recipe))
            (write_companion if options.index_only else write_index)(folder, index)
            add_documents(folder, origin, index.config, target)
        except RuntimeError as error:  # MLX raises this for a full disk
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "`mlx_path`."
            ) from error
    if options.uploads:
        say(f"Uploaded to {publish(target, repo_id, private=options.private, say=say)}")
    return index.config


def _load(
    source: Path, options: ConvertOptions, say: Callable[[str], None]
) -> tuple[nn.Module, Any, dict]:
    """The model with its final dtype and bits, not evaluated yet."""
    model, tokenizer, config = load_dense(
        source,
        tokenizer_config={"trust_remote_code": options.trust_remote_code},
        lazy=True,
        trust_remote_code=options.trust_remote_code,
    )
    head = find_head(model)
    options.check_size(head.rows().n_rows)
    if options.index_only:
        return model, tokenizer, config
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
    if options.head_bits is not None and head.tied:
        say(f"The head is tied to the embedding: both get {options.head_bits} bits.")
    model, config = set_bits(model, config, head.path, options)
    return model, tokenizer, config


def _named_dtype(source: Path, config: dict) -> str | None:
    """The dtype of ``mlx_lm.convert``; None for weights that MLX has stored."""
    for file in source.glob("model*.safetensors"):
        loaded: Any = mx.load(str(file), return_metadata=True)
        if loaded[1].get("format") == "mlx":
            return None
    text_config = config.get("text_config") or {}
    name = config.get("torch_dtype") or text_config.get("dtype")
    return name if name in MODEL_CONVERSION_DTYPES else None
