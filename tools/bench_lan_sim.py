"""Measures what the boards of a group know of each other, in a simulated network that fails.

Twenty boards that do nothing but watch each other (``edgemoa/sim/lan.py``); five for partitions.
Each figure has a reach and an aim; ``--check`` exits 1 if one is short of its reach. ``--quick``
does a tenth, to try the tool.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

# Tools are run by their path, and this one from a checkout, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import Row, row, say, tell  # beside this file

from edgemoa.core.envelope import short_id
from edgemoa.core.membership import Presence
from edgemoa.core.messages import Gossip, News
from edgemoa.core.swim import IS_SUSPECT
from edgemoa.sim.lan import Lan

BOARDS: Final = 20
SETTLED_MS: Final = 30_000
HOUR_MS: Final = 3_600_000
# Beside what membership says, a link that is idle carries this, by PROTOCOL.md: a PING and its PONG
# from each end every 5 s, as datagrams of 69 bytes with IP and UDP.
PATH_BYTES_PER_S: Final = 2 * 69 / 5
# And a ROSTER packet from each end about every 60 s: a digest, a key id and a place for each board.
ROSTER_BYTES_PER_S: Final = (180 + BOARDS * (10 + 30)) / 60


def naps(rng: Random) -> tuple[int, int]:
    """A board that gets no processor for a fifth of the time, up to two seconds at a time."""
    return round(rng.expovariate(1 / 4_400)), rng.randint(200, 2_000)


def news_ms(loss: float, seed: int) -> list[int]:
    """How long it takes until all know what one board says, here that it contradicts."""
    lan = Lan(BOARDS, Random(seed), loss=loss)
    lan.run(SETTLED_MS)
    took = []
    for place in range(BOARDS):
        machine, accuser = lan.machines[place], lan.machines[(place + 1) % BOARDS]
        node = machine.node
        assert node is not None  # noqa: S101
        accusal = News(short_id(machine.board), IS_SUSPECT, 1, node.swim.incarnation, b"somebody")
        lan.hear(place, accuser.place, Gossip((accusal,)))
        told = node.swim.incarnation

        def all_know(place: int = place, told: int = told) -> bool:
            board = lan.machines[place].board
            others = (each.node for each in lan.machines if each.place != place)
            return all(each and each.members.peers[board].incarnation >= told for each in others)

        took.append(lan.run(60_000, all_know))
        lan.run(2_000)
    return took


def crash_ms(loss: float, seed: int) -> list[int]:
    """How long it takes until all know that a board is gone that lost its power."""
    lan = Lan(BOARDS, Random(seed), loss=loss)
    lan.run(SETTLED_MS)
    place = seed % BOARDS
    lan.cut_power(place)
    return [lan.run(60_000, lambda: lan.all_believe(place, Presence.GONE))]


def deaths(loss: float, starved: bool, hours: float, seed: int) -> list[int]:
    """How many boards were given up that were there."""
    lan = Lan(BOARDS, Random(seed), loss=loss, naps=naps if starved else None)
    lan.run(round(hours * HOUR_MS))
    return [lan.false_deaths]


def idle_bytes_per_s(seed: int) -> list[int]:
    """What a board sends, with IP, UDP, TCP and what acknowledges it, while nothing happens."""
    lan = Lan(BOARDS, Random(seed))
    lan.run(60_000)
    before = lan.sent_bytes
    lan.run(600_000)
    return [round((lan.sent_bytes - before) / 600 / BOARDS)]


def heal_ms(cut_ms: int, seed: int) -> list[int]:
    """How long it takes after a partition until everybody believes what is true of everybody."""
    lan = Lan(5, Random(seed))
    lan.run(SETTLED_MS)
    lan.part((0, 1), (2, 3, 4))
    lan.run(cut_ms)
    lan.heal()
    return [lan.run(60_000, lan.agrees)]


def figures(quick: bool) -> list[Row]:
    """All of them."""
    runs = 4 if quick else 40
    hours = 0.1 if quick else 0.5
    with ProcessPoolExecutor() as pool:

        def seeds(task: Callable[[int], list[int]], number: int) -> list[int]:
            return sorted(value for values in pool.map(task, range(number)) for value in values)

        rows = []
        for loss, reach, aim in ((0.01, 1.5, 1), (0.3, 3, 2)):
            say(f"news at {loss:.0%} loss")
            took = seeds(partial(news_ms, loss), runs // 2)
            p99, half = took[len(took) * 99 // 100], took[len(took) // 2]
            note = (
                f"aim {aim}; median {half / 1000:.2f}, worst {took[-1] / 1000:.2f}, n {len(took)}"
            )
            rows.append(
                row(f"news to all {BOARDS}, {loss:.0%} loss, p99", p99 / 1000, "s", reach, note)
            )
        for loss in (0.0, 0.3):
            say(f"crashes at {loss:.0%} loss")
            took = seeds(partial(crash_ms, loss), 2 * runs)
            note = f"aim 5; median {took[len(took) // 2] / 1000:.2f}, n {len(took)}"
            rows.append(
                row(
                    f"crash known to all {BOARDS}, {loss:.0%} loss, worst",
                    took[-1] / 1000,
                    "s",
                    10,
                    note,
                )
            )
        for loss, starved, reach in ((0.1, False, 0), (0.3, False, 0.5), (0.3, True, 0.5)):
            what = f"{loss:.0%} loss" + (", starved" if starved else "")
            say(f"false deaths at {what}")
            total = BOARDS * hours * runs / 2
            wrong = sum(seeds(partial(deaths, loss, starved, hours), runs // 2))
            note = f"aim 0; {total:g} board-hours"
            rows.append(row(f"false deaths, {what}", wrong / total, "/board-h", reach, note))
        say("idle traffic")
        said = seeds(idle_bytes_per_s, 2)[-1]
        whole = said + (BOARDS - 1) * (PATH_BYTES_PER_S + ROSTER_BYTES_PER_S)
        rows.append(row("idle traffic of a board, membership", said, "B/s", 1_000))
        note = "aim 1000; with what links carry beside, computed"
        rows.append(row("idle traffic of a board, all", whole, "B/s", 2_000, note))
        for cut_ms in (6_000, 60_000):
            say(f"partitions of {cut_ms // 1000} s")
            took = seeds(partial(heal_ms, cut_ms), runs)
            note = f"aim 5; median {took[len(took) // 2] / 1000:.2f}, n {len(took)}"
            rows.append(
                row(f"2|3 healed after {cut_ms // 1000} s, worst", took[-1] / 1000, "s", 12, note)
            )
    return rows


def main() -> int:
    """Measure and tell; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    given = parser.parse_args()
    return tell(figures(given.quick), given, ["--quick"] if given.quick else [])


if __name__ == "__main__":
    sys.exit(main())
