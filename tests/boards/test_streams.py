"""Answers that another board writes, shown while it writes them: real daemons, the real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_boards import MODEL, ask, until

from edgemoa.demo import LocalBoard, group, wait_until_ready
from edgemoa.errors import BoardError

STORY = "Tell a long story about a lighthouse and the sea."


@pytest.fixture(scope="module")
def boards(models_dir: Path) -> Iterator[list[LocalBoard]]:
    """Two boards, of which the first knows that it is the slower one."""
    flags = ("moa.aggregator=strongest", "moa.proposal_max_tokens=160", "queue.own_proposal=always")
    with group(2, MODEL, models_dir, *flags) as started:
        wait_until_ready(started)
        engine = started[0].client.get("/v1/status")["engine"]["pid"]
        writing = threading.Thread(target=lambda: ask(started[0], layers=0, max_tokens=12))
        writing.start()
        until(lambda: started[0].client.get("/v1/status")["running"] == 1)
        os.kill(engine, signal.SIGSTOP)
        try:
            ask(started[1], layers=0, max_tokens=12)
            time.sleep(3)
        finally:
            os.kill(engine, signal.SIGCONT)
        writing.join(60)
        time.sleep(1.5)  # until the other one's report has come
        yield started


def chunks(board: LocalBoard, seen: list[dict[str, Any]], tokens: int) -> None:
    body = {
        "messages": [{"role": "user", "content": STORY}],
        "max_tokens": tokens,
        "temperature": 0,
        "edgemoa": {"events": True, "proposers": 1},
    }
    for chunk in board.client.chat(body):
        event = chunk.get("edgemoa") or {}
        text = "".join(c["delta"].get("content", "") for c in chunk["choices"])
        seen.append({"type": "text", "text": text} if text else event)


def texts(seen: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in seen if event.get("type") == "text"]


def test_an_answer_from_another_board_is_shown_as_it_is_written(boards: list[LocalBoard]) -> None:
    seen: list[dict[str, Any]] = []
    chunks(boards[0], seen, 200)
    (aggregating,) = (event for event in seen if event.get("type") == "aggregating")
    assert aggregating["board"] == "board-2"
    answered = seen[-1]
    assert answered["text"] == "".join(texts(seen))
    assert not answered["note"]
    assert len(texts(seen)) >= 4  # ten a second; all at once without


def test_a_board_lost_while_its_answer_is_shown_ends_it(boards: list[LocalBoard]) -> None:
    seen: list[dict[str, Any]] = []
    failed: list[BaseException] = []

    def follow() -> None:
        try:
            chunks(boards[0], seen, 500)
        except BoardError as error:
            failed.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: len(texts(seen)) >= 2)
    boards[1].process.send_signal(signal.SIGKILL)
    thread.join(30)
    (error,) = failed
    assert "board-2" in str(error)
    assert not any(event.get("type") == "answered" for event in seen)
    assert ask(boards[0], layers=0, max_tokens=4)["text"]  # by itself, as before


def rss_mb(board: LocalBoard) -> float:
    text = Path(f"/proc/{board.process.pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_a_client_that_never_reads_keeps_no_slot(
    boards: list[LocalBoard],
) -> None:
    board = boards[0]
    body = {
        "model": "edgemoa", "messages": [{"role": "user", "content": STORY}], "stream": True,
        "max_tokens": 2_000, "logprobs": True, "top_logprobs": 20,
        "edgemoa": {"layers": 0, "deadline_ms": 3_000},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    before_mb = rss_mb(board)
    with socket.socket(socket.AF_UNIX) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(str(board.socket))
        client.sendall(head.encode() + data)
        until(lambda: board.client.get("/v1/status")["running"] == 1)
        until(lambda: board.client.get("/v1/status")["prompts"] == 0, 6)
        assert board.client.get("/v1/status")["running"] == 0
        assert rss_mb(board) < before_mb + 20  # some 300 tokens with 20 alternatives each
        assert ask(board, layers=0, max_tokens=4)["text"]
