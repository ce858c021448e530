"""What the API knows of the board: the methods that it calls, and what they say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import msgspec

from edgemoa.core.events import Failed, Given, RequestEvent
from edgemoa.core.membership import Presence
from edgemoa.core.messages import BoardId, ChatMessage
from edgemoa.core.status import NodeStatus
from edgemoa.desk import Prompt, Ticket
from edgemoa.errors import (
    BoardError,
    DeadlineError,
    EdgemoaError,
    EngineError,
    OverloadedError,
    PromptTooLongError,
    SchemaError,
)


@dataclass(frozen=True)
class Card:
    """What this board's own model is, as far as its manifest says.

    :param digest: SHA-256 of its files, in hex.
    :param created: when it came here, by the wall clock, in seconds.
    :param parameters: 0 where that is not known.
    """

    name: str
    digest: str = ""
    size_bytes: int = 0
    created: int = 0
    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    context_length: int = 0
    layers: int = 0
    calls_tools: bool = False  # as far as is known: once it has been loaded
    embeds: bool = False


class Device(TypedDict):
    """A board that is known: paired, or seen and not paired. The last five are of one that is
    paired and has been heard of."""

    id: BoardId
    name: str
    state: Literal["paired", "pending", "revoked"]
    address: str
    linked: bool
    last_seen_age_ms: int | None
    detail: str
    presence: NotRequired[Presence]
    model: NotRequired[str]
    utilisation: NotRequired[float]
    waiting: NotRequired[int]
    expected_wait_ms: NotRequired[int]


class Devices(msgspec.Struct):
    devices: list[Device]


class EngineStatus(TypedDict):
    """Of the model's process: why there is none, and why it is not as was asked for."""

    pid: int | None
    restarts: int
    trouble: str
    note: str


class HardwareStatus(TypedDict):
    """What the machine's sensors say; None for what it does not tell."""

    temperature_c: float | None
    throttled: bool | None
    under_voltage: bool | None


class Status(NodeStatus, kw_only=True, frozen=True):
    """The state of a board."""

    engine: EngineStatus
    pid: int
    backlog: int  # prompts from before a restart
    port: int
    lent_bytes: int
    loop_lag_ms_max: float
    hardware: HardwareStatus


class LentModel(TypedDict):
    name: str
    model_id: str
    size_bytes: int
    quantization: str
    parameters: int


class Lender(TypedDict):
    """A paired board and the models that it lends, or why none are known."""

    id: BoardId
    name: str
    models: list[LentModel]
    detail: str


class PeerModels(TypedDict):
    """What paired boards lend, and where this board keeps its own models."""

    models_dir: str
    boards: list[Lender]


class Vector(NamedTuple):
    """What the model makes of a text: float32, little-endian; and how many tokens it read."""

    data: bytes
    tokens: int


class Service(Protocol):
    """What the API needs of the board."""

    def plan(self) -> tuple[int, int, int, int]:
        """The configured (layers, proposers, max_tokens, deadline_ms)."""

    def own_model(self) -> tuple[str, int]:
        """Name and context, in tokens, of this board's model; 0 until it has been loaded."""

    def card(self) -> Card:
        """What this board's model is."""

    def refusal(self) -> Failed | None:
        """Why a prompt that comes now is refused unread, which counts; None if it may come in."""

    async def measure(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """How many tokens the model counts.

        :raises InvalidPromptError: it cannot read that.
        :raises EngineError: the model is not there now.
        """

    async def check_schema(self, schema: str) -> None:
        """See that an answer can be held to this JSON schema.

        :raises UserError: it cannot.
        :raises EngineError: none can, or not now.
        """

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """A vector for each text; ``limits.MAX_EMBEDDED`` of them and ``limits.MAX_PROMPT_BYTES``
        at most.

        :raises UserError: a text that has none, or a model that makes none.
        :raises EngineError: the model is not there now.
        """

    def new_request_id(self) -> str:
        """A name for a prompt, never used before."""

    async def take(self, prompt: Prompt) -> str | Failed:
        """See :meth:`edgemoa.desk.Desk.take`."""

    def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        """See :meth:`edgemoa.desk.Desk.follow`."""

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        """See :meth:`edgemoa.desk.Desk.find`."""

    def unfinished(self, owner: str) -> list[Ticket]:
        """See :meth:`edgemoa.desk.Desk.unfinished`."""

    async def forget(self, request_id: str, owner: str) -> bool:
        """See :meth:`edgemoa.desk.Desk.forget`."""

    def status(self) -> dict[str, Any]:
        """The board's state, for people and scripts."""

    def devices(self) -> list[Device]:
        """Every board known: paired, or seen and not paired."""

    async def peer_models(self) -> PeerModels:
        """What paired boards lend, and where this board keeps its own models."""

    async def peer_manifest(self, board: BoardId, model_id: str) -> bytes:
        """The manifest of a paired board's model, as that board sends it.

        :raises EdgemoaError: it is not to be had.
        """

    def peer_file(
        self, board: BoardId, model_id: str, file: str, offset: int
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """How many bytes of such a model's file there are from ``offset`` on, and these bytes.

        :raises EdgemoaError: it is not to be had, or ends in the middle.
        """


def failure(failed: Failed) -> EdgemoaError:
    """The core's word for a prompt's bad end, as an error."""
    if failed.code == "overloaded":
        seconds = max(1, -(-failed.retry_after_ms // 1000))
        return OverloadedError(
            failed.reason,
            hint=f"try again in {seconds} s",
            retry_after_s=seconds,
            position=failed.position,
        )
    if failed.code == "schema_failed":
        return SchemaError(failed.reason, hint="use a simpler schema, or none")
    kinds: dict[str, type[EdgemoaError]] = {
        "context_length_exceeded": PromptTooLongError,
        "engine_failed": EngineError,
        "deadline_exceeded": DeadlineError,
    }
    return kinds.get(failed.code, BoardError)(failed.reason)
