"""mlx-lm's names that may move from one version to the next. Tested with 0.31.3 to 0.32.2."""

import argparse
import importlib
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from inspect import getclosurevars
from types import CodeType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import sample_utils
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.generate import (
    BatchResponse,
    GenerationResponse,
    batch_generate,
    generation_stream,
    maybe_quantize_kv_cache,
)
from mlx_lm.generate import generate as mlx_lm_generate
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import _download as download
from mlx_lm.utils import dequantize_model, load_adapters, load_tokenizer, quantize_model, save

from .patching import replaced

if find_spec("mlx_lm.cli_ui") is not None:  # new in 0.32
    from mlx_lm.generate import (
        BatchGenerator,
        TextStateMachine,
        generate_step,
        make_text_state_machine,
        speculative_generate_step,
    )
    from mlx_lm.utils import (
        DEFAULT_ALLOW_PATTERNS,
        load,
        maybe_set_recommended_wired_limit,
        sharded_load,
    )
else:
    from .mlx_lm_0_31 import (  # type: ignore[assignment]
        DEFAULT_ALLOW_PATTERNS,
        BatchGenerator,
        TextStateMachine,
        generate_step,
        load,
        make_text_state_machine,
        maybe_set_recommended_wired_limit,
        sharded_load,
        speculative_generate_step,
    )


def _nested_codes(*functions: Any) -> set[CodeType]:
    constants = (constant for f in functions for constant in f.__code__.co_consts)
    return {constant for constant in constants if isinstance(constant, CodeType)}


_SAMPLERS = _nested_codes(sample_utils.make_sampler)
_PROCESSORS = _nested_codes(
    sample_utils.make_logits_processors,
    sample_utils.make_repetition_penalty,
    sample_utils.make_presence_penalty,
    sample_utils.make_frequency_penalty,
)


def mlx_lm_sampler_settings(sampler: Any) -> dict[str, Any] | None:
    """What ``make_sampler`` was called with, read from its closures; None for a sampler whose draw
    is not a threshold and the best noisy logit, as with XTC or a least number of tokens."""
    if sampler is getattr(sample_utils, "greedy_sampler", sample_utils):
        return {}
    if getattr(sampler, "__code__", None) not in _SAMPLERS:
        return None
    values = getclosurevars(sampler).nonlocals
    if "sampling_methods" not in values:
        return {}  # the best token, of 0.31
    settings: dict[str, Any] = {"temperature": float(values["temp"])}
    for method in values["sampling_methods"]:
        filtered = dict(getclosurevars(method).nonlocals)
        kept = filtered.pop("min_tokens_to_keep", 1)
        known = filtered.keys() <= {"top_p", "min_p", "top_k"}
        # 0.31 cuts at another place, and in the dtype of the logits
        old_top_p = "top_p" in filtered and not hasattr(sample_utils, "greedy_sampler")
        if not known or kept != 1 or old_top_p:
            return None
        settings |= filtered
    valid = 0 <= settings.get("min_p", 0) <= 1 and settings.get("top_k", 0) >= 0
    return settings if valid and settings["temperature"] > 0 else None


def is_mlx_lm_processor(processor: Any) -> bool:
    """Whether it is mlx-lm's, depends on its arguments alone and moves each logit by itself, a
    larger one never below a smaller one."""
    if getattr(processor, "__code__", None) not in _PROCESSORS:
        return False
    penalty = getclosurevars(processor).nonlocals.get("penalty", 1)
    return penalty != 0 or "repetition" not in processor.__name__


# The attribute mlx_lm.generate is the function, so the module is imported by name.
module = importlib.import_module("mlx_lm.generate")


def run_generate(args: argparse.Namespace, **functions: Callable[..., Any]) -> None:
    """Runs mlx-lm's program with other ``load``, ``make_sampler`` and ``generate``, its only way to
    take a loaded model. Its ``load`` is called first for the model, then for the draft model."""
    parsed = SimpleNamespace(parse_args=lambda: args)
    # mlx-lm 0.31 does not hand the leave on
    functions["load"] = partial(functions["load"], trust_remote_code=args.trust_remote_code)
    with replaced(module, setup_arg_parser=lambda: parsed, **functions):
        module.main()


# mlx-lm's batch generator, with another choice of tokens. All that touches its inside stands here.


class _GenerationBatch(module.GenerationBatch):  # type: ignore[name-defined]
    _next_tokens: Any
    _next_logprobs: Any

    def _step(self) -> tuple[list[int], list[Any]]:
        """mlx-lm's step, whose forward pass and sampling are the generator's ``choose``."""
        self._current_tokens, self._current_logprobs = self._next_tokens, self._next_logprobs
        inputs, choose = self._current_tokens, self.fallback_sampler
        self._next_tokens, self._next_logprobs = choose(self.uids, inputs, self.prompt_cache)
        tokens = inputs.tolist()
        for held, token in zip(self.tokens, tokens, strict=True):
            held.append(token)
        return tokens, self._current_logprobs or [None] * len(tokens)


class _PromptBatch(module.PromptProcessingBatch):  # type: ignore[name-defined]
    def generate(self, tokens: list[list[int]]) -> Any:
        with replaced(module, GenerationBatch=_GenerationBatch):
            return super().generate(tokens)


class ChoosingBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator`` whose tokens are chosen by :meth:`choose`."""

    def __init__(self, model: nn.Module, **options: Any):
        choose: Any = self.choose
        super().__init__(model, sampler=choose, **options)  # which its batches hand on
        self._generation_batch = _GenerationBatch.empty(self.model, self.sampler)
        self._prompt_batch = _PromptBatch.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )

    @abstractmethod
    def choose(
        self, uids: list[int], latest: mx.array, cache: list[Any]
    ) -> tuple[mx.array, list[mx.array | None]]:
        """The next tokens (R,), launched, of sequences after their ``latest`` tokens (R,), and
        log-probabilities (V,) of each, or None."""

    def advance(self) -> tuple[list[Any], list[Any]]:
        """mlx-lm's next step: responses of prompts, and of tokens."""
        return super()._next()

    def count(self, n_tokens: int) -> None:
        self._counters.generation_tokens += n_tokens

    @property
    def generating(self) -> list[int]:
        """The sequences whose tokens are generated, in the order of their rows."""
        return self._generation_batch.uids

    @property
    def generation_cache(self) -> list[Any]:
        return self._generation_batch.prompt_cache


class StateMachineStops:
    """0.31's state machine of a sequence, with the face of 0.32's ``StopSequences`` too."""

    def __init__(self, machine: Any):
        self._machine, self._state = machine, machine.make_state()
        self.match_sequence: Any = None
        self.current_state: Any = None

    def matcher(self) -> "StateMachineStops":
        return StateMachineStops(self._machine)

    def advance(self, token: int) -> bool:
        found = self._machine.match(self._state, token)
        self._state, self.match_sequence, self.current_state = found
        return self.match_sequence is not None and self.current_state is None
