"""``edgemoa chat``: a conversation with the group in a terminal. Nothing of it is kept on disk."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from edgemoa import show
from edgemoa.errors import EdgemoaError

if TYPE_CHECKING:
    from edgemoa.client import Client

_FENCE: Final = '"""'
_PLAN: Final = re.compile(r"M?(\d{1,2})k(\d{1,2})", re.IGNORECASE)
_HELP: Final = f"""\
A line is a prompt; one that ends with \\ goes on, and {_FENCE} begins and ends several lines.
/new         forget the conversation so far
/plan M1k2   1 layer of 2 peers from now on; /plan alone: this board alone; /plan: as configured
/trace       who did what for the last answer
/quit        leave, as Ctrl-D does; Ctrl-C stops an answer, or empties the line"""


class Chat:
    """One conversation.

    :param terminal: where it is shown.
    """

    def __init__(self, client: Client, terminal: show.Terminal, body: dict[str, Any]) -> None:
        self._client = client
        self._terminal = terminal
        self._body = body  # what every request has in common
        self._plan: dict[str, int] = {}
        self._messages: list[dict[str, str]] = []
        self._answered: dict[str, Any] = {}

    def run(self) -> int:
        """Until the user leaves; returns the exit code."""
        with contextlib.suppress(ImportError):  # editing and history of this session alone
            import readline  # noqa: F401
        if sys.stdin.isatty():
            self._terminal.step("/help says what can be typed; Ctrl-D leaves")
        while True:
            try:
                if not self._turn():
                    return 0
            except KeyboardInterrupt:  # wherever in the turn it comes, the program stays
                print(file=sys.stderr)

    def _turn(self) -> bool:
        """One line of the user's, and what comes of it. Returns whether to go on."""
        try:
            text = _read()
        except EOFError:
            return False
        if text in ("/quit", "/exit"):
            return False
        if text.startswith("/"):
            self._command(text)
        elif text:
            try:
                self._ask(text)
            except EdgemoaError as error:
                self._terminal.step(f"{error}{f': {error.hint}' if error.hint else ''}")
        return True

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        match name:
            case "/new":
                self._messages.clear()
                self._terminal.step("a new conversation")
            case "/trace":
                told = (
                    show.summary(self._answered) if self._answered else "nothing was answered yet"
                )
                print(told, file=self._terminal.err, flush=True)
            case "/plan":
                self._set_plan(rest.strip())
            case _:
                print(_HELP, file=self._terminal.err, flush=True)

    def _set_plan(self, text: str) -> None:
        if match := _PLAN.fullmatch(text):
            self._plan = {"layers": int(match[1]), "proposers": int(match[2])}
        elif text in ("", "alone"):
            self._plan = {"layers": 0, "proposers": 0} if text else {}
        else:
            self._terminal.step("a plan is like M1k2, or: alone")
            return
        self._terminal.step(
            f"from now on: {show.plan(self._plan) if self._plan else 'as configured'}"
        )

    def _ask(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {**self._body, "messages": messages, "edgemoa": {"events": True, **self._plan}}
        heard: list[str] = []
        try:
            chunks = self._client.chat(body)
            with contextlib.closing(chunks):
                self._answered = show.follow(_heard(chunks, heard), self._terminal)
        except KeyboardInterrupt:
            self._terminal.write("\n")
            self._terminal.step("stopped")
        answer = "".join(heard)
        if answer:  # a stopped answer is a part of the conversation, too
            self._messages = [*messages, {"role": "assistant", "content": answer}]


def _heard(chunks: Iterable[dict[str, Any]], heard: list[str]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        deltas = (choice.get("delta", {}) for choice in chunk.get("choices", ()))
        heard.extend(delta.get("content") or "" for delta in deltas)
        yield chunk


def _read() -> str:
    """What the user types next. :raises EOFError: it is over."""
    ask, more = ("> ", "… ") if sys.stdin.isatty() else ("", "")
    line = input(ask)
    if line.strip().startswith(_FENCE):
        lines = [line.strip().removeprefix(_FENCE)]
        while not lines[-1].rstrip().endswith(_FENCE):
            lines.append(input(more))
        lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
        return "\n".join(lines).strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(more))
    return "\n".join(lines).strip()
