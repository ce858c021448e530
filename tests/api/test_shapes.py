"""The API's shapes beside the plain chat completion, over a real socket in front of a scripted
board."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import test_server
from test_server import CARD, RECORD, ScriptedBoard, answered, body

from edgemoa.api import answers, embeddings, ollama, prompts
from edgemoa.api.answers import Events
from edgemoa.api.completions import CompletionRequest, logprobs
from edgemoa.api.embeddings import EmbeddingRequest
from edgemoa.api.openai import ChatRequest
from edgemoa.api.service import Vector
from edgemoa.core import limits
from edgemoa.core.events import (
    Accepted,
    Answered,
    Failed,
    Granted,
    ProposalArrived,
    RequestEvent,
    Text,
    TokenLogprob,
    ToolCall,
    Tools,
    Wishes,
)
from edgemoa.core.messages import ChatMessage
from edgemoa.desk import Prompt
from edgemoa.engine.guidance import check_schema

path = test_server.path  # the fixture
CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


class Board(ScriptedBoard):
    """Has its own ids, takes only so many prompts, and notes what is taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[Prompt] = []
        self.most = 100
        self.forgotten: list[str] = []
        self.left = 0
        self.embed_s = 0.0

    def new_request_id(self) -> str:
        self.ids = getattr(self, "ids", 0) + 1
        return f"chatcmpl-{self.ids}"

    async def take(self, prompt: Prompt) -> str | Failed:
        if len(self.asked) >= self.most:
            return Failed("overloaded", "full", 1_000)
        self.prompts.append(prompt)
        return await super().take(prompt)

    async def forget(self, request_id: str, owner: str) -> bool:
        self.forgotten.append(request_id)
        return True

    async def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        try:
            async with contextlib.aclosing(super().follow(request_id, owner)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Text):
                        yield Text(f"{request_id[-1]}{event.text}", event.logprobs)
                    else:
                        yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        await asyncio.sleep(self.embed_s)
        return await super().embed(texts)


@pytest.fixture
def board() -> Board:
    return Board()


def call(
    path: Path, method: str, target: str, data: Any = None, **headers: str
) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection.sock):
        connection.sock.connect(os.fspath(path))
        raw = data if isinstance(data, bytes | None) else json.dumps(data).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, raw, named)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def post(path: Path, target: str, data: Any, **headers: str) -> tuple[int, Any]:
    status, told, _ = call(path, "POST", target, data, **headers)
    return status, json.loads(told)


def lines(told: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.splitlines()]


def ask(target: str, **more: Any) -> dict[str, Any]:
    if target == "/api/chat":
        return {"model": "edgemoa", "messages": [{"role": "user", "content": "Why?"}], **more}
    return {"model": "edgemoa", "prompt": "Why?", **more}


# --- several answers


def test_each_of_several_answers_has_its_own_seed(path: Path, board: Board) -> None:
    status, told = post(path, CHAT, body(n=3, seed=2**31 - 2, temperature=1))
    assert status == 200
    assert [r.sampling.seed for r in board.asked] == [2**31 - 2, 2**31 - 1, 0]
    assert len({r.request_id for r in board.asked}) == 3
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert told["usage"]["prompt_tokens"] == 10
    assert told["usage"]["completion_tokens"] == 12
    assert [trace["type"] for trace in told["edgemoa"]] == ["answered"] * 3


def test_they_are_streamed_side_by_side(path: Path, board: Board) -> None:
    board.script[1:1] = [0.02]
    _, told, _ = call(
        path, "POST", CHAT, body(n=3, stream=True, stream_options={"include_usage": True})
    )
    chunks = [json.loads(e[6:]) for e in told.decode().split("\n\n") if e.startswith("data: {")]
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "1Bec1ause.", 1: "2Bec2ause.", 2: "3Bec3ause."}
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert len(chunks[-1]["edgemoa"]) == 3
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert told.endswith(b"data: [DONE]\n\n")


def test_none_is_begun_where_not_all_can_be(path: Path, board: Board) -> None:
    board.most = 2
    assert post(path, CHAT, body(n=3))[0] == 429
    assert board.forgotten == [request.request_id for request in board.asked]
    assert len(board.forgotten) == 2


def test_one_that_fails_ends_the_others(path: Path, board: Board) -> None:
    board.script[1:] = [Failed("engine_failed", "broken")]
    assert post(path, CHAT, body(n=2))[0] == 503


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_leaves_them_all(path: Path, board: Board, stream: bool) -> None:
    board.script[1:] = [30.0]
    raw = json.dumps(body(n=3, stream=stream)).encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        sock.sendall(head.encode() + raw)
        until = time.monotonic() + 5
        while len(board.asked) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.1)
    while board.left < 3:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_key_names_all_of_them(path: Path, board: Board) -> None:
    post(path, CHAT, body(n=3), Idempotency_Key="mine")
    post(path, CHAT, body(), Idempotency_Key="mine")
    post(path, TEXT, {"prompt": ["Why?", "How?"]}, Idempotency_Key="mine")
    keys = [prompt.key for prompt in board.prompts]
    assert keys == ["mine", "mine\n1", "mine\n2", "mine", "mine", "mine\n1"]
    digests = [prompt.digest for prompt in board.prompts]
    assert len(set(digests[:3])) == 1
    assert len({digests[0], digests[3], digests[4]}) == 3
    assert post(path, CHAT, body(), Idempotency_Key="mi\tne")[0] == 400


def test_one_that_was_taken_back_meanwhile_says_so() -> None:
    async def nothing() -> AsyncIterator[RequestEvent]:
        return
        yield

    async def scenario() -> None:
        events = Events(nothing())
        index, event = await events.next()
        assert index == 0
        assert isinstance(event, Failed)
        await events.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("extra", "whole", "streamed"), [({}, True, False), ({"trace": True}, True, True),
     ({"trace": False}, False, False)],
)  # fmt: skip
def test_the_trace_on_request(
    path: Path, extra: dict[str, Any], whole: bool, streamed: bool
) -> None:
    for target, asked in ((CHAT, body(edgemoa=extra)), (TEXT, {"prompt": "W", "edgemoa": extra})):
        assert ("edgemoa" in post(path, target, asked)[1]) == whole
        told = call(path, "POST", target, {**asked, "stream": True})[1]
        assert (b'"edgemoa":' in told) == streamed
    asked = ask("/api/chat", edgemoa=extra)
    assert ("edgemoa" in lines(call(path, "POST", "/api/chat", asked)[1])[-1]) == streamed


# --- texts


def test_texts_are_prompts_like_others(path: Path, board: Board) -> None:
    status, told = post(
        path, TEXT, {"prompt": ["Why?", "How?"], "n": 2, "max_tokens": 5, "best_of": 2, "top_k": 3}
    )
    assert status == 200
    assert [r.messages for r in board.asked] == [
        (ChatMessage("user", text),) for text in ("Why?", "Why?", "How?", "How?")
    ]
    assert {(r.sampling.max_tokens, r.sampling.top_k) for r in board.asked} == {(5, 3)}
    assert [choice["text"] for choice in told["choices"]] == ["Because."] * 4
    assert told["usage"]["prompt_tokens"] == 20
    assert told["usage"]["completion_tokens"] == 16


def test_a_text_is_streamed(path: Path, board: Board) -> None:
    tokens = (TokenLogprob(b"Bec", -0.5, ((b"Bec", -0.5), (b"\xf0", -1.5))),)
    board.script[2:4] = [Text("Bec", tokens), Text("ause.", tokens)]
    _, told, _ = call(path, "POST", TEXT, {"prompt": "Why?", "stream": True, "logprobs": 1})
    events = told.decode().split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["text"] for choice in choices] == ["1Bec", "1ause.", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert [choice["logprobs"]["text_offset"] for choice in choices[:2]] == [[0], [4]]
    assert choices[0]["logprobs"]["top_logprobs"] == [{"Bec": -0.5, "bytes:\\xf0": -1.5}]
    assert all(chunk["object"] == "text_completion" for chunk in chunks)


def test_where_tokens_stand_in_a_text() -> None:
    told = logprobs([TokenLogprob(t, -1.0) for t in (b"a", b"\xf0\x9f", b"\x97\xbc", b"bc", b"d")])
    assert told.tokens == ["a", "bytes:\\xf0\\x9f", "bytes:\\x97\\xbc", "bc", "d"]
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)
    assert len(told.text_offset) == 5


def test_the_boards_own_model_goes_on_with_a_text_as_it_stands(path: Path, board: Board) -> None:
    assert post(path, TEXT, {"model": "tiny", "prompt": [" Once", "\n"], "n": 2})[0] == 200
    asked = ask("", model="tiny:latest", raw=True, stream=False)
    assert post(path, "/api/generate", asked)[0] == 200
    assert post(path, "/api/generate", ask("", raw=True, stream=False))[0] == 200  # of the group
    assert {request.wishes.given for request in board.asked} == {"text"}
    assert {(request.layers, request.proposers) for request in board.asked} == {(0, 0)}
    texts = [request.messages[0].content for request in board.asked]
    assert texts == [" Once", " Once", "\n", "\n", "Why?", "Why?"]
    assert post(path, TEXT, {"model": "tiny", "prompt": "x", "edgemoa": {"layers": 1}})[0] == 200
    assert post(path, TEXT, {"model": "tiny", "prompt": ""})[0] == 400


# --- tools

NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
SUM = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"of": {"$ref": "#/$defs/numbers"}, "$ref": {"type": "string"}},
            "$defs": {"numbers": {"type": "array", "items": {"type": "integer"}}},
        },
    },
}
CALLS = (ToolCall("sum", '{"of": [1, 2]}'), ToolCall("now", "{}"))


def called(board: Board, text: str = "") -> None:
    board.calls_tools, board.room = True, 2_000
    end = msgspec.structs.replace(answered(text), calls=CALLS)
    board.script = [Accepted(Granted(0, 0), 0), *([Text(text)] if text else []), end]


def test_tools_and_their_results_are_given_to_the_template(path: Path, board: Board) -> None:
    called(board)
    call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1]}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    asked = body(messages=messages, tools=[NOW, SUM], parallel_tool_calls=False)
    assert post(path, CHAT, asked)[0] == 200
    (request,) = board.asked
    assert request.wishes == Wishes(given="template", tools=Tools(("now", "sum"), parallel=False))
    assert (request.layers, request.proposers) == (0, 0)
    (message,) = request.messages
    shown = {"name": "sum", "arguments": {"of": [1]}}
    assert json.loads(message.content) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c1", "type": "function", "function": shown}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "sum"},
        ],
        "tools": [NOW, SUM],
    }


def test_calls_in_openais_shape(path: Path, board: Board) -> None:
    called(board, "See.")
    _, whole = post(path, CHAT, body(tools=[NOW, SUM]))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "See."
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "sum", "arguments": '{"of": [1, 2]}'}
    assert (second["type"], second["function"]["name"]) == ("function", "now")
    assert first["id"] != second["id"]
    _, told, _ = call(path, "POST", CHAT, body(tools=[NOW, SUM], stream=True))
    chunks = [json.loads(e[6:]) for e in told.decode().split("\n\n") if e.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert [each["index"] for each in calls] == [0, 1]
    assert [each["function"]["arguments"] for each in calls] == ['{"of": [1, 2]}', "{}"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    called(board)
    assert post(path, CHAT, body(tools=[NOW]))[1]["choices"][0]["message"]["content"] is None


def test_calls_in_ollamas_shape(path: Path, board: Board) -> None:
    called(board, "See.")
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]},
        {"role": "tool", "tool_name": "now", "content": "noon"},
    ]
    asked = {"model": "tiny", "messages": turns, "tools": [NOW, SUM]}
    told = lines(call(path, "POST", "/api/chat", asked)[1])
    assert [line["message"]["content"] for line in told] == ["1See.", "", ""]
    calls = told[1]["message"]["tool_calls"]
    assert calls[0] == {"function": {"name": "sum", "arguments": {"of": [1, 2]}}}
    assert (told[1]["done"], told[2]["done"], told[2]["done_reason"]) == (False, True, "stop")
    _, whole = post(path, "/api/chat", asked | {"stream": False})
    assert whole["message"]["tool_calls"] == calls
    last = json.loads(board.asked[0].messages[0].content)["messages"][-1]
    assert last == {"role": "tool", "content": "noon", "tool_call_id": "", "name": "now"}


@pytest.mark.parametrize(
    ("choice", "names", "forced"),
    [
        ("auto", ("now", "sum"), False),
        ("required", ("now", "sum"), True),
        ({"type": "function", "function": {"name": "sum"}}, ("sum",), True),
        ("none", None, False),
    ],
)
def test_which_tools_are_called(
    path: Path, board: Board, choice: Any, names: tuple[str, ...] | None, forced: bool
) -> None:
    called(board)
    assert post(path, CHAT, body(tools=[NOW, SUM], tool_choice=choice))[0] == 200
    wishes = board.asked[0].wishes
    assert wishes.tools == (None if names is None else Tools(names, forced))
    assert wishes.given == ("turns" if names is None else "template")
    assert bool(wishes.schema) == forced == bool(board.schemas)
    if forced:
        check_schema(wishes.schema)
        schema = json.loads(wishes.schema)
        moved = schema["$defs"][str(len(names or ()) - 1)]["properties"]
        assert moved["of"] == {"$ref": f"#/$defs/{len(names or ()) - 1}/$defs/numbers"}
        assert moved["$ref"] == {"type": "string"}


# --- vectors


def test_vectors_in_both_encodings(path: Path, board: Board) -> None:
    for form, make in (
        (None, tuple),
        ("float", tuple),
        ("base64", lambda e: struct.unpack("<3f", base64.b64decode(e))),
    ):
        asked = {"model": "tiny", "input": ["ab", "c"], "encoding_format": form, "dimensions": 3}
        status, told = post(path, VECTORS, asked)
        assert status == 200
        assert [make(each["embedding"]) for each in told["data"]] == [(2, 0.5, -1), (1, 0.5, -1)]
        assert [each["index"] for each in told["data"]] == [0, 1]
        assert told["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert told["model"] == "tiny"
    assert post(path, VECTORS, {"input": "abc"})[1]["data"][0]["embedding"] == [3, 0.5, -1]


def test_many_texts_are_embedded_a_few_at_a_time(path: Path, board: Board) -> None:
    large = "x" * 100_000
    texts = ["a"] * (limits.MAX_EMBEDDED + 1) + [large] * 4
    assert len(post(path, VECTORS, {"input": texts})[1]["data"]) == len(texts)
    assert [len(batch) for batch in board.embedded] == [limits.MAX_EMBEDDED, 3, 2]
    assert [text for batch in board.embedded for text in batch] == texts
    assert all(sum(map(len, b)) <= limits.MAX_PROMPT_BYTES for b in board.embedded)


def test_few_ask_for_vectors_at_a_time(path: Path, board: Board) -> None:
    board.embed_s = 0.4
    told: list[int] = []
    asking = [
        threading.Thread(target=lambda: told.append(post(path, VECTORS, {"input": "a"})[0]))
        for _ in range(prompts.MAX_EMBEDDING + 2)
    ]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert sorted(told) == [200] * prompts.MAX_EMBEDDING + [429] * 2
    assert post(path, VECTORS, {"input": "a"})[0] == 200


# --- Ollama's shapes


@pytest.mark.parametrize("target", ["/api/chat", "/api/generate"])
def test_ollamas_answers(path: Path, board: Board, target: str) -> None:
    status, told, headers = call(path, "POST", target, ask(target))
    assert status == 200
    assert headers["Content-Type"] == "application/x-ndjson"
    said = lines(told)

    def text(line: dict[str, Any]) -> str:
        written: str = line["message"]["content"] if "chat" in target else line["response"]
        return written

    assert [text(line) for line in said] == ["1Bec", "1ause.", ""]
    assert [line["done"] for line in said] == [False, False, True]
    assert said[-1]["done_reason"] == "stop"
    assert (said[-1]["total_duration"], said[-1]["eval_duration"]) == (3_000_000, 2_000_000)
    assert (said[-1]["prompt_eval_count"], said[-1]["eval_count"]) == (10, 4)
    status, whole = post(path, target, ask(target, stream=False))
    assert text(whole) == "Because."
    assert whole["done"] is True
    assert (board.asked[0].streamed, board.asked[1].streamed) == (True, False)


def test_ollamas_options(path: Path, board: Board) -> None:
    options = {
        "num_predict": 7, "temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "seed": 3,
        "stop": ["x"], "repeat_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1,
        "num_ctx": 4096, "num_gpu": 1, "mirostat": 0, "typical_p": 1.0, "whatever": [],
    }  # fmt: skip
    assert post(path, "/api/chat", ask("/api/chat", stream=False, options=options))[0] == 200
    off = {"num_predict": -1, "repeat_penalty": 1.2, "repeat_last_n": 0}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = ask("/api/generate", stream=False, options=off, format=schema, system="Brief.")
    assert post(path, "/api/generate", {**asked, "keep_alive": "5m", "context": []})[0] == 200
    asked = ask("/api/generate", stream=False, format="json", model="tiny:latest")
    assert post(path, "/api/generate", asked)[0] == 200
    asked = ask("/api/chat", stream=False, model="edgemoa:M2k3", edgemoa={"deadline_ms": 9_000})
    assert post(path, "/api/chat", asked)[0] == 200
    first, second, third, fourth = board.asked
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (7, 0.5, 20)
    assert (sampling.top_p, sampling.min_p, sampling.seed, sampling.stop) == (0.9, 0.1, 3, ("x",))
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.2, 1)
    assert (second.sampling.max_tokens, second.sampling.repetition_penalty) == (256, 1)
    assert second.messages == (ChatMessage("system", "Brief."), ChatMessage("user", "Why?"))
    assert [json.loads(each) for each in board.schemas] == [schema, {"type": "object"}]
    assert (third.layers, third.proposers) == (0, 0)
    assert (fourth.layers, fourth.proposers, fourth.deadline_ms) == (2, 3, 9_000)


def test_ollamas_streams_say_something_and_tell_errors(
    path: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.05)
    board.script[1:] = [0.3, Text("Be"), Failed("engine_failed", "broken")]
    status, told, _ = call(path, "POST", "/api/chat", ask("/api/chat"))
    assert status == 200
    *before, last = lines(told)
    assert last == {"error": "broken"}
    texts = [line["message"]["content"] for line in before]
    assert texts[-1] == "1Be"
    assert len(texts) >= 4
    assert set(texts[:-1]) == {""}
    assert not any(line["done"] for line in before)


def test_ollama_loads(path: Path, board: Board) -> None:
    status, told = post(path, "/api/generate", {"model": "tiny", "keep_alive": 0})
    assert (status, told["done_reason"], told["response"]) == (200, "load", "")
    status, told = post(path, "/api/chat", {"model": "tiny", "messages": []})
    assert (status, told["done_reason"], told["message"]["content"]) == (200, "load", "")
    board.engine_down = True
    assert post(path, "/api/generate", {"model": "tiny"})[0] == 503
    assert board.asked == []


def test_ollama_lists(path: Path, board: Board) -> None:
    _, told, _ = call(path, "GET", "/api/tags")
    group, own = json.loads(told)["models"]
    assert (group["name"], own["name"]) == ("edgemoa:latest", "tiny:latest")
    assert own["digest"] == CARD.digest != group["digest"]
    assert own["details"]["parameter_size"] == "134.52M"
    assert json.loads(call(path, "GET", "/api/ps")[1]) == {"models": []}
    board.context_tokens = 100
    assert json.loads(call(path, "GET", "/api/ps")[1])["models"][1]["context_length"] == 100
    for name in ("tiny", "tiny:latest", "edgemoa", "edgemoa:M2k3"):
        for field in ("model", "name"):
            assert post(path, "/api/show", {field: name})[0] == 200
    status, told, _ = call(path, "HEAD", "/")
    assert (status, told) == (200, b"")
    assert call(path, "GET", "/")[1] == b"Ollama is running"
    assert json.loads(call(path, "GET", "/v1/models/tiny")[1])["id"] == "tiny"


def test_ollama_embeds(path: Path, board: Board) -> None:
    status, told = post(path, "/api/embed", {"model": "tiny", "input": ["ab", "c"]})
    assert (status, told["embeddings"]) == (200, [[2, 0.5, -1], [1, 0.5, -1]])
    assert told["prompt_eval_count"] == 3
    assert post(path, "/api/embed", {"model": "tiny", "input": []})[1]["embeddings"] == []
    assert post(path, "/api/embeddings", {"model": "tiny", "prompt": "ab"})[1] == {
        "embedding": [2, 0.5, -1]
    }


@pytest.mark.parametrize(
    ("target", "data", "status"),
    [
        (TEXT, {}, 400),
        (TEXT, {"prompt": ""}, 400),
        (TEXT, {"prompt": []}, 400),
        (TEXT, {"prompt": [1, 2]}, 400),
        (TEXT, {"prompt": ["a"] * 9}, 400),
        (TEXT, {"prompt": ["a"] * 3, "n": 3}, 400),
        (TEXT, {"prompt": "a", "echo": True}, 400),
        (TEXT, {"prompt": "a", "suffix": "b"}, 400),
        (TEXT, {"prompt": "a", "best_of": 3}, 400),
        (TEXT, {"prompt": "a", "logprobs": 21}, 400),
        (TEXT, {"prompt": "a", "model": "gpt-9"}, 404),
        (TEXT, {"prompt": "a" * 101}, 400),
        (CHAT, body(tools=[NOW]), 400),
        (CHAT, body(tools=[NOW], tool_choice="often"), 400),
        (CHAT, body(tools=[NOW, NOW]), 400),
        (CHAT, body(tools=[NOW] * 129), 400),
        (CHAT, body(tools=[{"type": "custom", "custom": {"name": "x"}}]), 400),
        (CHAT, body(tools=[{"type": "function", "function": {"name": "a b"}}]), 400),
        (CHAT, body(tool_choice="required"), 400),
        (CHAT, body(tools=[NOW], tool_choice={"type": "function", "function": {"name": "x"}}), 400),
        (CHAT, body(tools=[NOW], logprobs=True), 400),
        (CHAT, body(tools=[NOW], response_format={"type": "json_object"}), 400),
        (CHAT, body(tools=[NOW], edgemoa={"plan": "M1k1"}), 400),
        (CHAT, body(tools=[NOW], model="edgemoa:M1k1"), 400),
        (CHAT, body(modalities=["text", "audio"]), 400),
        (VECTORS, {}, 400),
        (VECTORS, {"input": ""}, 400),
        (VECTORS, {"input": []}, 400),
        (VECTORS, {"input": ["a", ""]}, 400),
        (VECTORS, {"input": [[1, 2]]}, 400),
        (VECTORS, {"input": "a", "model": "gpt-9"}, 404),
        (VECTORS, {"input": "a", "dimensions": 2}, 400),
        (VECTORS, {"input": "a", "encoding_format": "hex"}, 400),
        (VECTORS, {"input": ["a"] * (embeddings.MAX_TEXTS + 1)}, 400),
        (VECTORS, {"input": "a" * (limits.MAX_PROMPT_BYTES + 1)}, 400),
        (VECTORS, {"input": "a" * limits.MAX_BODY_BYTES}, 413),
        ("/v1/requests", body(n=2), 400),
        ("/api/chat", b"{", 400),
        ("/api/chat", b"\xff", 400),
        ("/api/chat", b"[" * 5_000, 400),
        ("/api/chat", ask("/api/chat", model="llama9"), 404),
        ("/api/chat", {"model": "llama9", "messages": []}, 404),
        ("/api/chat", ask("/api/chat", tools=[{}]), 400),
        ("/api/chat", ask("/api/chat", think=True), 400),
        ("/api/chat", ask("/api/chat", format="xml"), 400),
        ("/api/chat", ask("/api/chat", format={"enum": ["canary"]}), 400),
        ("/api/chat", ask("/api/chat", options={"num_predict": -3}), 400),
        ("/api/chat", ask("/api/chat", options={"temperature": 9}), 400),
        ("/api/chat", ask("/api/chat", options={"tfs_z": 0.5}), 400),
        ("/api/chat", ask("/api/chat", edgemoa={"events": True}), 400),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, 400),
        ("/api/chat", {"messages": [{"role": "tool", "content": "x"}]}, 400),
        ("/api/chat", {"messages": [{"role": "assistant", "content": "x"}]}, 400),
        ("/api/chat", {"messages": [{"role": "user", "tool_calls": []}]}, 400),
        ("/api/chat", ask("/api/chat", tools=[NOW]), 400),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}] * 511}, 400),
        ("/api/generate", ask("", raw=True, system="x"), 400),
        ("/api/generate", ask("", raw=True, edgemoa={"plan": "M1k1"}), 400),
        ("/api/generate", ask("", raw=True, model="edgemoa:M1k1"), 400),
        ("/api/generate", ask("", template="x"), 400),
        ("/api/generate", ask("", suffix="x"), 400),
        ("/api/generate", ask("", context=[1]), 400),
        ("/api/generate", ask("", images=["x"]), 400),
        ("/api/generate", {"images": ["x"]}, 400),
        ("/api/generate", ask("", prompt="x" * 101), 400),
        ("/api/embed", {"model": "tiny", "input": ["a", ""]}, 400),
        ("/api/embed", {"model": "llama9", "input": "a"}, 404),
        ("/api/embed", {"model": "tiny", "input": "a", "dimensions": 2}, 400),
        ("/api/show", {"model": "llama9"}, 404),
        ("/api/show", b"x" * 5_000, 400),
        ("/api/pull", {"model": "llama9"}, 404),
        ("/api/nothing", {}, 404),
        ("/api/tags", {}, 405),
    ],
    ids=lambda value: repr(value)[:40].encode("ascii", "replace").decode(),
)
def test_bad_requests(path: Path, board: Board, target: str, data: Any, status: int) -> None:
    got, told = post(path, target, data)
    assert got == status
    error = told["error"]
    message = error if target.startswith("/api/") else error["message"]
    assert isinstance(message, str)
    assert message
    assert board.asked == []
    assert "canary" not in message or "schema" in message


DEEP = '{"a":' * 900 + "1" + "}" * 900
NASTY = (
    "null", "NaN", "-Infinity", "1e999", "1" * 400, "9" * 5_000, '""', '"\\ud800"', '"\\u0000"',
    "[]", "{}", "[null]", '{"":{}}', "true", "-1", "0.5", "[" * 100_000, DEEP,
    json.dumps(["x"] * 5_000),
    f'[{{"function":{{"name":"f","parameters":{DEEP}}}}}]',
    f'{{"type":"json_object","schema":{DEEP}}}', f'{{"const":{"9" * 30}}}',
    f'{{"type":"json_object","schema":{{"const":{"9" * 30}}}}}', '{"plan":"M1k1","layers":1}',
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "kind", "more"),
    [
        (CHAT, ChatRequest, {"messages": [{"role": "user", "content": "W"}]}),
        (TEXT, CompletionRequest, {"prompt": "W"}),
        (VECTORS, EmbeddingRequest, {"input": "W"}),
        ("/api/chat", ollama.ChatAsk, {"messages": [{"role": "user", "content": "W"}]}),
        ("/api/generate", ollama.GenerateAsk, {"prompt": "W"}),
        ("/api/embed", ollama.EmbedAsk, {"input": "W"}),
        ("/api/show", ollama.ShowAsk, {}),
    ],
)
def test_no_field_is_a_defect_of_ours_whatever_is_in_it(
    path: Path, board: Board, target: str, kind: type[msgspec.Struct], more: dict[str, Any]
) -> None:
    board.calls_tools, board.room = True, 1_000_000
    board.script = [Accepted(Granted(0, 0), 0), answered("W")]
    statuses = set()
    for field in kind.__struct_encode_fields__:
        usual = json.dumps({name: value for name, value in more.items() if name != field})
        for number, value in enumerate(NASTY):
            raw = f'{usual[:-1]}{", " if len(usual) > 2 else ""}"{field}": {value}}}'.encode()
            status, told, _ = call(path, "POST", target, raw, Idempotency_Key=f"{field}{number}")
            statuses.add(status)
            assert status in (200, 400, 404), (field, value[:40], told[:200])
            assert len(told) < 1_000
            if status != 200:
                error = json.loads(told)["error"]
                assert error if target.startswith("/api/") else error["message"]
    assert {200, 400} <= statuses


def test_what_a_board_refuses_ollamas_clients_hear(path: Path, board: Board) -> None:
    board.script[:] = [Failed("overloaded", "full", 2_500)]
    status, told, headers = call(path, "POST", "/api/chat", ask("/api/chat"))
    assert (status, headers["Retry-After"]) == (429, "3")
    assert json.loads(told) == {"error": "full: try again in 3 s"}


def test_events_of_several_prompts_come_in_their_order() -> None:
    async def source(name: str, pause_s: float) -> AsyncIterator[RequestEvent]:
        yield Accepted(Granted(0, 0), 0)
        for n in range(3):
            await asyncio.sleep(pause_s)
            yield Text(f"{name}{n}")
        yield ProposalArrived(RECORD)
        yield answered(name)

    async def scenario() -> None:
        events = Events(source("a", 0.0), source("b", 0.01))
        heard: list[list[RequestEvent]] = [[], []]
        while sum(isinstance(each[-1], Answered) for each in heard if each) < 2:
            happened = await events.next_within(0.001)
            if happened is not None:
                heard[happened[0]].append(happened[1])
        for name, said in zip("ab", heard, strict=True):
            assert [e.text for e in said if isinstance(e, Text)] == [f"{name}{n}" for n in range(3)]
        await events.aclose()

    asyncio.run(scenario())
