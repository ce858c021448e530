"""What the local API adds to the engine, and what its promise costs: real daemon, real model, real
disk. Figures of the engine alone and of the API are taken in turns, in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import Row, row, say, tell  # noqa: E402

from edgemoa.core.events import (  # noqa: E402
    Accepted,
    EngineInfo,
    Granted,
    Job,
    Request,
    TokenLogprob,
    WorkDone,
    WorkFailed,
)
from edgemoa.core.messages import ChatMessage, Sampling  # noqa: E402
from edgemoa.core.rates import Rates  # noqa: E402
from edgemoa.demo import LocalBoard, start_board, stop, wait_until_ready  # noqa: E402
from edgemoa.desk import Desk, Prompt  # noqa: E402
from edgemoa.engine.engine import Engine  # noqa: E402
from edgemoa.errors import EdgemoaError  # noqa: E402
from edgemoa.journal import Journal  # noqa: E402
from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402

MODEL: Final = "smollm2-135m-instruct"
THREADS: Final = 2
TOKENS: Final = 64
CLIENTS: Final = 500
WAITING: Final = 1_000
PROMPT: Final = "Tell me how a bicycle stays upright."
KILOBYTE: Final = (
    "The board in the corner of the workshop has to answer without any network but its own. "
    "Somebody asks it what to do about a pump that hums, about a valve that sticks, about a lamp "
    "that flickers when the press comes down. It knows what it was told last week and what the "
    "manual says, and it has to say so in a few plain sentences that can be read out aloud. "
) * 3


def call(
    path: Path, method: str, where: str, body: Any = None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """One request, its answer still to be read."""
    connection = http.client.HTTPConnection("localhost", timeout=120)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, where, data, headers or {})
    response = connection.getresponse()
    connection.sock.close()  # the response has its own hold on it
    return response


@contextlib.contextmanager
def board(place: Path, models_dir: Path, *flags: str) -> Iterator[LocalBoard]:
    """A board of its own, without peers."""
    started = start_board(
        place,
        f"board.models_dir={models_dir}",
        f"model.name={MODEL}",
        f"model.threads={THREADS}",
        "net.mdns=false",
        "moa.layers=0",
        *flags,
    )
    try:
        wait_until_ready([started])
        yield started
    finally:
        stop([started])


class Alone:
    """The engine without anything around it."""

    def __init__(self, models_dir: Path) -> None:
        self._loop = asyncio.new_event_loop()
        folder = ModelLibrary(models_dir).find(MODEL)
        self._engine = Engine(folder, MODEL, THREADS, self)
        self._ready = asyncio.Event()
        self._first = 0.0
        self._done: asyncio.Future[None] | None = None
        self._job = 0
        self._loop.run_until_complete(self._engine.start())
        self._loop.run_until_complete(self._ready.wait())

    def ask(self, text: str) -> tuple[float, float]:
        """Seconds to the first text and to the end."""
        return self._loop.run_until_complete(self._ask(text))

    async def _ask(self, text: str) -> tuple[float, float]:
        self._done, self._first = self._loop.create_future(), 0.0
        self._job += 1
        since = time.perf_counter()
        messages = (ChatMessage("user", text),)
        job = Job(self._job, "aggregation", messages, Sampling(TOKENS), stream=True)
        self._engine.work(job)
        await self._done
        return self._first - since, time.perf_counter() - since

    def close(self) -> None:
        """End the model process."""
        self._loop.run_until_complete(self._engine.stop())
        self._loop.close()

    def on_ready(self, info: EngineInfo) -> None:
        """See :class:`EngineEvents`."""
        self._ready.set()

    def on_lost(self, reason: str) -> None:
        """See :class:`EngineEvents`."""
        raise SystemExit(f"the engine was lost: {reason}")

    def on_text(self, job_id: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """See :class:`EngineEvents`."""
        self._first = self._first or time.perf_counter()

    def on_done(self, job_id: int, result: WorkDone) -> None:
        """See :class:`EngineEvents`."""
        if self._done is not None:
            self._done.set_result(None)

    def on_failed(self, job_id: int, failure: WorkFailed) -> None:
        """See :class:`EngineEvents`."""
        raise SystemExit(f"the engine failed: {failure.reason}")

    def on_rates(self, rates: Rates) -> None:
        """See :class:`EngineEvents`."""


def through_api(path: Path, text: str) -> tuple[float, float]:
    """The same by the API: seconds to the first text and to the end."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    since, first = time.perf_counter(), 0.0
    with call(path, "POST", "/v1/chat/completions", body) as response:
        for line in response:
            if line.startswith(b"data: {") and not first:
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter()
    return first - since, time.perf_counter() - since


def added(place: Path, models_dir: Path, rounds: int) -> list[Row]:
    """What the API adds to the first and to each further token; prompts differ, or they would
    have been read before."""
    firsts, rests = [], []
    alone = Alone(models_dir)
    try:
        with board(place, models_dir) as there:
            for number in range(-2, rounds):
                texts = [f"{number}. {way} {PROMPT}" for way in ("So:", "Now:")]
                direct, api = alone.ask(texts[0]), through_api(there.socket, texts[1])
                if number >= 0:
                    firsts.append((api[0] - direct[0]) * 1000)
                    rests.append(((api[1] - api[0]) - (direct[1] - direct[0])) * 1000 / TOKENS)
    finally:
        alone.close()
    return [
        row("added to the first token", statistics.median(firsts), "ms", reach=8, note="aim 3"),
        row("added to each token", statistics.median(rests), "ms", reach=0.5, note="aim .2"),
    ]


def resident_kb(pid: int) -> int:
    """Memory of a process that no other shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def idle_streams(place: Path, models_dir: Path) -> Row:
    """What a client costs that listens to a stream which says nothing yet."""
    with board(place, models_dir, "model.slots=1") as there:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8000}
        ids = [
            json.loads(call(there.socket, "POST", "/v1/requests", body).read())["id"]
            for _ in range(2)
        ]
        time.sleep(1)
        pid = there.process.pid
        before = resident_kb(pid)
        streams = [
            call(
                there.socket, "GET", f"/v1/requests/{ids[1]}", None, {"Accept": "text/event-stream"}
            )
            for _ in range(CLIENTS)
        ]
        time.sleep(1)
        kb = (resident_kb(pid) - before) / CLIENTS
        for stream in streams:
            stream.close()
        for request_id in ids:
            call(there.socket, "DELETE", f"/v1/requests/{request_id}").close()
    return row(f"each of {CLIENTS} idle streams", kb, "KB", reach=100, note="aim 50")


class Taker:
    """A node that takes everything: what is measured is the desk and the journal."""

    def __init__(self) -> None:
        self.desk: Desk

    def submit(self, request: Request, *, promised: bool) -> None:
        """Accepted."""
        self.desk.tell(request.request_id, Accepted(Granted(0, 0), 0))

    def cancel(self, request_id: str) -> None:
        """Nothing runs."""

    def has_room(self) -> bool:
        """What waits goes on waiting."""
        return False


def prompt(desk: Desk) -> Prompt:
    """A prompt of about a kilobyte."""
    messages = (ChatMessage("user", KILOBYTE[:1024]),)
    request = Request(desk.new_id(), messages, 250, 0, 0, Sampling(), 600_000)
    return Prompt(request, "edgemoa", owner=str(os.getuid()), created=7, holds=False)


def with_desk(place: Path, do: Callable[[Desk], Any]) -> Any:
    """Run something with a desk of its own, on the disk."""
    taker = Taker()
    desk = taker.desk = Desk(Journal(place, 86_400, 1 << 30), taker)
    desk.open()

    async def life() -> Any:
        try:
            return await do(desk)
        finally:
            await desk.close()

    return asyncio.run(life())


def written_bytes() -> int:
    """What this process has had written to the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def accepting(place: Path) -> list[Row]:
    """How many prompts a second can be accepted, on the disk, and how much that writes."""

    async def measure(desk: Desk) -> tuple[float, float, float]:
        async def several(count: int) -> None:
            for _ in range(count):
                await desk.take(prompt(desk))

        await several(50)
        since = time.perf_counter()
        before = written_bytes()
        await several(400)
        alone = 400 / (time.perf_counter() - since)
        each = (written_bytes() - before) / 400
        since = time.perf_counter()
        await asyncio.gather(*(several(50) for _ in range(64)))
        return alone, 3_200 / (time.perf_counter() - since), each

    alone, together, each = with_desk(place, measure)
    return [
        row("accepted durably, one client at a time", alone, "/s", reach=200, least=True,
            note="aim 1000"),
        row("accepted durably, 64 at once", together, "/s", reach=2_000, least=True,
            note="aim 5000"),
        row("written to accept a prompt of 1 KB", each / 1024, "KB", reach=16, note="aim 8"),
    ]  # fmt: skip


def crowd(path: Path) -> Row:
    """The same through HTTP, tokens counted by the model process while it works."""
    body = {"messages": [{"role": "user", "content": KILOBYTE[:1024]}], "max_tokens": 1}
    took, ids = [], []
    for _ in range(20):
        since = time.perf_counter()
        response = call(path, "POST", "/v1/requests", body)
        told = json.loads(response.read())
        took.append(time.perf_counter() - since)
        if response.status != 202:
            raise SystemExit(f"a prompt was not accepted: {told}")
        ids.append(told["id"])
    for request_id in ids:
        call(path, "DELETE", f"/v1/requests/{request_id}").close()
    return row("POST /v1/requests while it works, median", statistics.median(took) * 1000, "ms")


def after_a_crash(place: Path, models_dir: Path) -> list[Row]:
    """How long until a board is ready that has a thousand accepted prompts to answer, and what it
    takes without."""
    took = {}
    for name in ("without", "with"):
        state = place / name / "state"
        state.mkdir(parents=True)
        if name == "with":

            async def fill(desk: Desk) -> None:
                for _ in range(WAITING):
                    await desk.take(prompt(desk))

            with_desk(state, fill)
        with board(place / name, models_dir, f"board.state_dir={state}") as there:
            if name == "without":
                extra = crowd(there.socket)
            else:
                waiting = call(there.socket, "GET", "/v1/requests")
                count = len(json.loads(waiting.read())["data"])
                if count < WAITING - 50:
                    raise SystemExit(f"only {count} of {WAITING} prompts wait after the start")
        since = time.perf_counter()
        with board(place / name, models_dir, f"board.state_dir={state}"):
            took[name] = time.perf_counter() - since
    note = f"aim 1; {took['without']:.2f} s with none"
    return [
        row(f"ready with {WAITING} prompts waiting", took["with"], "s", reach=3, note=note),
        extra,
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument("--rounds", type=int, default=21, help="of each figure (default: 21)")
    given = parser.parse_args()
    models_dir = Path(os.environ.get("EDGEMOA_MODELS") or default_model_dir())
    place = Path(tempfile.mkdtemp(prefix="edgemoa-"))
    try:
        ensure(MODEL, ModelLibrary(models_dir), silent)
        say("first and further tokens, beside the engine alone")
        rows = added(place / "added", models_dir, given.rounds)
        say(f"{CLIENTS} idle streams")
        rows.append(idle_streams(place / "idle", models_dir))
        say("accepting")
        rows += accepting(place / "accepting")
        say(f"a start with {WAITING} prompts waiting")
        rows += after_a_crash(place / "crash", models_dir)
    except EdgemoaError as error:
        print(f"bench-api: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return tell(rows, given, [])


if __name__ == "__main__":
    sys.exit(main())
