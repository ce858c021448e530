"""The theory against the simulator, which runs the daemon's own node: rows for tools/bench-queue.

Three checks: the load from which queues grow against Theorem 1; the latencies of the paper's
Table I; how often a bounded queue is full against what is predicted of it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Final

import numpy as np
from figures import Row, row, say  # beside this file
from paper_table import ALPHA_S, BOARDS, TABLE, Bursts, Measured, burst

from edgemoa.core import stability
from edgemoa.core.admission import RESUME
from edgemoa.sim.scenario import PARTS, Arrival, Distribution, Outcome, Scenario
from edgemoa.sim.world import World

PLANS: Final = ((0, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))  # layers and proposers
OVERLOADS: Final = (1.06, 1.1, 1.15, 1.2)  # of what Theorem 1 allows, at which growth is measured
LEFT_OUT: Final = PARTS // 5  # of the parts, while queues are still empty at times
LOADS: Final = (0.6, 0.8, 0.95)
FULL_SHARES: Final = (0.1, 0.03)  # refused by the queues that are simulated, as predicted
RUNS: Final = 4_000  # of a row of Table I
PAIRS: Final = 60  # of them that are simulated as well

NO_BOUND: Final = 10**6
NO_END_S: Final = 1e6

# As in the paper: uniform picks, one queue in the order of arrival, and every prompt as asked for.
PAPER: Final = {
    "pick": "uniform",
    "discipline": "fcfs",
    "ladder": False,
    "own_proposal": "always",
    "promise_ms": 10**9,
    "queue_bytes": 2**40,
}


def scenario(
    layers: int,
    proposers: int,
    *,
    boards: int = BOARDS,
    seconds: float,
    arrivals: Sequence[Arrival],
    service_s: float = 1.0,
    distribution: Distribution = "fixed",
    cv: float = 1.0,
    places: int = NO_BOUND,
) -> Scenario:
    """The paper's group, on a quick network that loses nothing.

    :param places: for prompts of a board's own user; unbounded unless said otherwise.
    """
    return Scenario(
        boards=boards,
        seconds=seconds,
        replay=tuple(arrivals),
        layers=layers,
        proposers=proposers,
        service_s=(service_s,),
        distribution=distribution,
        cv=cv,
        own_requests=places,
        peer_jobs=NO_BOUND,
        layer_deadline_s=NO_END_S,
        deadline_s=NO_END_S,
        node=PAPER,
        reports="table",
        delay_ms=(1, 2),
    )


def poisson(rate: float, boards: int, seconds: float, seed: int) -> list[Arrival]:
    """Prompts at random times, at ``rate`` per second and board, in the order of time."""
    # The simulator's own chance must not begin alike: services would follow arrivals.
    rng, now, arrivals = Random(f"arrivals {seed}"), 0.0, list[Arrival]()
    while (now := now + rng.expovariate(rate * boards)) < seconds:
        arrivals.append(Arrival(now, rng.randrange(boards)))
    return arrivals


def simulate(what: Scenario, seed: int) -> Outcome:
    """Run it, quickly.

    :raises AssertionError: if a prompt was not answered in full, or refused without a bound: the
        figures would be about something else.
    """
    found = World(what, seed, checks=False).run()
    if found.answered + found.refused != found.asked or found.degraded:
        raise AssertionError(f"prompts went wrong: {found}")
    return found


# --- Theorem 1


@dataclass(frozen=True, slots=True)
class Growth:
    """A run above the boundary: prompts per second and board that came, and by how many jobs per
    second a board's queue grew."""

    rate: float
    jobs_per_s: float


@dataclass(frozen=True, slots=True)
class Boundary:
    """The rate from which queues grow, in prompts per second and board: predicted and found."""

    layers: int
    proposers: int
    predicted: float
    found: float
    growths: tuple[Growth, ...]

    @property
    def off(self) -> float:
        """The relative error of what was predicted."""
        return self.found / self.predicted - 1


def growth(
    plan: tuple[int, int], rate: float, seconds: float, seed: int, distribution: Distribution
) -> Growth:
    """Overload a group for a while (service times are 1 s), and see how its queues grow.

    Prompts are counted just as the queue is, by the slope over the same time: chance brings some
    more or fewer of them, and that is no error of the growth.
    """
    arrivals = poisson(rate, BOARDS, seconds, seed)
    what = scenario(*plan, seconds=seconds, arrivals=arrivals, distribution=distribution)
    queues = np.array(simulate(what, seed).queue_over_time)
    edges = np.linspace(0, seconds, PARTS + 1)
    times = np.array([each.time_s for each in arrivals])
    came = [  # so far, on average over each part
        np.clip((end - times) / (end - start), 0, 1).sum() / BOARDS
        for start, end in pairwise(edges)
    ]
    middles = (edges[:-1] + edges[1:]) / 2
    slope = [
        float(np.polyfit(middles[LEFT_OUT:], values[LEFT_OUT:], 1)[0])
        for values in (np.array(came), queues)
    ]
    return Growth(*slope)


def boundary(growths: Iterable[Growth], layers: int, proposers: int) -> Boundary:
    """Where a line through rates against growths has no growth. Near the boundary the rate is
    linear in the growth to within a thousandth: a queue that grows holds up later layers' work."""
    points = tuple(growths)
    line = np.polyfit([each.jobs_per_s for each in points], [each.rate for each in points], 1)
    predicted = stability.largest_rate([1.0], layers, proposers)
    return Boundary(layers, proposers, predicted, float(line[1]), points)


def boundaries(
    seconds: float, distribution: Distribution = "fixed", seed: int = 1
) -> list[Boundary]:
    """For every plan, from runs of so many simulated seconds, on all processors."""
    say(f"Theorem 1: {len(PLANS)} plans, {distribution} service")
    tasks = [
        ((m, k), over * stability.largest_rate([1.0], m, k), seconds, 100 * seed + i, distribution)
        for m, k in PLANS
        for i, over in enumerate(OVERLOADS)
    ]
    with ProcessPoolExecutor(_processors()) as pool:
        found = list(pool.map(growth, *zip(*tasks, strict=True)))
    each = len(OVERLOADS)
    return [boundary(found[i * each : (i + 1) * each], m, k) for i, (m, k) in enumerate(PLANS)]


def theorem_1(seconds: float = 4_000, distribution: Distribution = "fixed") -> list[Row]:
    """The load at which queues start to grow, against Theorem 1: the worst plan, and all.

    There is a bound to keep for fixed service only: exponential service needs ten times as long to
    come as near, by its own chance.
    """
    found = boundaries(seconds, distribution)
    worst = max(found, key=lambda each: abs(each.off))
    told = ", ".join(f"{each.layers},{each.proposers}: {each.off:+.1%}" for each in found)
    name = f"Theorem 1: where queues start to grow, {distribution} service"
    reach = 3 if distribution == "fixed" else None
    return [row(name, 100 * abs(worst.off), "%", reach, f"off at most; M,k {told}; aim 1")]


# --- Table I


def simulated_table(layers: int, proposers: int, runs: int, seed: int) -> tuple[float, float]:
    """Mean latencies of the same bursts by the recursion and by the simulator, in seconds."""
    rng = np.random.default_rng(seed)
    bursts = Bursts.draw(runs, rng)
    by_recursion = burst([ALPHA_S] * BOARDS, layers, proposers, bursts, rng)
    latencies_s = []
    for run in range(runs):
        arrivals = [
            Arrival(float(time_s), int(owner))
            for time_s, owner in zip(bursts.times_s[run], bursts.owners[run], strict=True)
        ]
        last_s = arrivals[-1].time_s + 1
        what = scenario(layers, proposers, seconds=last_s, arrivals=arrivals, service_s=ALPHA_S)
        latencies_s.append(statistics.fmean(simulate(what, seed + run).latency_ms) / 1000)
    return by_recursion.latency_s, statistics.fmean(latencies_s)


def table(alphas_s: Sequence[float], runs: int = RUNS, seed: int = 1) -> list[Measured]:
    """Each row of Table I by the recursion."""
    found = []
    for published in TABLE:
        rng = np.random.default_rng(seed)
        bursts = Bursts.draw(runs, rng)
        found.append(burst(alphas_s, published.layers, published.proposers, bursts, rng))
    return found


def table_1(runs: int = RUNS) -> list[Row]:
    """Latencies of the same-LLM column with the single free parameter, the worst row."""
    say(f"Table I: {len(TABLE)} rows of {runs:,} runs")
    found = table([ALPHA_S] * BOARDS, runs)
    off = [each.latency_s / published.same[0] - 1
           for each, published in zip(found, TABLE, strict=True)]  # fmt: skip
    told = ", ".join(f"{p.layers},{p.proposers}: {each:+.1%}"
                     for p, each in zip(TABLE, off, strict=True))  # fmt: skip
    note = f"off at most, alpha = {ALPHA_S:g} s; M,k {told}; aim 8"
    return [row("Table I: latencies", 100 * max(map(abs, off)), "%", 10, note)]


def table_1_simulated(runs: int = PAIRS) -> list[tuple[float, float]]:
    """For each row of Table I: :func:`simulated_table`."""
    say(f"Table I: {runs} runs of each row by the simulator")
    plans = [(each.layers, each.proposers, runs, 7) for each in TABLE]
    with ProcessPoolExecutor(_processors()) as pool:
        return list(pool.map(simulated_table, *zip(*plans, strict=True)))


# --- blocking


@dataclass(frozen=True, slots=True)
class Full:
    """A bounded queue: the share of prompts that find it full, predicted and simulated."""

    law: str
    load: float
    places: int
    predicted: float
    at_once: float  # predicted of a queue that takes jobs again as soon as a place is free
    two_moments: float  # MacGregor Smith's form, of the same
    simulated: float

    @property
    def off(self) -> float:
        """The relative error of what was predicted."""
        return self.predicted / self.simulated - 1


LAWS: Final[dict[str, tuple[Distribution, float]]] = {
    "fixed": ("fixed", 0.0),
    "gamma, cv 0.5": ("gamma", 0.5),
    "exponential": ("exponential", 1.0),
    "gamma, cv 1.5": ("gamma", 1.5),
}


def full(law: str, load: float, share: float, prompts: int, seed: int) -> Full | None:
    """Fill the node's queue of prompts that is predicted to refuse about a ``share`` of them, on
    several boards that know nothing of each other. None where no queue of 200 places refuses so
    few.
    """
    distribution, cv = LAWS[law]
    places = stability.places_for(load, cv * cv, share, 200, RESUME)
    if places is None:
        return None
    boards = 4
    seconds = prompts / load / boards
    arrivals = poisson(load, boards, seconds, seed)
    what = scenario(0, 0, boards=boards, seconds=seconds, arrivals=arrivals,
                    distribution=distribution, cv=cv, places=places)  # fmt: skip
    found = simulate(what, seed)
    return Full(
        law,
        load,
        places,
        stability.blocking(load, cv * cv, places, RESUME),
        stability.blocking(load, cv * cv, places),
        stability.two_moment_blocking(load, cv * cv, places),
        found.refused / found.asked,
    )


def queues(prompts: int) -> list[Full]:
    """All laws, loads and shares, on all processors."""
    say(f"blocking: {len(LAWS) * len(LOADS) * len(FULL_SHARES)} queues of {prompts:,} prompts")
    tasks = [(law, load, share, prompts, i)
             for i, law in enumerate(LAWS) for load in LOADS for share in FULL_SHARES]  # fmt: skip
    with ProcessPoolExecutor(_processors()) as pool:
        found = pool.map(full, *zip(*tasks, strict=True))
        return [each for each in found if each is not None]


def blocking(prompts: int = 80_000) -> list[Row]:
    """How far the prediction of a bounded queue is off at most; and MacGregor Smith's."""
    found = queues(prompts)
    worst = max(found, key=lambda each: abs(each.off))
    smith = max(found, key=lambda each: abs(each.two_moments / each.simulated - 1))
    where = f"{worst.law} at rho {worst.load:g} with {worst.places} places: "
    note = f"off at most; {where}{worst.predicted:.3%} for {worst.simulated:.3%}; aim 10"
    where = f"{smith.law} at rho {smith.load:g} with {smith.places} places"
    theirs = f"off at most; {where}; it knows of no draining"
    return [
        row("blocking predicted, rho .6-.95", 100 * abs(worst.off), "%", 25, note),
        row("  by the two-moment form, for comparison",
            100 * abs(smith.two_moments / smith.simulated - 1), "%", note=theirs),
    ]  # fmt: skip


def _processors() -> int:
    return len(os.sched_getaffinity(0))
