"""Wide steps against single ones, to the last bit."""

import copy

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache, make_prompt_cache

from mlx_flashhead.wide.step import Established, WideSteps, layout_of
from mlx_flashhead.wide.trial import established_costs

# The tokens that are fed are below it. A model may have more.
VOCAB_SIZE = 100
# Whether an attention takes positions apart.
FORMS = (False, True)


def bits(arrays) -> list[tuple]:
    """Dtypes, shapes and bits of arrays."""
    found = []
    for array in arrays:
        # An array without axes cannot be viewed as bytes.
        if array.ndim == 0:
            array = array[None]
        content = np.array(array.view(mx.uint8)).tobytes()
        found.append((array.dtype, array.shape, content))
    return found


def held(caches) -> list[tuple]:
    """What caches hold of a text: the bits of their arrays up to their end, and all numbers."""
    arrays = []
    for cache in caches:
        if isinstance(cache, CacheList):
            arrays += held(cache.caches)
        elif isinstance(cache, ArraysCache):
            own = [*cache.cache, cache.left_padding]
            arrays += bits(array for array in own if array is not None)
        elif cache.keys is not None:
            positions = {name: _number(value) for name, value in vars(cache).items()}
            ends = [positions.get(name) for name in ("_offset", "_idx", "offset")]
            if isinstance(cache, RotatingKVCache):
                ends = [cache.offset]
            end = next(end for end in ends if end is not None)
            start = positions.get("start_position", 0)
            tree = tree_flatten([cache.keys, cache.values])
            valid = [array[..., : end - start, :] for _, array in tree]
            arrays += [*bits(valid), positions]
    return arrays


def _number(value):
    """A cache's attribute, if it is a number or an array of some."""
    if isinstance(value, mx.array):
        if value.ndim == 1:
            return value.tolist()
        return None
    if isinstance(value, int):
        return value
    return None


def of_a_batch(caches):
    """Caches of a text alone as those of a text that is alone in a batch."""
    return [layer.merge([layer]) for layer in caches]


def read(model, length, caches=None, seed=0):
    """Caches of a prompt of ``length`` tokens, and some tokens that follow it."""
    tokens = np.random.default_rng(seed + length).integers(0, VOCAB_SIZE, length + 16)
    if caches is None:
        caches = make_prompt_cache(model)
    # The prompt is read as mlx-lm reads it.
    for prompt in (tokens[: length - 1], tokens[length - 1 : length]):
        if len(prompt):
            model(mx.array(prompt[None]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches, mx.array(tokens[None, length:])


def single_steps(model, tokens, caches) -> list[tuple]:
    """The bits of the logits after each of some tokens (1, T)."""
    found = []
    for j in range(tokens.shape[1]):
        logits = model(tokens[:, j : j + 1], cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        found += bits([logits])
    return found


def wide_steps(model, caches, *, apart) -> WideSteps:
    """Wide steps of a model, without a trial."""
    steps = WideSteps.of(model)
    costs = dict.fromkeys(range(2, 9), 1.0)
    steps.established[layout_of(caches)] = Established(costs, apart, costs_past_end=costs)
    return steps


def same_as_single(model, length, width, caches=None, *, apart) -> bool:
    """Whether a wide step after a prompt, and the step after it, have the bits of single steps."""
    caches, tokens = read(model, length, caches)
    single = copy.deepcopy(caches)
    expected = single_steps(model, tokens[:, :width], single)
    left = held(single)
    steps = wide_steps(model, caches, apart=apart)
    step = steps.feed(tokens[:, :width], caches)
    found = bits(mx.split(step.logits, width, axis=1))
    # The model is unchanged.
    assert WideSteps.of(model) is steps
    alike = found == expected and held(caches) == left
    after = tokens[:, width : width + 1]
    return alike and single_steps(model, after, caches) == single_steps(model, after, single)


def form_that_holds(model, lengths, widths) -> bool | None:
    """Whether attentions must take positions apart for wide steps to hold; None where none do."""
    for apart in FORMS:
        try:
            if all(same_as_single(model, n, w, apart=apart) for n in lengths for w in widths):
                return apart
        except Exception:
            # A model may do anything.
            continue
    return None


def widths_of(model) -> list[int]:
    """The widths of the steps that are established for a model."""
    return list(established_costs(WideSteps.of(model), make_prompt_cache(model)))
