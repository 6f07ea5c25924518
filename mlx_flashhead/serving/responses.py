"""OpenAI's API of responses, as Codex speaks it: a chat in items. None of them is kept.

Source: the types of OpenAI's SDK, and https://platform.openai.com/docs/api-reference/responses.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from .api_errors import ApiError, field_error
from .bodies import check_size
from .choices import usage_of
from .content_parts import BETWEEN_TEXTS, ChatMessages, Parts, passed_on
from .dialects import Dialect, StreamEvent
from .fields import Limit, Share, Temperature, read_struct, shown, without_nulls
from .jobs import Job
from .requests import read_arguments

# It stands between the names of a namespace and a function.
_BETWEEN_NAMES = "__"


class _InputText(Struct, tag="input_text", tag_field="type"):
    text: str


class _OutputText(Struct, tag="output_text", tag_field="type"):
    text: str


class _TextPart(Struct, tag="text", tag_field="type"):
    text: str


class _Refusal(Struct, tag="refusal", tag_field="type"):
    refusal: str


_Part = _InputText | _OutputText | _TextPart | _Refusal
_Content = Annotated[
    str | Annotated[list[_Part], Meta(max_length=1024)],
    Meta(description='a text, or a list of at most 1,024 {"type": "input_text", "text": "…"}'),
]


class _Message(Struct, tag="message", tag_field="type"):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content


class _ReasoningPart(Struct):
    text: str


class _Reasoning(Struct, tag="reasoning", tag_field="type"):
    summary: list[_ReasoningPart] = []
    content: list[_ReasoningPart] | None = None
    encrypted_content: str | None = None


class _FunctionCall(Struct, tag="function_call", tag_field="type"):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class _FunctionCallOutput(Struct, tag="function_call_output", tag_field="type"):
    call_id: str
    output: _Content


_Item = _Message | _Reasoning | _FunctionCall | _FunctionCallOutput


class _Tool(Struct):
    """A function; or a namespace, which has tools; or a search, which may have no access."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    tools: list["_Tool"] | None = None
    external_web_access: bool | None = None


class _Format(Struct):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema: dict[str, Any] | None = None


class _TextSettings(Struct):
    format: _Format | None = None
    verbosity: str | None = None


class _ReasoningSettings(Struct):
    effort: str | None = None


class _ResponseFields(Struct):
    """The fields of responses. Those of chats that are not here mean the same."""

    input: Annotated[
        str | Annotated[list[_Item], Meta(min_length=1, max_length=4096)],
        Meta(description="a text, or a list of 1 to 4,096 items"),
    ]
    instructions: str = ""
    max_output_tokens: Limit | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    tools: Annotated[list[_Tool], Meta(max_length=512, description="a list of at most 512")] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    text: Annotated[_TextSettings | None, Meta(description="an object")] = None
    reasoning: Annotated[_ReasoningSettings | None, Meta(description="an object")] = None
    include: list[str] = []
    truncation: Literal["disabled", "auto"] = "disabled"


_TRANSLATED = (
    "input",
    "instructions",
    "max_output_tokens",
    "tools",
    "text",
    "reasoning",
    "include",
    "truncation",
)
# Fields for what OpenAI keeps or runs, the values that change nothing, and what to do instead.
_NOT_KEPT = "responses are not kept here, send the whole conversation as input"
_OF_OPENAI: dict[str, tuple[Any, str]] = {
    "previous_response_id": (None, _NOT_KEPT),
    "conversation": (None, _NOT_KEPT),
    "background": (False, "an answer comes in its own response"),
}


def chat_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of chat completions that ask for the same as those of responses.

    Raises:
        ApiError: If a field is wrong, or asks for what OpenAI's servers alone have.
    """
    values = without_nulls(body)
    for name, (neutral, remedy) in _OF_OPENAI.items():
        if values.pop(name, neutral) != neutral:
            raise field_error(name, f"cannot be followed: {remedy}.")
    if isinstance(values.get("input"), list):
        values["input"] = [_typed(item) for item in values["input"]]
    fields = read_struct(values, _ResponseFields)
    if "message.output_text.logprobs" in fields.include:
        raise field_error("include", "asks for logprobs: chat completions have them.")
    chat = passed_on(values, _TRANSLATED)
    chat["messages"] = _chat_messages(fields)
    chat["max_tokens"] = fields.max_output_tokens
    chat["tools"] = _functions(fields.tools)
    text = fields.text or _TextSettings()
    chat["verbosity"] = text.verbosity
    if text.format is not None:
        chat["response_format"] = _response_format(text.format)
    if fields.reasoning is not None:
        chat["reasoning_effort"] = fields.reasoning.effort
        if fields.reasoning.effort == "none":
            chat["enable_thinking"] = False
    return chat


def _typed(item: Any) -> Any:
    """An item with its type: one with a role alone is a message."""
    if isinstance(item, dict) and "role" in item:
        return {"type": "message", **item}
    return item


def _chat_messages(fields: _ResponseFields) -> list[dict[str, Any]]:
    conversation = ChatMessages()
    if fields.instructions:
        conversation.say("system", fields.instructions)
    items = fields.input
    if isinstance(items, str):
        items = [_Message("user", items)]
    check_size(",".join(_arguments_in(items)).encode())
    for i, item in enumerate(items):
        match item:
            case _Message(role, content):
                conversation.say(role, _joined(content))
            case _Reasoning():
                conversation.think(_thought_of(item))
            case _FunctionCall(number, name, arguments, namespace):
                read = read_arguments(arguments, f"input[{i}]")
                conversation.call(number, _full_name(namespace, name), read)
            case _FunctionCallOutput(number, output):
                conversation.result(number, _joined(output))
    return conversation.messages


def _arguments_in(items: list[_Item]) -> list[str]:
    """The arguments of all calls, which are JSON within JSON."""
    return [item.arguments for item in items if isinstance(item, _FunctionCall)]


def _joined(content: str | list[_Part]) -> str:
    """The text of parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, _Refusal):
            texts.append(part.refusal)
        else:
            texts.append(part.text)
    return BETWEEN_TEXTS.join(texts)


def _thought_of(item: _Reasoning) -> str:
    """The thought of an item. Clients that keep nothing send it back as `encrypted_content`."""
    parts = item.content or item.summary
    if item.encrypted_content is not None and not parts:
        return item.encrypted_content
    return BETWEEN_TEXTS.join(part.text for part in parts)


def _full_name(namespace: str | None, name: str) -> str:
    """The name of a function for the model."""
    if namespace is None:
        return name
    return f"{namespace}{_BETWEEN_NAMES}{name}"


def _functions(tools: list[_Tool], namespace: str | None = None) -> list[dict[str, Any]]:
    """Tools in the form of chat completions, with those of their namespaces."""
    functions: list[dict[str, Any]] = []
    for tool in tools:
        if tool.type == "function" and tool.name:
            name = _full_name(namespace, tool.name)
            function = {"name": name, "parameters": tool.parameters or {}}
            if tool.description is not None:
                function["description"] = tool.description
            functions.append({"type": "function", "function": function})
        elif tool.type == "namespace" and namespace is None and tool.name:
            functions += _functions(tool.tools or [], tool.name)
        elif tool.type == "function":
            raise ApiError(
                'tools: a function has no name: send {"type": "function", "name": "…", '
                '"parameters": {…}}.',
                "tools",
            )
        elif tool.type != "web_search" or tool.external_web_access is not False:
            # Codex offers a search without access to the web unasked, of which nothing is missed.
            raise ApiError(
                f"tools: {shown(tool.type)} is a tool that this server does not have: send "
                "functions.",
                "tools",
            )
    return functions


def _response_format(wanted: _Format) -> dict[str, Any]:
    """The form of an answer in the words of chat completions."""
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.schema is None:
        raise field_error("text", 'is a json_schema without its schema: send "schema" with it.')
    described = {"name": wanted.name, "schema": wanted.schema}
    return {"type": "json_schema", "json_schema": described}


class ResponseAnswer(Parts):
    """An answer as OpenAI's response of items."""

    def __init__(self, jobs: list[Job], body: dict[str, Any]):
        super().__init__(jobs[0])
        self._body = without_nulls(body)
        self._id = _new_id("resp")
        self._created = int(time.time())
        self._n_events = 0
        self._n_thought_tokens = 0
        self._problem: ApiError | None = None
        # Namespaces and functions, by the names that the model knows.
        self._namespaces: dict[str, tuple[str, str]] = {}
        for tool in self._body.get("tools", []):
            if tool["type"] == "namespace":
                namespace = tool["name"]
                for function in tool.get("tools") or ():
                    name = function["name"]
                    self._namespaces[_full_name(namespace, name)] = (namespace, name)

    def begin(self) -> list[StreamEvent]:
        """The events with a response that has no items yet."""
        return [
            self._event("response.created", response=self.whole()),
            self._event("response.in_progress", response=self.whole()),
        ]

    def add(self, index: int, token: Any) -> list[StreamEvent]:
        """Adds what a token adds."""
        if token.reasoning:
            self._n_thought_tokens += 1
        return super().add(index, token)

    def end(self) -> list[StreamEvent]:
        """The event with the whole response."""
        whole = self.whole()
        return [self._event(f"response.{whole['status']}", response=whole)]

    def fail(self, problem: ApiError) -> list[StreamEvent]:
        """The event of a response that has failed."""
        self._problem = problem
        return [self._event("response.failed", response=self.whole())]

    def whole(self) -> dict[str, Any]:
        """The response."""
        body = self._body
        fields = self._job.request.fields
        reason = None
        if self._status == "incomplete":
            reason = {"reason": "max_output_tokens"}
        usage = None
        if self.is_complete:
            usage = self._usage()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "error": self._error(),
            "incomplete_details": reason,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self._job.served.name,
            "output": list(self.parts),
            "parallel_tool_calls": fields.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": fields.reasoning_effort, "summary": None},
            "store": False,
            "temperature": fields.temperature,
            "text": {"format": {"type": "text"}, **body.get("text", {})},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_p": fields.top_p,
            "truncation": body.get("truncation", "disabled"),
            "usage": usage,
        }

    @property
    def _status(self) -> str:
        if self._problem is not None:
            return "failed"
        if not self.is_complete:
            return "in_progress"
        if self.finish_reason == "length":
            return "incomplete"
        return "completed"

    def _error(self) -> dict[str, Any] | None:
        """What has failed. Codex knows a prompt that is too long by its code."""
        if self._problem is None:
            return None
        return {"code": self._problem.code or "server_error", "message": str(self._problem)}

    def _usage(self) -> dict[str, Any]:
        usage = usage_of([self._job])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._n_thought_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, event_name: str, **data: Any) -> StreamEvent:
        number = self._n_events
        self._n_events += 1
        return StreamEvent({"type": event_name, "sequence_number": number, **data}, event_name)

    def _of_item(self, event_name: str, **data: Any) -> StreamEvent:
        """An event of the last item."""
        index = len(self.parts) - 1
        return self._event(event_name, item_id=self.parts[-1]["id"], output_index=index, **data)

    def _begin_item(self, item: dict[str, Any]) -> StreamEvent:
        self.parts.append(item)
        index = len(self.parts) - 1
        return self._event("response.output_item.added", output_index=index, item=dict(item))

    def _end_item(self, **changes: Any) -> StreamEvent:
        """The event of the last item, which ends with some changes."""
        status = "completed"
        if self.finish_reason == "length":
            status = "incomplete"
        self.parts[-1] = {**self.parts[-1], "status": status, **changes}
        index = len(self.parts) - 1
        item = self.parts[-1]
        return self._event("response.output_item.done", output_index=index, item=item)

    def _begin_part(self, kind: str) -> list[StreamEvent]:
        if kind == "thought":
            item = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []}
        else:
            item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []}
        begun = self._begin_item({**item, "status": "in_progress"})
        part = _part_of(kind, "")
        return [begun, self._of_item("response.content_part.added", content_index=0, part=part)]

    def _delta(self, kind: str, text: str) -> StreamEvent:
        if kind == "thought":
            return self._of_item("response.reasoning_text.delta", content_index=0, delta=text)
        return self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _end_of(self, kind: str, text: str) -> list[StreamEvent]:
        part = _part_of(kind, text)
        changes: dict[str, Any] = {"content": [part]}
        if kind == "thought":
            done = self._of_item("response.reasoning_text.done", content_index=0, text=text)
            if "reasoning.encrypted_content" in self._body.get("include", []):
                changes["encrypted_content"] = text
        else:
            done = self._of_item(
                "response.output_text.done", content_index=0, text=text, logprobs=[]
            )
        ended = self._of_item("response.content_part.done", content_index=0, part=part)
        return [done, ended, self._end_item(**changes)]

    def _call(self, number: str, name: str, arguments: str) -> list[StreamEvent]:
        item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress"}
        item |= {"call_id": number, "name": name, "arguments": ""}
        if name in self._namespaces:
            namespace, name = self._namespaces[name]
            item |= {"namespace": namespace, "name": name}
        event_name = "response.function_call_arguments"
        return [
            self._begin_item(item),
            self._of_item(f"{event_name}.delta", delta=arguments),
            self._of_item(f"{event_name}.done", arguments=arguments, name=name),
            self._end_item(arguments=arguments),
        ]


def refused(problem: ApiError) -> list[StreamEvent]:
    """The event of an error of which there is no response."""
    error = {"code": problem.code, "message": str(problem), "param": problem.field}
    return [StreamEvent({"type": "error", "sequence_number": 0, **error}, "error")]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _part_of(kind: str, text: str) -> dict[str, Any]:
    """The content of an item."""
    if kind == "thought":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


RESPONSES = Dialect(
    chat=True,
    fields=chat_fields,
    answer=ResponseAnswer,
    refused=refused,
    forms=("tools", "text"),
    form="text.format",
    any_model=True,
    count_object="response.input_tokens",
)
