"""What other heads would gain, estimated from a measured gain and the bytes that a token reads."""

import mlx.core as mx
import mlx.nn as nn

from ..decoding.policy import Tuning
from ..models.finer_head import DEFAULT_BITS
from ..models.install import installed_head

# A token reads one row of these.
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def fine_gain(model: nn.Module, tuning: Tuning) -> float:
    """Estimates the speed with a head of 8 bits and FlashHead, relative to the head as it is.

    FlashHead reads the probed share of more bytes. Its verification is bound by arithmetic, which
    the bits do not change (docs/finer-head.md). A model that stays dense would use FlashHead then.
    """
    head = installed_head(model)
    rows = head.clustered.rows
    free = free_head_gain(model)
    # The head's share of a dense token's time, by bytes.
    head_share = 1 - 1 / free
    # Scales and biases take half a bit.
    more = (DEFAULT_BITS + 0.5) / (rows.bits + 0.5) - 1
    probed = head.n_probes / head.n_clusters
    return 1 / (1 / tuning.gain + head_share * probed * more)


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
    nbytes = 0.0
    for array in dict.values(module):
        if not isinstance(array, mx.array):
            continue
        n_matrices = 1
        if array.ndim == 3:
            # Experts are matrices in one array.
            n_matrices = len(array)
        nbytes += array.nbytes / n_matrices
    return nbytes
