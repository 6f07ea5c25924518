"""What all formats of calls have in common: a grammar of what mlx-lm's parser reads.

Each text of it becomes a call whose arguments follow the tool's schema. What a format cannot carry,
such as its own end mark within a string, is left out.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .dialects import (
    Dialect,
    FormatMarks,
    json_dialect,
)
from .lark import LarkRules, literal, one_of, one_of_written
from .schemas import Plain, Schemas, listed_properties
from .values import Brackets, ValueRules


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Any = field(default_factory=dict)  # a JSON schema of an object


class CallFormat(ABC):
    """A format of calls. ``section`` is what follows the mark at its start.

    Attributes:
        start: The mark that begins a section, as mlx-lm's parser has it.
        end: The mark that ends it; empty if the end of the answer does.
        names: A regular expression of the names that the format can carry.
        several_in_section: Whether a section may hold several calls.
    """

    start: ClassVar[str]
    end: ClassVar[str]
    names: ClassVar[str] = r"[^\s\"'<>&\[\]{}|:=\\]+"
    several_in_section: ClassVar[bool] = False

    def __init__(self, marks: FormatMarks):
        self.marks = marks
        self.rules = LarkRules()

    def section(self, tools: Sequence[Tool], *, several: bool) -> str:
        """A Lark expression of a section with a call, or several ones.

        Raises:
            ValueError: If a tool cannot be called in this format.
        """
        calls = []
        for tool in tools:
            try:
                call = self._checked_call(tool)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"The tool {tool.name!r:.60} cannot be called: {error}.") from None
            except (TypeError, AttributeError, KeyError, ArithmeticError):
                problem = "its parameters are no JSON schema"
                raise ValueError(
                    f"The tool {tool.name!r:.60} cannot be called: {problem}."
                ) from None
            calls.append(self.rules.rule(call))
        any_call = self.rules.rule(one_of(calls))
        return self.calls(any_call, several=several and self.several_in_section)

    def calls(self, call: str, *, several: bool) -> str:
        """A Lark expression of a section of calls."""
        inside = f"({call})+" if several else call
        return f"{inside} {self.marks.expression(self.end)}"

    @abstractmethod
    def call(self, tool: Tool) -> str | None:
        """A Lark expression of a call; None if it cannot be written."""

    def view(self, tool: Tool) -> Any:
        """The tool's parameters as mlx-lm's parser must see them to read the types."""
        return tool.parameters

    def _checked_call(self, tool: Tool) -> str:
        if not re.fullmatch(self.names, tool.name):
            raise ValueError("this model's format has no such names")
        call = self.call(tool)
        if call is None:
            raise ValueError("its required arguments cannot be written in this model's format")
        return call

    def _values(self, tool: Tool, dialect: Dialect) -> ValueRules:
        return ValueRules(self.rules, Schemas(tool.parameters), dialect, self.marks)

    def _objects(self, tool: Tool) -> list[Plain]:
        """The alternatives of a call's arguments."""
        schema = tool.parameters
        if isinstance(schema, dict) and not (schema.keys() & {"type", "$ref", "anyOf", "oneOf"}):
            schema = {**schema, "type": "object"}
        alternatives = Schemas(tool.parameters).alternatives(schema)
        return [plain for plain in alternatives if plain.get("type") == "object"]

    def _json_object(self, tool: Tool, *forbidden: str) -> str | None:
        return self._values(tool, json_dialect(*forbidden)).any_of(self._objects(tool))

    def _members(
        self,
        tool: Tool,
        values: ValueRules,
        brackets: Brackets,
        key: Callable[[str], str | None],
    ) -> str | None:
        """A Lark expression of all arguments within brackets; None if they cannot be written.

        Args:
            tool: The tool.
            values: How values are written.
            brackets: What is written around and between the arguments.
            key: How the name of an argument is written; None if it cannot be.
        """
        objects = self._objects(tool)
        return one_of_written(values.members(plain, brackets, key=key) for plain in objects)

    def _in_sequence(
        self, plain: Plain, written: Callable[[str, Any], str | None]
    ) -> list[tuple[str, bool]] | None:
        """Lark expressions of the arguments in the schema's order, each with whether it is needed.

        Args:
            plain: A plain schema of objects.
            written: From an argument's name and schema to its expression; None if it cannot be
                written.

        Returns:
            None if an argument that is needed cannot be written.
        """
        arguments: list[tuple[str, bool]] = []
        required = plain.get("required", ())
        for name, schema in listed_properties(plain).items():
            expression = written(name, schema)
            if expression is not None:
                arguments.append((expression, name in required))
            elif name in required:
                return None
        return arguments

    def _list(self, call: str, comma: str, *, several: bool) -> str:
        """A Lark expression of calls in square brackets."""
        more = f"({comma} {call})*" if several else ""
        return f"{literal('[')} {call} {more} {literal(']')}"

    @staticmethod
    def _joined(arguments: Sequence[tuple[str, bool]]) -> str:
        """A Lark expression of arguments one after the other; those not needed may be left out."""
        return " ".join(text if needed else f"({text})?" for text, needed in arguments)

    def _padding(self) -> str:
        """A Lark expression of the spaces and lines that may be between two marks."""
        spaces = self.rules.terminal([r"( \n?|\n{1,2})"])
        return f"{spaces}?"
