"""Talk to a running daemon over its local socket, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

from edgemoa.config import default_socket_path
from edgemoa.errors import BoardError, DaemonUnreachableError, EdgemoaError, OverloadedError


class Client:
    """A client of one board's daemon; a connection a call, so it can be shared and kept."""

    def __init__(self, path: Path | None = None, *, timeout_s: float | None = None) -> None:
        self.path = path or default_socket_path()
        self._timeout_s = timeout_s

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        with self._request("GET", path, None) as response:
            return _object(_rest(response))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the daemon says to the JSON object ``body``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        with self._request("POST", path, body) as response:
            return _object(_rest(response))

    def delete(self, path: str) -> dict[str, Any]:
        """What the daemon says when what is at ``path`` is ended; raises as :meth:`post` does."""
        with self._request("DELETE", path, None) as response:
            return _object(_rest(response))

    def open(self, path: str, offset: int = 0) -> http.client.HTTPResponse:
        """The bytes at ``path`` from ``offset`` on, to be read; their number is its ``length``.

        :raises DaemonUnreachableError: no daemon there.
        :raises EdgemoaError: what the daemon answered instead.
        """
        return self._request("GET", path, None, {"Range": f"bytes={offset}-"} if offset else {})

    def chat(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed chat completion; closing the iterator cancels it.

        :raises EdgemoaError: before the first chunk or in the middle.
        """
        response = self._request("POST", "/v1/chat/completions", {**body, "stream": True})
        try:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                chunk = _object(data)
                if "error" in chunk:
                    raise _error(chunk)
                yield chunk
            raise BoardError("the daemon went away in the middle of the answer", hint="ask again")
        except (http.client.HTTPException, OSError) as error:
            raise BoardError(
                "the connection to the daemon broke in the middle of the answer", hint="ask again"
            ) from error
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
        if response.status not in (http.client.OK, http.client.PARTIAL_CONTENT):
            with response:
                raise _error(_object(_rest(response)), response.getheader("Retry-After"))
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
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise DaemonUnreachableError(
                f"no edgemoa daemon listens on {self.path}",
                hint="start one with `edgemoa serve`, or name its socket with --socket",
            ) from error
        except PermissionError as error:
            raise DaemonUnreachableError(
                f"this user may not use {self.path}",
                hint="join the group that owns the socket, or ask as its user",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise DaemonUnreachableError(
                f"the daemon on {self.path} does not answer", hint="see its log"
            ) from error


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


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BoardError("the daemon's answer is not JSON", hint="is it edgemoa?") from error
    if not isinstance(value, dict):
        raise BoardError("the daemon's answer is not an object", hint="is it edgemoa?")
    return value


def _error(answer: dict[str, Any], retry_after: str | None = None) -> EdgemoaError:
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
