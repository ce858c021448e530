"""How long work reports where it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

# Called with the stage ("download", "import", ...), and how much of how much is done: bytes, except
# where the stage names another unit. A total of 0 means that the end is not known.
Progress = Callable[[str, int, int], None]

PLAIN_STEP: Final = 25  # percent between two lines where there is no terminal
REDRAW_S: Final = 0.1


def printable(text: object, most: int = 120) -> str:
    """Text from outside for a terminal: bounded, and without what a terminal would obey."""
    shown = str(text)[:most]
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def silent(stage: str, done: int, total: int) -> None:
    """A :data:`Progress` that says nothing."""


class ConsoleProgress:
    """Progress for a person: one line that is redrawn on a terminal, a few plain lines otherwise.

    Writes to standard error, so that standard output stays clean for results.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._stage = ""
        self._started = 0.0
        self._first = 0
        self._drawn = 0.0
        self._quarter = 0
        self._open_line = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._started, self._first = stage, now, done
            self._drawn, self._quarter = 0.0, -1
        if self._terminal:
            if done < total and now - self._drawn < REDRAW_S:
                return
            self._drawn = now
            self._stream.write("\r\x1b[K" + self._line(done, total, now))
            self._open_line = True
        else:
            quarter = 100 * done // total // PLAIN_STEP if total else 0
            if quarter == self._quarter:
                return
            self._quarter = quarter
            self._stream.write(self._line(done, total, now) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that is being redrawn."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False

    def _line(self, done: int, total: int, now: float) -> str:
        if not total:
            return self._stage
        percent = f"{self._stage}: {100 * done // total:3d} %"
        if total < 1e6:
            return percent
        elapsed = now - self._started
        rate = (done - self._first) / elapsed if elapsed > 0.05 else 0.0
        speed = f", {rate / 1e6:.1f} MB/s" if rate else ""
        return f"{percent} ({done / 1e6:.1f} of {total / 1e6:.1f} MB{speed})"
