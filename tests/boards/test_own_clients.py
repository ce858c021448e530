"""``edgemoa.Client`` and ``edgemoa.AsyncClient`` against a real daemon with the real model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_promises import kill, running

from edgemoa import Answer, AsyncClient, Client
from edgemoa.demo import LocalBoard
from edgemoa.errors import (
    DaemonUnreachableError,
    InvalidPromptError,
    ModelNotFoundError,
    NotFoundError,
    UserError,
)

PROMPT = "Name three colours."


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[LocalBoard]:
    with running(tmp_path_factory.mktemp("b"), models_dir) as board:
        yield board


def test_ask_stream_and_fetch_say_the_same(board: LocalBoard) -> None:
    client = Client(board.socket)
    answer = client.ask(PROMPT, max_tokens=12)
    assert str(answer) == answer.text
    assert answer.text
    assert (answer.finish, answer.tokens) == ("length", 12)
    assert answer.prompt_tokens > 5
    assert answer.trace["granted"]["layers"] == 0

    with client.stream(PROMPT, max_tokens=12) as stream:
        assert stream.answer is None
        pieces = list(stream)
    assert len(pieces) > 1
    streamed = stream.answer
    assert streamed is not None
    assert "".join(pieces) == streamed.text == answer.text
    assert (streamed.finish, streamed.tokens) == ("length", 12)
    assert streamed.prompt_tokens == answer.prompt_tokens

    request_id = client.submit(PROMPT, key="mine", max_tokens=12)
    assert client.submit(PROMPT, key="mine", max_tokens=12) == request_id
    kept = client.result(request_id, wait_s=60)
    assert kept is not None
    assert kept.text == answer.text
    client.cancel(request_id)
    with pytest.raises(NotFoundError):
        client.result(request_id)


def test_turns_schema_and_model(board: LocalBoard) -> None:
    client = Client(str(board.socket))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    name = str(client.status()["model"])
    assert client.ask(turns, model=name, plan="alone", max_tokens=4, seed=1, strict=True).text
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert client.ask("A number?", schema=schema, max_tokens=40).text.startswith("{")
    assert client.devices()["devices"] == []


def test_what_is_wrong_is_said_as_the_daemon_says_it(board: LocalBoard, tmp_path: Path) -> None:
    client = Client(board.socket)
    with pytest.raises(ModelNotFoundError):
        client.ask(PROMPT, model="nobody")
    with pytest.raises(InvalidPromptError):
        client.ask("")
    with pytest.raises(UserError, match="is no plan"):
        client.ask(PROMPT, plan="M2")
    with pytest.raises(DaemonUnreachableError, match="no edgemoa daemon"):
        Client(tmp_path / "none").ask(PROMPT)


def test_a_stream_that_is_left_takes_its_prompt_back(board: LocalBoard) -> None:
    client = Client(board.socket)
    before = client.status()["counters"]["cancelled"]
    with client.stream("Tell me a long story.", max_tokens=2_000) as stream:
        next(iter(stream))
    for _ in range(100):
        status = client.status()
        if status["running"] == 0 and status["counters"]["cancelled"] == before + 1:
            return
        threading.Event().wait(0.05)
    pytest.fail("the prompt still runs")


def test_the_same_with_asyncio(board: LocalBoard, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncClient(board.socket) as client:
            both = await asyncio.gather(
                client.ask(PROMPT, max_tokens=12), client.ask(PROMPT, max_tokens=12)
            )
            assert both[0].text == both[1].text
            async with client.stream(PROMPT, max_tokens=12) as stream:
                pieces = [piece async for piece in stream]
            assert stream.answer is not None
            assert "".join(pieces) == stream.answer.text == both[0].text
            request_id = await client.submit(PROMPT, max_tokens=3)
            assert isinstance(await client.result(request_id, wait_s=60), Answer)
            await client.cancel(request_id)
            with pytest.raises(NotFoundError):
                await client.result(request_id)
            assert (await client.status())["ready"]
            assert "devices" in await client.devices()
            with pytest.raises(ModelNotFoundError):
                await client.ask(PROMPT, model="nobody")
            before = (await client.status())["counters"]["cancelled"]
            async with client.stream("A long story.", max_tokens=2_000) as stream:
                async for _ in stream:
                    break
            for _ in range(100):
                if (await client.status())["counters"]["cancelled"] > before:
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("an answer that nobody reads was not cancelled")
        async with AsyncClient(tmp_path / "none") as client:
            with pytest.raises(DaemonUnreachableError, match="no edgemoa daemon"):
                await client.ask(PROMPT)

    asyncio.run(main())


def test_an_accepted_prompt_outlives_the_daemon(tmp_path: Path, models_dir: Path) -> None:
    answers: list[Answer] = []

    def ask(client: Client) -> None:
        answers.append(client.ask("Tell me about rain.", max_tokens=150))

    async def ask_async(path: Path) -> None:
        async with AsyncClient(path) as client:
            answers.append(await client.ask("Tell me about snow.", max_tokens=150))

    with running(tmp_path, models_dir) as board:
        asking = [
            threading.Thread(target=ask, args=(Client(board.socket),)),
            threading.Thread(target=asyncio.run, args=(ask_async(board.socket),)),
        ]
        for each in asking:
            each.start()
        while board.client.get("/v1/status")["running"] == 0:
            threading.Event().wait(0.01)
        threading.Event().wait(0.1)
        kill(board)
    assert not answers
    with running(tmp_path, models_dir):
        for each in asking:
            each.join(60)
    assert len(answers) == 2
    assert all(answer.tokens == 150 or answer.finish == "stop" for answer in answers)


def test_importing_edgemoa_imports_no_client() -> None:
    code = "import sys, edgemoa; print([m for m in sys.modules if 'edgemoa.' in m or 'http' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
