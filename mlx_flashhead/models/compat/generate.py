"""``mlx_lm.generate``: its loops, and its main program with replaced parts."""

import argparse
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from mlx_lm.generate import (
    BatchGenerator,
    BatchResponse,
    GenerationBatch,
    GenerationResponse,
    StopSequences,
    TextStateMachine,
    generate_step,
    generation_stream,
    make_text_state_machine,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from mlx_lm.generate import batch_generate as mlx_lm_batch_generate
from mlx_lm.generate import generate as mlx_lm_generate
from mlx_lm.generate import setup_arg_parser as generate_parser
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate

from .replaced import replaced

__all__ = [
    "BatchGenerator",
    "BatchResponse",
    "GenerationBatch",
    "GenerationResponse",
    "StopSequences",
    "TextStateMachine",
    "generate_parser",
    "generate_step",
    "generation_stream",
    "loops",
    "make_text_state_machine",
    "maybe_quantize_kv_cache",
    "mlx_lm_batch_generate",
    "mlx_lm_generate",
    "mlx_lm_stream_generate",
    "run_generate",
    "speculative_generate_step",
]

# The attribute mlx_lm.generate is the function, so the module is imported by name.
module = importlib.import_module("mlx_lm.generate")


def loops(**names: Any) -> AbstractContextManager[None]:
    """A block in which mlx-lm's functions take other loops, by their names."""
    return replaced(module, **names)


def run_generate(
    args: argparse.Namespace,
    *,
    load: Callable[..., Any],
    make_sampler: Callable[..., Any],
    generate: Callable[..., str],
) -> None:
    """Runs mlx-lm's program with other functions, its only way to take a loaded model.

    Args:
        args: Its parsed arguments.
        load: Replaces its ``load``, first for the model, then for the draft model.
        make_sampler: Replaces its ``make_sampler``.
        generate: Replaces its ``generate``.
    """
    parsed = SimpleNamespace(parse_args=lambda: args)
    names = {"load": load, "make_sampler": make_sampler, "generate": generate}
    with replaced(module, setup_arg_parser=lambda: parsed, **names):
        module.main()
