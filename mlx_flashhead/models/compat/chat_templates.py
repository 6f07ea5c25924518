"""Limits of a chat template's arithmetic, which jinja's sandbox lacks: ``{{ 7 ** 30000000 }}``
computes for minutes in one operation, which nothing interrupts."""

from typing import Any

import mlx_lm  # turns the notices of transformers off
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from transformers.utils import chat_template_utils

MAX_BITS = 4096  # of a number
MAX_LENGTH = 1 << 24  # of a repeated text or list


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product or a power has a limited size."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of ``left * right`` or ``left ** right``; SecurityError if it is too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            small = bits + right.bit_length() <= MAX_BITS
        else:
            length = max(
                len(side) if isinstance(side, str | list | tuple) else 0 for side in (left, right)
            )
            times = next((side for side in (left, right) if isinstance(side, int)), 0)
            small = length * times <= MAX_LENGTH
        if not small:
            raise SecurityError(f"the result of a {operator} in it is too large")
        return super().call_binop(context, operator, left, right)


chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # type: ignore[misc]
