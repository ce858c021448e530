"""Fetching one file over HTTP, going on where an earlier try was cut off.

Beside ``NAME.part`` lies ``NAME.part.note``, which says what it is a part of; a finished file is
``NAME``. Two answers are joined only where the server says that they are of the same file, or where
the address itself stands for certain bytes whose hash is checked afterwards.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import httpx2
import msgspec

from edgemoa import __version__
from edgemoa.errors import (
    EdgemoaError,
    HashMismatchError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.progress import Progress

BACKOFF_S: tuple[float, ...] = (1, 2, 4, 8)
"""Waits between tries that bring nothing new; after the last one it is given up."""

LONGEST_WAIT_S: Final = 60.0
NEWS_BYTES: Final = 1 << 20  # a try that brought so much starts the count of tries again
UNKNOWN_STEP_BYTES: Final = 64 << 20  # room that a file of unknown length is given at a time
MAX_REDIRECTS: Final = 10
TIMEOUT: Final = httpx2.Timeout(30.0, connect=15.0)

_NOT_NOW: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")

T = TypeVar("T")


class TransientError(Exception):
    """A try failed in a way that another one may not. ``str`` says how, for a person."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file to fetch to ``folder / name``.

    ``size`` is its length, where that is known already. ``immutable``: the address always stands
    for the same bytes, and whoever asks checks their hash; parts are then joined on the server's
    word for the length alone. ``check_room`` is called with the whole length, or the length up to
    which it is safe to go on, and with what is there of it; it raises what it raises.
    ``explain`` makes an error of a refusal's status and headers, where it knows better.
    """

    url: str
    folder: Path
    name: str
    check_room: Callable[[int, int], None]
    size: int | None = None
    immutable: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    explain: Callable[[int, Mapping[str, str]], EdgemoaError | None] = lambda status, headers: None


def public(url: str) -> str:
    """An address without what may be secret in it: for messages and manifests. It can be fetched
    again, and holds nothing that a terminal would obey: what was escaped in it still is.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise UserError("that is no address that can be read", hint="check it") from None
    path, _, _ = parsed.raw_path.partition(b"?")
    return f"{parsed.scheme}://{parsed.netloc.decode()}{path.decode()}"


def fetch(wanted: Wanted, progress: Progress) -> Path:
    """Bring the file, or what is missing of it; returns its path.

    Raises :class:`NetworkError`, :class:`ModelNotFoundError`, :class:`HashMismatchError` where the
    server has a file of another length than ``wanted.size``, and what ``check_room`` and
    ``explain`` say. What has arrived stays for a next call, as it does after an interrupt.
    """
    done = wanted.folder / wanted.name
    if done.is_file():
        return done
    part = _Part(done.with_name(f"{done.name}.part"))
    with httpx2.Client(timeout=TIMEOUT, headers={"User-Agent": f"edgemoa/{__version__}"}) as client:
        retry(lambda: _receive(client, wanted, part, progress), progress, lambda: part.size)
    part.path.rename(done)
    part.forget_note()
    return done


def retry(action: Callable[[], T], progress: Progress, arrived: Callable[[], int] = int) -> T:
    """Run ``action`` until it is through, waiting longer after each :class:`TransientError`.

    ``arrived`` counts what it has brought: one that brings something is tried on and on.
    """
    failures, before = 0, arrived()
    while True:
        try:
            with transient_errors():
                return action()
        except TransientError as error:
            news = arrived() - before >= NEWS_BYTES
            before = max(before, arrived())
            failures = 1 if news else failures + 1
            if failures > len(BACKOFF_S):
                raise NetworkError(
                    f"{error}; tried {failures} times",
                    hint="check the network and try again: what has arrived is kept",
                ) from None
            wait_s = min(max(BACKOFF_S[failures - 1], error.wait_s), LONGEST_WAIT_S)
            progress(f"{error}; trying again in {wait_s:.0f} s", 0, 0)
            time.sleep(wait_s)


@contextmanager
def transient_errors() -> Iterator[None]:
    """What the HTTP client raises, as errors of ours. Its own words could show an address."""
    try:
        yield
    except httpx2.TimeoutException:
        raise TransientError("the server did not answer in time") from None
    except httpx2.ProxyError as error:
        raise NetworkError(f"the proxy refuses: {error}", hint="check HTTPS_PROXY") from None
    except httpx2.ConnectError as error:
        if "CERTIFICATE" in str(error).upper():
            raise NetworkError(
                "the server's certificate cannot be verified",
                hint="is this board's clock right (`date`)? A proxy that opens TLS needs its "
                "certificate in SSL_CERT_FILE",
            ) from None
        raise TransientError("the server cannot be reached") from None
    except (httpx2.NetworkError, httpx2.RemoteProtocolError):
        raise TransientError("the connection was cut") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise NetworkError(
            f"the server cannot be used ({type(error).__name__})", hint="check the address"
        ) from None


class _Note(msgspec.Struct, frozen=True):
    """What a part is of: the server's mark of the file's version, and its whole length."""

    validator: str
    size: int | None


class _Part:
    """What there is of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note_path = path.with_name(f"{path.name}.note")

    @property
    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def note(self) -> _Note:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._note_path.read_bytes(), type=_Note)
        return _Note("", None)

    def begin(self, note: _Note) -> None:
        """Start anew: an empty file, and what it will be."""
        self.path.unlink(missing_ok=True)
        self._note_path.write_bytes(msgspec.json.encode(note))
        self.path.touch()

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.forget_note()

    def forget_note(self) -> None:
        self._note_path.unlink(missing_ok=True)


def _receive(client: httpx2.Client, wanted: Wanted, part: _Part, progress: Progress) -> None:
    """One try: ask for what is missing and write it down."""
    offset, note = part.size, part.note
    known = wanted.size if wanted.immutable else None
    if offset and offset == (note.size if known is None else known):
        return  # whole, and only its name was not yet given to it
    headers = dict(wanted.headers) | {"Accept-Encoding": "identity"}
    if offset and (wanted.immutable or note.validator):
        headers["Range"] = f"bytes={offset}-"
        if not wanted.immutable:
            headers["If-Range"] = note.validator
    else:
        offset = 0
    with _get(client, wanted.url, headers) as response:
        if response.status_code == 416 and offset:
            part.forget()
            raise TransientError("the server has no more than what is here")
        _refuse(response, wanted)
        if response.status_code == 206:
            begins, total = _range(response)
            whole = wanted.size or note.size
            if begins != offset or (total is not None and whole is not None and total != whole):
                part.forget()
                raise TransientError("the file changed on the server")
            total = total or whole
        else:
            offset, total = 0, _length(response)
        if total is not None and wanted.size is not None and total != wanted.size:
            part.forget()
            raise HashMismatchError(
                f"{public(wanted.url)} has {total} bytes, not {wanted.size}",
                hint="it was replaced; name another file or revision",
            )
        if total is not None:
            wanted.check_room(total, offset)
        if not offset:
            part.begin(_Note(_validator(response), total))
        with part.path.open("r+b") as stream:
            stream.seek(offset)
            _write(stream, response, wanted, total, progress)
    expected = total if total is not None else wanted.size
    if expected is not None and part.size != expected:
        if part.size > expected:
            part.forget()
        raise TransientError("the connection was cut")


@contextmanager
def _get(client: httpx2.Client, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """The answer after redirects. The client leaves credentials behind where the host changes."""
    request = client.build_request("GET", url, headers=headers)
    for _ in range(MAX_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            following = response.next_request
            if following is None:
                yield response
                return
            if request.url.scheme == "https" and following.url.scheme != "https":
                raise NetworkError(
                    f"{public(url)} leads from https to an address without",
                    hint="do not use that address: anybody on the way could change the file",
                )
        finally:
            response.close()
        request = following
    raise NetworkError(f"{public(url)} redirects in circles", hint="check the address")


def _refuse(response: httpx2.Response, wanted: Wanted) -> None:
    """Raise unless the answer carries the file as it is."""
    status, where = response.status_code, public(wanted.url)
    if status in (200, 206):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise NetworkError(f"{where} is sent packed, which was not asked for")
        return
    if status in _NOT_NOW:
        after = response.headers.get("Retry-After", "")
        wait_s = float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0
        raise TransientError(f"the server answers {status}", wait_s)
    if (known := wanted.explain(status, response.headers)) is not None:
        raise known
    if status in (404, 410):
        raise ModelNotFoundError(f"there is nothing at {where}", hint="check the address")
    if status in (401, 403):
        raise NetworkError(f"{where} is not given out to everybody (status {status})")
    raise NetworkError(f"{where} answers with status {status}")


def _range(response: httpx2.Response) -> tuple[int, int | None]:
    """Where a partial answer begins, and how long the whole is."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _length(response: httpx2.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _validator(response: httpx2.Response) -> str:
    """What ``If-Range`` may be asked with: a strong entity tag, else a date, else nothing."""
    tag: str = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return tag
    date: str = response.headers.get("Last-Modified", "")
    return date


def _write(
    stream: BinaryIO,
    response: httpx2.Response,
    wanted: Wanted,
    total: int | None,
    progress: Progress,
) -> None:
    """Write what comes, never more than there is room for."""
    size, limit = stream.tell(), total if total is not None else wanted.size
    room = size if limit is None else limit
    progress("download", size, limit or 0)
    for chunk in response.iter_raw():
        if limit is not None and size + len(chunk) > limit:
            raise TransientError("the server sends more than it said")
        if size + len(chunk) > room:
            room = size + UNKNOWN_STEP_BYTES
            wanted.check_room(room, size)
        stream.write(chunk)
        size += len(chunk)
        progress("download", size, limit or 0)
