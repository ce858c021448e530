"""What the daemon and its model process say to each other: msgpack in length-prefixed frames.

A frame is its length (u32, big-endian) and one tagged map. It travels over a pipe between a
parent and its child, so there is no version in it; but a child that crashes can leave anything
behind, so both sides check what they read against these types and against
``limits.MAX_WORKER_FRAME_BYTES``.
"""

from __future__ import annotations

from typing import Annotated, Final, Generic, TypeAlias, TypeVar

import msgspec

from edgemoa.core import limits
from edgemoa.core.events import FailureCode, Given, TokenLogprob, Wishes, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage, Count, Millis, Sampling
from edgemoa.core.rates import Rates
from edgemoa.engine.tuning import Tuning
from edgemoa.errors import (
    EdgemoaError,
    EngineError,
    InvalidPromptError,
    ModelInvalidError,
    PromptTooLongError,
    SchemaError,
)

_LENGTH_BYTES: Final = 4


# --- from the daemon


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Take a job. Jobs beyond the worker's slots wait in the worker, in order."""

    job_id: int
    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    stream: bool  # report text as it is written
    wishes: Wishes = Wishes()


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Drop a job, waiting or running. Nothing where there is no such job."""

    job_id: int


class ReadAhead(msgspec.Struct, frozen=True, tag="read_ahead"):
    """Read, behind the jobs, what some prompt will begin with; see
    :class:`edgemoa.core.events.ReadAhead`. Nothing is said of it."""

    key: str  # of whose prompt; a later one of the same replaces it
    messages: tuple[ChatMessage, ...]  # empty: read no further


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Count the tokens of a conversation, chat template included, or of what else is ``given``."""

    call_id: int
    messages: tuple[ChatMessage, ...]
    given: Given = "turns"


class Score(msgspec.Struct, frozen=True, tag="score"):
    """Say how likely the model would have written each candidate as its answer. It takes its turn
    and a slot like a job, and is cancelled like one; its number is below 0, where no job's is."""

    job_id: int
    messages: tuple[ChatMessage, ...]
    candidates: Annotated[
        tuple[
            Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_PROPOSAL_BYTES)],
            ...,
        ],
        msgspec.Meta(min_length=1, max_length=limits.MAX_CANDIDATES),
    ]


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """Make a vector of each text; see :mod:`edgemoa.engine.embed`. It takes its turn as a
    :class:`Score` does."""

    job_id: int
    texts: Annotated[
        tuple[
            Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_PROMPT_BYTES)],
            ...,
        ],
        msgspec.Meta(min_length=1, max_length=limits.MAX_EMBEDDED),
    ]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Say :class:`Progress`, between two steps like everything else."""


Work: TypeAlias = Generate | Score | Embed
"""What takes a slot."""

Op: TypeAlias = Work | Cancel | Measure | ReadAhead | Ping


# --- from the model process


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded. Said once."""

    context_tokens: Count
    slots: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    load_ms: Millis
    backend: str = ""
    note: str = ""  # why it is not the back end that was wished for
    budget_tokens: Count = 0  # that all jobs together may hold
    reads_ahead: bool = False  # whether :class:`ReadAhead` is of any use
    tuning: Tuning | None = None  # where it was asked to tune first
    calls_tools: bool = False  # whether the model was taught to
    embeds: bool = False  # whether :class:`Embed` is of any use


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """The model cannot be loaded; the process ends."""

    reason: str


class Text(msgspec.Struct, frozen=True, tag="text"):
    """The next piece of a streamed job: whole characters, never part of a stop string; and the
    ``logprobs`` of its tokens, if the job asks for them."""

    job_id: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The last word on a job: its result."""

    job_id: int
    result: WorkDone


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last word on a job: it could not be done."""

    job_id: int
    failure: WorkFailed


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """The answer to :class:`Measure`; ``refused`` says why there is none."""

    call_id: int
    tokens: Count
    refused: str = ""


class Likelihood(msgspec.Struct, frozen=True):
    """A candidate's score: the mean of its tokens' log-probabilities (0 at most), and how many
    tokens it has."""

    log_probability: Annotated[float, msgspec.Meta(le=0)]
    tokens: Count


class Scored(msgspec.Struct, frozen=True, tag="scored"):
    """The answer to :class:`Score`, a score for each candidate. Where there is none: ``Failed``."""

    job_id: int
    scores: tuple[Likelihood, ...]


class Embedding(msgspec.Struct, frozen=True):
    """A text's vector, of length 1, as float32 (little-endian); and how many tokens were read."""

    vector: Annotated[bytes, msgspec.Meta(min_length=4, max_length=4 * limits.MAX_DIMENSIONS)]
    tokens: Count


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """The answer to :class:`Embed`, a vector for each text. Where there is none: ``Failed``."""

    job_id: int
    embeddings: tuple[Embedding, ...]

    @property
    def dimensions(self) -> int:
        """Numbers of each vector."""
        return len(self.embeddings[0].vector) // 4

    @property
    def tokens(self) -> int:
        """Of all texts together, that were read."""
        return sum(each.tokens for each in self.embeddings)


class Pace(msgspec.Struct, frozen=True, tag="pace"):
    """How fast the model has been so far. Said now and then, beside other news."""

    rates: Rates


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A model step was finished. Said now and then between steps, by the thread that makes them."""


End: TypeAlias = Done | Failed | Scored | Embedded
"""The last word on what took a slot, which is free."""

Event: TypeAlias = Ready | Broken | Text | End | Measured | Progress | Pace

T = TypeVar("T")

_CODES: Final[dict[FailureCode, type[EdgemoaError]]] = {
    "context": PromptTooLongError,
    "prompt": InvalidPromptError,
    "schema": SchemaError,
    "model": ModelInvalidError,
}

_OPS: Final = msgspec.msgpack.Decoder(Op)
_EVENTS: Final = msgspec.msgpack.Decoder(Event)


def failure(error: Exception) -> WorkFailed:
    """Why a job failed, for whoever asked for it."""
    codes = [code for code, kind in _CODES.items() if isinstance(error, kind)]
    hint = error.hint if isinstance(error, ModelInvalidError) else ""
    reason = f"{error} {hint}".strip() or "No room in memory."
    return WorkFailed(reason, codes[0] if codes else "engine")


def error_of(failed: WorkFailed) -> EdgemoaError:
    """The error that :func:`failure` was made of, or as good."""
    return _CODES.get(failed.code, EngineError)(failed.reason)


def encode(frame: Op | Event) -> bytes:
    """The frame's bytes, length first. Raises :class:`EngineError` for a frame over the limit."""
    body = msgspec.msgpack.encode(frame)
    if len(body) > limits.MAX_WORKER_FRAME_BYTES:
        raise EngineError(
            f"A message of {len(body)} bytes is too large for the model process"
            f" (limit {limits.MAX_WORKER_FRAME_BYTES})."
        )
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def encode_op(op: Op) -> bytes:
    """As :func:`encode`, for a frame with a prompt in it: what the other side would not take is
    refused here, where it costs only this prompt.

    Raises :class:`InvalidPromptError` for a message over its limits and for text that is not
    Unicode (a lone surrogate).
    """
    try:
        data = encode(op)
        _OPS.decode(memoryview(data)[_LENGTH_BYTES:])
    except UnicodeEncodeError:  # quotes the text
        raise InvalidPromptError("The prompt holds text that is not valid Unicode.") from None
    except (EngineError, msgspec.ValidationError):
        raise InvalidPromptError("The prompt is too large for the model process.") from None
    return data


class FrameReader(Generic[T]):
    """Turns a stream of bytes into frames of one direction's type."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The frames that ``data`` completes.

        Raises :class:`EngineError` at the first frame that is too large or not of the type; the
        stream is of no use after that.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > limits.MAX_WORKER_FRAME_BYTES:
                raise EngineError(f"The model process's pipe carried a frame of {length} bytes.")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            try:
                frames.append(self._decoder.decode(body))
            except msgspec.DecodeError:  # the cause may quote what was in the frame
                raise EngineError("The model process's pipe carried a damaged frame.") from None
        return frames


def op_reader() -> FrameReader[Op]:
    """A reader for the model process's side."""
    return FrameReader(_OPS)


def event_reader() -> FrameReader[Event]:
    """A reader for the daemon's side."""
    return FrameReader(_EVENTS)
