"""Proves on real daemons that queues stay bounded below the stability condition, and what is done
above it.

Boards are started on this machine as for `edgemoa demo`, each with its own model process of one
thread. They share its cores, so service times are measured while all of them are busy, as they are
at the boundary. From these the two-class condition,
lambda [(k+1) S_1 + ((M-1)(k+1) + 1) S_a] < 1, predicts at which rate of prompts per board the
queues begin to grow. Then every board's user sends prompts at random (Poisson) in phases:

  below   .6 of that rate: queues are bounded, nothing is refused
  near    .9 of it
  strict  2 of it, where only the whole plan is wanted: how many of these the group brings about
          is the boundary as measured
  above   2 of it: smaller plans are granted
  flood   1.5 of what boards can do that each work alone: prompts are refused

In every one of them each accepted prompt gets exactly one answer.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import Row, row, say, tell  # noqa: E402

from edgemoa.core import stability  # noqa: E402
from edgemoa.demo import LocalBoard, group, start_board, stop, wait_until_ready  # noqa: E402
from edgemoa.errors import EdgemoaError, OverloadedError  # noqa: E402
from edgemoa.models.catalog import default_model  # noqa: E402
from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import ConsoleProgress  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402
from edgemoa.show import Terminal, table  # noqa: E402

CLIENTS: Final = 3  # a board, while service times are measured: enough to keep it busy
WARM_UP: Final = 0.25  # of that phase, before anything is counted
SETTLING: Final = 1 / 3  # of a phase, before throughput is counted
SAMPLE_S: Final = 0.5
PHASES: Final = ("below", "near", "strict", "above", "flood")
FLOOD: Final = 1.5
LONGEST_CHARACTERS: Final = 6_000  # of a prompt: longer ones do not fit every model's context
LARGEST_FILE_BYTES: Final = 64 << 20
FIELDS: Final = ("prompt", "instruction", "question", "text")

# What is promised of the figures. A queue that has no bound gains (load - 1) T / 2 / S jobs between
# the halves of a phase: far more than this wherever the load is not just at 1.
GROWTH_JOBS: Final = 2.0
GROWTH: Final = 2.0
BOUNDARY: Final = 0.25
IN_TIME: Final = 0.99
SHORT_PLANS: Final = 0.05
SHARES: Final = (("median", 0.5), ("p95", 0.95), ("p99", 0.99))

# Prompts where no file is given; all different, since what was read before is not read again.
_ASKED: Final = (
    "Explain {} to a child of ten.", "What should everybody know about {}?",
    "Name three surprising facts about {}.", "Write a short letter to a friend about {}.",
    "How did {} change the way people live?", "What is hard about {}, and what is easy?",
    "Give me a plan for a week to learn about {}.", "Which mistakes do people make with {}?",
    "Compare {} with what there was before.", "Write a riddle whose answer is {}.",
    "What would a world without {} be like?", "Which words does one need to talk about {}?",
)  # fmt: skip
_ABOUT: Final = (
    "bread", "bicycles", "the tides", "chess", "vaccines", "bridges", "jazz", "beekeeping",
    "volcanoes", "paper", "sailing", "solar eclipses", "gardening", "maps", "clocks", "coffee",
    "the moon", "migrating birds", "glass", "mirrors", "railways", "salt", "mushrooms", "wool",
    "photography", "earthquakes", "lighthouses", "the alphabet", "soap", "tea", "magnets", "rivers",
    "libraries", "kites", "steel", "cheese", "snow", "pianos", "potatoes", "the compass",
)  # fmt: skip


# --- pure parts


@dataclass(slots=True)
class Asked:
    """One prompt and what became of it. Times in seconds from the beginning of its phase."""

    board: int
    came_s: float
    ended_s: float = math.nan
    accepted: int = 0  # times that the client was told so
    answered: int = 0
    layers: int = 0
    proposers: int = 0
    why: str = ""  # less was granted than asked for
    note: str = ""
    refused: str = ""  # the error's code
    retry_s: int = 0
    first_ms: list[int] = field(default_factory=list)  # of the model's time, a proposal each
    last_ms: int = 0  # the same, of the answer
    left_out: list[str] = field(default_factory=list)  # why, a proposer each

    @property
    def plan(self) -> str:
        """As people write it."""
        return f"M{self.layers}k{self.proposers}" if self.layers else "alone"

    @property
    def whole(self) -> bool:
        """Whether everybody who was to propose did, as granted."""
        return bool(self.answered) and not self.left_out and not self.note


@dataclass(slots=True)
class Phase:
    """What a phase has shown."""

    name: str
    per_board: float  # prompts per second of each user
    seconds: float
    asked: list[Asked] = field(default_factory=list)
    # When, and how many jobs a board had on average.
    queues: list[tuple[float, float]] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)  # what all boards counted meanwhile
    others: float = 0.0  # share of this machine's processor that went to other work
    began_s: float = field(default_factory=time.monotonic)

    def clock(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began_s

    def accepted(self) -> list[Asked]:
        """The prompts that were taken."""
        return [each for each in self.asked if each.accepted]

    def lost(self) -> int:
        """Accepted prompts without exactly one answer, and answers to what was not accepted."""
        return sum(1 for each in self.asked if each.accepted > 1 or each.answered != each.accepted)

    def refused(self) -> list[Asked]:
        """The prompts that were sent away because of load."""
        return [each for each in self.asked if each.refused == OverloadedError.code]

    def broken(self) -> list[str]:
        """Codes of other errors: there should be none."""
        codes = (each.refused for each in self.asked)
        return [code for code in codes if code and code != OverloadedError.code]

    def halves(self) -> tuple[float, float]:
        """Jobs per board, on average over either half of the time in which prompts came."""
        half = self.seconds / 2
        first = [jobs for at, jobs in self.queues if at < half]
        second = [jobs for at, jobs in self.queues if half <= at < self.seconds]
        return mean(first), mean(second)

    def served_per_s(self, layers: int, proposers: int, *, whole: bool = True) -> float:
        """Plans per second that were brought about, of all boards, once it has settled.

        :param whole: only those that nobody was missing from.
        """
        since = self.seconds * SETTLING
        done = sum(
            1
            for each in self.asked
            if (each.whole if whole else each.answered)
            and (each.layers, each.proposers) == (layers, proposers)
            and since <= each.ended_s < self.seconds
        )
        return done / (self.seconds - since)

    def service_s(self, since_s: float, proposers: int) -> tuple[float, float]:
        """(S_1, S_a): mean seconds of the model's time of a first proposal, and of an aggregation
        of all proposals, from when on all boards were busy until prompts came no more."""
        counted = [
            each for each in self.asked if each.answered and since_s <= each.ended_s < self.seconds
        ]
        first = [ms / 1000 for each in counted for ms in each.first_ms]
        last = [
            each.last_ms / 1000
            for each in counted
            if each.whole and each.layers and each.proposers == proposers
        ]
        return mean(first), mean(last)


def mean(values: Sequence[float]) -> float:
    """Not a number where there are none."""
    return statistics.fmean(values) if values else math.nan


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    ranked = sorted(values)
    return ranked[max(math.ceil(share * len(ranked)) - 1, 0)] if ranked else math.nan


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Times at which something comes at random, so many per second."""
    times, at = [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    return times


def grew(first: float, second: float) -> bool:
    """Whether a queue was so much longer in the second half that chance does not explain it."""
    return not second <= GROWTH * first + GROWTH_JOBS


def read_prompts(file: Path) -> list[str]:
    """The prompts of a JSONL or CSV file, whichever of :data:`FIELDS` it has.

    :raises SystemExit: it cannot be read, or holds none.
    """
    try:
        if file.stat().st_size > LARGEST_FILE_BYTES:
            raise SystemExit(f"{file} is too large for a file of prompts")
        with file.open(encoding="utf-8", newline="") as lines:
            rows: Iterable[Any]
            if file.suffix == ".csv":
                rows = list(csv.DictReader(lines))
            else:
                rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"{file} cannot be read as prompts: {error}") from error
    found = []
    for each in rows:
        told = each if isinstance(each, dict) else {}
        text = next((told[name] for name in FIELDS if isinstance(told.get(name), str)), "")
        if text.strip() and len(text) <= LONGEST_CHARACTERS:
            found.append(text)
    if not found:
        raise SystemExit(f"{file} holds no prompt: one of the fields {', '.join(FIELDS)} is needed")
    return found


def own_prompts() -> list[str]:
    """Prompts where no file is given."""
    return [asked.format(about) for about, asked in itertools.product(_ABOUT, _ASKED)]


# --- users


class Users:
    """Everybody who asks the boards; each prompt in a thread of its own."""

    def __init__(
        self, boards: list[LocalBoard], prompts: list[str], given: argparse.Namespace
    ) -> None:
        self._boards = boards
        self._prompts = itertools.cycle(prompts)
        self._given = given
        self._rng = random.Random(given.seed)
        self._terminal = Terminal()
        self._lock = threading.Lock()
        self._before: Counter[str] = Counter()
        self._processor = Processor(boards)

    def ask(self, asked: Asked, phase: Phase, *, strict: bool = False) -> None:
        """Ask the board, and wait for what comes of it."""
        with self._lock:
            prompt = next(self._prompts)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._given.tokens,
            "edgemoa": {
                "layers": self._given.layers,
                "proposers": self._given.proposers,
                "strict": strict,
                "events": True,
            },
        }
        try:
            for chunk in self._boards[asked.board].client.chat(body):
                self._heard(asked, chunk.get("edgemoa"))
        except OverloadedError as error:
            asked.refused, asked.retry_s = error.code, error.retry_after_s
        except EdgemoaError as error:
            asked.refused = error.code
        asked.ended_s = phase.clock()

    def _heard(self, asked: Asked, event: Any) -> None:
        match event:
            case {"type": "accepted", "granted": granted}:
                asked.accepted += 1
                asked.layers, asked.proposers = granted["layers"], granted["proposers"]
                asked.why = granted["why"]
            case {"type": "proposal", "proposal": proposal} if proposal["layer"] == 1:
                asked.first_ms.append(proposal["model_ms"])
            case {"type": "left_out", "left_out": out}:
                asked.left_out.append(out["reason"])
            case {"type": "answered"}:
                asked.answered += 1
                asked.note, asked.last_ms = event["note"], event["model_ms"]

    def keep_busy(self, seconds: float, left_s: float) -> Phase:
        """Every board always has some prompts; who has an answer asks the next question."""
        phase = self._begin("busy", math.nan, seconds)

        def client(board: int) -> None:
            while phase.clock() < seconds:
                asked = Asked(board, phase.clock())
                phase.asked.append(asked)
                self.ask(asked, phase)
                if asked.refused:
                    time.sleep(1)

        users = [
            threading.Thread(target=client, args=(board,), daemon=True)
            for board in range(len(self._boards))
            for _ in range(CLIENTS)
        ]
        for user in users:
            user.start()
        self._watch(phase, users, left_s)
        return phase

    def come(
        self, name: str, per_board: float, seconds: float, left_s: float, *, strict: bool = False
    ) -> Phase:
        """Prompts come at random to every board, whatever becomes of those before."""
        phase = self._begin(name, per_board, seconds)
        came = sorted(
            (at, board)
            for board in range(len(self._boards))
            for at in poisson(per_board, seconds, self._rng)
        )
        phase.asked.extend(Asked(board, at) for at, board in came)
        users: list[threading.Thread] = []

        def come() -> None:
            for asked in phase.asked:
                time.sleep(max(asked.came_s - phase.clock(), 0))
                user = threading.Thread(
                    target=self.ask, args=(asked, phase), kwargs={"strict": strict}, daemon=True
                )
                users.append(user)
                user.start()

        users.append(threading.Thread(target=come, daemon=True))
        users[0].start()
        self._watch(phase, users, left_s)
        return phase

    def _begin(self, name: str, per_board: float, seconds: float) -> Phase:
        self._before, self._processor = counted(self._boards), Processor(self._boards)
        return Phase(name, per_board, seconds)

    def _watch(self, phase: Phase, users: list[threading.Thread], left_s: float) -> None:
        """Look at the queues until everybody has an answer, or has waited for far too long."""
        patience_s = phase.seconds + 3 * self._given.promise
        while phase.clock() < phase.seconds or (
            any(user.is_alive() for user in list(users)) and phase.clock() < patience_s
        ):
            jobs = mean([each["waiting"] + each["running"] for each in states(self._boards)])
            phase.queues.append((phase.clock(), jobs))
            rest_s = max(phase.seconds - phase.clock(), 0)
            self._terminal.pending(
                f"{phase.name}: {jobs:.1f} jobs a board,"
                f" {f'{rest_s:.0f} s to go' if rest_s else 'the last answers'};"
                f" about {max(left_s - phase.clock(), 0) / 60:.1f} min in all"
            )
            time.sleep(SAMPLE_S)
        phase.others = self._processor.others()
        phase.counters = counted(self._boards)
        phase.counters.subtract(self._before)


# --- the boards


def start_anew(boards: list[LocalBoard], settings: Sequence[str]) -> None:
    """Stop the boards in good order and start them again, each in its own place."""
    stop(boards)
    for i, board in enumerate(boards):
        boards[i] = start_board(board.log.parent, f"board.name={board.name}", *settings)


def wait_for_all(boards: list[LocalBoard]) -> None:
    """Wait until every board's model is loaded and it can ask every other board."""
    for i in range(len(boards)):
        wait_until_ready([*boards[i:], *boards[:i]])


# --- what it comes to


def judged(phase: Phase, given: argparse.Namespace) -> Iterator[Row]:
    """The figures of a phase."""
    name, counters = phase.name, phase.counters
    accepted, refused = phase.accepted(), phase.refused()
    answered = sum(each.answered for each in phase.asked)
    unlike = abs(counters["accepted"] - len(accepted)) + abs(counters["answered"] - answered)
    note = f"{len(phase.asked)} asked, {len(accepted)} accepted, {answered} answered"
    if unlike:
        note += f"; boards counted otherwise: {dict(counters)}"
    yield row(f"{name}: prompts lost or answered twice", phase.lost() + unlike, "", 0, note)
    if broken := phase.broken():
        yield row(f"{name}: other errors", len(broken), "", 0, ", ".join(sorted(set(broken))))

    took_s = [each.ended_s - each.came_s for each in accepted]
    late = sum(1 for each in took_s if each > given.promise)
    yield row(
        f"{name}: answered within the promised {given.promise} s",
        1 - late / max(len(took_s), 1), "", IN_TIME,
        ", ".join(f"{called} {percentile(took_s, share):.1f} s" for called, share in SHARES),
        least=True,
    )  # fmt: skip

    first, second = phase.halves()
    most = max((jobs for _, jobs in phase.queues), default=math.nan)
    yield row(
        f"{name}: jobs a board, second half", second, "",
        GROWTH * first + GROWTH_JOBS if name == "below" else None,
        f"{'grew' if grew(first, second) else 'bounded'}: first half {first:.2f}, most {most:.1f}",
    )  # fmt: skip

    plans = Counter(each.plan for each in accepted)
    less = [each for each in accepted if each.why]
    whys = Counter(each.why for each in less).most_common(2)
    yield row(
        f"{name}: granted less than asked for", len(less), "",
        1 if name == "above" and not refused else None,
        "; ".join(
            [", ".join(f"{n} x {plan}" for plan, n in plans.most_common())]
            + [f'{n} x "{why}"' for why, n in whys]
        ),
        least=True,
    )  # fmt: skip

    bound = {"below": 0, "flood": 1}.get(name)
    retries = [each.retry_s for each in refused]
    yield row(
        f"{name}: refused", len(refused), "", bound,
        f"Retry-After {min(retries)} to {max(retries)} s, median {statistics.median(retries):.0f}"
        if retries else "",
        least=name == "flood",
    )  # fmt: skip
    out = Counter(why for each in accepted for why in each.left_out)
    told_why = [f"{n} x {why}" for why, n in out.most_common(3)]
    without = sum(1 for each in accepted if not each.whole)
    yield row(
        f"{name}: answered with less than was granted", without / max(len(accepted), 1), "share",
        SHORT_PLANS if name == "below" else None,
        "; ".join([f"{sum(out.values())} proposers left out", *told_why]),
    )  # fmt: skip
    if counters["refused"] != len(refused):
        yield row(f"{name}: refused, as boards counted", counters["refused"])
    if notes := Counter(each.note for each in accepted if each.note):
        shown = "; ".join(f"{n} x {note}" for note, n in notes.most_common(3))
        yield row(f"{name}: answers with a note", sum(notes.values()), note=shown)
    yield row(f"{name}: cores at other work", phase.others, "share")


def told(phase: Phase, boards: list[LocalBoard]) -> dict[str, Any]:
    """A phase for scripts: every prompt, every look at the queues, and the boards at its end."""
    return {
        "name": phase.name,
        "prompts_per_s": None if math.isnan(phase.per_board) else phase.per_board,
        "seconds": phase.seconds,
        "prompts": [asdict(each) for each in phase.asked],
        "queues": phase.queues,
        "counters": phase.counters,
        "others": phase.others,
        "status": states(boards),
    }


class Processor:
    """What of this machine's processor goes to other work than ours, from one look to the next:
    figures from a machine that is busy otherwise are worth little."""

    def __init__(self, boards: list[LocalBoard]) -> None:
        self._boards = boards
        self._seen = self._look()

    def others(self) -> float:
        """The share of all cores, since the last time that this was asked."""
        before, self._seen = self._seen, self._look()
        every, busy, ours = (now - then for now, then in zip(self._seen, before, strict=True))
        return max(busy - ours, 0.0) / max(every, 1.0)

    def _look(self) -> tuple[float, float, float]:
        """Seconds of all cores so far: in all, busy, and busy for us."""
        tick = os.sysconf("SC_CLK_TCK")
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        spent = [int(each) / tick for each in line.split()[1:9]]
        ours = time.process_time()
        for each in states(self._boards):
            for pid in (each["pid"], each["engine"]["pid"]):
                # Behind the name, which may hold anything: user and system time are the 12th, 13th.
                told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                fields = told.rpartition(")")[2].split()
                ours += (int(fields[11]) + int(fields[12])) / tick
        return sum(spent), sum(spent) - spent[3] - spent[4], ours


def states(boards: list[LocalBoard]) -> list[dict[str, Any]]:
    """What each board says of itself now."""
    return [board.client.get("/v1/status") for board in boards]


def counted(boards: list[LocalBoard]) -> Counter[str]:
    """What all boards counted since they started."""
    total: Counter[str] = Counter()
    for each in states(boards):
        total.update(each["counters"])
    return total


def service_seen(boards: list[LocalBoard]) -> dict[str, float]:
    """What the boards say that a job of each kind takes, in seconds, on average."""
    seen = [each["service_ms"] for each in states(boards)]
    kinds = set.intersection(*(set(each) for each in seen))
    return {kind: mean([each[kind] for each in seen]) / 1000 for kind in kinds}


def prove(given: argparse.Namespace, prompts: list[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Start the boards and run the phases; returns figures, and the phases for scripts."""
    library = ModelLibrary(default_model_dir())
    model = given.model or default_model(library)
    progress = ConsoleProgress()
    try:
        ensure(model, library, progress)
    finally:
        progress.close()
    settings = (
        f"board.models_dir={library.root}",
        f"model.name={model}",
        "model.threads=1",
        f"model.slots={given.slots}",
        f"moa.proposal_max_tokens={given.tokens}",
        f"moa.promise_s={given.promise}",
        "log.level=warning",
    )
    rest_s = given.promise / 2  # about how long boards take to finish, at the end of a phase
    m, k = given.layers, given.proposers
    random.Random(given.seed).shuffle(prompts)
    rows: list[Row] = []
    phases: list[dict[str, Any]] = []
    left_s = (len(given.only or PHASES) + 0.5) * (given.seconds + rest_s / 2) + 10
    with group(given.boards, model, library.root, *settings) as boards:
        wait_for_all(boards)
        users = Users(boards, prompts, given)
        say(f"all boards are kept busy, to see what jobs take: {given.seconds / 2:.0f} s")
        busy = users.keep_busy(given.seconds / 2, left_s)
        first_s, last_s = busy.service_s(WARM_UP * busy.seconds, k)
        if math.isnan(first_s + last_s):
            raise SystemExit("too few answers to know what jobs take; try a longer --seconds")
        seen = service_seen(boards)
        rows.extend(judged(busy, given))
        phases.append(told(busy, boards))

        # What comes from now on is not to be mistaken for what came while boards were kept busy.
        start_anew(boards, settings)
        wait_for_all(boards)
        recalled = service_seen(boards)
        limit = 1 / stability.prompt_s(first_s, last_s, m, k)
        shared = f"{given.boards} boards with a thread each on {os.cpu_count()} cores"
        rows += [
            row("S_1, a first proposal", first_s, "s", note=f"all boards busy; {shared}"),
            row("S_a, an aggregation", last_s, "s"),
            row("S_1 as the boards have it after a restart", recalled.get("proposal"), "s", 0.01,
                "against before", around=seen.get("proposal")),
            row(f"boundary as predicted, M={m}, k={k}", 60 * limit, "/min",
                note=f"prompts of each user; {60 * limit * given.boards:.1f} of all"),
        ]  # fmt: skip
        rates = {
            "below": 0.6 * limit,
            "near": 0.9 * limit,
            "strict": 2 * limit,
            "above": 2 * limit,
            "flood": FLOOD / first_s,
        }
        if given.only:
            rates = {name: rate for name, rate in rates.items() if name in given.only}
        left_s = len(rates) * (given.seconds + rest_s / 2)
        for name, rate in rates.items():
            say(
                f"{name}: {60 * rate:.1f} prompts a minute to each board for {given.seconds:.0f} s;"
                f" about {left_s / 60:.0f} min left"
            )
            phase = users.come(name, rate, given.seconds, left_s, strict=name == "strict")
            rows.extend(judged(phase, given))
            phases.append(told(phase, boards))
            if name == "strict":
                rows.extend(boundary(phase, limit, given))
            left_s -= given.seconds + rest_s / 2
    return rows, phases


def boundary(phase: Phase, limit: float, given: argparse.Namespace) -> list[Row]:
    """The whole plans that the group brought about, beside the boundary that was predicted."""
    m, k = given.layers, given.proposers
    measured = phase.served_per_s(m, k) / given.boards
    granted = phase.served_per_s(m, k, whole=False) / given.boards
    first_s, last_s = phase.service_s(phase.seconds * SETTLING, k)
    now = 1 / stability.prompt_s(first_s, last_s, m, k)
    return [
        row(f"boundary as measured, M={m}, k={k}", 60 * measured, "/min",
            note=f"{60 * granted:.4g} with those whose proposers were late"),
        row("boundary, measured over predicted", measured / limit, "", BOUNDARY, around=1.0),
        row("the same, with service times of meanwhile", measured / now,
            note=f"S_1 {first_s:.3f} s, S_a {last_s:.3f} s predict {60 * now:.4g} /min"),
    ]  # fmt: skip


def _shown(phases: list[dict[str, Any]]) -> str:
    """The phases at a glance, for people."""
    lines = [("phase", "prompts/min", "asked", "accepted", "answered", "refused", "degraded")]
    for each in phases:
        asked, rate = each["prompts"], each["prompts_per_s"]
        lines.append(
            (
                each["name"],
                "-" if rate is None else f"{60 * rate:.1f}",
                str(len(asked)),
                str(sum(1 for one in asked if one["accepted"])),
                str(sum(one["answered"] for one in asked)),
                str(sum(1 for one in asked if one["refused"])),
                str(sum(1 for one in asked if one["why"])),
            )
        )
    return table(lines)


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    number.__name__ = f"number from {least} to {most}"
    return number


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prove-queue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--boards", type=_number(3, 5), default=3, help="default: %(default)s")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f"JSONL or CSV with one of the fields {', '.join(FIELDS)} (default: some of our own)",
    )
    add("--model", help="a model from `edgemoa model list` (default: the default one)")
    add("--slots", type=_number(1, 8), default=1, help="jobs at a time of each board (default: 1)")
    add("--layers", type=_number(1, 3), default=1, metavar="M", help="default: %(default)s")
    add("--proposers", type=_number(1, 4), default=2, metavar="K", help="default: %(default)s")
    add(
        "--tokens",
        type=_number(1, 512),
        default=40,
        help="of a proposal, and of an answer, at most (default: %(default)s)",
    )
    add(
        "--seconds",
        type=_number(20, 3600),
        default=90,
        help="of each phase; half as much to measure service times (default: %(default)s)",
    )
    add(
        "--promise",
        type=_number(1, 3600),
        default=30,
        metavar="SECONDS",
        help="within which prompts are to be answered (default: %(default)s)",
    )
    add(
        "--only",
        action="append",
        choices=PHASES,
        help="this phase alone; may be given several times",
    )
    add("--seed", type=int, default=1, help="of arrivals and the order of prompts (default: 1)")
    add("--json", action="store_true", help="print one JSON object, with every prompt's fate")
    add("--check", action="store_true", help="exit 1 if a figure falls short")
    given = parser.parse_args()
    if given.proposers >= given.boards:
        parser.error(f"{given.boards} boards have at most {given.boards - 1} proposers each")
    return given


def _stopped(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """The command."""
    given = _arguments()
    prompts = read_prompts(given.prompts) if given.prompts else own_prompts()
    signal.signal(signal.SIGTERM, _stopped)  # boards are stopped on the way out
    try:
        rows, phases = prove(given, prompts)
    except KeyboardInterrupt:
        say("interrupted; all boards are stopped")
        return 130
    except EdgemoaError as error:
        say(f"{error}")
        return error.exit_code
    left_out = ["--only"] if given.only else []
    if given.json:
        short = [each["name"] for each in rows if each.get("ok") is False]
        print(json.dumps({"figures": rows, "phases": phases, "left_out": left_out}))
        verdict = f"short of their reach: {', '.join(short)}" if short else "all within their reach"
        print(verdict, file=sys.stderr)
        return int(bool(short) and given.check)
    print(_shown(phases) + "\n")
    return tell(rows, given, left_out)


if __name__ == "__main__":
    raise SystemExit(main())
