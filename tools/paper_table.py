"""Table I of arXiv 2412.21200, and the recursion that regenerates its latencies and queues.

Ten prompts come to four users at random, 1/4 per second and user, and are worked off; nothing comes
after them. Each stage of a prompt is asked of its boards at once and over when the last has
answered. All runs go through the recursion side by side, as rows of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

BOARDS: Final = 4
PROMPTS: Final = 10
RATE: Final = 0.25  # prompts per second of each user
ALPHA_S: Final = 46.0  # of an inference; the paper does not state it


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the table: latency in seconds and the average queue, by column."""

    layers: int
    proposers: int
    same: tuple[float, float]
    diverse: tuple[float, float]


TABLE: Final = (
    Published(0, 0, (94.01, 0.60), (409.58, 1.71)),
    Published(1, 1, (329.92, 2.04), (806.88, 2.36)),
    Published(1, 2, (484.81, 3.28), (1112.33, 2.72)),
    Published(2, 1, (603.43, 2.32), (1357.74, 1.83)),
    Published(2, 2, (790.01, 4.80), (1971.50, 3.07)),
    Published(1, 3, (578.88, 3.74), (1292.73, 2.92)),
    Published(2, 3, (1074.28, 5.78), (2274.59, 4.21)),
)

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bursts:
    """When the prompts of each run come, and to whom: arrays of runs by prompts."""

    times_s: Array
    owners: NDArray[np.int64]

    @classmethod
    def draw(cls, runs: int, rng: np.random.Generator) -> Bursts:
        """Poisson arrivals at all users together, each prompt any user's."""
        shape = (runs, PROMPTS)
        gaps_s = rng.exponential(1 / (BOARDS * RATE), shape)
        return cls(gaps_s.cumsum(axis=1), rng.integers(0, BOARDS, shape))


@dataclass(frozen=True, slots=True)
class Measured:
    """What the runs came to; ``latencies_s`` are each run's mean."""

    latencies_s: Array
    script_queue: float
    true_queue: float

    @property
    def latency_s(self) -> float:
        """The mean."""
        return float(self.latencies_s.mean())


def burst(
    alphas_s: Sequence[float], layers: int, proposers: int, bursts: Bursts, rng: np.random.Generator
) -> Measured:
    """Work the bursts off, every inference taking its board's alpha.

    Stages are taken up in the order of time, so a board's queue is a single number: when it will be
    free. The true queue is the time average of who waits. The authors' script estimates it by what
    is known when a job is taken up: of those, how many come before that job's end, times its
    service time, added up and divided by the end of the job that was taken up last.
    """
    runs = np.arange(len(bursts.times_s))
    alphas = np.asarray(alphas_s, dtype=np.float64)
    ready = bursts.times_s.copy()  # each prompt's next stage
    stage = np.zeros(ready.shape, dtype=np.int64)
    ended = np.zeros(ready.shape)
    free = np.zeros((len(runs), BOARDS))
    waited = np.zeros(len(runs))
    counted = np.zeros(len(runs))
    last_end = np.zeros(len(runs))

    def asked(owner: NDArray[np.int64], final: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The owner and, but for the answer itself, some of the others."""
        lot = rng.random((len(runs), BOARDS))
        lot[runs, owner] = -1.0
        order = lot.argsort(axis=1).argsort(axis=1)
        return order <= np.where(final, 0, proposers)[:, None]

    known = np.stack(
        [asked(bursts.owners[:, i], stage[:, i] == layers) for i in range(PROMPTS)], axis=1
    )
    for _ in range(PROMPTS * (layers + 1)):
        prompt = ready.argmin(axis=1)
        now, owner = ready[runs, prompt], bursts.owners[runs, prompt]
        final = stage[runs, prompt] == layers
        boards = known[runs, prompt]
        end = np.maximum(free, now[:, None]) + alphas
        waited += np.where(boards, end - alphas - now[:, None], 0).sum(axis=1)
        free = np.where(boards, end, free)
        ready[runs, prompt] = np.inf
        before = (known & (ready[:, :, None] < end[:, None, :])).sum(axis=1)
        counted += np.where(boards, before * alphas, 0).sum(axis=1)
        last_end = np.where(boards, end, 0).max(axis=1)
        ended[runs, prompt] = last_end
        stage[runs, prompt] += 1
        ready[runs, prompt] = np.where(final, np.inf, last_end)
        known[runs, prompt] = asked(owner, stage[runs, prompt] == layers)
    return Measured(
        latencies_s=(ended - bursts.times_s).mean(axis=1),
        script_queue=float((counted / last_end).mean() / BOARDS),
        true_queue=float((waited / ended.max(axis=1)).mean() / BOARDS),
    )


def fitted_alpha_s(
    shape: Sequence[float], published_s: Sequence[float], runs: int, seed: int
) -> float:
    """The alpha with which boards of ``alpha * shape`` come nearest to the latencies of the table,
    all rows alike, by the mean of squared relative errors; within a thousandth.

    Latencies grow in proportion to alpha but for the time between arrivals, so a few steps of
    scaling by the best common factor find it.
    """
    alpha_s = ALPHA_S
    for _ in range(6):
        ratios = []
        for row, latency_s in zip(TABLE, published_s, strict=True):
            rng = np.random.default_rng(seed)
            alphas_s = [alpha_s * each for each in shape]
            found = burst(alphas_s, row.layers, row.proposers, Bursts.draw(runs, rng), rng)
            ratios.append(found.latency_s / latency_s)
        factor = sum(ratios) / sum(ratio * ratio for ratio in ratios)
        alpha_s *= factor
        if abs(factor - 1) < 1e-3:
            break
    return alpha_s
