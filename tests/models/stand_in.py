"""A stand-in for the Hugging Face hub, and for any server of files: a real HTTP server on this
machine that speaks what the hub's client asks for, and fails on demand.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class StandIn:
    """``files`` are those of the repository ``owner/repo`` at :data:`COMMIT`, by path.

    ``faults`` are taken one for each request for a file's bytes, the first first:
    ``("cut", n)`` sends n bytes of what was asked for and hangs up, ``("status", code)`` refuses,
    ``("silent", 0)`` sends the head and half of the rest, then waits until the client leaves,
    ``("shift", n)`` gives out a part that begins n bytes further on, ``("packed", 0)`` says that
    the content is compressed.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, int]] = field(default_factory=list)
    api_faults: list[int] = field(default_factory=list)
    gated: bool = False
    ranges: bool = True  # whether parts are given out
    tags: bool = True  # whether files have an entity tag
    lengths: bool = True  # whether an answer says how long it is
    plain: bool = False  # files without LFS, with git's hash alone
    told_sha256: str = ""  # what the hub says instead of the truth
    told_size: int = 0
    api_body: bytes | None = None
    retry_after: str = ""
    redirect: str = ""  # where every file is said to be
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent_bytes: int = 0
    waiting: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def asked(self, text: str) -> list[dict[str, str]]:
        """The headers of the requests whose path holds ``text``."""
        return [headers for path, headers in self.seen if text in path]

    def info(self) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            git = hashlib.sha1(
                b"blob %d\0" % len(content) + content, usedforsecurity=False
            ).hexdigest()
            size = self.told_size or len(content)
            sibling: dict[str, Any] = {"rfilename": path, "size": size, "blobId": git}
            if not self.plain and not path.endswith(".json"):
                sha256 = self.told_sha256 or hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
            siblings.append(sibling)
        gated = "manual" if self.gated else False
        return {"id": "owner/repo", "sha": COMMIT, "gated": gated, "siblings": siblings}


class _Handler(http.server.BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.stand_in
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.seen.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif found := re.fullmatch(r"/owner/repo/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2])
        elif path.startswith("/files/"):
            self._file(path.removeprefix("/files/"))
        else:
            self._say(404)

    def _api(self, path: str) -> None:
        hub = self.stand_in
        if hub.api_faults:
            self._say(hub.api_faults.pop(0))
        elif hub.api_body is not None:
            self._say(200, hub.api_body)
        elif path not in ("owner/repo", f"owner/repo/revision/{COMMIT}", "owner/repo/revision/v1"):
            known = path.startswith("owner/repo/")
            self._say(404, code="RevisionNotFound" if known else "RepoNotFound")
        else:
            self._say(200, json.dumps(hub.info()).encode())

    def _resolve(self, revision: str, path: str) -> None:
        hub = self.stand_in
        if hub.gated and self.headers.get("Authorization") != "Bearer hf_right":
            self._say(403 if self.headers.get("Authorization") else 401, code="GatedRepo")
        elif revision != COMMIT or path not in hub.files:
            self._say(404, code="EntryNotFound")
        else:  # the files are with somebody else, as the hub's are
            target = hub.redirect or f"http://localhost:{hub.port}/files/{path}?Signature=s3cret"
            self._say(302, location=target)

    def _file(self, path: str) -> None:
        hub = self.stand_in
        if hub.redirect and "Signature" not in self.path:
            self._say(302, location=hub.redirect)
            return
        kind, value = hub.faults.pop(0) if hub.faults else ("", 0)
        content = hub.files.get(path)
        if content is None or kind == "status":
            self._say(value or 404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start, whole = 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and hub.ranges and self.headers.get("If-Range") in (None, tag):
            start = int(wanted[1])
            if start >= whole:
                self._say(416)
                return
        self.send_response(206 if start else 200)
        if start:
            start += value if kind == "shift" else 0
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        if hub.tags:
            self.send_header("ETag", tag)
        if hub.lengths:
            self.send_header("Content-Length", str(whole - start))
        self.send_header("Connection", "close")
        self.end_headers()
        body = content[start:]
        body = body[:value] if kind == "cut" else body
        body = body[: len(body) // 2] if kind == "silent" else body
        self.wfile.write(body)
        self.wfile.flush()
        hub.sent_bytes += len(body)
        self.close_connection = True
        if kind == "silent":
            hub.waiting.set()
            self.connection.settimeout(20)
            self.connection.recv(1)  # returns when the client is gone

    def _say(self, status: int, body: bytes = b"", *, code: str = "", location: str = "") -> None:
        self.send_response(status)
        after = self.stand_in.retry_after if status == 503 else ""
        headers = {"X-Error-Code": code, "Location": location, "Retry-After": after}
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what this is for."""


@contextmanager
def stand_in(certificate: Path | None = None) -> Iterator[StandIn]:
    """A server that runs until the block ends; with a certificate and its key, by TLS."""
    hub = StandIn()
    handler = type("Handler", (_Handler,), {"stand_in": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.port = server.server_address[1]
        if certificate is not None:
            hub.scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
