"""Dialects: what each API makes of a request and its answer. Behind them all requests are one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .answer_text import Token
from .api_errors import ApiError
from .jobs import Job


class StreamEvent(NamedTuple):
    """An event of a stream.

    Attributes:
        data: An object, or a text that is sent as it is.
        name: Empty in an API whose events have no names.
    """

    data: dict[str, Any] | str
    name: str = ""


class Answer(Protocol):
    """The answer to a request, up to its latest token."""

    @property
    def is_complete(self) -> bool:
        """Whether all of its texts are."""

    def begin(self) -> list[StreamEvent]:
        """The events before all others, once the engine has begun with the prompt."""

    def add(self, index: int, token: Token) -> list[StreamEvent]:
        """Adds what a token adds to the text of an index, with calls in OpenAI's form."""

    def end(self) -> list[StreamEvent]:
        """The events after all others."""

    def fail(self, problem: ApiError) -> list[StreamEvent]:
        """The events that end a stream instead."""

    def whole(self) -> dict[str, Any]:
        """The body that answers a request without a stream."""


@dataclass(frozen=True)
class Dialect:
    """How an API writes requests and answers.

    Attributes:
        chat: Whether requests are chats; else texts are continued.
        fields: Makes the fields of chat completions of a body.
        answer: Makes an answer of the request's jobs and its body.
        refused: Makes the events of a stream whose request is refused.
        forms: Fields of which grammars are made, which takes long.
        form: The field with a schema that an answer follows.
        any_model: Whether clients name models of their own, whatever is served.
        silence: What a stream sends where an answer grows by nothing that it shows, so that no
            client and no proxy gives up: a comment, or an event that clients know.
        count_object: The name of what counts a prompt's tokens, if it has one.
    """

    chat: bool
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    answer: Callable[[list[Job], dict[str, Any]], Answer]
    refused: Callable[[ApiError], list[StreamEvent]]
    forms: tuple[str, ...]
    form: str = "response_format.json_schema"
    any_model: bool = False
    silence: str | StreamEvent = ": working"
    count_object: str | None = None
