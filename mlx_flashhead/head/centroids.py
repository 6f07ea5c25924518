"""What routing needs of each cluster: its centroid, a bias, and the offset of its tail."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Centroids:
    """Centroids, their bias and the tail's offset.

    Attributes:
        weight: (C, D·bits/32) uint32 in MLX's affine quantized form, or (C, D) floats.
        scales: (C, D/group_size), or None when not quantized.
        biases: (C, D/group_size) quantization offsets, or None.
        bias: (C,) float32, added to the scores.
        tail_offset: (C,) float32, added to a score for the logit of the cluster's tokens.
        group_size: Columns that share a scale; 0 when not quantized.
        bits: Bits per weight; 16 or 32 when not quantized.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bias: mx.array
    tail_offset: mx.array
    group_size: int
    bits: int

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def routing_bytes(self) -> int:
        """Bytes read to choose the clusters: the centroids and their bias."""
        read = (self.weight, self.scales, self.biases, self.bias)
        return sum(array.nbytes for array in read if array is not None)

    def dequantized(self) -> mx.array:
        """The centroids as floats: (C, D) float32."""
        if not self.quantized:
            return self.weight.astype(mx.float32)
        # mx.dequantize rounds to the dtype of the scales, as no product with the weights does
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(
            self.weight, scales, biases, group_size=self.group_size, bits=self.bits
        )

    def matmul(self, hidden: mx.array) -> mx.array:
        """Products with all centroids, without the bias: hidden (..., D) → (..., C)."""
        if not self.quantized:
            return hidden @ self.weight.T
        return mx.quantized_matmul(
            hidden,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
        )
