"""The dense product of several states at once, which reads each row once for all of them."""

import mlx.core as mx

from ..head.flash_head import FlashHead
from ..models.cpu_products import numpy_is_faster, slot_products


def slot_logits(head: FlashHead, hidden: mx.array) -> mx.array:
    """Logits in the order of the clusters: (k, D) → (k, C, n), by numpy where it is faster."""
    rows = head.clustered.rows
    if rows.quantized or rows.weight.dtype != mx.float32 or not numpy_is_faster():
        return head.slot_logits(hidden)
    logits = slot_products(rows.weight, hidden)
    return logits if rows.bias is None else logits + rows.bias
