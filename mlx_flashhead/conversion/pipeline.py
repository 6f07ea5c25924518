"""Conversion: from an mlx-lm or Hugging Face model to a folder of it and its FlashHead.

A failed or interrupted conversion leaves nothing behind.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..common.new_folder import new_folder
from ..common.repository_name import full_name
from ..head.matrix import Matrix
from ..index.files import CONFIG_KEY, FlashHeadIndex, write_companion, write_index
from ..index.settings import FlashHeadConfig
from ..models.compat.convert import MODEL_CONVERSION_DTYPES
from ..models.compat.utils import dequantize_model, save
from ..models.dense import load_dense
from ..models.fetch import resolve
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..publishing.hub import reserve, sign_in
from ..publishing.origin import card_metadata, find_origin
from ..publishing.publish import (
    add_documents,
    check_licence,
    checkpoint_name,
    precision_label,
    publish,
)
from ..publishing.recipe import make_recipe
from .calibration import text_states
from .indexing import build_index
from .mix import HELD_OUT_SHARE, mixed_positions
from .options import MIN_POSITIONS, NO_CALIBRATION, ConvertOptions, IndexOptions
from .place import check_apart, check_place, check_room
from .positions import Positions
from .probes import Goals
from .quantization import BodyRecipe, body_label, set_bits


def convert(*arguments: Any, progress: bool = True, **options: Any) -> FlashHeadConfig:
    """Converts a model: ``mlx_lm.convert``'s arguments, in its order, and those of FlashHead.

    Args:
        *arguments: Options of `ConvertOptions`: usually the model and the folder to write.
        progress: Show bars and steps.
        **options: The same by name.

    Returns:
        The stored settings with the measured report.

    Raises:
        ValueError: If an option, the model or the target is not valid, or the Hub would refuse an
            upload. Nothing is written then. Also if the upload itself fails. The checkpoint is
            kept then.
        OSError: If the checkpoint cannot be written. Nothing is left behind.
    """
    asked = ConvertOptions(*arguments, **options)
    text = asked.calibration_text()
    say = print if progress else (lambda *_: None)
    target = Path(asked.mlx_path).expanduser()
    check_place(target, asked.overwrite)
    with new_folder(target) as folder:
        # before the long work, since the Hub would refuse only at its end
        user = sign_in() if asked.uploads else ""
        repo_id = full_name(asked.repository, user) if asked.repository else None
        source = resolve(asked.hf_path, asked.revision)
        check_apart(source, target)
        origin = find_origin(asked.hf_path, source, asked.base_model, asked.license)
        if asked.uploads:
            check_licence(origin, repo_id, target)
        say(f"Loading {asked.hf_path}")
        model, tokenizer, config = _load(source, asked, say)
        location = find_head(model)
        check_plain_product(location)
        label = body_label(_body(asked), config) or precision_label(location.rows())
        name = checkpoint_name(origin, None if asked.index_only else label)
        check_room(target, _nbytes(location.rows(), model, asked.index_only))
        if asked.uploads:
            repo_id = repo_id or full_name(name, user)
            reserve(repo_id, user, asked.private)
        mx.eval(model.parameters())
        recipe = make_recipe(
            asked.flags(),
            model=origin.known_as,
            revision=origin.revision,
            seed=asked.seed,
            name=name,
        ) | {"metadata": card_metadata(origin, "adapter" if asked.index_only else "quantized")}
        index = make_index(model, tokenizer, location, asked, text, recipe, progress=progress)
        say(f"Writing {target}")
        config.pop(CONFIG_KEY, None)
        try:
            if asked.index_only:
                write_companion(folder, index)
            else:
                save(folder, str(source), model, tokenizer, config, donate_model=False)
                write_index(folder, index)
            add_documents(folder, origin, index.config, target)
        except RuntimeError as error:  # MLX raises this for a full disk
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "--mlx-path."
            ) from error
    if asked.uploads:
        say(f"Uploaded to {publish(target, repo_id, private=asked.private, say=say)}")
    return index.config


def make_index(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    options: IndexOptions,
    text: str | None,
    recipe: dict[str, Any],
    *,
    progress: bool = True,
    tables: bool = True,
) -> FlashHeadIndex:
    """Makes the index of a model in memory.

    Args:
        model: A dense mlx-lm model.
        tokenizer: Its tokenizer.
        location: Its head.
        options: The options of the index.
        text: Text of the file to calibrate on, if the options name one.
        recipe: The recipe to store.
        progress: Show bars and the choice.
        tables: Show the measured report too.

    Raises:
        ValueError: If the text is too short, or an option does not fit the model.
    """
    positions = None
    if options.calibration != NO_CALIBRATION:
        positions = _calibrate(model, tokenizer, location, options, text, progress, tables)
    return build_index(
        location.rows(),
        positions,
        cluster_size=options.cluster_size,
        n_probes=options.n_probes,
        goals=Goals(options.target_agreement, options.target_kl),
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        source="file" if text is not None else options.calibration,
        seed=options.seed,
        body_bytes=_body_bytes(model, location),
        recipe=recipe,
        progress=progress,
        tables=tables,
    )


def index_nbytes(rows: Matrix) -> int:
    """Approximate size of an index, from what is known before the work."""
    return rows.n_rows * (4 + rows.hidden_size // 16)  # ids, centroids of 4 bits and small arrays


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
    _cast(model, options.dtype or _named_dtype(source, config))
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        model = dequantize_model(model)
    if options.head_bits is not None and head.tied:
        say(f"The head is tied to the embedding: both get {options.head_bits} bits.")
    model, config = set_bits(model, config, head.path, _body(options), options.head_bits)
    return model, tokenizer, config


def _nbytes(rows: Matrix, model: nn.Module, index_only: bool) -> int:
    """Approximate size of the result, from what is known before the work."""
    index = index_nbytes(rows)
    if index_only:
        return index
    weights: Any = tree_flatten(model.parameters())
    return index + sum(array.nbytes for _, array in weights)


def _body(options: ConvertOptions) -> BodyRecipe | None:
    if not options.quantize:
        return None
    return BodyRecipe(options.q_group_size, options.q_bits, options.q_mode, options.quant_predicate)


def _calibrate(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    options: IndexOptions,
    text: str | None,
    progress: bool,
    tables: bool,
) -> Positions:
    """Positions of the text, or of the mix."""
    if text is None:
        start = time.monotonic()
        found = mixed_positions(
            model,
            tokenizer,
            location,
            options.calibration_positions,
            seed=options.seed,
            seconds=options.calibration_seconds,
            progress=progress,
        )
        if progress and tables and time.monotonic() - start > options.calibration_seconds:
            print(
                f"The time was up after {len(found):,} of {options.calibration_positions:,} "
                "positions: mlx_flashhead.convert --calibration-seconds takes more."
            )
        return found
    states, next_ids = text_states(
        model,
        tokenizer,
        location,
        text,
        positions=options.calibration_positions,
        progress=progress,
    )
    if len(states) < MIN_POSITIONS:
        raise ValueError(
            f"{options.calibration} has only {len(states)} positions to calibrate on: give a text "
            "of some pages."
        )
    return Positions.of_one_kind("file", states, next_ids, HELD_OUT_SHARE)


def _body_bytes(model: nn.Module, location: HeadLocation) -> int:
    """Bytes of all weights without the head and the embeddings, of which a token reads one row."""
    beside = {id(location.module)}
    beside |= {
        id(module)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    }
    return sum(
        array.nbytes
        for module in model.modules()
        if id(module) not in beside
        for array in module.values()
        if isinstance(array, mx.array)
    )


def _named_dtype(source: Path, config: dict) -> str | None:
    """The dtype of ``mlx_lm.convert``; None for weights that MLX has stored."""
    for file in source.glob("model*.safetensors"):
        loaded: Any = mx.load(str(file), return_metadata=True)
        if loaded[1].get("format") == "mlx":
            return None
    text_config = config.get("text_config") or {}
    name = config.get("torch_dtype") or text_config.get("dtype")
    return name if name in MODEL_CONVERSION_DTYPES else None


def _cast(model: nn.Module, dtype: str | None) -> None:
    if dtype is None:
        return
    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def cast(name, array):
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if floating and may_cast(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))
