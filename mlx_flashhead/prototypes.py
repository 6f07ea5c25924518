"""What routing needs of each cluster: a centroid that predicts the cluster's best, not its middle.

A cluster should be probed when it holds the winning token, so each centroid is fitted in closed
form, by ridge regression on calibration hidden states, to the logsumexp of its tokens' logits; then
it is rounded to few bits with the error fed forward (GPTQ), and what remains of the residual gives
the cluster's bias and the estimate for its tokens when it is not probed:

    S_c = h · mu_c + b_c           the score by which clusters are chosen
    S_c - ln n_c + s2_c / 2        the logit given to each of its n_c tokens if it is not

Knows arrays only: no model. Everything about the states enters through a few sums over them, so
neither the (N, V) logits nor the (N, C) targets are ever held whole.

On SmolLM2-135M at 4 bits the share of positions that keep the dense argmax is 95.7 % with unit
means (the paper's routing), 97.7 % with plain means and 99.1 % with these, at 256 of 3072 clusters.
Fitting a bias only, clipped targets and centroids of the hidden states' metric gained less.
"""

import warnings
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .clustering import as_float32

# The fit's constant feature: large, so that the ridge hardly shrinks the intercept.
CONSTANT = 5.0
DAMPING = 0.01  # share of the mean diagonal added to the Hessian before it is inverted
BLOCK_STATES = 2048  # states and clusters handled at once: bounds memory
BLOCK_CLUSTERS = 64


@dataclass(frozen=True)
class Prototypes:
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

    def dequantized(self) -> mx.array:
        """The centroids as floats: (C, D) float32."""
        if not self.quantized:
            return self.weight.astype(mx.float32)
        weight = mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )
        return weight.astype(mx.float32)

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
