"""Marks of a caller's samplers and processors, kept by identity.

An attribute of somebody else's object says nothing, whatever its name.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from inspect import ismethod
from typing import Any, TypeVar

Function = TypeVar("Function")


@dataclass
class Marks:
    """What a function was marked as."""

    pure: bool = False
    preserves_margins: bool = False
    # The tokens (n,) of a text and V → (⌈V/32⌉,) uint32, a bit for each token that may come next,
    # or None for all; of a processor that does nothing else.
    allowed: Callable[[Any, int], Any] | None = None
    begin: Callable[[], Any] | None = None  # called when a text begins
    for_sequence: Callable[[], Any] | None = None  # makes another one, for another text


_marks: dict[int, tuple[Any, Marks]] = {}  # by id: a weak reference, or the object; and its marks


def pure(function: Function) -> Function:
    """Marks a sampler or processor as a function of its arguments alone, and returns it.

    It may then be called more than once a token, so that its choices can be verified. Where the
    head has rows of 16 or fewer bits the text is decoded densely all the same.

    Args:
        function: A sampler, (1, V) log-probabilities → (1,) token, or a processor,
            (n,) tokens and (1, V) logits → (1, V) logits.
    """
    _marks_for(function).pure = True
    return function


def preserves_margins(processor: Function) -> Function:
    """Marks a processor that keeps the order of each token's logits, and returns it.

    It depends on its arguments alone. A larger logit of a token never becomes the smaller one,
    whatever the other tokens' are. A mask, a bias and a scale are such processors.

    Args:
        processor: (n,) tokens and (1, V) logits → (1, V) logits.
    """
    _marks_for(processor).preserves_margins = True
    return processor


def masks(processor: Function, allowed: Callable[[Any, int], Any]) -> Function:
    """Marks a processor that rules tokens out and changes no other logit, and returns it.

    No text needs the logits of all tokens for it.

    Args:
        processor: (n,) tokens and (1, V) logits → (1, V) logits, minus infinity for what is ruled
            out.
        allowed: (n,) tokens and V → (⌈V/32⌉,) uint32, a bit for each token that may come next, that
            of token t bit t % 32 of word t // 32; None where all may.
    """
    marks = _marks_for(processor)
    marks.preserves_margins = True
    marks.allowed = _unbound(allowed) if ismethod(allowed) else allowed
    return processor


def keeps_state(
    processor: Function, *, begin: Callable[[], Any], for_sequence: Callable[[], Any]
) -> Function:
    """Marks a processor with a state of its own, and returns it.

    Args:
        processor: The processor.
        begin: Called when a text begins.
        for_sequence: Makes another processor of the kind, for a text of its own.
    """
    marks = _marks_for(processor)
    # bound methods would hold a processor that nobody else does
    marks.begin = _unbound(begin)
    marks.for_sequence = _unbound(for_sequence)
    return processor


def marks_of(function: Any) -> Marks:
    """The marks of a function; none of a function that was never marked."""
    held, marks = _marks.get(id(function), (None, Marks()))
    if isinstance(held, weakref.ref):
        held = held()
    return marks if held is function else Marks()


def _marks_for(function: Any) -> Marks:
    known = marks_of(function)
    key = id(function)
    held: Any
    try:
        held = weakref.ref(function, lambda _: _marks.pop(key, None))
    except TypeError:  # no weak reference to it can be made: it is kept
        held = function
    _marks[key] = held, known
    return known


def _unbound(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of an object that it does not keep alive."""
    reference = weakref.WeakMethod(method)

    def call(*given: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*given)

    return call
