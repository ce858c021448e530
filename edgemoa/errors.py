"""Every error that a person or a client can meet, in one tree.

An error says what is wrong in one sentence and, as ``hint``, what to do next. The command line
prints both and exits with ``exit_code``; the local API answers with ``http_status`` and ``code``
in OpenAI's error shape. Exit codes and codes are stable: scripts may rely on them.
"""

from __future__ import annotations

from typing import ClassVar


class EdgemoaError(Exception):
    """The root. ``str(error)`` is one sentence that names the cause, never a prompt or a secret."""

    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 70
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def kind(self) -> str:
        """OpenAI's ``error.type``: whose turn it is to change something."""
        return "invalid_request_error" if self.http_status < 429 else "server_error"


# --- what the user asked for, or configured, cannot be done as it stands


class UserError(EdgemoaError):
    code = "invalid_request"
    exit_code = 2
    http_status = 400


class ConfigError(UserError):
    """A configuration file, environment variable or flag that cannot be read or is out of range."""

    code = "invalid_config"
    exit_code = 3


class ModelNotFoundError(UserError):
    """No model of that name on this board."""

    code = "model_not_found"
    exit_code = 4
    http_status = 404


class ModelInvalidError(UserError):
    """A model file or folder that is damaged, or of a kind that is not supported."""

    code = "model_invalid"
    exit_code = 5


class HashMismatchError(UserError):
    """What arrived is not what was pinned."""

    code = "hash_mismatch"
    exit_code = 6


class InvalidPromptError(UserError):
    """An empty prompt, or text that is not UTF-8."""

    code = "invalid_prompt"
    exit_code = 13


class PromptTooLongError(UserError):
    """The prompt does not fit in the model's context."""

    code = "context_length_exceeded"
    exit_code = 14


class ConflictError(UserError):
    """It is at odds with what was asked for before."""

    code = "conflict"
    exit_code = 19
    http_status = 409


class UnauthorizedError(UserError):
    """No API key, or one that is not known."""

    code = "unauthorized"
    exit_code = 21
    http_status = 401


class ForbiddenError(UserError):
    """Whoever it is, this is not for them."""

    code = "forbidden"
    exit_code = 22
    http_status = 403


class NotFoundError(UserError):
    """No prompt of that id: never there, another user's, or no longer kept."""

    code = "not_found"
    exit_code = 20
    http_status = 404


class SchemaError(UserError):
    """An answer cannot be held to its JSON schema, which was found out while it was written."""

    code = "schema_failed"
    exit_code = 18


# --- what this board cannot do now


class BoardError(EdgemoaError):
    code = "unavailable"
    exit_code = 69
    http_status = 503


class NetworkError(BoardError):
    """Something had to be fetched and could not be."""

    code = "network_unavailable"
    exit_code = 7


class DiskFullError(BoardError):
    """Not enough room, found out before or while writing."""

    code = "disk_full"
    exit_code = 8
    http_status = 507


class AddressInUseError(BoardError):
    """A port or a socket path that another process holds."""

    code = "address_in_use"
    exit_code = 9


class DaemonUnreachableError(BoardError):
    """No daemon answers on the local socket."""

    code = "daemon_unreachable"
    exit_code = 10


class EngineError(BoardError):
    """The model process died, hung, or could not answer."""

    code = "engine_failed"
    exit_code = 11


class OverloadedError(BoardError):
    """Every queue that could take this prompt is full. ``retry_after_s`` says when to come back,
    ``position`` how many prompts were before it, where that is why."""

    code = "overloaded"
    exit_code = 12
    http_status = 429

    def __init__(
        self, message: str, *, hint: str = "", retry_after_s: int = 1, position: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        self.position = position


class StateError(BoardError):
    """The state directory, identity or database cannot be used."""

    code = "state_unusable"
    exit_code = 15


class DeadlineError(BoardError):
    """The prompt's deadline passed before an answer was there."""

    code = "deadline_exceeded"
    exit_code = 17
    http_status = 504


# --- what a peer did


class PeerError(EdgemoaError):
    code = "peer_failed"
    exit_code = 16
    http_status = 502


class ProtocolError(PeerError):
    """Bytes from the network that are not a valid message. Never shows the bytes."""

    code = "protocol_error"


class PairingError(PeerError):
    """Two boards could not prove themselves to each other."""

    code = "pairing_failed"
