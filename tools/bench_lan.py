"""Measures whole boards on a LAN: real daemons, each on a host of its own (``tests/lan/bed.py``),
with a stand-in for the model.

All boards share this machine's processors, and a switch that is a process beside them, so that
times are upper bounds; each note says what else there is to know. How fast news travel, and how
many boards are given up wrongly in hundreds of board-hours, is for ``bench-lan-sim``: here, less
than a board-hour would say little, unless ``--minutes`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from figures import Row, row, say, tell  # noqa: E402
from lan.bed import PORT, Bed, Board, NoBedError, cpu_s, until  # noqa: E402

from edgemoa.errors import EdgemoaError  # noqa: E402

SIDES: Final = str(ROOT / "tools" / "bench_lan_sides.py")
KNOWN_S: Final = 120.0
GONE_S: Final = 60.0
SETTLE_S: Final = 20.0
JUNK_PER_S: Final = 50_000
BUSY: Final = "import os; os.nice(0)\nwhile True: pass"
CORES: Final = f"{os.cpu_count()} cores for all"


def all_know(boards: list[Board]) -> bool:
    """Whether each of them can ask each other one."""
    return all(board.knows(*boards) for board in boards)


def seconds(true: Callable[[], bool], most_s: float) -> float | None:
    """How long it takes to come true; None if longer than that."""
    began = time.monotonic()
    try:
        until(true, most_s, 0.1)
    except TimeoutError:
        return None
    return time.monotonic() - began


def worst(times: list[float | None]) -> float | None:
    """None if one of them is not known."""
    return None if None in times else max(t for t in times if t is not None)


def listed(times: list[float | None]) -> str:
    """For a note."""
    return ", ".join("-" if t is None else f"{t:.1f}" for t in times)


def side(*argv: str, host: Any = None) -> subprocess.Popen[bytes]:
    """One of ``bench_lan_sides.py``, on a host or on this machine."""
    line = [sys.executable, SIDES, *argv]
    if host is None:
        return subprocess.Popen(line, stdout=subprocess.PIPE)
    told: subprocess.Popen[bytes] = host.popen(line, stdout=subprocess.PIPE)
    return told


def said(process: subprocess.Popen[bytes], most_s: float = 120.0) -> dict[str, Any]:
    """What it prints in the end."""
    try:
        out, _ = process.communicate(timeout=most_s)
        told: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {}
        return told
    finally:
        process.kill()
        process.wait()


# --- the rows


def power_on(given: argparse.Namespace) -> list[Row]:
    """Five boards, from power-on to all paired and known."""
    times = []
    for _ in range(given.runs):
        with Bed() as bed:
            began = time.monotonic()
            boards = bed.boards(5)
            known = seconds(lambda boards=boards: all_know(boards), KNOWN_S)  # type: ignore[misc]
            times.append(None if known is None else time.monotonic() - began)
    note = f"aim 3; worst of {listed(times)}; starting Python is in it, {CORES}"
    return [row("5 boards from power-on to known", worst(times), "s", 5, note)]


def partition(given: argparse.Namespace) -> list[Row]:
    """2|3, until each side has given up the other, and healed."""
    times: list[float | None] = []
    cuts: list[float | None] = []
    with Bed() as bed:
        boards = bed.boards(5)
        until(lambda: all_know(boards), KNOWN_S)
        for _ in range(given.runs):
            two, three = boards[:2], boards[2:]
            bed.cut(two, three)

            def parted() -> bool:
                sides = ((two, three), (three, two))  # noqa: B023
                return all(a.sees()[b.name] == "gone" for x, y in sides for a in x for b in y)

            cuts.append(seconds(parted, GONE_S))
            bed.heal()
            times.append(seconds(lambda: all_know(boards), GONE_S))
    note = f"aim 5; worst of {listed(times)}; given up after {listed(cuts)}"
    return [row("2|3 healed: views converge", worst(times), "s", 12, note)]


def round_trip(given: argparse.Namespace) -> list[Row]:
    """A small prompt to a peer and its proposal back, whose model takes no time."""
    with Bed(token_ms=0) as bed:
        board = bed.board("board-1")
        seed, folder = f"{board.host.address}:{PORT}", str(bed.place / "asker")
        secret = str(bed.place / "join-secret")
        asker = side("ask", folder, secret, seed, "1000", host=bed.host("asker"))
        took = sorted(said(asker)["took_ms"])
        bare = sorted(switch_ms(bed, board))
    note = (
        f"aim 2; p99 {took[len(took) * 99 // 100]:.2f}, n {len(took)}; of it two ways through the"
        f" switch: {median(bare):.2f}"
    )
    return [row("small prompt, a peer's round trip, median", median(took), "ms", 5, note)]


def switch_ms(bed: Bed, board: Board) -> list[float]:
    """How long a packet takes there and back: TCP connections that are refused."""
    program = (
        "import socket, sys, time\n"
        "for _ in range(200):\n"
        "    began = time.perf_counter()\n"
        f"    socket.socket().connect_ex(('{board.host.address}', 9))\n"
        "    print((time.perf_counter() - began) * 1000)\n"
    )
    argv = [sys.executable, "-c", program]
    process = bed.host("pinger").popen(argv, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    return [float(line) for line in out.split()]


def envelope(given: argparse.Namespace) -> list[Row]:
    """Sign, seal, send; open, verify; over loopback, a process on each side."""
    rates = []
    for _ in range(given.runs):
        there = side("receive")
        assert there.stdout is not None  # noqa: S101
        port = there.stdout.readline().decode().strip()
        sent = said(side("send", port, "3"))
        got = said(there)
        lost = sent["messages"] - got["messages"]
        rates.append(got["messages"] / sent["seconds"])
        if lost:
            say(f"{lost} datagrams were lost on loopback")
    note = f"aim 8000; of {', '.join(f'{rate:.0f}' for rate in rates)}; no more than one core each"
    return [row("envelope path, median", median(rates), "/s", 3_000, note, least=True)]


def junk(given: argparse.Namespace) -> list[Row]:
    """Nonsense to one of three boards, sent on its own host: the switch does not carry so much."""
    with Bed() as bed:
        boards = bed.boards(3, "queue.own_proposal=always")
        until(lambda: all_know(boards), KNOWN_S)
        target = boards[0]
        before = bed.sent()[target.name]["frames"]
        wanted_s = 10.0 * given.minutes
        began = time.monotonic()
        address = target.host.address
        storm = side("flood", address, str(PORT), str(wanted_s), str(JUNK_PER_S), host=target.host)
        took, proposals, failed, wrong = [], 0, 0, 0
        while storm.poll() is None:
            asked = time.monotonic()
            try:
                answered = boards[len(took) % 3].ask("Are you there?")
                proposals += len(answered["proposals"])
                took.append(time.monotonic() - asked)
            except EdgemoaError:
                failed += 1
            wrong += sum(list(b.sees().values()).count("gone") for b in boards)
            time.sleep(0.2)
        passed_s = time.monotonic() - began
        told = said(storm)
        frames = bed.sent()[target.name]["frames"] - before
    rate = told["sent"] / told["seconds"]
    return [
        row("junk: datagrams", rate, "/s", JUNK_PER_S * 0.95, f"for {wanted_s:.0f} s", least=True),
        row("junk: replies", told["replies"], "", 0, f"{frames / passed_s:.0f} frames/s in all"),
        row("junk: boards given up that were there", wrong, "", 0, "times seen"),
        row("junk: prompts that failed", failed, "", 0, f"{len(took)} answered, the slowest in"
            f" {max(took, default=0):.2f} s, {proposals / max(len(took), 1):.2f} of 3 proposals"),
    ]  # fmt: skip


# --- with twenty boards


def twenty(given: argparse.Namespace, wanted: set[str]) -> list[Row]:
    """What is measured of a large group, in one: idle, with loss, and dying."""
    rows: list[Row] = []
    with Bed() as bed:
        began = time.monotonic()
        boards = bed.boards(given.boards)
        until(lambda: all_know(boards), KNOWN_S, 0.5)
        note = CORES
        rows.append(
            row(f"{len(boards)} boards from power-on to known", time.monotonic() - began, "s",
                note=note)
        )  # fmt: skip
        time.sleep(SETTLE_S)
        if "idle" in wanted:
            rows += idle(bed, boards, given.minutes)
        if "deaths" in wanted:
            rows += deaths(bed, boards, given.minutes, 0.1, busy=False)
            rows += deaths(bed, boards, given.minutes, 0.3, busy=True)
        if "crash" in wanted:
            rows += crashes(bed, boards, given.runs)
    return rows


def idle(bed: Bed, boards: list[Board], minutes: float) -> list[Row]:
    """What boards send and use while nothing happens; nobody asks them anything meanwhile."""
    say(f"idle for {minutes:g} min")
    sent, used = bed.sent(), [cpu_s(board.process.pid) for board in boards]
    began = time.monotonic()
    time.sleep(60 * minutes)
    passed_s = time.monotonic() - began
    now = bed.sent()
    kinds = {
        kind: sum(now[b.name].get(kind, 0) - sent[b.name].get(kind, 0) for b in boards)
        / passed_s
        / len(boards)
        for kind in ("udp", "tcp", "mdns", "arp", "other")
    }
    cpu = [cpu_s(b.process.pid) - was for b, was in zip(boards, used, strict=True)]
    parts = ", ".join(f"{kind} {rate:.0f}" for kind, rate in kinds.items() if rate >= 0.5)
    share = 100 * sum(cpu) / len(cpu) / passed_s
    most = 100 * max(cpu) / passed_s
    return [
        row("idle traffic of a board", sum(kinds.values()), "B/s", 2_000,
            f"aim 1000; packets with IP: {parts}"),
        row("idle CPU of a board, mean", share, "% of core", 0.5,
            f"aim .2; most {most:.2f}; the daemon, its model's process sleeps"),
    ]  # fmt: skip


def deaths(bed: Bed, boards: list[Board], minutes: float, loss: float, *, busy: bool) -> list[Row]:
    """How often a board is given up that is there, as the boards say when they are asked."""
    what = f"{loss:.0%} loss" + (", all cores busy" if busy else "")
    say(f"{what} for {minutes:g} min")
    bed.usual(loss=loss)
    load = [
        subprocess.Popen([sys.executable, "-c", BUSY])
        for _ in range(2 * (os.cpu_count() or 1) if busy else 0)
    ]
    given_up: set[tuple[str, str]] = set()
    episodes, looked = 0, 0
    try:
        until_s = time.monotonic() + 60 * minutes
        while time.monotonic() < until_s:
            seen = {(b.name, o) for b in boards for o, how in b.sees().items() if how == "gone"}
            episodes += len({other for _, other in seen} - {other for _, other in given_up})
            given_up = seen
            looked += 1
            time.sleep(1.0)
    finally:
        for process in load:
            process.kill()
            process.wait()
        bed.usual()
    until(lambda: all_know(boards), KNOWN_S, 0.5)
    hours = len(boards) * minutes / 60
    note = f"aim 0; {hours:.2g} board-hours, looked at {looked} times"
    reach = 0.5 if busy else 0.0
    return [row(f"false deaths, {what}", episodes / hours, "/board-h", reach, note)]


def crashes(bed: Bed, boards: list[Board], runs: int) -> list[Row]:
    """From SIGKILL to the last board that knows."""
    rows = []
    left = list(boards)
    for loss in (0.0, 0.3):
        say(f"crashes at {loss:.0%} loss")
        bed.usual(loss=loss)
        time.sleep(5 if loss else 0)
        times = []
        for _ in range(runs):
            lost = left.pop()
            lost.kill()
            times.append(
                seconds(lambda lost=lost: all(b.sees().get(lost.name) == "gone" for b in left),  # type: ignore[misc]
                        GONE_S)
            )  # fmt: skip
            time.sleep(2)
        bed.usual()
        note = f"aim 5; worst of {listed(times)}; {CORES}"
        name = f"crash known to all {len(boards)}, {loss:.0%} loss"
        rows.append(row(name, worst(times), "s", 10, note))
    return rows


SMALL: Final[dict[str, Callable[[argparse.Namespace], list[Row]]]] = {
    "envelope": envelope,
    "round-trip": round_trip,
    "power-on": power_on,
    "partition": partition,
    "junk": junk,
}
LARGE: Final = ("idle", "deaths", "crash")


def main() -> int:
    """Measure and tell; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    rows_there = [*SMALL, *LARGE]
    parser.add_argument(
        "--only", action="append", choices=rows_there, metavar="ROW",
        help=f"only this: {', '.join(rows_there)}",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="of what is done anew (default: 3)")
    parser.add_argument(
        "--minutes", type=float, default=1.0,
        help="of what has to be watched; with 20 boards, 3 are a board-hour (default: 1)",
    )  # fmt: skip
    parser.add_argument("--boards", type=int, default=20, help="in a large group (default: 20)")
    given = parser.parse_args()
    wanted = set(given.only or rows_there)
    rows: list[Row] = []
    try:
        for name, measure in SMALL.items():
            if name in wanted:
                say(name)
                rows += measure(given)
        if wanted & set(LARGE):
            say(f"{given.boards} boards")
            rows += twenty(given, wanted)
    except (NoBedError, TimeoutError, EdgemoaError, RuntimeError) as error:
        print(f"bench-lan: {error}", file=sys.stderr)
        return 1
    return tell(rows, given, [name for name in rows_there if name not in wanted])


if __name__ == "__main__":
    sys.exit(main())
