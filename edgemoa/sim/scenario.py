"""What is simulated, and what came of it: plain values that go to another process and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias

from edgemoa.core.node import NodeSettings
from edgemoa.errors import UserError
from edgemoa.sim.recording import Recording

Distribution: TypeAlias = Literal["exponential", "fixed", "gamma"]

MOST_BOARDS: Final = 10_000
PARTS: Final = 20  # of the time, that the length of queues is told for

PAPER: Final[Mapping[str, Any]] = {
    "pick": "uniform",
    "discipline": "fcfs",
    "ladder": False,
    "own_proposal": "always",
    "queue_bytes": 2**40,
    "promise_ms": 10**9,
}
"""Settings of a node that does as the device of arXiv 2412.21200: one queue, first come first
served, peers picked uniformly, every plan as asked for."""
FREE: Final = 1_000_000  # prompts, jobs or seconds: no bound of a run that anybody waits for

_OURS: Final = frozenset({"name", "boot"})  # of the node's settings, each board's own


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that comes at a known time. A ``board`` of -1 is each in turn, tokens of 0 are
    those of the scenario."""

    time_s: float
    board: int = -1
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Usual sizes in tokens: of a prompt, of a proposal, and of the answer made of proposals."""

    prompt: int = 60
    proposal: int = 150
    answer: int = 250


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. Rates are per board and second, probabilities per message.

    Boards are unequal by tuples (``service_s``, ``prompts_per_s``, ``recordings``), whose values
    are dealt out to the boards in turn.
    """

    boards: int = 4
    seconds: float = 60.0
    warm_up_s: float = 0.0  # of that, and no figure is taken of it
    prompts_per_s: float | tuple[float, ...] = 0.05
    burst: int = 0  # prompts at each board at the beginning
    replay: tuple[Arrival, ...] = ()  # in place of prompts_per_s, in the order of time
    layers: int = 1
    proposers: int = 2
    service_s: tuple[float, ...] = (1.0,)  # mean time of a proposal where a board has one job
    aggregation_factor: float = 1.0  # what an aggregation takes, in proposals
    distribution: Distribution = "exponential"
    cv: float = 1.0  # coefficient of variation of a gamma distribution
    recordings: tuple[Recording, ...] = ()  # measured boards, in place of all times above
    sizes: Sizes | None = None  # of jobs on recorded boards; None: as they were recorded
    slots: int = 1  # jobs that an engine works on at a time
    batch_overhead: float = 1.0  # t0 / (t0 + a) of a step that takes t0 + a b for b jobs
    own_requests: int | None = 16
    peer_jobs: int | None = 32
    quorum: int = 0
    layer_deadline_s: float = 60.0
    deadline_s: float = 180.0
    node: Mapping[str, Any] = field(default_factory=dict)  # more of the node's own settings
    reports: Literal["messages", "table"] = "messages"
    report_age_s: float = 1.0  # of the table's: a report is taken so often, each board in its turn
    delay_ms: tuple[int, int] = (1, 20)
    loss: float = 0.0
    duplicates: float = 0.0
    false_alarms: float = 0.0  # delivered, but the sender is told that it was not
    crashes_per_s: float = 0.0
    stops_per_s: float = 0.0  # in good order: drained, then stopped, then started again
    down_s: tuple[float, float] = (0.5, 30.0)
    engine_crashes_per_s: float = 0.0
    failures: float = 0.0  # jobs that the engine cannot do
    cancels: float = 0.0  # users that go away before their answer
    streams: bool = False  # proposals and answers of other boards are told of in parts

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated.

        :raises UserError: with the reason.
        """
        known = {each.name for each in fields(NodeSettings)} - _OURS
        for name in self.node:
            if name not in known:
                raise UserError(
                    f"boards have no setting {name!r}", hint=f"they have {', '.join(sorted(known))}"
                )
        if self.reports == "table" and self.has_faults:
            raise UserError(
                "faults need the whole protocol, and a table of reports stands for a part of it",
                hint="simulate messages, or no faults",
            )
        if not all(self.service_s) or not self.boards:
            raise UserError("there is nobody who works")
        if not 0 <= self.batch_overhead <= 1 or self.cv < 0 or self.warm_up_s >= self.seconds:
            raise UserError("a batch overhead, variation or warm-up is out of range")

    @property
    def has_faults(self) -> bool:
        """Whether boards, engines or the network fail."""
        return bool(
            self.loss
            or self.duplicates
            or self.false_alarms
            or self.crashes_per_s
            or self.stops_per_s
            or self.engine_crashes_per_s
        )

    def rate_of(self, board: int) -> float:
        """Prompts per second that come to a board."""
        rates = self.prompts_per_s
        return rates[board % len(rates)] if isinstance(rates, tuple) else rates


@dataclass(slots=True)
class Outcome:
    """What came of a run. Figures but ``events`` and ``asked`` leave out the warm-up."""

    seed: int
    events: int = 0  # that came off the clock's queue and were no leftovers
    seconds: float = 0.0  # simulated, while prompts came
    asked: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    lost_with_owner: int = 0  # the owner crashed before the answer
    unfinished: int = 0  # only where the run was interrupted
    degraded: int = 0  # answered with less than was asked for
    left_out: int = 0
    latency_ms: list[int] = field(default_factory=list)
    mean_queue: float = 0.0  # jobs per board, in service included, averaged over time
    utilisation: float = 0.0  # share of the time in which a board works, averaged over boards
    queues: list[float] = field(default_factory=list)  # of each board
    utilisations: list[float] = field(default_factory=list)
    queue_over_time: list[float] = field(default_factory=list)  # by equal parts of the time
    interrupted: bool = False  # from the keyboard, and this is what there was
    digest: str = ""
