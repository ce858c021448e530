"""``/v1/requests``: prompts that outlive the connection that they came by.

What they are asked with is a chat completion's body, and what they are answered with its response;
here is what stands around it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from edgemoa.api import chats, openai
from edgemoa.api.chats import Completion
from edgemoa.core.events import Accepted, Answered, Failed, Granted, RequestEvent, Text
from edgemoa.desk import State, Ticket
from edgemoa.errors import EdgemoaError, UserError

MAX_KEY_CHARS: Final = 255
MAX_WAIT_S: Final = 300
PATH: Final = "/v1/requests"


class Ticketed(msgspec.Struct, kw_only=True):
    """How a prompt stands, for its client: ``state``, what it was granted, how much is before it,
    what has happened and been written so far, and the answer or the error at its end."""

    id: str
    object: Literal["edgemoa.request"] = "edgemoa.request"
    created: int
    model: str
    state: State
    granted: Granted | UnsetType = UNSET
    position: int | UnsetType = UNSET
    expected_ms: int | UnsetType = UNSET
    text: str | UnsetType = UNSET
    events: list[RequestEvent] | UnsetType = UNSET
    response: Completion | UnsetType = UNSET
    error: openai.ErrorBody | UnsetType = UNSET
    edgemoa: openai.Refusal | UnsetType = UNSET


class Trace(msgspec.Struct, kw_only=True):
    """How an answer came about, or how far it has come: ``events``, and at its end ``trace``, which
    says of each proposal who wrote it, where its time went, and what it read and wrote. No text."""

    id: str
    object: Literal["edgemoa.trace"] = "edgemoa.trace"
    created: int
    model: str
    state: State
    granted: Granted | UnsetType = UNSET
    position: int | UnsetType = UNSET
    expected_ms: int | UnsetType = UNSET
    events: list[RequestEvent] | UnsetType = UNSET
    trace: Answered | UnsetType = UNSET
    error: openai.ErrorBody | UnsetType = UNSET


class Unfinished(msgspec.Struct):
    """A user's prompts that have no outcome yet."""

    data: list[Ticketed]
    object: Literal["list"] = "list"


class Deleted(msgspec.Struct):
    id: str
    object: Literal["edgemoa.request"] = "edgemoa.request"
    deleted: bool = True


def ticket_json(ticket: Ticket, error: EdgemoaError | None = None) -> Ticketed:
    """How a prompt stands.

    :param error: what its bad end means, if it came to one.
    """
    accepted = next((e for e in ticket.said if isinstance(e, Accepted)), None)
    told = Ticketed(id=ticket.id, created=ticket.created, model=ticket.model, state=ticket.state)
    if accepted is not None:
        told.granted = accepted.granted
        told.position = accepted.position
        told.expected_ms = accepted.expected_ms
    elif ticket.waiting_before:
        told.position = ticket.waiting_before
    end = ticket.end
    if end is None:
        told.text = "".join(e.text for e in ticket.said if isinstance(e, Text))
        hidden = (Accepted, Text)
        told.events = [e for e in ticket.said if not isinstance(e, hidden)]
    elif isinstance(end, Answered):
        told.response = chats.completion(ticket.id, ticket.created, ticket.model, end)
    elif error is not None:
        failed = openai.error_json(error)
        told.error, told.edgemoa = failed.error, failed.edgemoa
    return told


def trace_json(ticket: Ticket, error: EdgemoaError | None = None) -> Trace:
    """How its answer came about. Parameters as of :func:`ticket_json`."""
    told = ticket_json(ticket, error)
    trace = Trace(
        id=told.id,
        created=told.created,
        model=told.model,
        state=told.state,
        granted=told.granted,
        position=told.position,
        expected_ms=told.expected_ms,
        events=told.events,
        error=told.error,
    )
    if isinstance(ticket.end, Answered):
        trace.trace = msgspec.structs.replace(ticket.end, text="", calls=())
    return trace


def idempotency_key(http: web.Request) -> str:
    """What the client calls its prompt; empty for nothing.

    :raises UserError: it cannot be a key.
    """
    key = http.headers.get("Idempotency-Key", "")
    if len(key) > MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise UserError(
            "that Idempotency-Key cannot be used",
            hint=f"use up to {MAX_KEY_CHARS} printable ASCII characters, e.g. a UUID",
        )
    return key


def wait_s(http: web.Request) -> float:
    """For how long a client wants to wait for the end of its prompt.

    :raises UserError: it is no number of seconds.
    """
    text = http.query.get("wait", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise UserError("'wait' is not a number of seconds", hint="e.g. ?wait=30")
    return min(int(text), MAX_WAIT_S)


def wants_events(http: web.Request) -> bool:
    """Whether the client wants to hear what happens as it happens."""
    return "text/event-stream" in http.headers.get("Accept", "")


def failed(ticket: Ticket) -> Failed | None:
    """Its bad end, if it came to one."""
    return ticket.end if isinstance(ticket.end, Failed) else None
