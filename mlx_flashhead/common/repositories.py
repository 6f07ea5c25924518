"""Repositories of the Hugging Face Hub: their names, and messages without the user's secrets."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .command import printable

HIDDEN = "…"
_PATTERNS = (
    (re.compile(r"Bearer\s+[^\s'\"]+"), f"Bearer {HIDDEN}"),
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"), HIDDEN),
    (re.compile(r"(://)[^\s/@'\"]+:[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),
    # Addresses of the storage behind the Hub are signed in their query.
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), rf"\1?{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text without the user's token and other secrets."""
    token = get_token()
    if token:
        text = text.replace(token, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


@contextmanager
def redacted_logs() -> Iterator[None]:
    """Within the block, log messages of the Hub's client are redacted and printable."""
    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]

    def redacted(record: logging.LogRecord) -> bool:
        record.msg = printable(redact(record.getMessage()))
        record.args = ()
        record.exc_info = None
        record.exc_text = None
        return True

    for handler in handlers:
        handler.addFilter(redacted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redacted)


def full_name(name: str, user: str) -> str:
    """The full name of a repository.

    Args:
        name: Its name, with or without its owner.
        user: The owner, where it is named without.

    Returns:
        "owner/name".

    Raises:
        ValueError: If the Hub does not allow the name.
    """
    repo_id = name
    if "/" not in name:
        repo_id = f"{user}/{name}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is not a name of a repository: give OWNER/NAME of letters, digits, '-', '_' "
            "and '.', at most 96 of them."
        ) from None
    return repo_id
