"""``/v1/requests``: prompts that outlive the connection that they came by.

What they are asked with is a chat completion's body, and what they are answered with its response;
here is what stands around it.
"""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from edgemoa.api import openai
from edgemoa.core.events import Accepted, Answered, Failed, Text
from edgemoa.desk import Ticket
from edgemoa.errors import EdgemoaError, UserError

MAX_KEY_CHARS: Final = 255
MAX_WAIT_S: Final = 300
PATH: Final = "/v1/requests"


def ticket_json(ticket: Ticket, error: EdgemoaError | None = None) -> dict[str, Any]:
    """How a prompt stands, for its client: ``state``, what it was granted, how much is before it,
    and the answer or the error at its end.

    :param error: what its bad end means, if it came to one.
    """
    accepted = next((e for e in ticket.said if isinstance(e, Accepted)), None)
    told: dict[str, Any] = {
        "id": ticket.id,
        "object": "edgemoa.request",
        "created": ticket.created,
        "model": ticket.model,
        "state": ticket.state,
    }
    if accepted is not None:
        told["granted"] = accepted.granted
        told["position"] = accepted.position
        told["expected_ms"] = accepted.expected_ms
    elif ticket.waiting_before:
        told["position"] = ticket.waiting_before
    end = ticket.end
    if end is None:
        told["text"] = "".join(e.text for e in ticket.said if isinstance(e, Text))
        hidden = (Accepted, Text)
        told["events"] = [e for e in ticket.said if not isinstance(e, hidden)]
    elif isinstance(end, Answered):
        told["response"] = openai.completion(ticket.id, ticket.created, ticket.model, end)
    elif error is not None:
        told |= openai.error_json(error)
    return told


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
