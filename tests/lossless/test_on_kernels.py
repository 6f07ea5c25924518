"""The checked loop with proposals of the Metal kernels."""

import pytest

from flash_loops import OTHERS, PROMPT, make_flash
from kernel_cases import kernels
from mlx_flashhead import make_sampler
from mlx_flashhead.head.steps import NO_DEPTH


@pytest.mark.parametrize("depth", [NO_DEPTH, 1.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temp": 0.9}, {"temp": 0.8, "top_p": 0.9, "top_k": 20}, {"temp": 1.0, "min_p": 0.1}],
    ids=["greedy", "temperature", "top-p and top-k", "min-p"],
)
def test_the_text_is_the_dense_rows(settings, depth, misses):
    """For one text and for a batch, whichever clusters are scored."""
    with kernels(check=False):
        flash = make_flash(n_probes=9)
        assert flash.head.backend == "metal"
        flash.head.depth = depth
        options = {"sampler": make_sampler(**settings), "max_tokens": 16}
        assert flash.tokens(**options) == flash.tokens(dense=True, **options)
        options = {"samplers": [options["sampler"]] * 4, "max_tokens": 8}
        prompts = [PROMPT, *OTHERS]
        assert flash.batch(prompts, **options)[0] == flash.batch(prompts, dense=True, **options)[0]
    assert misses
