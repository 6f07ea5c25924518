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

    # The tokens (n,) of a text and V → (⌈V/32⌉,) uint32, a bit for each token that may come next,
    # or None for all; of a processor that does nothing else.
    allowed: Callable[[Any, int], Any] | None = None
    # The tokens (n,) of a text and a number → the next ones, so many at most, if no others may come
    forced: Callable[[Any, int], list[int]] | None = None
    begin: Callable[[], Any] | None = None  # called when a text begins
    for_sequence: Callable[[], Any] | None = None  # makes another one, for another text


_marks: dict[int, tuple[Any, Marks]] = {}  # by id: a weak reference, or the object; and its marks


def masks(
    processor: Function,
    allowed: Callable[[Any, int], Any],
    forced: Callable[[Any, int], list[int]] | None = None,
) -> Function:
    """Marks a processor that rules tokens out and changes no other logit, and returns it.

    No text needs the logits of all tokens for it.

    Args:
        processor: (n,) tokens and (1, V) logits → (1, V) logits, minus infinity for what is ruled
            out.
        allowed: (n,) tokens and V → (⌈V/32⌉,) uint32, a bit for each token that may come next, that
            of token t bit t % 32 of word t // 32; None where all may.
        forced: (n,) tokens and a number → the next tokens, so many at most, if no others may come.
    """
    marks = _marks_for(processor)
    marks.allowed = _unbound(allowed) if ismethod(allowed) else allowed
    marks.forced = _unbound(forced) if ismethod(forced) else forced
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
