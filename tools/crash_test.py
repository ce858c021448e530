"""Proves that an accepted prompt is a promise: a real daemon with the real model is killed
(SIGKILL) at random instants while clients leave prompts, ask with keys, and take some back; after
each second kill the end of its journal is torn as well, as by a power cut in the middle of a write
that nobody had been told of. In the end every prompt that was acknowledged has to have its answer,
and no key a second one.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import Row, row, say, tell  # noqa: E402

from edgemoa.demo import LocalBoard, start_board, stop, wait_until_ready  # noqa: E402
from edgemoa.errors import EdgemoaError  # noqa: E402
from edgemoa.journal import FILE_NAME  # noqa: E402
from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402

MODEL: Final = "smollm2-135m-instruct"
CLIENTS: Final = 6
MOST_ALIVE_S: Final = 1.5
_BROKEN: Final = (OSError, http.client.HTTPException, ValueError)


@dataclass
class Books:
    """What the clients were told. A key's answer is set once, or it was answered twice."""

    accepted: dict[str, str] = field(default_factory=dict)  # id by key, as acknowledged
    answers: dict[str, str] = field(default_factory=dict)  # text by key
    taken_back: set[str] = field(default_factory=set)  # keys; both ends are right then
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def acknowledged(self, key: str, request_id: str) -> None:
        with self.lock:
            before = self.accepted.setdefault(key, request_id)
            if before != request_id:
                self.wrong.append(f"{key} was {before} and is {request_id}")

    def answered(self, key: str, text: str) -> None:
        with self.lock:
            before = self.answers.setdefault(key, text)
            if before != text:
                self.wrong.append(f"{key} was answered twice")


def call(
    path: Path, method: str, where: str, body: Any = None, key: str = ""
) -> tuple[int, dict[str, Any]]:
    """One request. :raises OSError, HTTPException, ValueError: the board went away."""
    connection = http.client.HTTPConnection("localhost", timeout=90)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(path))
        headers = {"Idempotency-Key": key} if key else {}
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, where, data, headers)
        response = connection.getresponse()
        told = json.loads(response.read() or b"{}")
        return response.status, told


class Client(threading.Thread):
    """Leaves prompts and asks with keys, one after the other, until told to stop."""

    def __init__(self, number: int, path: Path, books: Books, seed: int) -> None:
        super().__init__(daemon=True)
        self._number = number
        self._path = path
        self._books = books
        self._rng = random.Random(seed)
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        asked = 0
        while not self._stopping.is_set():
            key = f"{self._number}-{asked}-{self._rng.getrandbits(32):08x}"
            asked += 1
            try:
                self._ask(key)
            except _BROKEN:
                time.sleep(0.02)  # killed; the next life answers

    def _ask(self, key: str) -> None:
        body = {
            "messages": [{"role": "user", "content": f"Say {key}."}],
            "max_tokens": self._rng.choice((1, 2, 8)),
            "edgemoa": {"layers": 0},
        }
        if self._rng.random() < 0.3:  # holds the line; the key keeps it when the line breaks
            status, told = call(self._path, "POST", "/v1/chat/completions", body, key)
            if status == 200:
                self._books.acknowledged(key, told["id"])
                self._books.answered(key, told["choices"][0]["message"]["content"])
            else:
                self._refused()
            return
        status, told = call(self._path, "POST", "/v1/requests", body, key)
        if status != 202:
            self._refused()
            return
        self._books.acknowledged(key, told["id"])
        where = f"/v1/requests/{told['id']}"
        dice = self._rng.random()
        if dice < 0.1:
            with self._books.lock:
                self._books.taken_back.add(key)
            call(self._path, "DELETE", where)
        elif dice < 0.3:
            again = call(self._path, "POST", "/v1/requests", body, key)[1]
            self._books.acknowledged(key, again["id"])
        elif dice < 0.7:
            self._take(key, call(self._path, "GET", f"{where}?wait=5")[1])

    def _take(self, key: str, ticket: dict[str, Any]) -> None:
        if ticket.get("state") == "answered":
            text = ticket["response"]["choices"][0]["message"]["content"]
            self._books.answered(key, text)

    def _refused(self) -> None:
        with self._books.lock:
            self._books.refused += 1
        time.sleep(0.05)


def tear(journal: Path, rng: random.Random) -> None:
    """What a write that was under way may have left: the beginning of a page, or rubbish."""
    log = journal.with_name(f"{journal.name}-wal")
    if not log.exists() or log.stat().st_size < 4096:
        return
    data = log.read_bytes()
    size = rng.randrange(1, 4000)
    torn = rng.choice((rng.randbytes(size), bytes(size), data[-size:], data[32 : 32 + size]))
    with log.open("ab") as stream:
        stream.write(torn)


def collect(board: LocalBoard, books: Books) -> int:
    """Fetch every answer that is owed; returns how many acknowledged prompts have none."""
    lost = 0
    for key, request_id in books.accepted.items():
        status, ticket = call(board.socket, "GET", f"/v1/requests/{request_id}?wait=60")
        if key in books.taken_back and status == 404:
            continue
        if status != 200 or ticket["state"] != "answered":
            books.wrong.append(f"{key}: {status} {ticket.get('state')} {ticket.get('error')}")
            lost += 1
            continue
        books.answered(key, ticket["response"]["choices"][0]["message"]["content"])
    return lost


def prove(place: Path, models_dir: Path, kills: int, seed: int) -> list[Row]:
    """Live and die ``kills`` times."""
    rng = random.Random(seed)
    books = Books()
    flags = (
        f"board.models_dir={models_dir}",
        f"model.name={MODEL}",
        "net.mdns=false",
        "api.keep_answers_mb=1024",
        "queue.own_requests=256",
        "moa.deadline_s=600",
    )
    torn, ready_s = 0, []
    for life in range(kills + 1):
        since = time.monotonic()
        board = start_board(place, *flags)
        try:
            wait_until_ready([board])
            ready_s.append(time.monotonic() - since)
            if life == kills:
                say(f"collecting {len(books.accepted)} answers")
                lost = collect(board, books)
                break
            clients = [Client(n, board.socket, books, rng.getrandbits(32)) for n in range(CLIENTS)]
            for client in clients:
                client.start()
            time.sleep(rng.uniform(0, MOST_ALIVE_S))
            board.process.send_signal(signal.SIGKILL)
            board.process.wait()
            for client in clients:
                client.stop()
            for client in clients:
                client.join()
        finally:
            stop([board])
        if life % 2:
            torn += 1
            for journal in place.rglob(FILE_NAME):
                tear(journal, rng)
        if life % 10 == 9:
            say(f"{life + 1} of {kills} kills; {len(books.accepted)} prompts acknowledged")
    twice = sum("twice" in w or " was " in w for w in books.wrong)
    for wrong in books.wrong[:20]:
        say(wrong)
    return [
        row("kills", kills, note=f"{torn} with the journal's last write torn"),
        row("acknowledged prompts", len(books.accepted), note=f"{books.refused} refused"),
        row("acknowledged prompts lost", lost, reach=0),
        row("keys answered twice", twice, reach=0),
        row("start to ready, median", sorted(ready_s)[len(ready_s) // 2], "s"),
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument("--kills", type=int, default=300, help="how often (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (default: 1)")
    given = parser.parse_args()
    models_dir = Path(os.environ.get("EDGEMOA_MODELS") or default_model_dir())
    place = Path(tempfile.mkdtemp(prefix="edgemoa-"))
    try:
        ensure(MODEL, ModelLibrary(models_dir), silent)
        rows = prove(place, models_dir, given.kills, given.seed)
    except EdgemoaError as error:
        print(f"crash-test: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return tell(rows, given, [])


if __name__ == "__main__":
    sys.exit(main())
