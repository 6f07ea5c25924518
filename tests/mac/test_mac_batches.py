"""Batches on an Apple GPU: of a dense model, with FlashHead, and with both ways in one batch."""

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator

import mlx_flashhead
from kernel_cases import on_gpu
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.proposer import Proposer

# The oldest environment has no compiler for the emulator. An M1 multiplies up to five states one by
# one: texts together have the bits of each alone, also where a rejected token is computed again.
pytestmark = [pytest.mark.newest, pytest.mark.parametrize("gpu", ["M1"], indirect=True)]
one_by_one = pytest.mark.skipif(on_gpu(), reason="later GPUs round texts together otherwise")
PROMPTS = ["One day", "Later", "A fox and a hen"]
N_TOKENS = 8


def texts(library, loaded, **options):
    """The texts of a batch by mlx_lm or mlx_flashhead."""
    mx.random.seed(7)
    prompts = [loaded[1].encode(prompt) for prompt in PROMPTS]
    return library.batch_generate(*loaded, prompts, max_tokens=N_TOKENS, **options).texts


def test_a_batch_of_a_model_without_a_flash_head(pair):
    expected = texts(mlx_lm, pair.plain)
    assert texts(mlx_flashhead, pair.plain) == expected


@one_by_one
def test_a_batch_with_a_flash_head(pair, kernels):
    expected = texts(mlx_lm, pair.plain)
    assert texts(mlx_flashhead, pair.flash) == expected
    assert kernels() is None or kernels() >= {"score", "screen"}


@one_by_one
def test_a_batch_of_which_one_text_cannot_be_verified(pair, kernels):
    """A sampler that nobody knows chooses the second one's tokens, densely."""
    prompts = [pair.plain[1].encode(prompt) for prompt in PROMPTS]
    samplers = [None, lambda logprobs: mx.argmin(logprobs, axis=-1), None]

    def tokens(generator):
        uids = generator.insert(prompts, [N_TOKENS] * 3, samplers=samplers)
        found = {uid: [] for uid in uids}
        responses = generator.next_generated()
        while responses:
            for response in responses:
                found[response.uid].append(response.token)
            responses = generator.next_generated()
        generator.close()
        return list(found.values())

    expected = tokens(BatchGenerator(pair.plain[0]))
    model = pair.flash[0]
    assert tokens(VerifiedBatchGenerator(model, proposer=Proposer(model))) == expected
    assert kernels() is None or kernels() >= {"score", "screen"}
