"""How fast a model is on this board: what reading and writing take, by context and batch.

The model process measures (:class:`Meter`), the node estimates (:class:`Rates`). A step that makes
a token for each of b jobs takes tau(b) = t0 + b (a + c x), where x is their mean context; a token
read after x others takes p + q x. With the default model on two cores, 1 to 8 jobs and 64 to 2,048
tokens of context, the five numbers were within 19 % of every measured mean, 9 % in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

REMEMBERED_STEPS: Final = 50  # that an exponential average goes back over
REMEMBERED_TOKENS: Final = 1_000  # the same where tokens are read
LEAST_CONTEXT: Final = 64  # tokens; shorter ones are counted with it
_PRIOR: Final = 1e-3  # weight of what is assumed against a measured mean

Positive = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class PrefillRate(msgspec.Struct, frozen=True):
    """What reading takes after so much context, measured."""

    context: Whole  # tokens, on average
    ms_per_token: Positive


class DecodeRate(msgspec.Struct, frozen=True):
    """What a step takes that writes a token for each of so many jobs, measured."""

    rows: Whole
    context: Whole  # tokens of one job, on average
    step_ms: Positive


class Rates(msgspec.Struct, frozen=True):
    """What was measured so far: by context, and by batch and context; contexts by powers of two."""

    prefill: Annotated[tuple[PrefillRate, ...], msgspec.Meta(max_length=64)] = ()
    decode: Annotated[tuple[DecodeRate, ...], msgspec.Meta(max_length=1024)] = ()

    def estimate(
        self, prompt_tokens: float, tokens: float, batch: int, cached_tokens: float = 0
    ) -> float | None:
        """The model's time in ms that a job needs for itself where ``batch`` jobs are written at a
        time, each with such a context; None while too little has been measured.

        What no measured batch tells, how much of a step its jobs share, is taken to be nothing.
        """
        if not self.prefill or not self.decode:
            return None
        read = max(prompt_tokens - cached_tokens, 0)
        p, q = self.token()
        t0, a, c = self.step()
        prefill = read * (p + q * (cached_tokens + read / 2))
        return prefill + tokens * (t0 / batch + a + c * (prompt_tokens + tokens / 2))

    def token(self) -> tuple[float, float]:
        """(p, q): ms for a token that is read, and more for each token before it."""
        p, q = _fit([((1.0, each.context), each.ms_per_token) for each in self.prefill], 0)
        return p, q

    def step(self) -> tuple[float, float, float]:
        """(t0, a, c): ms for a step, more for each job, and more for each token of its context."""
        t0, a, c = _fit(
            [((1.0, each.rows, each.rows * each.context), each.step_ms) for each in self.decode], 1
        )
        return t0, a, c


@dataclass(slots=True)
class _Mean:
    """An exponential average, plain at its beginning: ms and context, by weight."""

    ms: float = 0.0
    context: float = 0.0
    weight: float = 0.0

    def add(self, ms: float, context: float, weight: float, most: float) -> None:
        weight = min(weight, most)
        self.weight = min(self.weight + weight, most)
        self.ms += (ms - self.ms) * weight / self.weight
        self.context += (context - self.context) * weight / self.weight


class Meter:
    """Averages of what steps took."""

    def __init__(self) -> None:
        self._prefill: dict[int, _Mean] = {}
        self._decode: dict[tuple[int, int], _Mean] = {}

    def observe_prefill(self, tokens: int, context: int, ms: float) -> None:
        """So many tokens were read after ``context`` others."""
        mean = self._prefill.setdefault(_bucket(context), _Mean())
        mean.add(ms / tokens, context + tokens / 2, tokens, REMEMBERED_TOKENS)

    def observe_decode(self, rows: int, context: float, ms: float) -> None:
        """A step wrote a token for ``rows`` jobs, with ``context`` tokens on average."""
        mean = self._decode.setdefault((rows, _bucket(context)), _Mean())
        mean.add(ms, context, 1, REMEMBERED_STEPS)

    def rates(self) -> Rates:
        """The averages as they are now."""
        return Rates(
            prefill=tuple(
                PrefillRate(round(mean.context), mean.ms)
                for _, mean in sorted(self._prefill.items())
            ),
            decode=tuple(
                DecodeRate(rows, round(mean.context), mean.ms)
                for (rows, _), mean in sorted(self._decode.items())
            ),
        )


def _bucket(context: float) -> int:
    """The power of two that a context is counted with."""
    return max(round(context), LEAST_CONTEXT).bit_length()


def _fit(samples: Sequence[tuple[tuple[float, ...], float]], assumed: int) -> list[float]:
    """Coefficients, none negative, with the least relative errors of ``features -> value``.

    What the samples leave open is given to the ``assumed`` feature.
    """
    used = list(range(len(samples[0][0])))
    # In units in which each alone would explain the mean: no coefficient is tiny by its unit.
    total = sum(value for _, value in samples)
    unit = [total / max(sum(x[i] for x, _ in samples), 1e-9) for i in used]
    least_value = max(total / len(samples) / 100, 1e-9)  # anything below is as good as nothing
    solution = [0.0] * len(used)
    while used:
        matrix = [[_PRIOR * (i == j) for j in used] for i in used]
        right = [_PRIOR * (i == assumed) for i in used]
        for x, value in samples:
            scale = max(value, least_value)
            row = [x[i] * unit[i] / scale for i in used]
            for i, left in enumerate(row):
                right[i] += left * value / scale
                for j, other in enumerate(row):
                    matrix[i][j] += left * other
        found = _solve(matrix, right)
        least = min(range(len(used)), key=found.__getitem__)
        if found[least] >= 0:
            for i, value in zip(used, found, strict=True):
                solution[i] = value * unit[i]
            break
        del used[least]
    return solution


def _solve(matrix: list[list[float]], right: Iterable[float]) -> list[float]:
    """Gauss; the matrix is symmetric and positive definite, so that no pivot is zero."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
    solution = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, len(rows)))
        solution[i] = (rows[i][-1] - known) / rows[i][i]
    return solution
