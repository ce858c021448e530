"""Proves that no flood gets a board killed: a real daemon under a limit of memory, and hundreds of
clients and a paired board that send all they can.

The limit is that of a control group where ``--group`` names a folder in which this user may make
one (as root, /sys/fs/cgroup of version 2, or /sys/fs/cgroup/memory of version 1). Elsewhere the
kernel gives the daemon no more data than the limit leaves (RLIMIT_DATA), and the model process's
part is measured. Each request has to come to an answer or a clear refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gzip
import http.client
import io
import itertools
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import Row, row, say, tell  # noqa: E402

from edgemoa import config  # noqa: E402
from edgemoa.core import limits  # noqa: E402
from edgemoa.core.messages import (  # noqa: E402
    Ack,
    BoardId,
    ChatMessage,
    Declined,
    Message,
    Ping,
    Propose,
    Queued,
    Sampling,
)
from edgemoa.demo import LocalBoard, start_board, stop, wait_until_ready  # noqa: E402
from edgemoa.errors import EdgemoaError  # noqa: E402
from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402
from edgemoa.net.identity import load_identity  # noqa: E402
from edgemoa.net.network import Network  # noqa: E402
from edgemoa.net.pairing import new_join_secret, parse_join_secret  # noqa: E402
from edgemoa.store import Store  # noqa: E402

MODEL: Final = "smollm2-135m-instruct"
MB: Final = 1_000_000
WATCH_S: Final = 0.05
DOWN_S: Final = 10.0  # for the memory to come down
PATIENCE_S: Final = 120.0  # for the last answers
KEPT_MB: Final = 64  # that Python's allocator may hold: 45 to 55 after floods of 35 to 240 s
OWN_S: Final = 30.0  # for an own prompt while a peer floods
ON_THEIR_WAY: Final = 12  # of a peer's questions, at a time
KV_MB: Final = 96  # for the model process, where it does not see the limit
REFUSED: Final = (429, 503)
HOPELESS: Final = (400, 413)  # what asking again would not mend
OUTCOMES: Final = ("answered", "refused", "hopeless")


# --- the limit, and what is used of it


class Group:
    """A control group with a limit of memory, of either version, made in a folder of the user's."""

    def __init__(self, parent: Path, limit_bytes: int) -> None:
        self.folder = parent / f"edgemoa-flood-{time.monotonic_ns()}"
        self.folder.mkdir()
        self._v2 = (self.folder / "memory.max").exists()
        limits_of = "memory.max" if self._v2 else "memory.limit_in_bytes"
        self._write(limits_of, limit_bytes)
        if self._v2:
            self._write("memory.swap.max", 0)

    def add(self, pid: int) -> None:
        self._write("cgroup.procs", pid)

    def peak_bytes(self) -> int:
        name = "memory.peak" if self._v2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    def killed(self) -> int:
        file = self.folder / ("memory.events" if self._v2 else "memory.oom_control")
        told = dict(line.split() for line in file.read_text().splitlines())
        return int(told["oom_kill"])

    def remove(self) -> None:
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))


def status_bytes(pid: int, key: str) -> int:
    """A line of a process's status, e.g. ``VmRSS``; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class Watch:
    """What both processes hold, looked at all the time."""

    daemon: int
    model: int
    together: int = 0

    def now(self) -> tuple[int, int]:
        return status_bytes(self.daemon, "VmRSS"), status_bytes(self.model, "VmRSS")

    def forget(self) -> None:
        """Have the kernel count peaks from now on."""
        for pid in (self.daemon, self.model):
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    async def run(self) -> None:
        while True:
            daemon, model = self.now()
            self.together = max(self.together, daemon + model)
            await asyncio.sleep(WATCH_S)

    def peaks(self) -> tuple[int, int]:
        """Of the daemon and of the model process, by the kernel, which misses none."""
        return status_bytes(self.daemon, "VmHWM"), status_bytes(self.model, "VmHWM")


# --- the clients


@dataclass
class Flood:
    """What was asked, and what became of it."""

    socket: Path
    clients: int = 1
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)  # why there was neither

    async def ask(self, *pieces: bytes | Awaitable[Any], read: bool = True) -> str:
        """One request, to its end: answered, refused, hopeless, or lost.

        :param pieces: what is sent, and what is waited for meanwhile.
        :param read: False for a client that reads no more than the status of an answer, and stays.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket)
        except BlockingIOError:
            return await self._not_let_in()
        except OSError as error:
            await asyncio.sleep(0.5)
            return self._note(repr(error))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._send(writer, pieces)
                head = await reader.readuntil(b"\r\n\r\n")
                line, _, rest = head.partition(b"\r\n")
                status, headers = int(line.split()[1]), http.client.parse_headers(io.BytesIO(rest))
                if status == http.HTTPStatus.OK and not read:
                    await asyncio.sleep(self.seconds)
                else:
                    await reader.read()
            outcome = _outcome(status, headers.get("Retry-After", ""))
        except (OSError, EOFError, TimeoutError) as error:
            # asyncio takes a full backlog for a connection that is on its way.
            if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
                return await self._not_let_in()
            outcome = repr(error)
        finally:
            writer.transport.abort()
        return self._note(outcome)

    def _note(self, outcome: str) -> str:
        if outcome not in OUTCOMES:
            self.lost[outcome] += 1
            outcome = "lost"
        self.counts[outcome] += 1
        return outcome

    async def _not_let_in(self) -> str:
        """So many wait to be let in already: nothing was asked."""
        await asyncio.sleep(0.05)
        return ""

    async def _send(
        self, writer: asyncio.StreamWriter, pieces: tuple[bytes | Awaitable[Any], ...]
    ) -> None:
        # One that is refused before it has been read may be closed while it is sent.
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await piece

    async def at_once(self, once: Callable[[int], Awaitable[Any]]) -> None:
        """Each of the clients again and again, for as long as is given."""
        until = time.monotonic() + self.seconds

        async def client(number: int) -> None:
            while time.monotonic() < until:
                await once(number)

        await asyncio.gather(*(client(n) for n in range(self.clients)))


def _outcome(status: int, retry_after: str) -> str:
    if status == http.HTTPStatus.OK:
        return "answered"
    if status in HOPELESS:
        return "hopeless"
    if status in REFUSED and retry_after.isdigit() and int(retry_after):
        return "refused"
    return f"{status}, Retry-After '{retry_after}'"


def head(*headers: str) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: board", "Connection: close", *headers)
    return "\r\n".join((*lines, "", "")).encode()


def request(data: bytes, *headers: str) -> bytes:
    return head(f"Content-Length: {len(data)}", *headers) + data


def body(content: str, **more: Any) -> bytes:
    """A request of nearly the most bytes that one may have."""
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
    size = len(json.dumps(asked, ensure_ascii=False).encode())
    filler = "x" * (limits.MAX_BODY_BYTES - size - 200)
    return json.dumps({**asked, "user": filler}, ensure_ascii=False).encode()


def small(content: str, **more: Any) -> bytes:
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
    return request(json.dumps(asked).encode())


# As long a prompt as there may be, in which one sign makes each take four bytes in memory.
LONGEST: Final = "word " * (limits.MAX_PROMPT_BYTES // 5 - 2) + "\U0001f600"
FITTING: Final = "word " * 1500  # the model's context has room for it
TINY: Final = small("Say yes.")


async def flood_large(flood: Flood) -> None:
    kinds = itertools.cycle([request(body(LONGEST)), request(body(FITTING))])
    await flood.at_once(lambda _: flood.ask(next(kinds)))


async def flood_tiny(flood: Flood) -> None:
    await flood.at_once(lambda _: flood.ask(TINY))


async def flood_slow(flood: Flood) -> None:
    """Nearly all of a body at once, and its end later; half of the clients do not say how long it
    is."""
    whole = body(FITTING)
    known, unknown = request(whole), head("Transfer-Encoding: chunked")
    unknown += b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole)
    until = time.monotonic() + flood.seconds

    async def once(number: int) -> None:
        sent = known if number % 2 else unknown
        pause = asyncio.sleep(max(until - time.monotonic(), 0))
        outcome = await flood.ask(sent[: -limits.KIB], pause, sent[-limits.KIB :])
        pause.close()
        if outcome == "refused":
            await asyncio.sleep(0.2)

    await flood.at_once(once)


async def flood_odd(flood: Flood) -> None:
    """What is small when it is sent and large when it is read."""
    lists = b'{"messages": [], "tools": [' + b"[]," * (limits.MAX_BODY_BYTES // 3 - 50) + b"[]]}"
    schema = {"type": "json_object", "schema": {"enum": [[]] * 15_000}}
    zipped = gzip.compress(b" " * 8 * limits.MAX_BODY_BYTES)
    crumbs = b"2\r\n[]\r\n" * (limits.MAX_BODY_BYTES // 16)
    kinds = itertools.cycle(
        [
            request(lists),
            request(body("hi", response_format=schema)),
            request(zipped, "Content-Encoding: gzip"),
            head("Transfer-Encoding: chunked") + crumbs + b"0\r\n\r\n",
        ]
    )
    await flood.at_once(lambda _: flood.ask(next(kinds)))


async def flood_unread(flood: Flood) -> None:
    """Streams with all that an answer can say beside its text, of which nothing is read."""
    wish = {"max_tokens": 4096, "stream": True, "logprobs": True, "top_logprobs": 20}
    sent = small("Count to a thousand, in words.", **wish)
    await flood.at_once(lambda _: flood.ask(sent, read=False))


FLOODS: Final[dict[str, Callable[[Flood], Awaitable[None]]]] = {
    "large prompts": flood_large,
    "slow senders": flood_slow,
    "odd bodies": flood_odd,
    "unread streams": flood_unread,
    "tiny prompts": flood_tiny,
}


# --- the other board


class Peer:
    """A paired board that asks for proposals on the largest prompts there are, without an end."""

    def __init__(self, folder: Path, secret: str, port: int) -> None:
        self._store = Store(folder)
        self._folder, self._secret, self._port = folder, secret, port
        self.counts: Counter[str] = Counter()
        self._there = asyncio.Event()
        self._wanted: set[str] = set()
        self._network: Network

    async def start(self) -> None:
        self._folder.mkdir()
        await asyncio.to_thread(self._store.open)
        self._network = Network(
            config.Net(
                listen="127.0.0.1",
                interfaces=("127.0.0.1",),
                mdns=False,
                seeds=(f"127.0.0.1:{self._port}",),
            ),
            name="flood",
            identity=load_identity(self._folder),
            store=self._store,
            boot=self._store.count_boot(),
            handlers=self,
            rng=random.Random(),
            join_secret=parse_join_secret(self._secret),
        )
        await self._network.start()
        async with asyncio.timeout(30):
            await self._there.wait()
            while not any(d.linked for d in self._network.devices()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        await self._network.stop()
        await asyncio.to_thread(self._store.close)

    async def flood(self, seconds: float) -> None:
        """Keep as many questions on their way as the link takes."""
        until, number = time.monotonic() + seconds, 0
        (board,) = (device.id for device in self._network.devices())
        while time.monotonic() < until:
            while len(self._wanted) < ON_THEIR_WAY:  # 3 MB of 4 that may wait for one board
                number += 1
                name = f"flood-{number:06}"
                # Some could be answered: what is only declined does not fill a queue.
                content = LONGEST if number % 2 else f"word {number} " * 600
                self._wanted.add(name)
                self._network.send(
                    board,
                    Propose(
                        name, 1, (ChatMessage("user", content),), Sampling(64, seed=number), 60_000
                    ),
                )
                self.counts["asked"] += 1
            await asyncio.sleep(0.005)

    # what the network tells

    def on_message(self, sender: BoardId, message: Message) -> None:
        if isinstance(message, Ping):
            self._network.send(sender, Ack(message.number, 0, sure=message.sure))
        elif isinstance(message, Queued | Declined) and message.request_id in self._wanted:
            self._wanted.discard(message.request_id)
            self.counts["taken" if isinstance(message, Queued) else "declined"] += 1

    def on_undelivered(self, _: BoardId, message: Message) -> None:
        if isinstance(message, Propose):
            self._wanted.discard(message.request_id)
            self.counts["undelivered"] += 1

    def on_paired(self, _: BoardId, name: str) -> None:
        self._there.set()

    def on_unpaired(self, _: BoardId, reason: str) -> None:
        self._there.clear()

    def on_linked(self, board: BoardId, boot: int) -> None:
        pass

    def on_unlinked(self, board: BoardId) -> None:
        pass


# --- all of it


@contextlib.contextmanager
def limited_board(
    place: Path, models_dir: Path, secret: str, limit_bytes: int, parent: Path | None
) -> Iterator[tuple[LocalBoard, Group | None]]:
    """A daemon under the limit, ready."""
    file = place / "join-secret"
    file.touch(mode=0o600)
    file.write_text(secret + "\n", encoding="utf-8")
    flags = [
        f"board.models_dir={models_dir}",
        f"model.name={MODEL}",
        "net.mdns=false",
        f"net.join_secret_file={file}",
    ]
    group = None if parent is None else Group(parent, limit_bytes)
    if group is None:  # it does not see the limit, so it is told what would follow from that
        flags += [f"model.memory_mb={KV_MB}", f"queue.memory_mb={limit_bytes // 16 // MB}"]
    boards: list[LocalBoard] = []
    try:
        boards.append(start_board(place / "board", *flags))
        if group is not None:
            group.add(boards[0].process.pid)  # while it starts: the model process is not there yet
        wait_until_ready(boards)
        yield boards[0], group
    finally:
        stop(boards)
        if group is not None:
            group.remove()


async def prompts(flood: Flood) -> list[float]:
    """A well-behaved client, as there may be one beside a flood; how long each answer took."""
    until, took = time.monotonic() + flood.seconds, []
    while time.monotonic() < until:
        began = time.monotonic()
        if await flood.ask(TINY) == "answered":
            took.append(time.monotonic() - began)
        await asyncio.sleep(0.5)
    return took


class Proof:
    """One board, and all the floods it is put through."""

    def __init__(self, board: LocalBoard, group: Group | None, given: argparse.Namespace) -> None:
        self._board = board
        self._group = group
        self._given = given
        self._rows: list[Row] = []
        self._requests: Counter[str] = Counter()
        status = board.client.get("/v1/status")
        self._port = status["port"]
        self._watch = Watch(board.process.pid, status["engine"]["pid"])

    @property
    def _alive(self) -> bool:
        return self._board.process.poll() is None

    async def run(self) -> list[Row]:
        """All of it; ends early if the board does."""
        limit_bytes, watch = self._given.limit_mb * MB, self._watch
        warm = Flood(self._board.socket, 8)
        await asyncio.gather(*(warm.ask(small(FITTING + str(n))) for n in range(warm.clients)))
        began = time.monotonic()
        await warm.ask(TINY)
        alone_s = time.monotonic() - began
        rest = watch.now()
        room = limit_bytes - sum(rest)
        how = "of a control group"
        if self._group is None:
            most = status_bytes(watch.daemon, "VmData") + room
            resource.prlimit(watch.daemon, resource.RLIMIT_DATA, (most, most))
            how = "for the daemon by RLIMIT_DATA, for both measured"
        say(f"at rest {sum(rest) / MB:.0f} MB; the limit of {self._given.limit_mb} MB is {how}")
        watch.forget()
        watching = asyncio.create_task(watch.run())
        share_s = self._given.seconds / (len(FLOODS) + 2)
        for name, flooding in FLOODS.items():
            if self._alive:
                await self._flood(name, flooding, share_s)
        if self._alive:
            await self._flood_by_peer(2 * share_s, alone_s)
        await self._look_afterwards(rest)
        watching.cancel()
        self._sum_up(rest, how)
        return self._rows

    async def _flood(
        self, name: str, flooding: Callable[[Flood], Awaitable[None]], seconds: float
    ) -> None:
        say(f"{name}: {self._given.clients} clients")
        flood = Flood(self._board.socket, self._given.clients, seconds)
        await flooding(flood)
        self._requests += flood.counts
        why = "".join(f"; {why} x {n}" for why, n in flood.lost.most_common(3))
        note = f"{_told(flood.counts)}{why}; daemon at most {self._watch.peaks()[0] / MB:.0f} MB"
        self._rows.append(row(f"{name}: lost", flood.counts["lost"], "", 0, note))

    async def _flood_by_peer(self, seconds: float, alone_s: float) -> None:
        say("a paired board that asks for proposals without an end")
        place = self._board.socket.parent.parent
        peer = Peer(place / "peer", (place / "join-secret").read_text().strip(), self._port)
        await peer.start()
        own = Flood(self._board.socket, seconds=seconds)
        took, _ = await asyncio.gather(prompts(own), peer.flood(seconds))
        await peer.stop()
        asked, told = peer.counts["asked"], peer.counts["taken"] + peer.counts["declined"]
        note = f"{_told(peer.counts)}; daemon at most {self._watch.peaks()[0] / MB:.0f} MB"
        self._rows += [
            row("peers' jobs: neither taken nor declined", asked - told, "", ON_THEIR_WAY, note),
            row("own prompts meanwhile: unanswered", sum(own.counts.values()) - len(took), "", 0,
                f"{len(took)} answered"),
            row("own prompts meanwhile: longest", max(took, default=None), "s", OWN_S,
                f"alone: {alone_s:.2f} s"),
        ]  # fmt: skip

    async def _look_afterwards(self, rest: tuple[int, int]) -> None:
        """Whether it works as before, and has given back what it took."""
        again = Flood(self._board.socket)
        until = time.monotonic() + PATIENCE_S
        while self._alive and time.monotonic() < until:
            if await again.ask(TINY) == "answered":
                break
            await asyncio.sleep(1)
        self._rows.append(
            row("answers afterwards", again.counts["answered"], "", 1, least=True),
        )
        most = rest[0] + KEPT_MB * MB
        until = time.monotonic() + DOWN_S
        while self._watch.now()[0] > most and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        daemon, model = self._watch.now()
        note = f"model process: {model / MB:.0f} MB, what it has read included"
        self._rows.append(row("memory afterwards: daemon", daemon / MB, "MB", most / MB, note))

    def _sum_up(self, rest: tuple[int, int], how: str) -> None:
        restarts = None
        if self._alive:
            restarts = self._board.client.get("/v1/status")["engine"]["restarts"]
        peak, note = self._watch.together, f"the kernel's peaks: {_parts(self._watch.peaks())}"
        if self._group is not None:
            peak, note = self._group.peak_bytes(), "with the pages of files"
            self._rows.append(row("killed for want of memory", self._group.killed(), "", 0))
        self._rows += [
            row("daemon ended", int(not self._alive), "", 0, cause(self._board.log, self._alive)),
            row("model process restarted", restarts, "", 0),
            row("requests", sum(self._requests.values()), note=_told(self._requests)),
            row("memory at rest", sum(rest) / MB, "MB", note=_parts(rest)),
            row("memory at most", peak / MB, "MB", self._given.limit_mb, note),
            row("limit", self._given.limit_mb, "MB", note=how),
        ]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


def _parts(both: tuple[int, int]) -> str:
    return f"daemon {both[0] / MB:.0f}, model {both[1] / MB:.0f}"


def cause(log: Path, alive: bool) -> str:
    return "" if alive else log.read_text(errors="replace").strip()[-300:]


def main() -> int:
    """Start the board, flood it, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument("--seconds", type=float, default=35.0, help="to flood for (default: 35)")
    parser.add_argument("--clients", type=int, default=240, help="at a time (default: 240)")
    parser.add_argument("--limit-mb", type=int, default=640, help="of memory (default: 640)")
    parser.add_argument(
        "--group", type=Path, metavar="FOLDER", help="where to make a control group for the board"
    )
    given = parser.parse_args()
    models_dir = default_model_dir()
    ensure(MODEL, ModelLibrary(models_dir), silent)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    place = Path(tempfile.mkdtemp(prefix="edgemoa-"))
    try:
        with limited_board(
            place, models_dir, new_join_secret(), given.limit_mb * MB, given.group
        ) as (board, group):
            os.nice(10)  # as if the flood came from elsewhere: it takes no time from the board
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
            rows = asyncio.run(Proof(board, group, given).run())
    except EdgemoaError as error:
        print(f"prove-flood: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"prove-flood: {error}; may this user make control groups there?", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return tell(rows, given, [])


if __name__ == "__main__":
    sys.exit(main())
