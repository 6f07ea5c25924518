"""``mlx_lm.generate``: its loops, and its main program with replaced parts."""

import argparse
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

from mlx_lm.generate import (
    BatchResponse,
    GenerationResponse,
    generation_stream,
    maybe_quantize_kv_cache,
)
from mlx_lm.generate import generate as mlx_lm_generate
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate

from .replaced import replaced

try:
    from mlx_lm.generate import (
        BatchGenerator,
        TextStateMachine,
        batch_generate,
        generate_step,
        make_text_state_machine,
        speculative_generate_step,
    )
    from mlx_lm.generate import setup_arg_parser as generate_parser
except ImportError:
    from .mlx_lm_0_31 import (  # type: ignore[assignment]
        BatchGenerator,
        TextStateMachine,
        batch_generate,
        generate_parser,
        generate_step,
        make_text_state_machine,
        speculative_generate_step,
    )

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
    """Runs mlx-lm's program with other functions, its only way to take a loaded model. Its ``load``
    is called first for the model, then for the draft model."""
    parsed = SimpleNamespace(parse_args=lambda: args)
    # mlx-lm 0.31 does not hand the leave on
    trusted = partial(load, trust_remote_code=args.trust_remote_code)
    names = {"load": trusted, "make_sampler": make_sampler, "generate": generate}
    with replaced(module, setup_arg_parser=lambda: parsed, **names):
        module.main()
