"""What other programs do to mlx-lm's batches, where it is known and does nothing to most texts."""

from inspect import signature
from types import FunctionType
from typing import Any

from .mlx_lm import BatchGenerator, GenerationBatch, is_mlx_lm_processor
from .recognised import digest

# Digests of texts. oMLX (flyto-mlx 0.7.0) puts these in the places of mlx-lm's functions: they do
# something more for models with ``_uses_mrope``, and for processors that are grammars.
STEP = "_step"
CHANGES = {
    STEP: ("omlx.scheduler", "575b28147d216221"),
    "prompt": ("omlx.scheduler", "4a721ba79c66b4e9"),
}
# vllm-mlx 0.6.0: the first looks for the cache of a text, the second whether names are there.
SERVED = {
    ("vllm_mlx.scheduler", "Scheduler._extract_cache_for_uid"): "c84758e43fd93fa1",
    ("vllm_mlx.scheduler", "_configure_chunked_prefill"): "7c2a1a59f82ea05b",
}


def is_known(cls: type, as_imported: dict[str, Any], model: Any) -> bool:
    """Returns whether a class of mlx-lm is as it was imported.

    Changes are allowed that are known and do nothing to the texts of ``model``.
    """
    now = dict(vars(cls))
    if now.keys() != as_imported.keys():
        return False
    changed = [name for name, value in as_imported.items() if now[name] != value]
    if changed and getattr(model, "_uses_mrope", False):
        return False
    return all(_is_known_change(name, now[name]) for name in changed)


def _is_known_change(name: str, function: Any) -> bool:
    module, text = CHANGES.get(name, ("", ""))
    return getattr(function, "__module__", "") == module and digest(function) == text


def needs_own_step(generator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Returns whether a processor needs oMLX's step, which says which tokens were chosen.

    The processors are those in the arguments of ``insert_segments``; any needs it that is not
    mlx-lm's.
    """
    if not _is_known_change(STEP, vars(GenerationBatch)[STEP]):
        return False
    named = signature(BatchGenerator.insert_segments).bind(generator, *arguments, **options)
    given = named.arguments.get("logits_processors") or [generator.logits_processors]
    return not all(is_mlx_lm_processor(each) for processors in given for each in processors or ())


def is_served(function: FunctionType) -> bool:
    """Whether a function looks into mlx-lm's batches, and gets what it looks for from ours."""
    expected = SERVED.get((function.__module__, function.__qualname__))
    return expected is not None and digest(function) == expected
