"""Anthropic's API of messages, as Claude Code speaks it: a chat in blocks.

Source: the types of Anthropic's SDK, and https://platform.claude.com/docs/en/api/messages.
"""

import json
import uuid
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from .api_errors import ApiError, field_error
from .choices import usage_of
from .content_parts import BETWEEN_TEXTS, ChatMessages, Parts, passed_on
from .dialects import Dialect, StreamEvent
from .fields import Count, Limit, Share, StopTexts, Temperature, read_struct, without_nulls
from .jobs import Job

# Begins a block of Claude Code's system prompt that is meant for Anthropic's bills. What follows is
# another one in each conversation, so that no prompt would begin like the last one.
_BILLING = "x-anthropic-billing-header:"


class _TextBlock(Struct, tag="text", tag_field="type"):
    text: str


class _Thinking(Struct, tag="thinking", tag_field="type"):
    thinking: str


class _RedactedThinking(Struct, tag="redacted_thinking", tag_field="type"):
    """A thought that Anthropic alone can read."""


class _ToolUse(Struct, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: dict[str, Any]


_Texts = Annotated[
    str | Annotated[list[_TextBlock], Meta(max_length=1024)],
    Meta(description='a text, or a list of at most 1,024 {"type": "text", "text": "…"}'),
]


class _ToolResult(Struct, tag="tool_result", tag_field="type"):
    tool_use_id: str
    content: _Texts | None = None


_Block = _TextBlock | _Thinking | _RedactedThinking | _ToolUse | _ToolResult


class _Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | Annotated[list[_Block], Meta(max_length=1024)],
        Meta(description="a text, or a list of at most 1,024 blocks"),
    ]


class _Tool(Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class _ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _ThinkingMode(Struct):
    type: Literal["enabled", "adaptive", "disabled"]


class _OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(Struct):
    effort: str | None = None
    format: _OutputFormat | None = None


class _MessageFields(Struct):
    """The fields of messages. Those of chats that are not here mean the same."""

    messages: Annotated[
        list[_Turn],
        Meta(
            min_length=1,
            max_length=4096,
            description='a list of 1 to 4,096 objects such as {"role": "user", "content": "…"}',
        ),
    ]
    system: _Texts = ""
    max_tokens: Limit | None = None
    stop_sequences: StopTexts = []
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    tools: Annotated[list[_Tool], Meta(max_length=512, description="a list of at most 512")] = []
    tool_choice: Annotated[
        _ToolChoice | None, Meta(description='an object such as {"type": "auto"}')
    ] = None
    thinking: Annotated[
        _ThinkingMode | None, Meta(description='an object such as {"type": "disabled"}')
    ] = None
    output_config: Annotated[_OutputConfig | None, Meta(description="an object")] = None


_TRANSLATED = (
    "messages",
    "system",
    "stop_sequences",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
)


def chat_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of chat completions that ask for the same as those of messages.

    Raises:
        ApiError: If a field is wrong, or asks for what Anthropic's servers alone have.
    """
    values = without_nulls(body)
    for name in ("mcp_servers", "container"):
        if values.get(name):
            raise field_error(name, "cannot be followed here: leave it out.")
    fields = read_struct(values, _MessageFields)
    choice = fields.tool_choice or _ToolChoice("auto")
    output = fields.output_config or _OutputConfig()
    chat = passed_on(values, _TRANSLATED)
    chat["messages"] = _chat_messages(fields)
    chat["stop"] = fields.stop_sequences
    chat["tools"] = [_function(tool, i) for i, tool in enumerate(fields.tools)]
    chat["tool_choice"] = _chat_choice(choice)
    chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    chat["reasoning_effort"] = output.effort
    if fields.thinking is not None:
        chat["enable_thinking"] = fields.thinking.type != "disabled"
    if output.format is not None:
        described = {"name": "answer", "schema": output.format.schema}
        chat["response_format"] = {"type": "json_schema", "json_schema": described}
    return chat


def _chat_messages(fields: _MessageFields) -> list[dict[str, Any]]:
    conversation = ChatMessages()
    if isinstance(fields.system, str):
        fields.system = [_TextBlock(fields.system)]
    for part in fields.system:
        if part.text and not part.text.startswith(_BILLING):
            conversation.say("system", part.text)
    for turn in fields.messages:
        if isinstance(turn.content, str):
            turn.content = [_TextBlock(turn.content)]
        for block in turn.content:
            _add_block(conversation, turn.role, block)
    if not conversation.messages:
        raise field_error("messages", "have no content: send a text.")
    if conversation.messages[-1]["role"] == "assistant":
        raise field_error(
            "messages", "end with the assistant, whose text is not continued: end with the user."
        )
    return conversation.messages


def _add_block(conversation: ChatMessages, role: str, block: _Block) -> None:
    match block:
        case _TextBlock(text):
            conversation.say(role, text)
        case _Thinking(thought):
            conversation.think(thought)
        case _ToolUse(number, name, arguments):
            conversation.call(number, name, arguments)
        case _ToolResult(number, content):
            conversation.result(number, _joined(content or ""))


def _joined(content: str | list[_TextBlock]) -> str:
    """The text of texts."""
    if isinstance(content, str):
        return content
    return BETWEEN_TEXTS.join(block.text for block in content)


def _function(tool: _Tool, i: int) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    if tool.type not in (None, "custom"):
        raise ApiError(
            f"tools[{i}] is {tool.type:.40}, a tool of Anthropic's: this server has none, send "
            "tools with an input_schema.",
            "tools",
        )
    function = {"name": tool.name, "parameters": tool.input_schema or {}}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _chat_choice(choice: _ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type == "any":
        return "required"
    return choice.type


class MessageAnswer(Parts):
    """An answer as Anthropic's message of blocks."""

    def __init__(self, jobs: list[Job], body: dict[str, Any]):
        super().__init__(jobs[0])
        self._id = f"msg_{uuid.uuid4().hex}"

    def begin(self) -> list[StreamEvent]:
        """The event with a message that has no blocks yet."""
        return [_event("message_start", message=self.whole())]

    def end(self) -> list[StreamEvent]:
        """The events with the reason of the end."""
        ended = {"stop_reason": self._stop_reason, "stop_sequence": self.stop_text}
        return [
            _event("message_delta", delta=ended, usage=self._usage()),
            _event("message_stop"),
        ]

    def fail(self, problem: ApiError) -> list[StreamEvent]:
        """The event of an error."""
        return refused(problem)

    def whole(self) -> dict[str, Any]:
        """The message."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.served.name,
            "content": self.parts,
            "stop_reason": self._stop_reason,
            "stop_sequence": self.stop_text,
            "usage": self._usage(),
        }

    @property
    def _stop_reason(self) -> str | None:
        if self.finish_reason is None:
            return None
        if self.finish_reason == "length":
            return "max_tokens"
        if self.stop_text is not None:
            return "stop_sequence"
        has_calls = any(part["type"] == "tool_use" for part in self.parts)
        if has_calls:
            return "tool_use"
        return "end_turn"

    def _usage(self) -> dict[str, Any]:
        """The tokens. Those of a prompt that a cache held are counted apart from the others."""
        usage = usage_of([self._job])
        n_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - n_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": n_cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _begin_part(self, kind: str) -> list[StreamEvent]:
        block: dict[str, Any] = {"type": "text", "text": ""}
        if kind == "thought":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        return [self._begin_block(block)]

    def _begin_block(self, block: dict[str, Any]) -> StreamEvent:
        index = len(self.parts)
        self.parts.append(block)
        return _event("content_block_start", index=index, content_block=dict(block))

    def _delta(self, kind: str, text: str) -> StreamEvent:
        if kind == "thought":
            return self._change(type="thinking_delta", thinking=text)
        return self._change(type="text_delta", text=text)

    def _change(self, **delta: str) -> StreamEvent:
        return _event("content_block_delta", index=len(self.parts) - 1, delta=delta)

    def _end_of(self, kind: str, text: str) -> list[StreamEvent]:
        if kind == "thought":
            self.parts[-1]["thinking"] = text
            signature = self._change(type="signature_delta", signature="")
            return [signature, self._end_block()]
        self.parts[-1]["text"] = text
        return [self._end_block()]

    def _end_block(self) -> StreamEvent:
        return _event("content_block_stop", index=len(self.parts) - 1)

    def _call(self, number: str, name: str, arguments: str) -> list[StreamEvent]:
        begun = self._begin_block({"type": "tool_use", "id": number, "name": name, "input": {}})
        self.parts[-1]["input"] = json.loads(arguments)
        change = self._change(type="input_json_delta", partial_json=arguments)
        return [begun, change, self._end_block()]


def refused(problem: ApiError) -> list[StreamEvent]:
    """The event of an error."""
    return [StreamEvent(problem.as_anthropic_json(), "error")]


def _event(event_name: str, **data: Any) -> StreamEvent:
    return StreamEvent({"type": event_name, **data}, event_name)


MESSAGES = Dialect(
    chat=True,
    fields=chat_fields,
    answer=MessageAnswer,
    refused=refused,
    forms=("tools", "output_config"),
    form="output_config.format",
    any_model=True,
    silence=_event("ping"),
)
