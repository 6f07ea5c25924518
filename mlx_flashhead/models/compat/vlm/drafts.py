"""Drafters of mlx-vlm: who they draft for, and which calls of a head are theirs.

Most of them share the target's head. The text is the target's choices, which all rows make.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..imports import put_in_place, when_imported

DRAFTERS = "mlx_vlm.speculative.drafters"
LOOP = "mlx_vlm.generate.ar"
TEMPERATURE = 0.8  # of answers that are recorded: the states of likely tokens are less alike
FILES = f"{os.sep}{DRAFTERS.replace('.', os.sep)}{os.sep}"


def drafter_asks(frame: FrameType | None) -> bool:
    """Whether a drafter's code has led to this call, itself or by a function of its target."""
    while frame is not None:
        if FILES in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def own_head(drafter: Any, target: Any) -> Any:
    """What makes a drafter's logits, if it is neither the target's nor a retrieval already.

    A linear layer, or the method ``as_linear`` of an embedding; else None. Gemma 4's assistant with
    centroids has a function instead, which scores the tokens of a few.
    """
    target = getattr(target, "language_model", target)
    drafter.bind(target)
    head = getattr(drafter, "_lm_head_fn", None) or getattr(drafter, "lm_head", None)
    if head is None:  # a tied EAGLE-3
        head = getattr(getattr(drafter, "embed_tokens", None), "as_linear", None)
    layer = getattr(head, "__self__", head)
    shared = any(layer is other for other in target.modules())
    return head if isinstance(layer, nn.Module) and not shared else None


def drafted_answer(
    target: Any, drafter: Any, kind: str, prompt: list[int], n_tokens: int
) -> Iterator[int]:
    """Tokens of the target after a prompt, sampled if possible, in the loop with the drafter."""
    from mlx_vlm.generate.ar import generate_step

    options = {"max_tokens": n_tokens, "draft_model": drafter, "draft_kind": kind}
    if not getattr(drafter, "requires_greedy_sampling", False):
        options["temperature"] = TEMPERATURE
    for token, _ in generate_step(mx.array([prompt]), target, None, None, **options):
        yield int(token)


@cache  # once per process
def when_drafted(then: Callable[[Any, Any, str], None]) -> None:
    """Calls ``then`` with each model that is given a drafter, it and its kind, before a prompt."""

    def put(module: Any) -> None:
        # each loop for one text asks this with its drafter, and so does the server once
        original = module.validate_drafter_compatibility

        @wraps(original)
        def validate(target_model: Any, draft_model: Any, draft_kind: Any) -> None:
            original(target_model, draft_model, draft_kind)
            then(target_model, draft_model, draft_kind)

        put_in_place("mlx_vlm", module, "validate_drafter_compatibility", validate)

    def put_in_batches(module: Any) -> None:
        original = module.BatchGenerator.__init__

        @wraps(original)
        def made(self: Any, model: Any, *arguments: Any, **options: Any) -> None:
            if options.get("draft_model") is not None:
                then(model, options["draft_model"], options["draft_kind"])
            original(self, model, *arguments, **options)

        module.BatchGenerator.__init__ = made

    when_imported(DRAFTERS, put)
    when_imported(LOOP, put_in_batches)
