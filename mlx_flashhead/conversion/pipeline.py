"""Conversion: an mlx-lm or Hugging Face model becomes a FlashHead checkpoint.

A failed or interrupted conversion leaves nothing behind.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from ..index.files import CONFIG_KEY, write_index
from ..index.new_folder import new_folder
from ..index.settings import FlashHeadConfig
from ..models.compat import MODEL_CONVERSION_DTYPES, dequantize_model, save
from ..models.load import load_dense, resolve
from ..models.locate import check_plain_product, find_head
from ..publishing.hub import full_name, reserve, sign_in
from ..publishing.origin import card_metadata, find_origin
from ..publishing.publish import add_documents, check_licence, checkpoint_name, publish
from ..publishing.recipe import make_recipe
from .calibration import generated_states, text_states
from .indexing import build_index
from .options import (
    MIN_POSITIONS,
    NO_CALIBRATION,
    SELF_GENERATED,
    calibration_text,
    check_arguments,
    check_size,
    check_upload,
)
from .quantization import BodyRecipe, body_label, set_bits


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
    cluster_size: int = 16,
    n_probes: int | None = None,
    target_agreement: float = 0.99,
    calibration: str = SELF_GENERATED,
    calibration_positions: int = 12_000,
    seed: int = 0,
    upload: bool = False,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> FlashHeadConfig:
    """Converts a model; the first arguments are those of ``mlx_lm.convert``.

    Args:
        hf_path: A local folder (Hugging Face or mlx-lm, also quantized) or a Hub repository.
        mlx_path: Folder to write.
        quantize: Quantize the model.
        q_group_size: Quantization group.
        q_bits: Bits per weight.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        dtype: Of the weights that are not quantized; default: an mlx-lm folder's own, else what
            its configuration names as ``torch_dtype``.
        upload_repo: Hub repository to upload the checkpoint to, "owner/name", or "name" under the
            user's own.
        revision: Branch, tag or commit of the repository.
        dequantize: Undo the model's quantization.
        quant_predicate: One of mlx-lm's mixed-bit recipes, or a function as mlx-lm takes it.
        trust_remote_code: Allow the repository's own Python code.
        head_bits: Bits of the head's rows, 4, 8 or 16; default: as the model has it.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token; default: chosen for ``target_agreement``.
        target_agreement: Agreement with the dense head to reach on held-out positions, 0 … 1.
        calibration: "self" (text that the model writes), "none", or a text file.
        calibration_positions: Positions to calibrate on.
        seed: Of the clustering and of the generated text.
        upload: Upload the checkpoint; without ``upload_repo``, as
            "<user>/<model>-FlashHead-<precision>".
        private: Make a new repository a private one.
        base_model: Repository of the model, "owner/name", where ``hf_path`` is a folder that does
            not say so; for the card.
        license: The model's licence as the Hub calls it, where its card does not name it.
        overwrite: Replace a target that exists.
        progress: Show bars and what is being done.

    Returns:
        The settings and the measured report, as stored.

    Raises:
        ValueError: If an argument, the model or the target is not valid, or the Hub would refuse
            an upload; nothing is written then. Also if the upload itself fails, which keeps the
            checkpoint.
        OSError: If the checkpoint cannot be written. Nothing is left behind then.
    """
    arguments = dict(locals())
    check_arguments(
        cluster_size, n_probes, target_agreement, calibration_positions, head_bits, dtype, seed
    )
    if quantize and dequantize:
        raise ValueError("Choose either --quantize or --dequantize, not both.")
    text = calibration_text(calibration)
    upload = upload or upload_repo is not None
    check_upload(upload, private, base_model)
    say = print if progress else (lambda *_: None)
    target = Path(mlx_path).expanduser()
    with new_folder(target, overwrite) as folder:
        # before long work: what the Hub would refuse at its end
        user = sign_in() if upload else None
        repo_id = full_name(upload_repo, user) if upload_repo else None
        source = resolve(hf_path, revision)
        origin = find_origin(hf_path, source, base_model, license)
        if upload:
            check_licence(origin, repo_id, target)
        say(f"Loading {hf_path}")
        model, tokenizer, config = load_dense(
            source,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            lazy=True,
            trust_remote_code=trust_remote_code,
        )
        head = find_head(model)
        check_size(head.rows(), cluster_size, n_probes)
        _cast(model, dtype or _named_dtype(source, config))
        if dequantize:
            config.pop("quantization", None)
            config.pop("quantization_config", None)
            model = dequantize_model(model)
        body = BodyRecipe(q_group_size, q_bits, q_mode, quant_predicate) if quantize else None
        if head_bits is not None and head.tied:
            say(f"The head is tied to the embedding: both get {head_bits} bits.")
        model, config = set_bits(model, config, head.path, body, head_bits)
        location = find_head(model)
        check_plain_product(location)
        name = checkpoint_name(origin, location.rows(), body_label(body, config))
        if upload:
            repo_id = repo_id or full_name(name, user)
            reserve(repo_id, user, private)
        mx.eval(model.parameters())
        states, next_ids = None, None
        if calibration != NO_CALIBRATION:
            states, next_ids = _calibrate(
                model, tokenizer, text, calibration, calibration_positions, seed, progress
            )
        index = build_index(
            location.rows(),
            states,
            next_ids,
            cluster_size=cluster_size,
            n_probes=n_probes,
            target_agreement=target_agreement,
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            source="file" if text is not None else calibration,
            seed=seed,
            recipe=make_recipe(
                arguments,
                {key: p.default for key, p in inspect.signature(convert).parameters.items()},
                model=origin.repo_id or origin.name,
                revision=origin.revision,
                name=name,
            )
            | {"metadata": card_metadata(origin)},
            progress=progress,
        )
        say(f"Writing {target}")
        config.pop(CONFIG_KEY, None)
        try:
            save(folder, str(source), model, tokenizer, config, donate_model=False)
            write_index(folder, index)
            add_documents(folder, origin, index.config, target)
        except RuntimeError as error:  # what MLX raises when a disk is full
            raise OSError(
                f"{target} cannot be written ({error}): free some space or choose another "
                "--mlx-path."
            ) from error
    if upload:
        say(f"Uploaded to {publish(target, repo_id, private=private, say=say)}")
    return index.config


def _calibrate(
    model: nn.Module,
    tokenizer,
    text: str | None,
    calibration: str,
    positions: int,
    seed: int,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """States and next tokens of the text, or of one that the model writes itself."""
    location = find_head(model)
    if text is None:
        states, next_ids = generated_states(
            model, tokenizer, location, positions, seed=seed, progress=progress
        )
    else:
        states, next_ids = text_states(
            model,
            tokenizer,
            location,
            text,
            positions=positions,
            description="Calibrating",
            progress=progress,
        )
    if len(states) < MIN_POSITIONS:
        raise ValueError(
            f"{calibration} has only {len(states)} positions to calibrate on: give a text of some "
            "pages."
        )
    return states, next_ids


def _named_dtype(source: Path, config: dict) -> str | None:
    """The dtype that ``mlx_lm.convert`` would take; None for weights that MLX has stored."""
    for file in source.glob("model*.safetensors"):
        _, metadata = mx.load(str(file), return_metadata=True)
        if metadata.get("format") == "mlx":
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
