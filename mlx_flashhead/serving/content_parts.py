"""What the APIs of coding agents have in common: turns made of parts, both ways.

A request's parts become the messages of a chat. What a model writes becomes parts again: thoughts,
texts and calls, of which the last one may grow.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .answer_text import Token
from .api_errors import field_error
from .dialects import StreamEvent
from .fields import shown
from .jobs import Job

BETWEEN_TEXTS = "\n\n"
# Fields of chat completions that have no place in another API's answer, and what changes nothing.
_OF_CHATS: dict[str, Any] = {"n": 1, "logprobs": False, "top_logprobs": 0}


def passed_on(body: Mapping[str, Any], translated: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a request that mean the same in a chat completion.

    Args:
        body: The fields that are there.
        translated: Names of those that do not.

    Raises:
        ApiError: If a field cannot be answered in another API than that of chat completions.
    """
    for name, neutral in _OF_CHATS.items():
        if body.get(name, neutral) != neutral:
            raise field_error(
                name, f"is {shown(body[name])}: it is a field of chat completions, leave it out."
            )
    return {name: value for name, value in body.items() if name not in translated}


class ChatMessages:
    """The messages of a chat, to which turns are added.

    Turns of one role that follow each other are one message, since many templates want users and
    assistants to alternate. System messages are one at the beginning. Later ones are a user's: many
    templates refuse them.
    """

    def __init__(self):
        self.messages: list[dict[str, Any]] = []
        # The names of the functions called, by the calls' ids.
        self._names: dict[str, str] = {}

    def say(self, role: str, text: str) -> None:
        """Adds a text of a role: system, developer, user or assistant."""
        if role in ("system", "developer"):
            role = "user"
            if all(message["role"] == "system" for message in self.messages):
                role = "system"
        message = self._turn_of(role)
        texts = [each for each in (message["content"], text) if each]
        message["content"] = BETWEEN_TEXTS.join(texts)

    def think(self, thought: str) -> None:
        """Adds a thought of the assistant."""
        message = self._turn_of("assistant")
        message["reasoning_content"] = message.get("reasoning_content", "") + thought

    def call(self, number: str, name: str, arguments: dict[str, Any] | str) -> None:
        """Adds a call of the assistant. ``number`` is its id."""
        self._names[number] = name
        function = {"name": name, "arguments": arguments}
        call = {"id": number, "type": "function", "function": function}
        self._turn_of("assistant").setdefault("tool_calls", []).append(call)

    def result(self, number: str, text: str) -> None:
        """Adds the result of a call."""
        message = {"role": "tool", "tool_call_id": number, "content": text}
        if number in self._names:
            message["name"] = self._names[number]
        self.messages.append(message)

    def _turn_of(self, role: str) -> dict[str, Any]:
        """The last message if it is of a role, else a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]


class Parts(ABC):
    """An answer as a list of parts, each of which begins, grows and ends. Empty ones do not begin.

    Attributes:
        parts: Those that have begun, as the API has them.
        finish_reason: "stop" or "length" if the answer is complete.
    """

    def __init__(self, job: Job):
        self.parts: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stop_text: str | None = None
        self._job = job
        # "thought" or "text" if the last part may grow, and what it has become.
        self._kind = ""
        self._grown = ""
        # The white space with which a part of a kind will begin.
        self._spaces: dict[str, str] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the answer is."""
        return self.finish_reason is not None

    def add(self, index: int, token: Token) -> list[StreamEvent]:
        """Adds what a token adds."""
        events = self._grow("thought", token.reasoning)
        events += self._grow("text", token.content)
        for call in token.calls:
            events += self._end_part()
            events += self._call(call["id"], **call["function"])
        self.finish_reason = token.finish_reason
        self.stop_text = token.stop_text
        if token.finish_reason is not None:
            events += self._end_part()
        return events

    def _grow(self, kind: str, text: str) -> list[StreamEvent]:
        if not text:
            return []
        events: list[StreamEvent] = []
        if kind != self._kind:
            text = self._spaces.get(kind, "") + text
            self._spaces = {kind: text}
            if not text.strip():
                return []
            events = self._end_part()
            self._kind = kind
            events += self._begin_part(kind)
        self._grown += text
        return [*events, self._delta(kind, text)]

    def _end_part(self) -> list[StreamEvent]:
        kind = self._kind
        text = self._grown
        self._kind = ""
        self._grown = ""
        self._spaces = {}
        if not kind:
            return []
        return self._end_of(kind, text)

    @abstractmethod
    def _begin_part(self, kind: str) -> list[StreamEvent]:
        """Begins a part of a kind, which is the last of ``parts`` then."""

    @abstractmethod
    def _delta(self, kind: str, text: str) -> StreamEvent:
        """Adds a text to the last part."""

    @abstractmethod
    def _end_of(self, kind: str, text: str) -> list[StreamEvent]:
        """Ends the last part, which has become a text."""

    @abstractmethod
    def _call(self, number: str, name: str, arguments: str) -> list[StreamEvent]:
        """Adds a whole call, with its id and its arguments as JSON."""
