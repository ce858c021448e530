"""Many runs, on all processors: the same results in the same order as one after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from edgemoa.sim.scenario import PARTS, Outcome, Scenario
from edgemoa.sim.world import World

CARRIED: Final = 0.01  # share of prompts at most that were refused, failed or given less
GROWS: Final = 1.5  # times as much in the last quarter of the time as in the second one
GROWS_JOBS: Final = 0.5  # and so many jobs more on a board


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    scenario: Scenario
    seed: int


def run(task: Task, progress: Callable[[float], None] = lambda _: None) -> Outcome:
    """Run one, without checks."""
    return World(task.scenario, task.seed, checks=False).run(progress)


def run_all(tasks: Sequence[Task], progress: Callable[[float], None]) -> Iterator[Outcome]:
    """Outcomes in the order of their tasks; an interrupt ends the processes and is passed on.

    :param progress: is told the share of the tasks that is done.
    """
    processes = min(len(tasks), os.cpu_count() or 1)
    if processes <= 1:
        for number, task in enumerate(tasks):
            yield run(task, lambda part, done=number: progress((done + part) / len(tasks)))  # type: ignore[misc]
        return
    # Spawned, not forked: whatever threads this process has, the others begin without.
    with multiprocessing.get_context("spawn").Pool(processes, _in_child) as pool:
        for number, outcome in enumerate(pool.imap(run, tasks)):
            progress((number + 1) / len(tasks))
            yield outcome


def _in_child() -> None:
    """The parent decides what an interrupt from the keyboard means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What came of one or more runs of a scenario, as plain numbers; times in ms, rates per second
    and board. Counts are sums, averages are of the runs, latencies of all prompts together."""
    latency_ms = sorted(each for outcome in outcomes for each in outcome.latency_ms)
    counted = (
        "events", "asked", "answered", "refused", "failed", "cancelled", "lost_with_owner",
        "unfinished", "degraded", "left_out",
    )  # fmt: skip
    told: dict[str, Any] = {
        "runs": len(outcomes),
        **{name: sum(getattr(each, name) for each in outcomes) for name in counted},
        "latency_ms_mean": round(fmean(latency_ms)) if latency_ms else None,
    }
    for percent in (50, 95, 99):
        place = max(-(-len(latency_ms) * percent // 100) - 1, 0)
        told[f"latency_ms_p{percent}"] = latency_ms[place] if latency_ms else None
    told["mean_queue"] = fmean(each.mean_queue for each in outcomes)
    told["utilisation"] = fmean(each.utilisation for each in outcomes)
    told["busiest"] = fmean(max(each.utilisations, default=0.0) for each in outcomes)
    told["stable"] = all(is_stable(each) for each in outcomes)
    told["digest"] = outcomes[0].digest if len(outcomes) == 1 else None
    return told


def is_stable(outcome: Outcome) -> bool:
    """Whether prompts got what they asked for, and queues did not go on growing."""
    short = outcome.refused + outcome.failed + outcome.degraded
    return short <= CARRIED * max(outcome.asked, 1) and not grows(outcome)


def grows(outcome: Outcome) -> bool:
    """Whether there is much more waiting in the last quarter of the time than in the second."""
    quarter = PARTS // 4
    queues = outcome.queue_over_time
    before, after = fmean(queues[quarter : 2 * quarter]), fmean(queues[-quarter:])
    return after > GROWS * before and after > before + GROWS_JOBS
