"""What other programs do to mlx-lm's batches, by program and version, where it is known."""

from typing import Any

import mlx.core as mx

from .recognised import digest, replaced_names

# Functions that a program puts in the places of mlx-lm's: the module, and the digest of the text.
# They do something more for models with ``_uses_mrope``, and for processors that are grammars.
REPLACEMENTS = {
    "oMLX (flyto-mlx 0.7.0)": {
        "GenerationBatch._step": ("omlx.scheduler", "575b28147d216221"),
        "PromptProcessingBatch.prompt": ("omlx.scheduler", "4a721ba79c66b4e9"),
    },
}
# Processors that such a step tells which tokens were chosen.
GRAMMARS = {"oMLX (flyto-mlx 0.7.0)": ("omlx.api.grammar", "GrammarConstraintProcessor")}


def batches_are_as_imported(model: Any) -> bool:
    """Whether mlx-lm's batches would decode a model's texts as they did when imported.

    They would with a replacement that is known and does nothing to the texts of ``model``.
    """
    replaced = replaced_names()
    if not replaced:
        return True
    if getattr(model, "_uses_mrope", False):
        return False
    now = {}
    for name, function in replaced.items():
        now[name] = (getattr(function, "__module__", ""), digest(function))
    return any(now.items() <= known.items() for known in REPLACEMENTS.values())


class Told:
    """A grammar of a program, which is told the tokens that were chosen in its text.

    Args:
        grammar: The program's processor, with ``accept_token``.
    """

    def __init__(self, grammar: Any):
        self._grammar = grammar
        self._begun = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Called once a token, as mlx-lm calls a processor that it does not know."""
        if self._begun:
            self._grammar.accept_token(tokens[-1].item())
        self._begun = True
        allowed: mx.array = self._grammar(tokens, logits)
        return allowed


def adapted(processors: Any) -> Any:
    """The ``logits_processors`` of ``insert_segments``, where known grammars are told tokens."""
    if not processors:
        return processors
    found = []
    for of_text in processors:
        found.append([_adapted(processor) for processor in of_text or ()])
    return found


def _adapted(processor: Any) -> Any:
    cls = type(processor)
    if (cls.__module__, cls.__qualname__) in GRAMMARS.values():
        return Told(processor)
    return processor
