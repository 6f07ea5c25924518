"""Fills in a chat template, as transformers does, in a helper process (common/guarded.py).

It does without transformers, which takes a second and much memory to import.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

# Of a text.
MAX_CHARACTERS = 1 << 24


def work(request: list[Any]) -> Any:
    """Text of ``[template, variables]``; of ``[template]`` the names of variables that it reads."""
    environment = _environment()
    if len(request) == 1:
        names = meta.find_undeclared_variables(environment.parse(request[0]))
        return sorted(names - environment.globals.keys())
    text = _compiled(request[0]).render(json.loads(request[1]))
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its text has more than {MAX_CHARACTERS:,} characters")
    return text


class _Generation(Extension):
    """``{% generation %}`` marks what the model writes. Its text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """One without names that reach Python's inside, as in transformers."""

    def __init__(*args: Any, **attributes: Any):
        # So an attribute may be called self.
        self, *parts = args
        Namespace.__init__(self)
        for name, value in dict(*parts, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r} in a template")
        super().__setitem__(name, value)


@lru_cache(1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *parts, **entries: dict(*parts, **entries),
        "namespace": _Namespace,
    }
    return environment


@lru_cache(8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    form = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    return json.dumps(value, sort_keys=sort_keys, **form)


def _raise(message: str) -> None:
    raise TemplateError(message)
