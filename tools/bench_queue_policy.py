"""Unequal boards, overload, promises and refusals in the simulator: rows for tools/bench-queue."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from random import Random
from typing import Any, Final, NamedTuple

from figures import Row, row, say  # beside this file

from edgemoa.core import stability
from edgemoa.core.events import Answered, Effect, Failed, Request, Tell
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.sim.scenario import FREE, Scenario
from edgemoa.sim.sweep import grows
from edgemoa.sim.world import Board, Prompt, World

BRIEF_S: Final = (1.0, 1.0, 1.0, 2.0, 4.0, 4.0)
LAYERS, PROPOSERS = 1, 2
SHARES: Final = (0.70, 0.75, 0.80, 0.84, 0.88, 0.92, 0.96)  # of the best rate of any policy
PROMPTS: Final = 12_000  # of a run that looks for growth
SETS: Final = 20
SPEEDS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
FULL: Final = {"ladder": False, "own_proposal": "always", "promise_ms": 10**9, "queue_bytes": 2**40}
OVERLOAD: Final = 3.0
SERVICE_S: Final = 10.0
CVS: Final = (0.0, 0.5, 1.0)  # of service times
PROMISE_S: Final = 300
SETTLED_MS: Final = 600_000  # from then on refusals are looked at
HOUR_S: Final = 3_600.0


# --- the largest stable rate


def carries(share: float, service_s: Sequence[float], pick: str, seed: int) -> bool:
    """Whether queues stay bounded at so much of the best rate that any policy could have, every
    prompt as asked for and the reports up to a second old."""
    rate = share * stability.best_rate(service_s, LAYERS, PROPOSERS)
    seconds = PROMPTS / (rate * len(service_s))
    outcome = World(
        Scenario(
            boards=len(service_s), seconds=seconds, prompts_per_s=rate,
            layers=LAYERS, proposers=PROPOSERS, service_s=tuple(service_s),
            own_requests=FREE, peer_jobs=FREE, layer_deadline_s=FREE, deadline_s=FREE,
            reports="table", report_age_s=1.0, node={**FULL, "pick": pick},
        ),
        seed, checks=False,
    ).run()  # fmt: skip
    return not grows(outcome)


def largest_share(service_s: Sequence[float], pick: str, seeds: Sequence[int]) -> float:
    """The largest of :data:`SHARES` at which most seeds stay bounded; 0 for none."""
    for share in reversed(SHARES):
        bounded = 0
        for done, seed in enumerate(seeds, 1):
            bounded += carries(share, service_s, pick, seed)
            if 2 * bounded > len(seeds) or 2 * (done - bounded) >= len(seeds) + 1:
                break
        if 2 * bounded > len(seeds):
            return share
    return 0.0


def random_set(seed: int) -> list[float]:
    """The service times of 5 to 30 boards."""
    chance = Random(seed)
    return [chance.choice(SPEEDS_S) for _ in range(chance.randint(5, 30))]


def policies(sets: int = SETS) -> list[Row]:
    """What each policy carries on the brief's boards, and the default on random ones."""
    say(f"unequal boards: three policies, and {sets} random sets")
    picks = ("shortest", "capacity", "uniform")
    with ProcessPoolExecutor(_processors()) as pool:
        brief = pool.map(partial(largest_share, BRIEF_S, seeds=(1, 2, 3)), picks)
        drawn = pool.map(
            partial(largest_share, pick="shortest", seeds=(1, 2, 3)), map(random_set, range(sets))
        )
        by_pick, shares = dict(zip(picks, brief, strict=True)), sorted(drawn)
    best = stability.best_rate(BRIEF_S, LAYERS, PROPOSERS)
    others = ", ".join(f"{pick} {by_pick[pick]:.2f}" for pick in picks[1:])
    return [
        row("unequal boards (1,1,1,2,4,4 s): largest stable rate over the best of any policy",
            by_pick["shortest"], "", 0.8, f"of {best:.3f}/s; {others} (or less); aim .92",
            least=True),
        row(f"the same on {sets} random sets of 5 to 30 boards, median",
            statistics.median(shares), "", 0.8, f"least {shares[0]:.2f}; aim .90", least=True),
    ]  # fmt: skip


# --- overload


class Kept(NamedTuple):
    """What came of a group under overload."""

    asked: int
    answered: int
    refused: int
    in_time: int
    useful: float  # share of all boards' time that went into answers in time
    retries: tuple[tuple[float, float], ...]  # told and true, in seconds


class _Watched(World):
    """Looks at how prompts end, and at when a board that refused takes prompts again."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(scenario, seed, checks=False)
        self.in_time = 0
        self.useful_ms = 0
        self.retries: list[tuple[float, float]] = []
        self._refused: dict[BoardId, list[tuple[int, int]]] = {}

    def _tally(self, prompt: Prompt) -> None:
        super()._tally(prompt)
        answered = prompt.ended
        in_time = prompt.end_ms - prompt.asked_ms <= PROMISE_S * 1_000
        if isinstance(answered, Answered) and in_time and answered.finish != "deadline":
            self.in_time += 1
            if prompt.end_ms > self.scenario.seconds * 1_000:
                return  # boards go on after the hour
            self.useful_ms += sum(each.model_ms for each in answered.proposals)
            if not answered.note:  # else a proposal was given, which is counted
                self.useful_ms += answered.model_ms

    def _do(self, board: Board, effects: list[Effect]) -> None:
        now_ms, waiting = self.now_ms, self._refused.setdefault(board.board_id, [])
        waiting += [
            (now_ms, effect.event.retry_after_ms)
            for effect in effects
            if isinstance(effect, Tell)
            and isinstance(effect.event, Failed)
            and effect.event.retry_after_ms
        ]
        super()._do(board, effects)
        if waiting and board.node is not None and board.node.refusal(now_ms) is None:
            self.retries += [
                (told_ms / 1_000, (now_ms - at_ms) / 1_000)
                for at_ms, told_ms in waiting
                if at_ms >= SETTLED_MS
            ]
            waiting.clear()


def overloaded(times: float, seconds: float, cv: float, seed: int) -> Kept:
    """Four boards that are asked so many times as much as Theorem 1 allows."""
    boards = 4
    rate = times * stability.largest_rate([SERVICE_S] * boards, LAYERS, PROPOSERS)
    world = _Watched(
        Scenario(
            boards=boards, seconds=seconds, prompts_per_s=rate,
            layers=LAYERS, proposers=PROPOSERS, service_s=(SERVICE_S,),
            distribution="gamma" if cv else "fixed", cv=cv or 1.0,
            layer_deadline_s=120, deadline_s=600, reports="table",
            node={"own_requests": None, "peer_jobs": None, "promise_ms": PROMISE_S * 1_000},
        ),
        seed,
    )  # fmt: skip
    outcome = world.run()
    return Kept(
        outcome.asked, outcome.answered, outcome.refused, world.in_time,
        world.useful_ms / 1_000 / seconds / boards, tuple(world.retries),
    )  # fmt: skip


def overload(seeds: Sequence[int] = (1, 2, 3)) -> list[Row]:
    """Three times what the boards can do as asked for; and six, for what is said to the refused."""
    say(f"overload: {OVERLOAD:g} times as much for an hour")
    with ProcessPoolExecutor(_processors()) as pool:
        hour = [pool.submit(overloaded, OVERLOAD, HOUR_S, cv, s) for cv in CVS for s in seeds]
        long = {
            cv: [pool.submit(overloaded, 2 * OVERLOAD, 2 * HOUR_S, cv, s) for s in seeds]
            for cv in CVS
        }
        kept = [each.result() for each in hour]
        told = {
            cv: [pair for each in runs for pair in each.result().retries]
            for cv, runs in long.items()
        }
    answered = sum(each.answered for each in kept)
    refused = sum(each.refused for each in kept) / sum(each.asked for each in kept)
    off = {cv: _median_error(pairs) for cv, pairs in told.items()}
    by_cv = ", ".join(f"cv {cv:g}: {error:.0%}" for cv, error in off.items())
    return [
        row("3 x overload for an hour: useful throughput over capacity",
            statistics.median(each.useful for each in kept), "", 0.93,
            f"least {min(each.useful for each in kept):.3f} of {len(kept)} runs,"
            f" service times of cv 0, .5, 1; {refused:.0%} refused; aim .98", least=True),
        row("accepted prompts finished within the promised latency",
            100 * sum(each.in_time for each in kept) / answered, "%", 99,
            f"{answered} prompts, {PROMISE_S} s promised; aim 99.9", least=True),
        row("Retry-After against the true wait, median error", 100 * off[0.5], "%", 30,
            f"{sum(map(len, told.values()))} refusals; {by_cv}; aim 15"),
    ]  # fmt: skip


def _median_error(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(abs(told - true) / max(true, 1.0) for told, true in pairs)


# --- the decision itself


def admission(boards: int = 64) -> list[Row]:
    """What it takes to decide about a prompt, in a full group."""
    say(f"admission: a group of {boards} boards")
    scenario = Scenario(
        boards=boards, seconds=60, prompts_per_s=0.05, layers=2, proposers=4, reports="table",
        service_s=BRIEF_S, node={"own_requests": None, "peer_jobs": None},
    )  # fmt: skip
    world = World(scenario, 1, checks=False)
    world.run()
    board = next(iter(world.boards.values()))
    node = board.node
    assert node is not None  # noqa: S101 - nothing takes a board down there
    now_ms, asks = world.now_ms, (ChatMessage("user", "why?"),)
    took_us = []
    for i in range(2_000):
        request = Request(f"admission-{i:05}", asks, 10, 2, 4, Sampling(), 600_000)
        started_ns = time.perf_counter_ns()
        node.decide(request, now_ms)
        took_us.append((time.perf_counter_ns() - started_ns) / 1_000)
    return [
        row(f"admission decision among {boards} boards, M=2 k=4", statistics.median(took_us), "us",
            200, f"{sorted(took_us)[-20]:.0f} us at most in 99 of 100; aim 50")
    ]  # fmt: skip


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def rows(sets: int = SETS) -> list[Row]:
    """All of them."""
    found: list[Row] = []
    parts: list[Callable[[], list[Row]]] = [partial(policies, sets), overload, admission]
    for part in parts:
        found += part()
    return found


def simulator() -> list[Row]:
    """How fast the simulator is."""
    from bench_queue_sim import measure  # noqa: PLC0415 - beside this file

    say("the simulator's own speed")
    told: dict[str, Any] = measure()
    return [
        row("simulator, events per second on one core", told["events_per_s"], "/s", 50_000,
            "aim 200000", least=True),
        row("1,000 boards for an hour", told["crowd_s"], "s", 120,
            f"{told['crowd_asked']:.0f} prompts; aim 30"),
    ]  # fmt: skip
