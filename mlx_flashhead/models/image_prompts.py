"""Prompts with images, for a model of mlx-lm that takes some."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .compat.mlx_lm import load_processor


def with_images(
    model: nn.Module, config: dict[str, Any], text: str, files: Sequence[str]
) -> tuple[str, Any]:
    """Puts images into a prompt.

    Args:
        model: A model of mlx-lm.
        config: Its configuration.
        text: The prompt.
        files: The images' paths.

    Returns:
        The prompt with the images' placeholders, and the values that the model embeds.

    Raises:
        ValueError: If the model takes no images.
    """
    from PIL import Image

    processor = load_processor(model, config)
    if processor is None:
        raise ValueError("This model does not take images: leave `image` out.")
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return processor(text, images=images)


def embedded(model: Any, token_ids: list[int], images: Any) -> mx.array:
    """The embeddings (n, D) of a prompt's tokens and images.

    Args:
        model: The model.
        token_ids: The prompt with the images' placeholders.
        images: Their values, of :func:`with_images`.
    """
    embeddings = model.embed_inputs(mx.array(token_ids), pixel_values=images)
    # The prompt is read on another stream.
    mx.eval(embeddings)
    return embeddings
