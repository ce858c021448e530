"""Feeds every parser that reads what the network or a client sends with inputs that are almost
right, ten million each, and sees that none crashes, hangs, or keeps memory.

Inputs are made in tests/fuzz; what a parser says of one tells whether it is worth going on from.
Where atheris can be installed, in an environment of its own, the first tenth of them also follows
which lines of Python they reach, and the rest goes on from what that found. What finds something is
kept in tests/fuzz/corpus, where the tests try it again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from figures import Row, arguments, row, say, tell  # beside this file
from fuzz_worker import HANG_S, TARGETS, Note, Share  # beside this file

ATHERIS: Final = "atheris==3.0.0"
COVERED: Final = 0.1  # of the inputs, at most a fifth as fast
GROWTH_MIB: Final = 8.0
TOLD_S: Final = 5.0
START_S: Final = 120.0  # until a process has judged its seeds
WORKER: Final = Path(__file__).with_name("fuzz_worker.py")


@dataclass
class Run:
    """One target in one process."""

    share: Share
    child: subprocess.Popen[bytes]
    note: Note
    began: float
    moved: float = 0.0
    seen: int = 0
    trouble: str = ""

    def watch(self, now: float) -> bool:
        """Whether it goes on."""
        if self.note.inputs != self.seen:
            self.seen, self.moved = self.note.inputs, now
        if self.child.poll() is None:
            if now - (self.moved or self.began) < (HANG_S if self.moved else START_S):
                return True
            self.child.kill()
            self.child.wait()
            self.trouble = f"one input took more than {HANG_S:.0f} s"
        elif self.child.returncode:
            code = self.child.returncode
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            lines = self.share.log.read_text("utf-8", "replace").splitlines()
            self.trouble = f"the process ended: {name} {lines[-1][:200] if lines else ''}".rstrip()
        defect = self.child.returncode == 1  # of the fuzzer itself
        if self.trouble and self.note.last and not defect:
            TARGETS[self.share.target].keep(self.note.last)
        return False


@dataclass
class Outcome:
    """What became of a target, in all its processes."""

    inputs: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    growth_mib: float = 0.0
    outcomes: int = 0
    taken: int = 0

    def add(self, run: Run, seconds: float) -> None:
        """Take a process that has ended into account."""
        note = run.note
        self.inputs += note.inputs
        self.taken += note.taken
        self.seconds += seconds
        if not run.share.covers:  # libFuzzer keeps what it finds in memory
            self.growth_mib = max(self.growth_mib, note.growth_mib)
        self.outcomes = max(self.outcomes, note.outcomes)
        self.findings += [*run.share.findings(), *([run.trouble] if run.trouble else [])]


def main() -> int:
    """Run, print, judge; returns the exit code."""
    given = _arguments()
    for ending in (signal.SIGTERM, signal.SIGINT):  # also where a shell has it ignored
        signal.signal(ending, signal.default_int_handler)
    names = given.target or list(TARGETS)
    python = _python(given)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = _run(given, names, python, Path(folder))
    rows = [line for name in names for line in _rows(name, outcomes[name])]
    return tell(rows, given, [name for name in TARGETS if name not in names])


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--target", nargs="+", choices=list(TARGETS), metavar="NAME",
        help=f"only these, of {', '.join(TARGETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--inputs", type=int, metavar="N",
        help="for each target (usually ten million, or what is said of one that is slow)",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=0, help="for each target at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all chance")
    parser.add_argument(
        "--engine", choices=("auto", "atheris", "own"), default="auto",
        help="auto: atheris where it can be installed",
    )  # fmt: skip
    return parser.parse_args()


def _python(given: argparse.Namespace) -> Path | None:
    """The interpreter of an environment with atheris, or None."""
    if given.engine == "own":
        return None
    from fetched import environment  # noqa: PLC0415 - which imports much

    try:
        return environment("fuzz", [ATHERIS])
    except subprocess.CalledProcessError:
        if given.engine == "atheris":
            raise
        say("atheris cannot be installed here: inputs are made without it")
        return None


def _run(
    given: argparse.Namespace, names: list[str], python: Path | None, folder: Path
) -> dict[str, Outcome]:
    """Several targets at a time; a single one in several processes."""
    parts = given.jobs if len(names) == 1 else 1
    waiting: list[Share] = []
    for name in names:
        inputs = given.inputs or TARGETS[name].figure
        for part in range(parts):
            seed = given.seed * parts + part
            count = inputs // parts + (part < inputs % parts)
            share = Share(name, count, 60 * given.minutes, seed, str(folder), part)
            waiting.append(share if python is None else _scaled(share, COVERED, covers=True))
    outcomes = {name: Outcome() for name in names}
    running: list[Run] = []
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < given.jobs:
                share = waiting.pop(0)
                running.append(_start(share, python if share.covers else None))
            time.sleep(0.2)
            now = time.monotonic()
            for run in [each for each in running if not each.watch(now)]:
                running.remove(run)
                outcomes[run.share.target].add(run, now - run.began)
                if run.share.covers and not run.trouble:
                    rest = (1 - COVERED) / COVERED
                    waiting.insert(0, _scaled(run.share, rest, covers=False))
            if now - told >= TOLD_S:
                told = now
                _tell_progress(running, len(waiting))
    finally:
        for run in running:
            run.child.kill()
            run.child.wait()
    return outcomes


def _scaled(share: Share, part: float, *, covers: bool) -> Share:
    inputs, seconds = round(share.inputs * part), share.seconds * part
    return replace(share, inputs=inputs, seconds=seconds, covers=covers)


def _start(share: Share, python: Path | None) -> Run:
    note = Note.make(share.note)
    command = [
        sys.executable if python is None else str(python),
        str(WORKER),
        json.dumps(share.told),
    ]
    environment = dict(os.environ)
    if python is not None:  # atheris is there, and all else here
        environment["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
        environment["EDGEMOA_FUZZ_ATHERIS"] = "1"
    with share.log.open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    return Run(share, child, note, time.monotonic())


def _tell_progress(running: list[Run], waiting: int) -> None:
    now = time.monotonic()
    told = [
        f"{run.share.target} {run.note.inputs / 1e6:.2f} M at "
        f"{run.note.inputs / (now - run.began):,.0f}/s, {run.note.rss_mib:.0f} MiB"
        for run in running
    ]
    say("; ".join(told) + (f"; {waiting} to come" if waiting else ""))


def _rows(name: str, outcome: Outcome) -> list[Row]:
    per_s = outcome.inputs / max(outcome.seconds, 1e-9)
    what = "; ".join(dict.fromkeys(outcome.findings))
    figure = TARGETS[name].figure
    taken = f"{outcome.taken / max(outcome.inputs, 1):.0%} taken"
    note = f"{per_s:,.0f}/s in a process, {taken}, {outcome.outcomes} ways to come out"
    return [
        row(f"{name}: inputs", outcome.inputs, "", figure, note, least=True),
        row(f"{name}: findings", len(outcome.findings), "", 0, what),
        row(f"{name}: growth", outcome.growth_mib, "MiB", GROWTH_MIB),
    ]


if __name__ == "__main__":
    sys.exit(main())
