"""Whether a step of several tokens has the bits of single ones on this machine, and what it costs.

Both are compared part by part: the products of each shape, rotations, norms, experts, attentions,
whole layers and the model; then the texts of some kinds.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashhead.benchmarks import SAMPLERS
from mlx_flashhead.benchmarks.variants import Variant
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.models.compat.mlx_lm import make_prompt_cache, sample_utils
from mlx_flashhead.models.install import dense_copy
from mlx_flashhead.wide.step import WIDTHS, WideSteps, layout_of
from mlx_flashhead.wide.trial import established_costs, have_same_bits

# Of a text.
N_TOKENS = 64
# What a model's parts return, by name, in the order of their calls.
Results = dict[str, list[mx.array]]


def wide_figures(model: nn.Module, prompt: list[int]) -> dict[str, Any]:
    """Compares steps of several tokens with single ones.

    Args:
        model: A model of mlx-lm with a FlashHead.
        prompt: Tokens.

    Returns:
        The ``established`` numbers of tokens, the ``costs`` of these relative to a single step, by
        number of tokens the ``parts``, each with how many are ``equal`` ``of`` all that are alike,
        and the ``texts``: whether each is plain mlx-lm's, and its guessed tokens. JSON-ready.
    """
    steps = WideSteps.of(model)
    caches = make_prompt_cache(model)
    costs = established_costs(steps, caches)
    apart = steps.established[layout_of(caches)].apart
    if not costs:
        texts = {}
    else:
        texts = dict(_texts(model, prompt))
    return {
        "established": list(costs),
        "costs": costs,
        "parts": {width: compared(steps, prompt, width, apart=apart) for width in WIDTHS},
        "texts": texts,
    }


def compared(
    steps: WideSteps, prompt: list[int], width: int, *, apart: bool = False
) -> dict[str, dict[str, int]]:
    """How many parts of each kind give in a wide step the bits that they give in single ones.

    Args:
        steps: The wide steps of a model.
        prompt: What the caches hold before.
        width: Tokens of a step.
        apart: Whether each operation of an attention runs once per position.
    """
    model: Any = steps.model
    twin = steps.twin(apart=apart)
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([prompt]), cache=caches), [cache.state for cache in caches])
    tokens = mx.array([prompt[:width]])
    kinds = {name: _kind(part) for name, part in model.named_modules()}
    own = copy.deepcopy(caches)
    with _recorded(model) as singles:
        for i in range(width):
            mx.eval(model(tokens[:, i : i + 1], cache=own))
    with _recorded(twin) as wides:
        mx.eval(steps.feed_by(twin, tokens, copy.deepcopy(caches)).logits)
    equal: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, results in wides.items():
        for pair in _pairs(results, singles.get(name, []), width):
            total[kinds[name]] += 1
            equal[kinds[name]] += bool(have_same_bits(*pair))
    return {kind: {"equal": equal[kind], "of": n} for kind, n in sorted(total.items())}


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Results]:
    """A block in which the arrays that a model's parts return are noted."""
    results: Results = defaultdict(list)
    parts = [(name, part, type(part)) for name, part in model.named_modules()]
    for name, part, cls in parts:
        part.__class__ = _recording(cls, results[name])
    try:
        yield results
    finally:
        for _, part, cls in parts:
            part.__class__ = cls


def _recording(cls: Any, results: list[mx.array]) -> type:
    """A class of parts that does the same, and adds what it returns to ``results``."""

    def call(self: Any, *args: Any, **named: Any) -> Any:
        result = cls.__call__(self, *args, **named)
        if isinstance(result, mx.array):
            results.append(result)
        return result

    return type(cls.__name__, (cls,), {"__call__": call})


def _kind(part: nn.Module) -> str:
    """A part's class, and the shape of its weights where it has some."""
    weight = dict.get(part, "weight")
    bits = ""
    if hasattr(part, "bits"):
        bits = f", {part.bits} bits"
    if weight is None:
        shape = ""
    else:
        shape = f" {'x'.join(map(str, weight.shape))}{bits}"
    return f"{type(part).__name__}{shape}"


def _pairs(
    wides: list[mx.array], singles: list[mx.array], width: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """What a part gave in a wide step and in as many single ones, call by call.

    Nothing for a part that is called otherwise, or that makes no value for each position.
    """
    n_calls = len(wides)
    # The part is called once per position in both.
    if len(singles) == n_calls:
        yield from zip(wides, singles, strict=True)
    elif len(singles) == n_calls * width:
        for i, wide in enumerate(wides):
            of_call = singles[i::n_calls]
            shape = of_call[0].shape
            axes = [axis for axis, n in enumerate(wide.shape) if n != shape[axis]]
            if len(axes) == 1:
                yield wide, mx.concatenate(of_call, axis=axes[0])


def _texts(model: nn.Module, prompt: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts after a prompt that repeats itself, with guesses and by mlx-lm's loop."""
    dense = Variant(dense_copy(model))
    for kind, sampler, penalty in (
        ("greedy", "greedy", None),
        ("top-p", "top-p", None),
        ("penalty", "greedy", 1.1),
    ):
        make_processors = partial(sample_utils.make_logits_processors, repetition_penalty=penalty)
        proposer = Proposer(model, DecodingSettings(lookup="on"))
        loop = partial(verified_tokens, proposer=proposer, logprobs=False)
        run = 2 * prompt, 1, N_TOKENS, SAMPLERS[sampler], make_processors
        texts = []
        for variant in (dense, dense._replace(model=model, loop=loop)):
            mx.random.seed(0)
            _, tokens = variant.decode(*run)
            texts.append(tokens)
        yield kind, {"same": texts[0] == texts[1], "guessed": proposer.n_guessed.total()}
