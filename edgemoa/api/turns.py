"""Conversations as clients send them: turns, tools, and what a model is given of both.

Pure, as :mod:`edgemoa.api.openai`, in whose shapes all of it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edgemoa.core import limits
from edgemoa.core.events import Given, Tools
from edgemoa.core.messages import ChatMessage, Role
from edgemoa.errors import InvalidPromptError, UserError

ToolName: TypeAlias = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]

_encode: Final = msgspec.json.Encoder().encode


class TextPart(msgspec.Struct):
    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct):
    """``arguments`` are a JSON object; OpenAI's clients write it as text, Ollama's as it is."""

    name: ToolName
    arguments: str | dict[str, Any] = ""


class ToolCallPart(msgspec.Struct):
    function: CalledFunction
    id: Annotated[str, Meta(max_length=256)] = ""
    type: Literal["function"] = "function"


class Turn(msgspec.Struct):
    """A turn of a conversation. A ``tool``'s is the result of the call of that id."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCallPart], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(msgspec.Struct, omit_defaults=True):
    """A function that may be called; ``parameters`` are a JSON schema of its arguments. Where a
    call is required, it is obeyed; ``strict`` is taken and changes nothing."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    function: Function
    type: Literal["function"] = "function"


class ChosenFunction(msgspec.Struct):
    name: ToolName


class ToolChoice(msgspec.Struct):
    """The tool that the answer has to be a call of."""

    function: ChosenFunction
    type: Literal["function"]


Choice: TypeAlias = Literal["none", "auto", "required"] | ToolChoice


def to_json(value: Any, what: str) -> str:
    """A value that came from a client, as JSON.

    :raises UserError: it cannot be put into JSON again: it is nested too deep, or a number in it is
        too large.
    """
    try:
        return _encode(value).decode()
    except (RecursionError, OverflowError, UnicodeError):
        raise UserError(f"{what} cannot be read", hint="is it nested too deep?") from None


def conversation(
    turns: Sequence[Turn], tools: Sequence[Tool]
) -> tuple[tuple[ChatMessage, ...], Given]:
    """What the model is given.

    :raises InvalidPromptError: it is empty, too large, or does not end with a turn to be answered.
    """
    last = turns[-1] if turns else None
    if last is None or not (last.role == "tool" or (last.role == "user" and last.text.strip())):
        raise InvalidPromptError(
            "the prompt is empty",
            hint="the last message must be the user's, or a tool's result, and say something",
        )
    if tools or any(turn.role == "tool" or turn.tool_calls for turn in turns):
        given: dict[str, Any] = {"messages": _with_calls(turns)}
        if tools:
            given["tools"] = list(tools)
        return _bounded((ChatMessage("user", to_json(given, "the conversation")),)), "template"
    return _bounded(tuple(ChatMessage(_role(turn), turn.text) for turn in turns)), "turns"


def bare(text: str) -> tuple[tuple[ChatMessage, ...], Given]:
    """The same for a text that the model is to go on with as it stands.

    :raises InvalidPromptError: it is empty, or too large.
    """
    if not text:
        raise InvalidPromptError("the prompt is empty", hint="send some text")
    return _bounded((ChatMessage("user", text),)), "text"


def _bounded(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    size_bytes = sum(len(turn.content.encode()) for turn in messages)
    if size_bytes > limits.MAX_PROMPT_BYTES:
        raise InvalidPromptError(
            f"the conversation has {size_bytes} bytes, more than {limits.MAX_PROMPT_BYTES}",
            hint="send less of it",
        )
    return messages


def _role(turn: Turn) -> Role:
    return "system" if turn.role == "developer" else turn.role  # type: ignore[return-value]


def _with_calls(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as chat templates know them."""
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tools that were called, by the call's id
    for turn in turns:
        one: dict[str, Any] = {"role": _role(turn), "content": turn.text}
        if turn.tool_calls:
            if turn.role != "assistant":
                raise InvalidPromptError(
                    "tools are called by the assistant", hint="check the roles of the messages"
                )
            one["tool_calls"] = [_call(call) for call in turn.tool_calls]
            names |= {call.id: call.function.name for call in turn.tool_calls}
        if turn.role == "tool":
            one["tool_call_id"] = turn.tool_call_id or ""
            one["name"] = turn.name or names.get(turn.tool_call_id or "", "")
        told.append(one)
    return told


def _call(call: ToolCallPart) -> dict[str, Any]:
    function, arguments = call.function, call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            raise InvalidPromptError(
                "the arguments of a tool's call are not a JSON object",
                hint="send them as the assistant wrote them",
            ) from None
    called = {"name": function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": called}


def offered(
    tools: Sequence[Tool], choice: Choice | None, *, parallel: bool
) -> tuple[Tools | None, str]:
    """Which of the tools an answer may call, and the JSON schema that it has to obey, or "", where
    it has to call one: that of a call.

    :raises UserError: the one that is to be called is not among them, or there is none.
    """
    if choice == "none":
        return None, ""
    names = tuple(tool.function.name for tool in tools)
    if len(set(names)) < len(names):
        raise UserError("two tools have one name", hint="give each its own")
    if choice in (None, "auto"):
        return (Tools(names, parallel=parallel) if tools else None), ""
    wanted = choice.function.name if isinstance(choice, ToolChoice) else None
    forced = [tool for tool in tools if wanted in (None, tool.function.name)]
    if not forced:
        raise UserError(
            "there is no tool that 'tool_choice' could mean", hint="name one of 'tools'"
        )
    schema = to_json(_schema_of_a_call(forced), "the tools' parameters")
    return Tools(tuple(tool.function.name for tool in forced), True, parallel), schema


def _schema_of_a_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """Of one call, of any of these tools. Each tool's parameters become a definition, and what they
    refer to within themselves is looked for there."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": {"$ref": f"#/$defs/{number}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    definitions = {
        str(number): {"type": "object"}
        | _moved(tool.function.parameters or {}, f"#/$defs/{number}")
        for number, tool in enumerate(tools)
    }
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def _moved(schema: Mapping[str, Any], to: str) -> dict[str, Any]:
    try:
        return {name: _moved_value(name, value, to) for name, value in schema.items()}
    except RecursionError:
        raise UserError(
            "the tools' parameters are nested too deep", hint="use simpler ones"
        ) from None


def _moved_value(name: str, value: Any, to: str) -> Any:
    match value:
        case dict():
            return {inner: _moved_value(inner, each, to) for inner, each in value.items()}
        case list():
            return [_moved_value("", each, to) for each in value]
        case str() if name == "$ref" and value.startswith("#"):
            return to + value[1:]
        case _:
            return value
