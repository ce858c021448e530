"""Calls of tools in what a model writes: kept out of the text that is shown, and read at its end.

How a call looks was found out from the model's chat template
(:meth:`edgemoa.text.template.ChatTemplate.call_form`). What begins like one and turns out to be
none, or calls what is not there, is text like any other.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final, NoReturn

import msgspec

from edgemoa.core.events import ToolCall
from edgemoa.text.template import CallForm

FORCED: Final = CallForm("", "")
"""Of an answer that is held to a schema of calls: nothing stands around the JSON."""

_ARGUMENTS: Final = ("arguments", "parameters")
_BETWEEN: Final = " \t\r\n;,"
_NO_ARGUMENTS: Final = msgspec.Raw(b"{}")


class Calls:
    """One answer's text on its way out.

    Where a model marks its calls, text before the mark is shown as it comes; where it does not, an
    answer is calls and nothing else, or text.
    """

    def __init__(self, form: CallForm, names: Collection[str], *, parallel: bool = True) -> None:
        self.calls: tuple[ToolCall, ...] = ()
        self._form = form
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._holds = False  # whether a call seems to have begun
        self._free = False  # whether none can follow

    def push(self, piece: str) -> str:
        """What of the text so far cannot be part of a call."""
        if self._free:
            return piece
        self._held += piece
        if self._holds:
            return ""
        if self._form.before:
            end = self._before_mark(self._form.before)
        else:
            begin = self._held.lstrip()
            self._holds = begin.startswith(("{", "["))
            self._free = bool(begin) and not self._holds
            end = len(self._held) if self._free else 0
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def finish(self) -> str:
        """What is shown of the rest, now that all is there; the rest are ``calls``."""
        rest, self._held = self._held, ""
        found = None if self._free else self._read(rest)
        if found is None:
            return rest
        text, calls = found
        self.calls = tuple(calls if self._parallel else calls[:1])
        return text

    def _before_mark(self, mark: str) -> int:
        """Where the text ends that no mark can begin in, nor the white space before one."""
        at = self._held.find(mark)
        self._holds = at >= 0
        if at < 0:
            longest = min(len(mark) - 1, len(self._held))
            part = next((n for n in range(longest, 0, -1) if mark.startswith(self._held[-n:])), 0)
            at = len(self._held) - part
        return len(self._held[:at].rstrip())

    def _read(self, text: str) -> tuple[str, list[ToolCall]] | None:
        """The text around the calls, and the calls; None where there are none."""
        mark, end = self._form
        before, found, _ = text.partition(mark) if mark else ("", "", "")
        at, begins = len(before) + len(found), bool(found or not mark)
        calls: list[ToolCall] = []
        while begins:
            value = _value(text, _skip(text, at))
            more = self._calls_of(value[0]) if value is not None else None
            if value is None or more is None:
                return None
            calls += more
            at = _skip(text, value[1])
            if end and text.startswith(end, at):
                at = _skip(text, at + len(end))
            begins = text.startswith(mark, at) and at < len(text)
            at += len(mark) if begins else 0
        if not calls:
            return None
        return before.rstrip() + text[at:].rstrip(), calls

    def _calls_of(self, data: bytes) -> list[ToolCall] | None:
        try:
            told = msgspec.json.decode(data, type=dict[str, msgspec.Raw] | list[msgspec.Raw])
            each = told if isinstance(told, list) else [data]
            calls = [msgspec.json.decode(one, type=dict[str, msgspec.Raw]) for one in each]
            return [self._call(call) for call in calls]
        except (msgspec.DecodeError, KeyError, RecursionError, ValueError):
            return None

    def _call(self, call: dict[str, msgspec.Raw]) -> ToolCall:
        name = msgspec.json.decode(call["name"], type=str)
        if name not in self._names:
            raise KeyError(name)
        given = next((call[key] for key in _ARGUMENTS if key in call), _NO_ARGUMENTS)
        msgspec.json.decode(given, type=dict[str, Any])
        return ToolCall(name, bytes(given).decode())


def _skip(text: str, at: int) -> int:
    """Where what stands between two calls ends."""
    while at < len(text) and text[at] in _BETWEEN:
        at += 1
    return at


def _value(text: str, at: int) -> tuple[bytes, int] | None:
    """The JSON value that stands there, as bytes, and where it ends."""
    try:
        _, end = _decoder.raw_decode(text, at)
        return text[at:end].encode(), end
    except (ValueError, RecursionError):
        return None


def _no_number(_: str) -> NoReturn:
    raise ValueError


_decoder: Final = json.JSONDecoder(parse_constant=_no_number)
