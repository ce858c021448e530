"""Prompts that come at recorded times, from a file of JSON lines or of comma-separated values.

Each has ``time_s`` from the beginning, in order or not; ``board``, counted from 0, or ``*`` for
each board in turn; and, if known, ``prompt_tokens`` and ``answer_tokens``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from edgemoa.errors import UserError
from edgemoa.sim.scenario import MOST_BOARDS, Arrival

MOST_BYTES: Final = 256 * 1024 * 1024
MOST_LINE: Final = 4096
MOST_ARRIVALS: Final = 2_000_000

Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
Place = Annotated[int, msgspec.Meta(ge=0, lt=MOST_BOARDS)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    time_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    board: Place | Literal["*"] = "*"
    prompt_tokens: Tokens = 0
    answer_tokens: Tokens = 0


def read_replay(file: Path, boards: int) -> tuple[Arrival, ...]:
    """All arrivals of a file, in the order of time; they are dealt out to so many boards.

    :raises UserError: with the line, for what is no such file; also as the file system does.
    """
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file} is too large to be replayed", hint="cut it into parts")
    found: list[Arrival] = []
    with file.open(encoding="utf-8", newline="") as stream:
        try:
            for number, line in enumerate(_lines(stream, file), 1):
                if line.board != "*" and line.board >= boards:
                    raise UserError(
                        f"{file}, entry {number}: there is no board {line.board} among {boards}",
                        hint="boards are counted from 0; * is each in turn",
                    )
                place = -1 if line.board == "*" else line.board
                found.append(Arrival(line.time_s, place, line.prompt_tokens, line.answer_tokens))
                if len(found) > MOST_ARRIVALS:
                    raise UserError(f"{file} holds more prompts than can be replayed")
        except (msgspec.DecodeError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{file}, entry {len(found) + 1}: {error}",
                hint='write lines such as {"time_s": 1.5, "board": 0}, or a table with a heading',
            ) from None
    return tuple(sorted(found, key=lambda arrival: arrival.time_s))


def _lines(stream: Iterable[str], file: Path) -> Iterator[_Line]:
    bounded = _bounded(stream)
    if file.suffix.lower() == ".csv":
        for row in csv.DictReader(bounded):
            told: dict[str | Any, Any] = {key: value for key, value in row.items() if value != ""}
            if told.get("board", "*") != "*":
                told["board"] = msgspec.convert(told["board"], Place, strict=False)
            yield msgspec.convert(told, _Line, strict=False)
        return
    for line in bounded:
        if line.strip():
            yield msgspec.json.decode(line, type=_Line)


def _bounded(stream: Iterable[str]) -> Iterator[str]:
    for line in stream:
        if len(line) > MOST_LINE:
            raise csv.Error("a line is too long")
        yield line
