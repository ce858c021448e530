"""Talk to a running daemon over its local socket, with nothing but the standard library.

What is said here is said to users as well: ``from edgemoa import Client``. The client for asyncio
(:mod:`edgemoa.client_async`) has the same methods and shares what is pure.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from edgemoa.config import default_socket_path
from edgemoa.errors import (
    BoardError,
    DaemonUnreachableError,
    EdgemoaError,
    OverloadedError,
    UserError,
)

CHAT: Final = "/v1/chat/completions"
REQUESTS: Final = "/v1/requests"
POLL_S: Final = 60  # for which the daemon is asked to wait with its answer
RESTART_S: Final = 60.0  # for which a daemon that has gone may be on its way back
AGAIN_S: Final = 0.25
GOOD: Final = (http.client.OK, http.client.ACCEPTED, http.client.PARTIAL_CONTENT)
ALONE: Final = "alone"
_PLAN: Final = re.compile(r"M(\d)k(\d{1,2})", re.ASCII | re.IGNORECASE)

T = TypeVar("T")
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """What a prompt may be asked with; what is left out is as the board is configured."""

    model: str
    """``edgemoa`` for the group, the default; or the name of this board's own model, alone."""
    plan: str
    """``M2k3`` for two layers of three peers' proposals each; ``alone`` for none."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | list[str]
    schema: dict[str, Any]
    """The JSON schema that the answer obeys."""
    deadline_s: float
    """After which what is there is the answer."""
    strict: bool
    """Refuse what cannot be had as it was asked for, instead of doing less."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a prompt; ``str()`` of it is its text."""

    id: str
    text: str
    finish: str
    """``stop``; ``length`` where it was cut off at ``max_tokens`` or the deadline."""
    model: str
    prompt_tokens: int
    tokens: int
    trace: dict[str, Any]
    """Who proposed what, how long each part took, who was left out and why."""

    def __str__(self) -> str:
        return self.text


class Stream:
    """An answer on its way: iterate over its pieces of text; ``answer`` is there afterwards.

    Closing it, or leaving its ``with``, before the end takes the prompt back.
    """

    def __init__(self, chunks: Generator[dict[str, Any], None, None]) -> None:
        self._chunks = chunks
        self._heard = Heard()

    @property
    def answer(self) -> Answer | None:
        """The whole answer; None before its end."""
        return self._heard.answer

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            if text := self._heard.hear(chunk):
                yield text

    def close(self) -> None:
        """Hear no more of it."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A client of one board's daemon; a connection a call, so it can be shared and kept.

    :param path: the daemon's socket; by default ``$EDGEMOA_API_SOCKET`` or its usual place.
    :param timeout_s: how long to wait for the daemon's next byte; by default for ever.
    """

    def __init__(self, path: Path | str | None = None, *, timeout_s: float | None = None) -> None:
        self.path = socket_path(path)
        self._timeout_s = timeout_s

    def ask(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> Answer:
        """The answer to ``prompt``: a text, or turns as ``{"role": ..., "content": ...}``.

        The daemon keeps an accepted prompt whatever happens: should it be restarted meanwhile,
        this waits for it to come back, and gets the answer all the same.

        :param key: of your own for the prompt: one that was asked before gets the same answer.
        :raises OverloadedError: not accepted; ``retry_after_s`` says when to come back.
        :raises EdgemoaError: another refusal, or what kept it from being answered.
        """
        key = key or uuid.uuid4().hex
        request_id = self._patiently(
            lambda: self.submit(prompt, key=key, **options), Patience(was_there=False)
        )
        answer = None
        while answer is None:
            answer = self._patiently(
                lambda: self.result(request_id, wait_s=POLL_S), Patience(was_there=True)
            )
        return answer

    @staticmethod
    def _patiently(call: Callable[[], T], patience: Patience) -> T:
        while True:
            try:
                return call()
            except EdgemoaError as error:
                if not patience.allows(error, time.monotonic()):
                    raise
            time.sleep(AGAIN_S)

    def stream(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> Stream:
        """The answer to ``prompt`` as it is written; raises as :meth:`ask` does, on its way."""
        return Stream(self.chat(body_of(prompt, options), key=key))

    def submit(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> str:
        """Leave ``prompt`` with the daemon; returns the id under which its answer can be fetched,
        by any process of this user and for a day.

        :raises OverloadedError: not accepted; ``retry_after_s`` says when to come back.
        """
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        with self._request("POST", REQUESTS, body_of(prompt, options), headers) as response:
            return str(object_of(_rest(response))["id"])

    def result(self, request_id: str, *, wait_s: float = 0) -> Answer | None:
        """The answer to a prompt that was left; None while there is none.

        :param wait_s: how long to wait for it; up to 300.
        :raises EdgemoaError: what kept it from being answered.
        """
        return answer_of(self.get(f"{path_of(request_id)}?wait={max(0, round(wait_s))}"))

    def cancel(self, request_id: str) -> None:
        """Take a prompt back, or have its answer deleted."""
        self.delete(path_of(request_id))

    def status(self) -> dict[str, Any]:
        """How the board is doing: queue, bounds, speed, peers."""
        return self.get("/v1/status")

    def devices(self) -> dict[str, Any]:
        """The boards of the group, and others in sight."""
        return self.get("/v1/devices")

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        with self._request("GET", path, None) as response:
            return object_of(_rest(response))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the daemon says to the JSON object ``body``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        with self._request("POST", path, body) as response:
            return object_of(_rest(response))

    def delete(self, path: str) -> dict[str, Any]:
        """What the daemon says when what is at ``path`` is ended; raises as :meth:`post` does."""
        with self._request("DELETE", path, None) as response:
            return object_of(_rest(response))

    def open(self, path: str, offset: int = 0) -> http.client.HTTPResponse:
        """The bytes at ``path`` from ``offset`` on, to be read; their number is its ``length``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        return self._request("GET", path, None, {"Range": f"bytes={offset}-"} if offset else {})

    def chat(self, body: dict[str, Any], *, key: str = "") -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed chat completion; closing the iterator cancels it.

        :param key: the prompt's Idempotency-Key; with one, it is not cancelled.
        :raises EdgemoaError: before the first chunk or in the middle.
        """
        more = {"Idempotency-Key": key} if key else None
        response = self._request("POST", CHAT, {**body, "stream": True}, more)
        try:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if (chunk := chunk_of(line)) is None:
                    return
                yield chunk
            raise broken()
        except (http.client.HTTPException, OSError) as error:
            raise broken() from error
        finally:
            response.close()

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        more: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        connection = _Connection(self.path, self._timeout_s)
        try:
            response = self._answer(connection, method, path, body, more)
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:  # the response has its own hold on it
            connection.sock.close()
        if response.status not in GOOD:
            with response:
                raise error_of(object_of(_rest(response)), response.getheader("Retry-After"))
        return response

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        more: dict[str, str] | None,
    ) -> http.client.HTTPResponse:
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Connection": "close", "Content-Type": "application/json"} | (more or {})
            connection.request(method, path, data, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise unreachable(self.path, error) from error


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            raise
        self.sock = sock


def _rest(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read()
    except (http.client.HTTPException, OSError) as error:
        raise BoardError("the daemon went away in the middle of its answer") from error


# --- what both clients share; pure


class Heard:
    """The chunks of a streamed answer, put together."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self._said: list[str] = []
        self._finish = ""

    def hear(self, chunk: dict[str, Any]) -> str:
        """The text that it adds; empty for none."""
        text = ""
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            self._finish = choice.get("finish_reason") or self._finish
        self._said.append(text)
        if usage := chunk.get("usage"):  # the last one
            self.answer = Answer(
                id=chunk["id"],
                text="".join(self._said),
                finish=self._finish,
                model=chunk["model"],
                prompt_tokens=usage["prompt_tokens"],
                tokens=usage["completion_tokens"],
                trace=chunk["edgemoa"],
            )
        return text


class Patience:
    """For how long a daemon that has gone may be on its way back.

    :param was_there: it has been reached before.
    """

    def __init__(self, *, was_there: bool) -> None:
        self._was_there = was_there
        self._since_s: float | None = None

    def allows(self, error: EdgemoaError, now_s: float) -> bool:
        """Whether to try again after this failure."""
        if type(error) not in (DaemonUnreachableError, BoardError):
            return False
        if not self._was_there and isinstance(error.__cause__, _SHUT):
            return False
        self._was_there = True
        self._since_s = now_s if self._since_s is None else self._since_s
        return now_s - self._since_s < RESTART_S


_SHUT = (FileNotFoundError, ConnectionRefusedError, PermissionError)


def socket_path(path: Path | str | None) -> Path:
    """Where the daemon listens, as far as one can tell from here."""
    named = path or os.environ.get("EDGEMOA_API_SOCKET")
    return Path(named).expanduser() if named else default_socket_path()


def plan_of(text: str) -> dict[str, int]:
    """A plan's layers and proposers.

    :raises UserError: it is none.
    """
    if text == ALONE:
        return {"layers": 0, "proposers": 0}
    if (found := _PLAN.fullmatch(text)) is None:
        raise UserError(
            f"{text!r} is no plan", hint="M2k3 for two layers of three peers each, or alone"
        )
    return {"layers": int(found[1]), "proposers": int(found[2])}


def body_of(prompt: Prompt, options: Options) -> dict[str, Any]:
    """A chat completion's body.

    :raises UserError: a plan that is none.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    body: dict[str, Any] = {"messages": turns}
    same = ("model", "max_tokens", "temperature", "top_p", "seed", "stop")
    body |= {name: options[name] for name in same if name in options}  # type: ignore[literal-required]
    extra: dict[str, Any] = {"events": True}
    if "plan" in options:
        extra |= plan_of(options["plan"])
    if "deadline_s" in options:
        extra["deadline_ms"] = round(options["deadline_s"] * 1000)
    if "strict" in options:
        extra["strict"] = options["strict"]
    if "schema" in options:
        schema = {"name": "answer", "schema": options["schema"]}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body | {"edgemoa": extra}


def path_of(request_id: str) -> str:
    """Where a prompt that was left is looked up."""
    return f"{REQUESTS}/{quote(request_id, safe='')}"


def answer_of(told: dict[str, Any]) -> Answer | None:
    """The answer that a prompt's state holds; None while it has none.

    :raises EdgemoaError: it came to a bad end.
    """
    if "error" in told:
        raise error_of(told)
    if (response := told.get("response")) is None:
        return None
    choice, usage = response["choices"][0], response["usage"]
    return Answer(
        id=response["id"],
        text=choice["message"]["content"] or "",
        finish=choice["finish_reason"],
        model=response["model"],
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"],
        trace=response["edgemoa"],
    )


def chunk_of(line: bytes) -> dict[str, Any] | None:
    """What a ``data:`` line of a stream says; None for its end.

    :raises EdgemoaError: the error that it tells.
    """
    data = line.removeprefix(b"data: ").strip()
    if data == b"[DONE]":
        return None
    chunk = object_of(data)
    if "error" in chunk:
        raise error_of(chunk)
    return chunk


def unreachable(path: Path, error: Exception) -> DaemonUnreachableError:
    """What it means that the socket cannot be used."""
    match error:
        case FileNotFoundError() | ConnectionRefusedError():
            return DaemonUnreachableError(
                f"no edgemoa daemon listens on {path}",
                hint="start one with `edgemoa serve`, or name its socket with --socket",
            )
        case PermissionError():
            return DaemonUnreachableError(
                f"this user may not use {path}",
                hint="join the group that owns the socket, or ask as its user",
            )
    return DaemonUnreachableError(f"the daemon on {path} does not answer", hint="see its log")


def broken() -> BoardError:
    """The stream ended without its end."""
    return BoardError("the daemon went away in the middle of the answer", hint="ask again")


def object_of(data: bytes) -> dict[str, Any]:
    """The JSON object that the daemon answered.

    :raises BoardError: it is none.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BoardError("the daemon's answer is not JSON", hint="is it edgemoa?") from error
    if not isinstance(value, dict):
        raise BoardError("the daemon's answer is not an object", hint="is it edgemoa?")
    return value


def error_of(answer: dict[str, Any], retry_after: str | None = None) -> EdgemoaError:
    """The error that the daemon reported, as the class that it came from."""
    told = answer.get("error")
    code, text = (
        (told.get("code"), str(told.get("message"))) if isinstance(told, dict) else ("", "unknown")
    )
    kind = _by_code(EdgemoaError).get(str(code), EdgemoaError)
    if kind is OverloadedError and retry_after and retry_after.isdigit():
        return OverloadedError(text, retry_after_s=int(retry_after))
    return kind(text)


def _by_code(kind: type[EdgemoaError]) -> dict[str, type[EdgemoaError]]:
    kinds = {kind.code: kind}
    for below in kind.__subclasses__():
        kinds |= {code: k for code, k in _by_code(below).items() if code not in kinds}
    return kinds
