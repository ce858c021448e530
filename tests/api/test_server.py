"""The local API over a real Unix socket, in front of a scripted board."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from edgemoa import cli_peer_models
from edgemoa.api import answers, server
from edgemoa.api.chats import usage
from edgemoa.api.openai import error_json
from edgemoa.api.server import Api
from edgemoa.api.service import Card, Device, PeerModels, Vector
from edgemoa.client import Client
from edgemoa.core import envelope, limits
from edgemoa.core.events import (
    Accepted,
    Answered,
    Failed,
    Given,
    Granted,
    LeftOut,
    ProposalArrived,
    ProposalRecord,
    Request,
    RequestEvent,
    Text,
    TokenLogprob,
    Wishes,
)
from edgemoa.core.messages import BoardId, ChatMessage
from edgemoa.desk import Prompt, Ticket, _Mailbox
from edgemoa.errors import (
    AddressInUseError,
    BoardError,
    ConfigError,
    DaemonUnreachableError,
    DeadlineError,
    EdgemoaError,
    EngineError,
    InvalidPromptError,
    ModelNotFoundError,
    NetworkError,
    OverloadedError,
    PeerError,
    PromptTooLongError,
    SchemaError,
    UserError,
)
from edgemoa.net import copies

BEE = envelope.board_id(b"b" * 32)
MODEL_ID = "ab" * 32
WEIGHTS = os.urandom(1_000_000)
LENT = f"/v1/peers/{BEE}/models/{MODEL_ID}"
CARD = Card("tiny", "ab" * 32, 1_000, 1_700_000_000, "llama", 134_515_008, "Q4_0", 100, 3)
RECORD = ProposalRecord("bee", BoardId("b"), "tiny", 1, 10, 5, 3, 7, own=False)


def answered(text: str) -> Answered:
    return Answered(
        text=text,
        finish="stop",
        granted=Granted(1, 1),
        proposals=(RECORD,),
        left_out=(LeftOut("cee", BoardId("c"), 1, "too late"),),
        prompt_tokens=10,
        tokens=4,
        queue_ms=1,
        work_ms=2,
        total_ms=3,
    )


class ScriptedBoard:
    """Answers with what the test wrote down, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.schemas: list[str] = []
        self.embedded: list[list[str]] = []
        self.script: list[RequestEvent | float] = [
            Accepted(Granted(1, 1), 0),
            ProposalArrived(RECORD),
            Text("Bec"),
            Text("ause."),
            answered("Because."),
        ]
        self.engine_down = False
        self.refused: Failed | None = None
        self.files: list[tuple[str, str, int]] = []
        self.measure_s = 0.0
        self.check_s = 0.0
        self.measuring = 0
        self.calls_tools = False
        self.room = 100  # of the context
        self.context_tokens = 0  # not known before the model has been loaded
        self.gone_early = threading.Event()

    def plan(self) -> tuple[int, int, int, int]:
        return 1, 2, 256, 60_000

    def own_model(self) -> tuple[str, int]:
        return "tiny", self.context_tokens

    def card(self) -> Card:
        return CARD

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        if self.engine_down:
            raise EngineError("the model is away", hint="wait")
        self.embedded.append(list(texts))
        return [Vector(struct.pack("<3f", len(text), 0.5, -1), len(text)) for text in texts]

    def refusal(self) -> Failed | None:
        return self.refused

    async def measure(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        if self.engine_down:
            raise EngineError("the model is away", hint="wait")
        self.measuring += 1
        await asyncio.sleep(self.measure_s)
        self.measuring -= 1
        if given == "template" and not self.calls_tools:
            raise InvalidPromptError("The model does not support tools.")
        self.context_tokens = self.room
        return sum(len(m.content) for m in messages)

    async def check_schema(self, schema: str) -> None:
        self.schemas.append(schema)
        await asyncio.sleep(self.check_s)
        if "canary" in schema:
            raise UserError("The JSON schema cannot be obeyed: a canary.", hint="Use another one.")

    def new_request_id(self) -> str:
        return f"chatcmpl-{len(self.asked)}"

    async def take(self, prompt: Prompt) -> str | Failed:
        self.asked.append(prompt.request)
        first = self.script[0]
        return first if isinstance(first, Failed) else prompt.request.request_id

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        return None

    def unfinished(self, owner: str) -> list[Ticket]:
        return []

    async def forget(self, request_id: str, owner: str) -> bool:
        return False

    async def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        try:
            for event in self.script:
                if isinstance(event, float):
                    await asyncio.sleep(event)
                else:
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.gone_early.set()
            raise

    def status(self) -> dict[str, Any]:
        return {"ready": True}

    def devices(self) -> list[Device]:
        return [
            {
                "id": BEE, "name": "bee", "state": "paired", "address": "", "linked": False,
                "last_seen_age_ms": None, "detail": "",
            }
        ]  # fmt: skip

    async def peer_models(self) -> PeerModels:
        return {"models_dir": "/models", "boards": []}

    async def peer_manifest(self, board: BoardId, model_id: str) -> bytes:
        if model_id != MODEL_ID:
            raise PeerError("bee: that model is not there", hint="look there")
        return b'{"name": "tiny"}'

    @contextlib.asynccontextmanager
    async def peer_file(
        self, board: BoardId, model_id: str, file: str, offset: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        self.files.append((board, file, offset))
        if file == "busy":
            raise OverloadedError("bee: it lends to others", retry_after_s=7)
        try:
            length = 2**40 if file == "endless" else max(0, len(WEIGHTS) - offset)
            yield length, self.pieces(file, offset)
        finally:
            self.gone_early.set()

    async def pieces(self, file: str, offset: int) -> AsyncIterator[bytes]:
        while file == "endless":
            yield WEIGHTS[:65_536]
        for at in range(offset, len(WEIGHTS), 10_000):
            if file == "breaks" and at >= 50_000:
                raise NetworkError("bee went away in the middle")
            if file == "slow":
                await asyncio.sleep(0.01)
            yield WEIGHTS[at : at + 10_000]


@pytest.fixture
def board() -> ScriptedBoard:
    return ScriptedBoard()


@pytest.fixture
def path(board: ScriptedBoard, tmp_path: Path) -> Iterator[Path]:
    """The socket of a server that runs in a thread of its own."""
    place = tmp_path / "api.sock"
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    api = Api(board, place, 0o660)
    try:
        call(api.start())
        yield place
        call(api.stop())
        assert not place.exists()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def body(content: Any = "Why?", **more: Any) -> dict[str, Any]:
    return {"model": "edgemoa", "messages": [{"role": "user", "content": content}], **more}


def schema(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of, "strict": True}}


def post(path: Path, data: bytes | dict[str, Any]) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers of a request that is made by hand."""
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection.sock):
        connection.sock.connect(os.fspath(path))
        connection.request("POST", "/v1/chat/completions", raw)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


def test_a_completion_in_openais_shape(path: Path, board: ScriptedBoard) -> None:
    status, told, _ = post(path, body(max_tokens=7, temperature=0.5, stop="x", seed=-1))
    assert status == 200
    assert told["object"] == "chat.completion"
    choice = told["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Because.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert told["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert told["edgemoa"]["proposals"][0]["board"] == "bee"
    (request,) = board.asked
    assert (request.layers, request.proposers, request.deadline_ms) == (1, 2, 60_000)
    assert request.prompt_tokens == len("Why?")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (7, 0.5, ("x",))
    assert 0 <= sampling.seed < 2**31


@pytest.mark.parametrize("proposed", [True, False])
def test_cached_is_what_of_the_prompt_was_known_before(proposed: bool) -> None:
    own = ProposalRecord("me", BoardId("m"), "tiny", 1, 10, 5, 3, 7, own=True, cached_tokens=6)
    later = msgspec.structs.replace(own, layer=2, cached_tokens=9)
    told = msgspec.structs.replace(
        answered("Because."),
        proposals=(RECORD, own, later) if proposed else (RECORD,),
        job_tokens=300,
        cached_tokens=250,
    )
    # The answer's job begins with the prompt, and knows all of it where nothing was proposed.
    assert usage(told).prompt_tokens_details.cached_tokens == (6 if proposed else 10)


def test_a_stream_in_openais_shape(path: Path) -> None:
    chunks = list(Client(path).chat(body(stream_options={"include_usage": True})))
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(texts) == "Because."
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 14


def test_what_a_request_may_say_of_its_tokens(path: Path, board: ScriptedBoard) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 2, "seed": 3,
    }  # fmt: skip
    assert post(path, body(**options, logit_bias={"5": -100, "17": 2.5}))[0] == 200
    assert post(path, body(repeat_penalty=1.3, top_k=-1, top_p=None, logprobs=False))[0] == 200
    assert post(path, body())[0] == 200
    first, second, third = board.asked
    assert msgspec.structs.asdict(first.sampling) == {"max_tokens": 256, "stop": (), **options}
    assert first.wishes == Wishes(logit_bias={5: -100, 17: 2.5})
    assert (second.sampling.repetition_penalty, second.sampling.top_k) == (1.3, 0)
    assert not second.wishes
    assert second.sampling.seed != third.sampling.seed  # of no request's own: by chance


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "text"}, []),
        ({"type": "json_object"}, [{"type": "object"}]),
        ({"type": "json_object", "schema": {"type": "array"}}, [{"type": "array"}]),
        (schema({"enum": ["é"]}), [{"enum": ["é"]}]),
    ],
)
def test_the_form_of_an_answer(
    path: Path, board: ScriptedBoard, form: dict[str, Any], told: list[Any]
) -> None:
    assert post(path, body(response_format=form))[0] == 200
    assert [json.loads(each) for each in board.schemas] == told
    assert board.asked[0].wishes.schema == (board.schemas[0] if told else "")


LOGPROBS = (
    TokenLogprob(b"Be", -0.5, ((b"Be", -0.5), (b"It", -1.5))),
    TokenLogprob(b"\xf0\x9f", -0.25, ((b"\xf0\x9f", -0.25),)),
)


def test_logprobs_as_openais_own_client_reads_them(path: Path, board: ScriptedBoard) -> None:
    rest = (TokenLogprob(b"\x97\xbc", -2.0),)
    board.script[2:] = [Text("Be", LOGPROBS[:1]), Text("🗼", LOGPROBS[1:] + rest), answered("Be🗼")]
    transport = httpx2.HTTPTransport(uds=os.fspath(path))
    with openai.OpenAI(
        base_url="http://localhost/v1", api_key="-", http_client=httpx2.Client(transport=transport)
    ) as client:
        ask: Any = functools.partial(
            client.chat.completions.create,
            model="edgemoa",
            messages=[{"role": "user", "content": "Why?"}],
        )
        whole = ask(logprobs=True, top_logprobs=2).choices[0]
        assert whole.logprobs is not None
        told = whole.logprobs.content
        assert told is not None
        assert bytes(byte for each in told for byte in each.bytes or []).decode() == "Be🗼"
        assert [each.logprob for each in told] == [-0.5, -0.25, -2.0]
        assert [(top.token, top.logprob) for top in told[0].top_logprobs] == [
            ("Be", -0.5), ("It", -1.5)
        ]  # fmt: skip
        assert told[1].token == "\N{REPLACEMENT CHARACTER}"
        streamed = [
            (choice.delta.content, choice.logprobs and choice.logprobs.content)
            for chunk in ask(logprobs=True, top_logprobs=2, stream=True)
            for choice in chunk.choices
        ]
        assert [text for text, _ in streamed] == ["", "Be", "🗼", None]
        assert [each for _, part in streamed for each in part or []] == told
        assert board.asked[0].wishes.logprobs == board.asked[1].wishes.logprobs == 2
        board.script[2:4] = [Text("Be🗼")]
        plain = ask()
        assert plain.choices[0].logprobs is None
        assert not board.asked[2].wishes


def test_what_a_slow_client_has_not_heard_yet_keeps_its_logprobs() -> None:
    async def scenario() -> None:
        mailbox = _Mailbox()
        for event in (Text("a"), Text("b"), Text("c", LOGPROBS[:1]), Text("d"), Text("e")):
            mailbox.put(event)
        heard = [await mailbox.get() for _ in range(3)]
        assert heard == [Text("ab"), Text("c", LOGPROBS[:1]), Text("de")]

    asyncio.run(scenario())


def test_events_on_request(path: Path) -> None:
    chunks = list(Client(path).chat(body(edgemoa={"events": True})))
    kinds = [chunk["edgemoa"]["type"] for chunk in chunks if "edgemoa" in chunk]
    assert kinds == ["accepted", "proposal", "answered"]


def test_a_stream_says_something_while_nothing_happens(
    path: Path, board: ScriptedBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.05)
    board.script.insert(1, 0.3)
    response = Client(path)._request("POST", "/v1/chat/completions", body(stream=True))
    lines = response.read().split(b"\n\n")
    assert sum(line.startswith(b":") for line in lines) >= 4
    assert lines[-2] == b"data: [DONE]"


@pytest.mark.parametrize(
    ("model", "extra", "plan"),
    [
        ("edgemoa", {}, (1, 2)),
        ("tiny", {}, (0, 0)),
        ("edgemoa:M2k3", {}, (2, 3)),
        ("edgemoa", {"layers": 3, "proposers": 4}, (3, 4)),
        ("edgemoa:M2k3", {"proposers": 1}, (2, 1)),
        ("tiny", {"plan": "M2k3"}, (2, 3)),
    ],
)
def test_plans(
    path: Path, board: ScriptedBoard, model: str, extra: dict[str, int], plan: tuple[int, int]
) -> None:
    post(path, {**body(edgemoa=extra), "model": model})
    assert (board.asked[0].layers, board.asked[0].proposers) == plan


def test_content_in_parts_and_turns(path: Path, board: ScriptedBoard) -> None:
    turns = [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "y"}]},
    ]
    assert post(path, {"messages": turns})[0] == 200
    assert board.asked[0].messages == (ChatMessage("system", "Brief."), ChatMessage("user", "Wy"))


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "invalid_prompt"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_request"),
        (body(""), 400, "invalid_prompt"),
        (body("  \n"), 400, "invalid_prompt"),
        ({"messages": []}, 400, "invalid_prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_prompt"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_prompt"),
        ({"messages": "x"}, 400, "invalid_request"),
        (body(model="gpt-9"), 404, "model_not_found"),
        (body(model="edgemoa:M9k9"), 400, "invalid_request"),
        (body(max_tokens=0), 400, "invalid_request"),
        (body(temperature=9), 400, "invalid_request"),
        (body(n=9), 400, "invalid_request"),
        (body(n=0), 400, "invalid_request"),
        (body(n=2, edgemoa={"events": True}), 400, "invalid_request"),
        (body(tools=[{}]), 400, "invalid_request"),
        (body(functions=[{}], tool_choice="auto"), 400, "invalid_request"),
        (body(edgemoa={"plan": "M9k9"}), 400, "invalid_request"),
        (body(edgemoa={"plan": "large"}), 400, "invalid_request"),
        (body(edgemoa={"plan": "M1k1", "layers": 2}), 400, "invalid_request"),
        (body(grammar='root ::= "x"'), 400, "invalid_request"),
        (body(guided_json={"type": "integer"}), 400, "invalid_request"),
        (body(top_k=-2), 400, "invalid_request"),
        (body(top_k=1.5), 400, "invalid_request"),
        (body(min_p=1.1), 400, "invalid_request"),
        (body(repetition_penalty=0), 400, "invalid_request"),
        (body(repetition_penalty=1.1, repeat_penalty=1.1), 400, "invalid_request"),
        (body(presence_penalty=2.1), 400, "invalid_request"),
        (body(frequency_penalty=-2.1), 400, "invalid_request"),
        (body(logit_bias={"a": 1}), 400, "invalid_request"),
        (body(logit_bias={"1": 101}), 400, "invalid_request"),
        (body(logit_bias={str(n): 1 for n in range(1025)}), 400, "invalid_request"),
        (body(top_logprobs=2), 400, "invalid_request"),
        (body(logprobs=True, top_logprobs=21), 400, "invalid_request"),
        (body(logprobs=True, top_logprobs=20, max_tokens=9000), 400, "invalid_request"),
        (body(response_format={"type": "grammar"}), 400, "invalid_request"),
        (body(response_format={"type": "json_schema"}), 400, "invalid_request"),
        (
            body(response_format=schema({"x": "y" * limits.MAX_SCHEMA_BYTES})),
            400,
            "invalid_request",
        ),
        (body(response_format=schema({"enum": ["canary"]})), 400, "invalid_request"),
        (body(stop=[""]), 400, "invalid_request"),
        (body(edgemoa={"layer": 1}), 400, "invalid_request"),
        (body(edgemoa={"layers": 99}), 400, "invalid_request"),
        (body("x" * 100), 400, "context_length_exceeded"),
        (body("é" * (limits.MAX_PROMPT_BYTES // 2 + 1)), 400, "invalid_prompt"),
        (b"[" * 5_000, 400, "invalid_request"),
        (b'{"x": "' + b"y" * limits.MAX_BODY_BYTES + b'"}', 413, "invalid_request"),
    ],
    ids=lambda value: repr(value)[:40].encode("ascii", "replace").decode(),
)
def test_bad_requests(
    path: Path, board: ScriptedBoard, data: bytes | dict[str, Any], status: int, code: str
) -> None:
    got, told, _ = post(path, data)
    assert (got, told["error"]["code"]) == (status, code)
    assert told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"
    assert board.asked == []


@pytest.mark.parametrize(
    ("failed", "status", "error"),
    [
        (Failed("overloaded", "full", 2_500), 429, OverloadedError),
        (Failed("overloaded", "full", 2_500, 7), 429, OverloadedError),
        (Failed("unavailable", "stopping"), 503, BoardError),
        (Failed("engine_failed", "broken"), 503, EngineError),
        (Failed("deadline_exceeded", "late"), 504, DeadlineError),
        (Failed("context_length_exceeded", "long"), 400, PromptTooLongError),
        (Failed("schema_failed", "too complex"), 400, SchemaError),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
def test_refusals_and_failures(
    path: Path, board: ScriptedBoard, failed: Failed, status: int, error: type[Exception]
) -> None:
    for accepted in (False, True):
        board.script[:] = [Accepted(Granted(0, 0), 0), failed] if accepted else [failed]
        got, told, headers = post(path, body())
        assert (got, told["error"]["code"]) == (status, failed.code)
        assert failed.reason in told["error"]["message"]
        assert headers.get("Retry-After") == ("3" if failed.code == "overloaded" else None)
        place = {"position": failed.position, "retry_after_s": 3} if failed.position else None
        assert told.get("edgemoa") == place
        with pytest.raises(error, match=failed.reason):
            list(Client(path).chat(body()))


def test_an_errors_hint_goes_on_in_its_sentence() -> None:
    told = error_json(EngineError("It is down.", hint="wait"))
    assert told.error.message == "It is down: wait"


def test_an_error_in_the_middle_of_a_stream_travels_in_it(path: Path, board: ScriptedBoard) -> None:
    board.script[-1] = Failed("engine_failed", "broken")
    text = ""
    with pytest.raises(EngineError, match="broken"):
        for chunk in Client(path).chat(body()):
            text += chunk["choices"][0]["delta"].get("content", "")
    assert text == "Because."


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_noticed(path: Path, board: ScriptedBoard, stream: bool) -> None:
    board.script[1:] = [30.0]
    raw = json.dumps(body(stream=stream)).encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        sock.sendall(head.encode() + raw)
        while not board.asked:
            pass
    assert board.gone_early.wait(3)


def test_a_defect_is_hidden_from_the_client_and_its_text_from_the_log(
    path: Path, board: ScriptedBoard, caplog: pytest.LogCaptureFixture
) -> None:
    def choke(*_: object) -> int:
        raise RuntimeError("canary")

    board.new_request_id = choke  # type: ignore[method-assign, assignment]
    status, told, _ = post(path, body())
    assert (status, told["error"]["code"]) == (500, "internal_error")
    assert "canary" not in json.dumps(told)
    from edgemoa.log import JsonFormatter, TextFormatter

    (record,) = [r for r in caplog.records if r.name == "edgemoa.api.server"]
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert "RuntimeError" in line
        assert "canary" not in line


def test_a_full_board_says_so_before_it_counts(path: Path, board: ScriptedBoard) -> None:
    board.refused = Failed("overloaded", "full", 1_000)
    board.measure_s = 30.0
    assert post(path, body())[0] == 429


def test_prompts_being_counted_are_bounded_also_when_their_clients_leave(
    path: Path, board: ScriptedBoard
) -> None:
    board.measure_s = 1.0
    raw = json.dumps(body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    for _ in range(limits.MAX_MEASURING + 5):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(path))
            sock.sendall(head.encode() + raw)
            time.sleep(0.02)
    assert board.measuring == limits.MAX_MEASURING
    status, told, headers = post(path, body())
    assert (status, told["error"]["code"], headers["Retry-After"]) == (429, "overloaded", "1")
    time.sleep(1.2)
    assert post(path, body())[0] == 200


def test_schemas_being_checked_are_bounded_and_keep_no_other_prompt_out(
    path: Path, board: ScriptedBoard
) -> None:
    board.check_s = 1.0
    form = {"type": "json_object"}
    with ThreadPoolExecutor() as clients:
        told = clients.map(
            lambda _: post(path, body(response_format=form))[0], range(limits.MAX_CHECKING + 3)
        )
        time.sleep(0.5)
        assert len(board.schemas) == limits.MAX_CHECKING
        assert post(path, body())[0] == 200
        assert sorted(told) == [200] * limits.MAX_CHECKING + [429] * 3
    board.check_s = 0.0
    assert post(path, body(response_format=form))[0] == 200


def test_connections_are_bounded_and_the_board_lives(
    path: Path, board: ScriptedBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_API_CONNECTIONS", 10)
    with contextlib.ExitStack() as held:
        for _ in range(10):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(os.fspath(path))
        time.sleep(0.1)
        with pytest.raises(OverloadedError, match="too many connections") as told:
            Client(path).get("/v1/status")
        assert told.value.retry_after_s == 1
    time.sleep(0.1)
    assert Client(path).get("/v1/status") == {"ready": True}


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\1nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: %b\r\n\r\n" % (b"a" * 20_000),
    ],
)
def test_what_is_not_http_is_refused_and_fills_no_log(
    path: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        sock.sendall(raw)
        assert b" 400 " in sock.makefile("rb").readline()
    assert not caplog.records


def test_a_body_that_is_not_as_encoded_as_it_says(path: Path) -> None:
    raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        sock.sendall(raw + b"Content-Length: 4\r\nConnection: close\r\n\r\nnope")
        answer = sock.makefile("rb").read()
    assert b" 400 " in answer.splitlines()[0]
    assert b"invalid_request" in answer


def test_without_its_model_the_board_says_so(path: Path, board: ScriptedBoard) -> None:
    board.engine_down = True
    status, told, _ = post(path, body())
    assert (status, told["error"]["code"]) == (503, "engine_failed")


def test_the_small_ones(path: Path) -> None:
    client = Client(path)
    assert [m["id"] for m in client.get("/v1/models")["data"]] == ["edgemoa", "tiny"]
    assert client.get("/v1/status") == {"ready": True}
    assert client.get("/v1/devices")["devices"][0]["id"] == BEE
    with pytest.raises(UserError, match="Not Found"):
        client.get("/v1/nothing")
    with pytest.raises(UserError, match="Method Not Allowed"):
        client.get("/v1/chat/completions")


def test_errors_come_back_as_what_they_were(path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        list(Client(path).chat(body(model="gpt-9")))
    with pytest.raises(InvalidPromptError):
        list(Client(path).chat(body("")))


# --- the socket itself


def start(path: Path, mode: int = 0o660) -> None:
    async def main() -> None:
        api = Api(ScriptedBoard(), path, mode)
        await api.start()
        try:
            assert stat.S_IMODE(os.stat(path).st_mode) == mode  # noqa: PTH116
        finally:
            await api.stop()

    asyncio.run(main())


def test_the_socket_has_its_mode_and_is_taken_away(tmp_path: Path) -> None:
    start(tmp_path / "new" / "api.sock", 0o600)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(os.fspath(path))
    start(path)


def test_another_ones_socket_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"

    async def main() -> None:
        first = Api(ScriptedBoard(), path, 0o600)
        await first.start()
        await asyncio.to_thread(path.rename, tmp_path / "moved")
        second = Api(ScriptedBoard(), path, 0o600)
        await second.start()
        await first.stop()
        assert await asyncio.to_thread(path.is_socket)
        await second.stop()

    asyncio.run(main())


def test_a_busy_one_is_in_use_too(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with contextlib.ExitStack() as held:
        busy = held.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(os.fspath(path))
        busy.listen(0)
        for _ in range(3):  # fill its backlog
            client = held.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(os.fspath(path))
        with pytest.raises(AddressInUseError):
            start(path)


def test_a_socket_in_use_is_left_alone(path: Path) -> None:
    with pytest.raises(AddressInUseError, match="another edgemoa"):
        start(path)
    assert Client(path).get("/v1/status")


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("x")
    with pytest.raises(AddressInUseError):
        start(file)
    assert file.read_text() == "x"


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107"):
        start(tmp_path / ("x" * 100) / "api.sock")


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError) as caught:
        Client(tmp_path / "none.sock").get("/v1/status")
    assert "serve" in caught.value.hint


# --- models of paired boards


def test_a_paired_boards_files_pass_through(path: Path, board: ScriptedBoard) -> None:
    client = Client(path)
    assert client.get("/v1/peers/models") == {"models_dir": "/models", "boards": []}
    assert client.get(LENT) == {"name": "tiny"}
    for offset in (0, 1, 999_999):
        response = client.open(f"{LENT}/weights.bin", offset)
        assert response.length == 1_000_000 - offset
        assert response.status == (206 if offset else 200)
        assert response.read() == WEIGHTS[offset:]
    assert response.getheader("Content-Range") == "bytes 999999-999999/1000000"
    assert board.files == [(BEE, "weights.bin", offset) for offset in (0, 1, 999_999)]


def test_a_file_that_breaks_off_is_cut_short_and_nothing_else(path: Path) -> None:
    response = Client(path).open(f"{LENT}/breaks")
    assert response.length == 1_000_000
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)) as told:
        response.read()
    if isinstance(told.value, http.client.IncompleteRead):
        assert WEIGHTS.startswith(told.value.partial)
    assert Client(path).get("/v1/status")["ready"]


def test_a_client_that_leaves_ends_the_transfer(path: Path, board: ScriptedBoard) -> None:
    with Client(path).open(f"{LENT}/slow") as response:
        response.read(1)
        assert not board.gone_early.is_set()
    assert board.gone_early.wait(5)


def stalled(path: Path) -> socket.socket:
    """A client that asks for a file and does not read it."""
    asking = socket.socket(socket.AF_UNIX)
    asking.settimeout(10)
    asking.connect(os.fspath(path))
    asking.sendall(f"GET {LENT}/endless HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return asking


def test_a_client_that_does_not_read_ends_the_transfer(
    path: Path, board: ScriptedBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "COPY_S", 0.2)
    with stalled(path) as asking:
        assert board.gone_early.wait(5)
        with contextlib.suppress(ConnectionResetError):
            while asking.recv(1 << 20):
                pass
    assert Client(path).get("/v1/status")["ready"]


def test_a_transfer_does_not_delay_the_end(board: ScriptedBoard, tmp_path: Path) -> None:
    async def test() -> None:
        api = Api(board, tmp_path / "api.sock", 0o600)
        await api.start()
        with await asyncio.to_thread(stalled, tmp_path / "api.sock") as asking:
            await asyncio.to_thread(asking.recv, 1)
            began = time.monotonic()
            await api.stop()
            assert time.monotonic() - began < server.STOP_GRACE_S / 2
        assert board.gone_early.is_set()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("target", "wanted", "status"),
    [
        ("weights.bin", "bytes=1000000-", 416),
        ("weights.bin", "bytes=1000001-", 416),
        ("weights.bin", f"bytes={2**48}-", 416),
        ("weights.bin", f"bytes={2**48 + 1}-", 416),
        ("weights.bin", f"bytes={2**70}-", 416),
        ("weights.bin", f"bytes={'9' * 5000}-", 416),
        ("..%2f..%2fetc", "", 400),
        ("a%2fb", "", 400),
        ("%2e%2e", "", 400),
        ("%00", "", 400),
        ("%ff%fe", "", 400),
        ("w%0a", "", 400),
        (".hidden", "", 400),
    ],
)
def test_what_no_board_could_answer_is_refused_here(
    path: Path, board: ScriptedBoard, target: str, wanted: str, status: int
) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection.sock):
        connection.sock.connect(os.fspath(path))
        connection.request("GET", f"{LENT}/{target}", headers={"Range": wanted} if wanted else {})
        response = connection.getresponse()
        assert response.status == status
        assert json.loads(response.read())["error"]["code"] == "invalid_request"
    asked = [offset for _, _, offset in board.files]
    assert all(offset <= server.MAX_OFFSET for offset in asked)
    assert asked == [] or status == 416


def test_names_and_offsets_are_those_that_boards_may_say() -> None:
    assert server.MAX_OFFSET == copies.MAX_FILE_BYTES
    assert server._FILE.pattern == cli_peer_models.PLAIN.pattern
    assert copies.FileName.__metadata__[0].pattern == f"^{server._FILE.pattern}\\Z"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", DaemonUnreachableError),
        (b"x\r\n\r\n", DaemonUnreachableError),
        (b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n{", BoardError),
        (b"HTTP/1.1 500 No\r\nContent-Length: 1\r\n\r\n{", BoardError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", BoardError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", BoardError),
    ],
)
def test_a_daemon_that_breaks_off_leaves_no_open_connection(
    tmp_path: Path, said: bytes, error: type[EdgemoaError]
) -> None:
    """What is left open, the interpreter warns of, and warnings fail a test."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(tmp_path / "s"))
        listening.listen()

        def serve() -> None:
            for _ in range(20):
                with listening.accept()[0] as asking:
                    if said:
                        asking.recv(10_000)
                    asking.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        client = Client(tmp_path / "s", timeout_s=5)
        before = len(list(Path("/proc/self/fd").iterdir()))
        kept = []  # as an error that is looked at later keeps the connection
        for _ in range(20):
            with pytest.raises(error) as told:
                client.get("/v1/status")
            assert type(told.value) is error
            kept.append(told)
        thread.join()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
        assert len(kept) == 20


def test_peers_models_that_cannot_be_had(path: Path, board: ScriptedBoard) -> None:
    client = Client(path)
    with pytest.raises(OverloadedError, match="lends to others") as told:
        client.open(f"{LENT}/busy")
    assert told.value.retry_after_s == 7
    with pytest.raises(PeerError, match="bee: that model is not there"):
        client.get(LENT.replace("ab", "00"))
    with pytest.raises(UserError, match="not a board's identity"):
        client.get(LENT.replace(BEE, BEE[:-1] + "a"))
    for wrong in (LENT[:-1], LENT + "/a/b", LENT + "/" + "x" * 129, LENT.upper()):
        with pytest.raises(UserError, match=r"Not Found|no model has that id|no file of a model"):
            client.open(wrong)
    board.files.clear()
    for wrong in ("bytes=0-5", "bytes=-5", "bytes=x-", "lines=1-"):
        with pytest.raises(UserError):
            client._request("GET", f"{LENT}/weights.bin", None, {"Range": wrong})
    assert board.files == []
