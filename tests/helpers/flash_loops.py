"""Tiny models with a FlashHead of random clusters, which proposes other tokens often."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flashhead import get_flash_head, make_sampler
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from tiny_models import install_index, tiny_index, tiny_model

# A text has so many tokens, unless a test says otherwise.
N_TOKENS = 22
PROMPT = [5, 17, 3, 99, 42, 7]
OTHERS = [[8, 8, 120], [1, 2, 3, 4, 5, 6, 7, 9], [60, 61]]


@dataclass(frozen=True)
class Flash:
    """A model with a FlashHead, and its loops with and without verification."""

    model: Any

    @property
    def head(self):
        return get_flash_head(self.model)

    def tokens(self, *, seed=7, **options):
        """The tokens of the loop for one text."""
        mx.random.seed(seed)
        return [token for token, _ in self.steps(**options)]

    def checked(self, settings=None, **options):
        """The tokens of the loop with a sampler, which are those of the dense loop."""
        if settings is None:
            settings = {}
        found = self.tokens(sampler=make_sampler(**settings), **options)
        dense = self.tokens(dense=True, sampler=make_sampler(**settings), **options)
        assert found == dense
        return found

    def steps(self, dense=False, verify=True, n_probes=None, prompt=PROMPT, **options):
        if dense:
            n_probes = None
        proposer = Proposer(
            self.model, DecodingSettings(verify=verify, dense=dense, n_probes=n_probes)
        )
        options = {"proposer": proposer, "max_tokens": N_TOKENS} | options
        return verified_tokens(mx.array(prompt), self.model, **options)

    def batch(self, prompts, *, dense=False, verify=True, max_tokens=25, seed=7, **options):
        """The tokens of each text of a batch, and the responses that ended them."""
        mx.random.seed(seed)
        proposer = Proposer(self.model, DecodingSettings(verify=verify, dense=dense))
        generator = VerifiedBatchGenerator(self.model, proposer=proposer, logprobs=False)
        uids = generator.insert(prompts, [max_tokens] * len(prompts), **options)
        tokens = {uid: [] for uid in uids}
        ends = {}
        responses = generator.next_generated()
        while responses:
            for response in responses:
                tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    ends[response.uid] = response
            responses = generator.next_generated()
        generator.close()
        return [tokens[uid] for uid in uids], [ends[uid] for uid in uids]


def flash_of(model) -> Flash:
    """The model with a FlashHead of random clusters."""
    install_index(model, tiny_index(model, n_probes=3))
    return Flash(model)


def make_flash(arch="llama", **options) -> Flash:
    """A tiny model with a FlashHead of random clusters."""
    return flash_of(tiny_model(arch, **options))
