"""Given text to calibrate on, by kind: files of this package and of Python's standard library.

The files in `texts` are written for this project, except the first sentences of Caesar's De Bello
Gallico. The standard library gives Python code and further documentation, which differ a little
between Python's versions.
"""

import importlib
import importlib.util
from contextlib import suppress
from importlib import resources
from pathlib import Path

PROSE, DOCUMENTATION, CODE, PYTHON = "prose", "documentation", "code", "Python"
MARKUP, DIALOGUE = "mark-up", "dialogue"
EUROPEAN, ASIAN = "European languages", "Asian languages"
KINDS = (PROSE, DOCUMENTATION, CODE, MARKUP, EUROPEAN, ASIAN, PYTHON, DIALOGUE)

FILES = {
    PROSE: "prose.txt",
    DOCUMENTATION: "documentation.txt",
    CODE: "code.txt",
    MARKUP: "markup.txt",
    EUROPEAN: "european.txt",
    ASIAN: "asian.txt",
}
SEPARATOR = "%%%%\n"  # between the documents of a file
SPEAKERS = {"User": "user", "Assistant": "assistant"}

# Characters of each module's source, from 40 % on, and of each help topic, from its beginning.
EXCERPT_CHARACTERS = 3000
MODULES = (
    "argparse", "bisect", "calendar", "cmd", "configparser", "contextlib", "csv", "dataclasses",
    "difflib", "email.message", "enum", "fractions", "functools", "gzip", "heapq", "html.parser",
    "http.client", "inspect", "ipaddress", "json.decoder", "logging.handlers", "optparse", "pickle",
    "plistlib", "queue", "random", "shlex", "shutil", "socketserver", "statistics", "string",
    "subprocess", "tarfile", "textwrap", "threading", "traceback", "unittest.case", "urllib.parse",
    "uuid", "weakref", "xml.etree.ElementTree", "zipfile",
)  # fmt: skip
TOPICS = (
    "assert", "assignment", "attribute-access", "binary", "bltin-exceptions", "booleans", "calls",
    "class", "comparisons", "compound", "customization", "debugger", "dict", "dynamic-features",
    "exceptions", "execmodel", "for", "formatstrings", "function", "global", "id-classes", "import",
    "in", "lambda", "lists", "naming", "numbers", "operator-summary", "raise", "slicings",
    "specialnames", "string-methods", "strings", "try", "typesseq", "with", "yield",
)  # fmt: skip


def given_documents() -> dict[str, list[str]]:
    """Documents by kind, always in the same order. Dialogues: :func:`dialogues`.

    Modules and topics that a Python installation lacks are left out.
    """
    documents = {kind: _documents(name) for kind, name in FILES.items()}
    documents[PYTHON] = _module_excerpts()
    documents[DOCUMENTATION] += _topic_excerpts()
    return documents


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations as lists of messages with ``role`` and ``content``."""
    found = []
    for document in _documents("dialogue.txt"):
        messages: list[dict[str, str]] = []
        for line in document.splitlines(keepends=True):
            speaker, colon, rest = line.partition(": ")
            if colon and speaker in SPEAKERS:
                messages.append({"role": SPEAKERS[speaker], "content": rest})
            else:
                messages[-1]["content"] += line
        found.append([m | {"content": m["content"].strip()} for m in messages])
    return found


def _documents(name: str) -> list[str]:
    text = (resources.files(__package__) / "texts" / name).read_text(encoding="utf-8")
    return text.split(SEPARATOR)


def _module_excerpts() -> list[str]:
    excerpts = []
    for name in MODULES:
        with suppress(ImportError, OSError, UnicodeDecodeError):
            spec = importlib.util.find_spec(name)
            source = Path(spec.origin or "").read_text(encoding="utf-8") if spec else ""
            start = source.find("\n", len(source) * 2 // 5) + 1
            if source:
                excerpts.append(source[start : start + EXCERPT_CHARACTERS])
    return excerpts


def _topic_excerpts() -> list[str]:
    with suppress(ImportError):
        topics = importlib.import_module("pydoc_data.topics").topics
        return [topics[name][:EXCERPT_CHARACTERS] for name in TOPICS if name in topics]
    return []
