"""Which peers are asked for a proposal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeAlias

from edgemoa.core.load import PRIOR_SERVICE_MS
from edgemoa.core.messages import Alive, BoardId

Pick: TypeAlias = Literal["uniform", "capacity", "shortest"]

LEAST_SPARE: Final = 0.02  # share of a full board that is still picked: its report may be old
FRESH_MS: Final = 3_000
SPREAD: Final = 3  # more boards than are needed are compared with each other


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a board is expected to do with the next job it is given. Times in ms.

    ``utilisation`` is the work that comes to it against what it can do.
    """

    board: BoardId
    wait_ms: float
    proposal_ms: float
    aggregation_ms: float
    utilisation: float

    @classmethod
    def of(cls, board: BoardId, report: Alive, unreported: int, age_ms: int = 0) -> Outlook:
        """By the board's own last report, and ``unreported`` jobs that it was given since.

        A board that works tells of it again before the report is :data:`FRESH_MS` old. What it
        leaves out counts as waiting: either it is slow, or the network to it is.
        """
        late_ms = max(age_ms - FRESH_MS, 0) if report.is_busy else 0
        proposal_ms = float(report.proposal_ms or PRIOR_SERVICE_MS)
        return cls(
            board,
            report.expected_wait_ms + unreported * proposal_ms + late_ms,
            proposal_ms,
            float(report.aggregation_ms or proposal_ms),
            report.utilisation_permille / 1000,
        )

    def done_ms(self, layer: int = 1) -> float:
        """How long a proposal of that layer takes from now."""
        return self.wait_ms + (self.proposal_ms if layer == 1 else self.aggregation_ms)

    @property
    def spare(self) -> float:
        """Proposals per ms that it could do beside what comes to it now."""
        return max(1 - self.utilisation, LEAST_SPARE) / self.proposal_ms


def choose(
    pick: Pick,
    usable: Sequence[BoardId],
    proposers: int,
    rng: Random,
    outlook: Callable[[BoardId], Outlook],
) -> list[Outlook]:
    """The boards to ask, the best ones first; the ones after the first ``proposers`` are spare.

    ``uniform`` picks them like the paper. ``capacity`` picks them by what they have to spare, so
    that load spreads as capacity does. ``shortest`` compares a few that it picks at random, and
    takes those that would be done first: not all of them, or else everybody would pick the same
    ones by the same old reports; equal ones fall as they may.
    """
    if pick == "capacity":
        # Efraimidis and Spirakis: the largest u^(1/w) are a sample without replacement by weight.
        keys = [(math.log(1 - rng.random()) / each.spare, each) for each in map(outlook, usable)]
        keys.sort(key=lambda key: -key[0])
        return [each for _, each in keys]
    most = max(2 * proposers, proposers + SPREAD)
    sampled = [outlook(board) for board in rng.sample(usable, min(most, len(usable)))]
    if pick == "shortest":
        sampled.sort(key=Outlook.done_ms)
    return sampled
