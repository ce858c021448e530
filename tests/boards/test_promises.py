"""A promise is kept: real daemons, killed at any instant, with the real model."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgemoa.demo import LocalBoard, start_board, stop, wait_until_ready

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgemoa-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def running(place: Path, models_dir: Path, *flags: str) -> Iterator[LocalBoard]:
    """A board that keeps its state in ``place`` over its lives."""
    board = start_board(
        place,
        f"board.models_dir={models_dir}",
        f"model.name={MODEL}",
        "net.mdns=false",
        "model.threads=2",
        *flags,
    )
    try:
        wait_until_ready([board])
        yield board
    finally:
        stop([board])


def call(
    board: LocalBoard, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(board.socket))
        data = None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, named)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}")


def text_at(board: LocalBoard, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(board.socket))
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def asked(text: str, tokens: int = 24) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": 1}


def kill(board: LocalBoard) -> None:
    board.process.send_signal(signal.SIGKILL)
    board.process.wait(10)


def test_killed_and_started_again_it_answers_what_it_had_accepted(
    place: Path, models_dir: Path
) -> None:
    ids = []
    with running(place, models_dir) as board:
        for n in range(6):
            status, ticket = call(board, "POST", "/v1/requests", asked(f"Name {n + 1} colours."))
            assert status == 202
            assert ticket["state"] in ("waiting", "working")
            ids.append(ticket["id"])
        status, first = call(board, "GET", f"/v1/requests/{ids[0]}?wait=60")
        assert (status, first["state"]) == (200, "answered")
        kill(board)
    with running(place, models_dir) as board:
        for request_id in ids:
            status, ticket = call(board, "GET", f"/v1/requests/{request_id}?wait=60")
            assert (status, ticket["state"]) == (200, "answered")
            assert ticket["response"]["choices"][0]["message"]["content"]
        again = call(board, "GET", f"/v1/requests/{ids[0]}")[1]
        assert again["response"] == first["response"], "answered once"
        assert call(board, "GET", "/v1/requests") == (200, {"object": "list", "data": []})
        assert board.client.get("/v1/status")["counters"]["accepted"] == 5
        assert text_at(board, "/readyz") == (200, "ok\n")
        status, metrics = text_at(board, "/metrics")
        assert status == 200
        families = {family.name: family for family in text_string_to_metric_families(metrics)}
        assert families["edgemoa_answered"].samples[0].value == 5


def test_a_key_finds_its_answer_again(place: Path, models_dir: Path) -> None:
    with running(place, models_dir) as board:
        ask = asked("Name a colour.", 400)
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(board.socket))
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({**ask, "stream": True}).encode(),
            {"Idempotency-Key": "k1"},
        )  # fmt: skip
        response = connection.getresponse()
        assert response.status == 200
        chunk = json.loads(response.readline().removeprefix(b"data: "))
        connection.close()  # it breaks in the middle
        response.close()
        status, answer = call(board, "POST", "/v1/chat/completions", ask, Idempotency_Key="k1")
        assert status == 200
        assert answer["id"] == chunk["id"]
        status, error = call(
            board, "POST", "/v1/chat/completions", asked("Else?"), Idempotency_Key="k1"
        )
        assert (status, error["error"]["code"]) == (409, "conflict")
        kill(board)
    with running(place, models_dir) as board:
        again = call(board, "POST", "/v1/chat/completions", ask, Idempotency_Key="k1")
        assert again == (200, answer)
        events = list(_events(board, answer["id"]))
        assert events[-1] == "[DONE]"
        text = "".join(
            choice["delta"].get("content", "")
            for event in events[:-1]
            for choice in json.loads(event)["choices"]
        )
        assert text == answer["choices"][0]["message"]["content"]
        assert call(board, "DELETE", f"/v1/requests/{answer['id']}")[0] == 200
        assert call(board, "GET", f"/v1/requests/{answer['id']}")[0] == 404


def _events(board: LocalBoard, request_id: str) -> Iterator[str]:
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(board.socket))
        connection.request(
            "GET", f"/v1/requests/{request_id}", headers={"Accept": "text/event-stream"}
        )
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "text/event-stream"
        for line in response:
            if line.startswith(b"data: "):
                yield line[6:].decode().strip()


def test_a_prompt_can_be_taken_back(place: Path, models_dir: Path) -> None:
    with running(place, models_dir) as board:
        _, ticket = call(board, "POST", "/v1/requests", asked("Tell a long story.", 4000))
        assert call(board, "DELETE", f"/v1/requests/{ticket['id']}")[0] == 200
        until = time.monotonic() + 10
        while call(board, "GET", f"/v1/requests/{ticket['id']}")[0] != 404:
            assert time.monotonic() < until
            time.sleep(0.02)
        while board.client.get("/v1/status")["running"]:
            assert time.monotonic() < until, "it goes on working for nobody"
            time.sleep(0.02)


def test_a_board_that_is_told_to_stop_finishes_later(place: Path, models_dir: Path) -> None:
    """Systemd does not wait for ever; what is not done by then is done after the next start."""
    with running(place, models_dir, "model.slots=1") as board:
        ids = [
            call(board, "POST", "/v1/requests", asked("Tell a long story.", 60))[1]["id"]
            for _ in range(2)
        ]
        for _ in range(2):  # told twice: at once
            board.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        board.process.wait(10)
    with running(place, models_dir) as board:
        for request_id in ids:
            status, ticket = call(board, "GET", f"/v1/requests/{request_id}?wait=60")
            assert (status, ticket["state"]) == (200, "answered")
