"""How much a model could gain at most: its speed if its output head took no time."""

import mlx.core as mx
import mlx.nn as nn

from ..models.install import installed_head

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)  # of which a token reads one row


def free_head_gain(model: nn.Module) -> float:
    """Estimates tokens per second with a head that takes no time, relative to dense decoding.

    A token takes as long as the weights that it reads. The estimate is high: of experts it counts
    one, and it leaves the cache out.

    Args:
        model: A model with an installed FlashHead.

    Returns:
        The ratio, 1 or more.
    """
    head_bytes = sum(
        array.nbytes for array in installed_head(model).clustered.rows.arrays().values()
    )
    body_bytes = sum(_bytes_read(module) for module in model.modules())
    return (body_bytes + head_bytes) / max(body_bytes, 1)


def _bytes_read(module: nn.Module) -> float:
    """Bytes of a module's own arrays that a token reads, without the head's."""
    if isinstance(module, _EMBEDDINGS) or hasattr(module, "_flash_head"):
        return 0
    arrays = [array for array in dict.values(module) if isinstance(array, mx.array)]
    # experts are matrices in one array of three dimensions
    return sum(array.nbytes / (len(array) if array.ndim == 3 else 1) for array in arrays)
