"""What a board was measured to do, as a small file: ``edgemoa bench --record`` writes it, the
simulator reads it. The speeds are those that the node estimates with; the samples say how far
single jobs are from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from edgemoa.core.events import JobKind
from edgemoa.core.messages import Name
from edgemoa.core.rates import Rates, Whole
from edgemoa.errors import UserError

VERSION: Final = 1
MOST_BYTES: Final = 256 * 1024
MOST_SAMPLES: Final = 256
LEAST_MS: Final = 1.0  # to read or write a hundred tokens; what is faster is no measurement


class Sample(msgspec.Struct, frozen=True):
    """One job that had the model to itself."""

    kind: JobKind
    prompt_tokens: Whole
    tokens: Whole
    model_ms: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Recording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A board with a model. Without ``samples`` it is known by its speeds alone."""

    version: Literal[1]
    board: Name  # for people
    model: Name
    slots: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    rates: Rates
    samples: Annotated[tuple[Sample, ...], msgspec.Meta(max_length=MOST_SAMPLES)] = ()
    note: Annotated[str, msgspec.Meta(max_length=1000)] = ""  # where the figures are from

    def __post_init__(self) -> None:
        if not self.rates.prefill or not self.rates.decode:
            raise ValueError("it holds no speeds")
        speeds = Speeds.of(self.rates)
        if speeds.job_ms(100, 0) < LEAST_MS or speeds.job_ms(0, 100) < LEAST_MS:
            raise ValueError("its speeds are those of no board")

    def mean_ms(self, kind: JobKind) -> float | None:
        """What the samples of a kind took on average; None without any."""
        took = [each.model_ms for each in self.samples if each.kind == kind]
        return math.fsum(took) / len(took) if took else None


@dataclass(frozen=True, slots=True)
class Speeds:
    """The fitted numbers of :mod:`edgemoa.core.rates`: a token after x others is read in p + q x
    ms, a step that writes for b jobs with contexts of x takes t0 + b (a + c x)."""

    p: float
    q: float
    t0: float
    a: float
    c: float

    @classmethod
    def of(cls, rates: Rates) -> Speeds:
        """Of a board's measurements."""
        return cls(*rates.token(), *rates.step())

    def job_ms(self, prompt_tokens: float, tokens: float) -> float:
        """A job that has the model to itself."""
        read = prompt_tokens * (self.p + self.q * prompt_tokens / 2)
        return read + tokens * (self.t0 + self.a + self.c * (prompt_tokens + tokens / 2))

    def overhead(self, prompt_tokens: float, tokens: float) -> float:
        """The part of such a job that does not grow with how many others are written with it."""
        return tokens * self.t0 / max(self.job_ms(prompt_tokens, tokens), 1e-9)


def read_recording(file: Path) -> Recording:
    """Raises :class:`UserError` for a file that is none, and as the file system does."""
    with file.open("rb") as stream:
        encoded = stream.read(MOST_BYTES + 1)
    if len(encoded) > MOST_BYTES:
        raise UserError(f"{file} is too large for a recording of a board", hint=_HINT)
    try:
        return msgspec.json.decode(encoded, type=Recording)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is no recording of a board: {error}", hint=_HINT) from None


def write_recording(file: Path, recording: Recording) -> None:
    """Write it, so that people can read it, too."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(recording), indent=1) + b"\n")


_HINT: Final = "make one with `edgemoa bench --record FILE` on that board"
