"""``edgemoa chat`` and ``trace`` as processes of their own; the conversation on a real terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_server import ScriptedBoard, answered, board, path  # noqa: F401

from edgemoa.core.events import Accepted, Granted, Text

_CHAT = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C comes from the terminal
from edgemoa.cli import main
sys.exit(main(["chat", "--socket", sys.argv[1]]))
"""


class Conversation:
    """A person in front of a terminal."""

    def __init__(self, socket: Path) -> None:
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHAT, str(socket)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, true: Callable[[str], bool], seconds: float = 15) -> str:
        """What is shown until it is as wanted; returns it, and forgets it."""
        end = time.monotonic() + seconds
        while not true(self.seen):
            assert time.monotonic() < end, self.seen
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.seen += os.read(self._terminal, 4096).decode(errors="replace")
        shown, self.seen = self.seen, ""
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def asked(seen: str) -> bool:
    """Whether the program waits for the next line."""
    return seen.rstrip(" ").endswith(">")


@pytest.fixture
def talk(path: Path) -> Iterator[Conversation]:  # noqa: F811
    made = Conversation(path)
    try:
        yield made
    finally:
        made.close()


def test_a_conversation(talk: Conversation, board: ScriptedBoard) -> None:  # noqa: F811
    board.context_tokens = 1000
    talk.until(lambda seen: "> " in seen)
    talk.type("Why?\n")
    shown = talk.until(lambda seen: "Because." in seen and asked(seen))
    assert "bee proposes" in shown
    talk.type("/plan M1k3\n")
    talk.until(lambda seen: "M=1, k=3" in seen)
    talk.type('"""\nTwo\nlines"""\n')
    talk.until(lambda seen: "Because." in seen)
    second = board.asked[1]
    assert (second.layers, second.proposers) == (1, 3)
    assert [(m.role, m.content) for m in second.messages] == [
        ("user", "Why?"), ("assistant", "Because."), ("user", "Two\nlines"),
    ]  # fmt: skip
    talk.type("/new\n")
    talk.until(lambda seen: "new conversation" in seen)
    talk.type("one \\\nline\n")
    talk.until(lambda seen: "Because." in seen)
    assert [m.content for m in board.asked[2].messages] == ["one \nline"]
    talk.type("/trace\n")
    talk.until(lambda seen: "plan M=1, k=1" in seen and asked(seen))
    talk.type("\x04")
    assert talk.process.wait(10) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    talk: Conversation,
    board: ScriptedBoard,  # noqa: F811
) -> None:
    board.script = [Accepted(Granted(0, 0), 0), Text("It begins"), 60.0, answered("never")]
    talk.until(lambda seen: "> " in seen)
    talk.type("Why?\n")
    talk.until(lambda seen: "It begins" in seen)
    talk.type("\x03")
    talk.until(lambda seen: "stopped" in seen and asked(seen))
    assert board.gone_early.wait(10), "the board works on for nobody"
    talk.type("half a line")
    talk.until(lambda seen: "half a line" in seen)
    time.sleep(0.3)  # while readline still draws, Python hears of it only with the next key
    talk.type("\x03")
    talk.until(asked)
    board.script = [Accepted(Granted(0, 0), 0), Text("Yes."), answered("Yes.")]
    talk.type("And?\n")
    talk.until(lambda seen: "Yes." in seen)
    assert [m.content for m in board.asked[1].messages] == ["Why?", "It begins", "And?"]
    talk.type("/quit\n")
    assert talk.process.wait(10) == 0


def test_a_trace_of_what_is_not_there(path: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-m", "edgemoa", "trace", "chatcmpl-x/../y", "--socket", str(path)],
        check=False, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 20
    assert "no such request" in done.stderr
