"""The margins of certainty: the kernels have those of the table."""

import re

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import KERNEL_FILES
from mlx_flashhead.head import margins
from mlx_flashhead.head.draws import noise
from mlx_flashhead.head.logit_map import NEAR_CAP


def kernels_number(file, name):
    """A constant of a kernel's file."""
    text = (KERNEL_FILES / file).read_text()
    return float(re.search(rf"constexpr float {name} = ([-0-9.e]+)f;", text)[1])


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("tally.h", "NOISE_MARGIN", margins.NOISE_MARGIN),
        ("certain.h", "MASS_MARGIN", margins.MASS_MARGIN),
        ("tally.h", "LIKELY_NOISE", noise.LIKELY_NOISE),
        ("tally.h", "MOST_NATS", noise.MOST_NATS),
        ("logit_map.h", "MAP_SLACK", margins.MAP_ULPS * mx.finfo(mx.float32).eps),
        ("logit_map.h", "NEAR_CAP", NEAR_CAP),
    ],
)
def test_the_kernels_have_the_same(file, name, value):
    assert kernels_number(file, name) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_that_far_apart_have_other_log_probabilities(dtype):
    """Nearer ones may become equal, and then mlx-lm takes the lower id."""
    logits = mx.random.normal((2000, 40), key=mx.random.key(0)) * 6
    epsilon = mx.finfo(dtype).eps
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    distance = margins.merging_distance(total, logits, epsilon)
    above = logits + distance
    rounded = [
        np.array((each - total).astype(dtype).astype(mx.float32)) for each in (above, logits)
    ]
    # There the one above is no more than all together.
    near = (total - logits) > distance
    assert ((rounded[0] > rounded[1]) | ~np.array(near)).all()
    halfway = (
        (logits + distance / 4 - total).astype(dtype) == (logits - total).astype(dtype)
    ).any()
    assert halfway


def test_noise_of_large_logits_has_a_larger_margin():
    found = margins.noise_margin(mx.array([-50.0, 0.0, 0.5, 200.0]))
    assert mx.allclose(found, margins.NOISE_MARGIN * mx.array([50.0, 1.0, 1.0, 200.0]))
