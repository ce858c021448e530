"""What theory says of a scenario: the work of a prompt, and the rates that boards can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgemoa.core.stability import batch_share_s, best_rate
from edgemoa.sim.engines import Recorded
from edgemoa.sim.scenario import Scenario, Sizes

MOST_BOARDS: Final = 100  # for which the best rate of any policy is worked out


@dataclass(frozen=True, slots=True)
class BoardWork:
    """Seconds of a board's model, with all its slots in use, for a prompt of its own user, and for
    one of another's that it is picked for in every layer."""

    own_s: float
    picked_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest stable rates, in prompts per second and user: with uniform picks, at which
    ``board`` is full first, and with the best picks that there could be (None for many boards)."""

    uniform: float
    best: float | None
    board: int


def work_of(scenario: Scenario, board: int) -> BoardWork:
    """Theorem 1 of arXiv 2412.21200 with classes of service: S_1 for a first proposal, S_a for a
    later one, S_f for the answer; own work is S_1 + (M - 1) S_a + S_f."""
    first_s, later_s, final_s, overhead, slots = _service(scenario, board)
    first_s, later_s, final_s = (
        batch_share_s(each * overhead, each * (1 - overhead), slots)
        for each in (first_s, later_s, final_s)
    )
    layers = scenario.layers if scenario.proposers else 0
    if not layers:
        return BoardWork(first_s, 0.0)
    helped_s = first_s + (layers - 1) * later_s
    return BoardWork(helped_s + final_s, helped_s)


def _service(scenario: Scenario, board: int) -> tuple[float, float, float, float, int]:
    """Seconds of S_1, S_a and S_f for a job alone; the overhead of its batch, and slots."""
    if not scenario.recordings:
        mean_s = scenario.service_s[board % len(scenario.service_s)]
        later_s = mean_s * scenario.aggregation_factor
        return mean_s, later_s, later_s, scenario.batch_overhead, scenario.slots
    recording = scenario.recordings[board % len(scenario.recordings)]
    law = Recorded(scenario, recording)
    proposal, aggregation = recording.mean_ms("proposal"), recording.mean_ms("aggregation")
    if scenario.sizes is None and proposal is not None and aggregation is not None:
        first_s, later_s = proposal / 1000, aggregation / 1000
        return first_s, later_s, later_s, law.overhead, law.slots
    sizes = scenario.sizes or Sizes()
    drafts = scenario.proposers + 1
    first, later, final = (
        law.mean("proposal", 0, sizes),
        law.mean("aggregation", drafts, sizes),
        law.mean("aggregation", drafts, sizes, final=True),
    )
    return (
        first.model_ms / 1000,
        later.model_ms / 1000,
        final.model_ms / 1000,
        law.overhead,
        law.slots,
    )


def limits(scenario: Scenario) -> Limits:
    """The rates up to which all queues stay bounded. Users' rates keep their proportions: theirs is
    the mean of all users."""
    n, k = scenario.boards, scenario.proposers
    rates = [scenario.rate_of(i) for i in range(n)]
    mean = sum(rates) / n
    weights = [rate / mean for rate in rates] if mean > 0 else [1.0] * n
    works = [work_of(scenario, i) for i in range(n)]
    asked = min(k, n - 1)
    everyone = sum(weights)
    # (5) of the paper with picks that are uniform: of the others' k picks, 1 in n - 1 is a board's.
    loads = [
        weight * work.own_s + work.picked_s * asked * (everyone - weight) / max(n - 1, 1)
        for weight, work in zip(weights, works, strict=True)
    ]
    full = max(range(n), key=loads.__getitem__)
    return Limits(1 / loads[full], _best(scenario, works, weights, asked), full)


def _best(
    scenario: Scenario, works: list[BoardWork], weights: list[float], proposers: int
) -> float | None:
    if len(works) > MOST_BOARDS:
        return None
    if not scenario.layers or not proposers:
        return min(1 / (work.own_s * weight) for work, weight in zip(works, weights, strict=True))
    alphas_s = [work.picked_s / scenario.layers for work in works]
    own_jobs = [work.own_s / alpha for work, alpha in zip(works, alphas_s, strict=True)]
    return best_rate(alphas_s, scenario.layers, proposers, own_jobs=own_jobs, weights=weights)
