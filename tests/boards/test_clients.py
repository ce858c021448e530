"""The clients that people have, against a real daemon with the real model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import httpx2
import ollama
import openai
import pydantic
import pytest

from edgemoa.api.doors import Keys
from edgemoa.demo import LocalBoard, start_board, stop, wait_until_ready

MODEL = "smollm2-135m-instruct"
SEARCH_S = 8  # for schemathesis to look for what breaks the API


class Tcp(NamedTuple):
    """The way in over TCP."""

    url: str
    key: str


class City(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=24)
    people: int = pydantic.Field(ge=0, le=99_999_999)


@pytest.fixture(scope="module")
def board(models_dir: Path) -> Iterator[LocalBoard]:
    with tempfile.TemporaryDirectory(prefix="edgemoa-") as place:
        (Path(place) / "key").write_text(Keys(Path(place) / "state").new("tests"))
        board = start_board(
            Path(place),
            f"board.models_dir={models_dir}",
            f"model.name={MODEL}",
            "net.mdns=false",
            "moa.max_tokens=8",
            "api.listen=127.0.0.1:0",
        )
        try:
            wait_until_ready([board])
            yield board
        finally:
            stop([board])


@pytest.fixture(scope="module")
def tcp(board: LocalBoard) -> Tcp:
    told = re.search(r'"listening for applications".*?"port": ?([0-9]+)', board.log.read_text())
    assert told is not None
    return Tcp(f"http://127.0.0.1:{told[1]}", (board.log.parent / "key").read_text())


@pytest.fixture(scope="module")
def gpt(board: LocalBoard) -> Iterator[openai.OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(board.socket))
    with openai.OpenAI(
        base_url="http://localhost/v1",
        api_key="-",
        max_retries=0,
        http_client=httpx2.Client(transport=transport, timeout=60),
    ) as client:
        yield client


@pytest.fixture(scope="module")
def llama(board: LocalBoard) -> Iterator[ollama.Client]:
    transport = httpx.HTTPTransport(uds=str(board.socket))
    with ollama.Client(host="http://localhost", transport=transport, timeout=60) as client:
        yield client


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


# --- openai


def test_several_answers_at_a_time(gpt: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL, "messages": said("Name an animal."), "max_tokens": 12,
        "temperature": 1.5, "seed": 7, "n": 3,
    }  # fmt: skip
    whole = gpt.chat.completions.create(**ask)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert 3 < whole.usage.completion_tokens <= 36
    alone = gpt.chat.completions.create(**(ask | {"n": 1}))
    assert alone.choices[0].message.content == texts[0]
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == whole.usage.prompt_tokens
    streamed = ["", "", ""]
    ends = []
    for chunk in gpt.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_answers_of_a_form(gpt: openai.OpenAI) -> None:
    parsed = gpt.chat.completions.parse(
        model=MODEL, messages=said("Describe Paris as JSON."), response_format=City, max_tokens=80
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    form: Any = {"type": "json_object"}
    free = gpt.chat.completions.create(
        model=MODEL, messages=said('Say {"a": 1}.'), response_format=form, max_tokens=60
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


def test_logprobs_and_usage_of_a_stream(gpt: openai.OpenAI) -> None:
    tokens, text, usage = [], "", None
    for chunk in gpt.chat.completions.create(
        model=MODEL, messages=said("Name a colour."), max_tokens=8, logprobs=True, top_logprobs=3,
        stream=True, stream_options={"include_usage": True},
        extra_body={"edgemoa": {"trace": True}},
    ):  # fmt: skip
        for choice in chunk.choices:
            text += choice.delta.content or ""
            tokens += (choice.logprobs and choice.logprobs.content) or []
        usage = chunk.usage or usage
        last = chunk
    assert "".join(token.token for token in tokens) == text
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert last.edgemoa["granted"]["layers"] == 0  # type: ignore[attr-defined]


def test_a_text_and_how_it_goes_on(gpt: openai.OpenAI) -> None:
    texts = ["Name a colour.", "Name an animal."]
    whole = gpt.completions.create(
        model="edgemoa", prompt=texts, max_tokens=8, logprobs=2, stop="\n"
    )
    assert whole.object == "text_completion"
    assert [choice.index for choice in whole.choices] == [0, 1]
    for choice in whole.choices:
        told = choice.logprobs
        assert told is not None
        assert told.tokens is not None
        assert told.text_offset is not None
        assert "".join(told.tokens).startswith(choice.text)
        assert told.text_offset == [len("".join(told.tokens[:n])) for n in range(len(told.tokens))]
    streamed = "".join(
        chunk.choices[0].text
        for chunk in gpt.completions.create(
            model="edgemoa", prompt=texts[0], max_tokens=8, stop="\n", stream=True
        )
    )
    assert streamed == whole.choices[0].text


def test_a_text_goes_on_as_it_stands(gpt: openai.OpenAI) -> None:
    begun = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,"
    bare = gpt.completions.create(model=MODEL, prompt=begun, max_tokens=8)
    assert bare.choices[0].text.startswith(" 15, 16")
    turn = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    raw = gpt.completions.create(model=MODEL, prompt=turn, max_tokens=8)
    asked = gpt.completions.create(model="edgemoa", prompt="Name a colour.", max_tokens=8)
    chat = gpt.chat.completions.create(model=MODEL, messages=said("Name a colour."), max_tokens=8)
    assert asked.choices[0].text == chat.choices[0].message.content
    assert raw.usage is not None
    assert chat.usage is not None
    # The model's template begins with a system turn of its own.
    assert 10 < raw.usage.prompt_tokens < chat.usage.prompt_tokens


def test_embeddings(gpt: openai.OpenAI) -> None:
    texts = ["The cat sleeps.", "A kitten naps.", "Interest rates rose in March."]
    compact = gpt.embeddings.create(model=MODEL, input=texts)  # asks for base64
    plain = gpt.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [each.embedding for each in plain.data] == [each.embedding for each in compact.data]
    cat, kitten, rates = (each.embedding for each in plain.data)
    assert abs(sum(x * x for x in cat) - 1) < 1e-4
    assert dot(cat, kitten) > dot(cat, rates)
    assert plain.usage.total_tokens == compact.usage.prompt_tokens > 12
    many = gpt.embeddings.create(model=MODEL, input=["word"] * 70, dimensions=len(cat))
    assert len(many.data) == 70
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        gpt.embeddings.create(model=MODEL, input="word", dimensions=7)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_models_and_errors(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == ["edgemoa", MODEL]
    assert gpt.models.retrieve("edgemoa:M2k3").id == "edgemoa:M2k3"
    with pytest.raises(openai.NotFoundError, match="no model"):
        gpt.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError) as told:
        gpt.chat.completions.create(model="gpt-9", messages=said("Hello"))
    assert told.value.code == "model_not_found"
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        gpt.chat.completions.create(model=MODEL, messages=said("Time?"), tools=[tool])
    calm = gpt.chat.completions.create(
        model=MODEL, messages=said("Hi."), tools=[tool], tool_choice="none", max_tokens=4
    )
    assert calm.choices[0].message.content


# --- ollama


def test_ollama_chats(llama: ollama.Client, gpt: openai.OpenAI) -> None:
    options = {"num_predict": 16, "temperature": 0, "num_ctx": 4096, "stop": ["\n\n"]}
    messages = [{"role": "system", "content": "Be brief."}, *said("Why is the sky blue?")]
    whole = llama.chat(model=f"{MODEL}:latest", messages=messages, options=options)
    assert whole.done
    assert whole.done_reason in ("stop", "length")
    assert whole.message.content
    parts = list(llama.chat(model=MODEL, messages=messages, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    end = parts[-1]
    assert end.eval_count == whole.eval_count
    assert end.eval_count is not None
    assert 0 < end.eval_count <= 16
    assert end.prompt_eval_count is not None
    assert end.prompt_eval_count > 10
    assert end.total_duration is not None
    assert end.eval_duration is not None
    assert end.total_duration >= end.eval_duration > 1_000_000
    same = gpt.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=16,
        temperature=0,
        stop="\n\n",
    )
    assert same.choices[0].message.content == whole.message.content


def test_ollama_generates(llama: ollama.Client) -> None:
    whole = llama.generate(
        model="edgemoa", prompt="Name a colour.", system="Be brief.", options={"num_predict": 8}
    )
    assert whole.response
    schema = City.model_json_schema()
    formed = llama.generate(
        model=MODEL, prompt="Paris, as JSON.", format=schema, options={"num_predict": 80}
    )
    City.model_validate_json(formed.response or "")
    told = llama.generate(
        model=MODEL, prompt="Hi.", logprobs=True, top_logprobs=2, options={"num_predict": 4}
    )
    assert told.logprobs is not None
    assert "".join(each.token for each in told.logprobs).startswith(told.response or "?")
    bare = llama.generate(model=MODEL, prompt="1, 2, 3, 4, 5, 6, 7,", raw=True)
    assert (bare.response or "").startswith(" 8, 9")
    loaded = llama.generate(model=MODEL)
    assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
    assert llama.chat(model=MODEL, messages=[], keep_alive=0).done_reason == "load"


def test_ollama_embeds(llama: ollama.Client, gpt: openai.OpenAI) -> None:
    told = llama.embed(model=MODEL, input=["One.", "Two."])
    there = gpt.embeddings.create(model=MODEL, input=["One.", "Two."], encoding_format="float")
    assert [list(each) for each in told.embeddings] == [each.embedding for each in there.data]
    assert told.prompt_eval_count == there.usage.prompt_tokens
    older = llama.embeddings(model=MODEL, prompt="One.")
    assert list(older.embedding) == list(told.embeddings[0])
    assert list(llama.embed(model=MODEL, input="").embeddings) == []


def test_ollama_finds_its_models(llama: ollama.Client, board: LocalBoard) -> None:
    models = llama.list().models
    assert [model.model for model in models] == ["edgemoa:latest", f"{MODEL}:latest"]
    assert models[1].size is not None
    assert models[1].size > 90_000_000
    assert models[1].details is not None
    assert models[1].details.parameter_size == "134.52M"
    shown = llama.show(f"{MODEL}:latest")
    assert shown.capabilities == ["completion", "embedding"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert [each.context_length for each in llama.ps().models] == [8192, 8192]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(board.socket))) as plain:
        for method in ("GET", "HEAD"):
            assert plain.request(method, "http://localhost/").status_code == 200
        assert plain.get("http://localhost/").text == "Ollama is running"
        assert plain.get("http://localhost/api/version").json()["version"]


def now(zone: str) -> str:
    """The time.

    Args:
        zone: where
    """
    return zone


def test_ollama_hears_what_is_wrong(llama: ollama.Client) -> None:
    for attempt, status, words in (
        (lambda: llama.chat(model="llama9", messages=said("Hi.")), 404, "no model 'llama9'"),
        (lambda: llama.generate(model="edgemoa:M1k1", prompt="x", raw=True), 400, "bare texts"),
        (lambda: llama.chat(model=MODEL, messages=said("x"), tools=[now]), 400, "support tools"),
        (lambda: llama.generate(model=MODEL, prompt="x", template="{{ .Prompt }}"), 400, "templ"),
        (lambda: llama.generate(model=MODEL, prompt="x", images=[b"x"]), 400, "images"),
        (lambda: llama.chat(model=MODEL, messages=said("x"), think=True), 400, "think"),
        (lambda: llama.generate(model=MODEL, prompt="x", options={"mirostat": 2}), 400, "mirostat"),
        (lambda: llama.generate(model=MODEL, prompt="x", options={"top_p": 2}), 400, "top_p"),
        (lambda: llama.show("llama9"), 404, "no model"),
        (lambda: llama.pull("llama9"), 404, "edgemoa model"),
        (lambda: llama.delete("llama9"), 404, "edgemoa model"),
    ):
        with pytest.raises(ollama.ResponseError, match=words) as told:
            attempt()
        assert told.value.status_code == status


# --- over TCP


def test_the_same_over_tcp_with_a_key(tcp: Tcp) -> None:
    with openai.OpenAI(base_url=f"{tcp.url}/v1", api_key=tcp.key, max_retries=0) as client:
        told = client.chat.completions.create(model=MODEL, messages=said("Hi."), max_tokens=4)
        assert told.choices[0].message.content
    with openai.OpenAI(base_url=f"{tcp.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "unauthorized"
    with ollama.Client(host=tcp.url, headers={"Authorization": f"Bearer {tcp.key}"}) as client:
        assert client.chat(model=MODEL, messages=said("Hi.")).done


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "30", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    return f"{done.returncode} {done.stdout}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(board: LocalBoard, tcp: Tcp) -> None:
    ask = json.dumps({"model": "edgemoa", "messages": said("Hi."), "stream": True})
    chat = ("-H", "Content-Type: application/json", "-d", ask)
    there = ("--unix-socket", str(board.socket), "http://localhost/v1/chat/completions")
    code, told = curl(*there, *chat).split(" ", 1)
    assert code == "0"
    assert told.startswith('data: {"id":"')
    assert told.endswith("data: [DONE]\n\n")
    key = ("-H", f"Authorization: Bearer {tcp.key}")
    assert curl(*key, f"{tcp.url}/api/chat", *chat).splitlines()[-1].count('"done":true') == 1
    assert '"data":[{"id":"edgemoa"' in curl(*key, f"{tcp.url}/v1/models")
    assert curl(f"{tcp.url}/v1/models").startswith('22 {"error":{"message":"an API key is needed')
    assert curl(*key, "-X", "PUT", f"{tcp.url}/v1/models").startswith('22 {"error":')
    assert curl("-I", f"{tcp.url}/").startswith("0 HTTP/1.1 200 OK")


def test_schemathesis_finds_nothing(tcp: Tcp, board: LocalBoard, tmp_path: Path) -> None:
    """No answer is a defect's, or other than the OpenAPI document says.

    That whatever a schema allows is accepted is not looked for: there has to be such a model, too.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{tcp.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {tcp.key}", "--max-time", str(SEARCH_S)),
            *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            *("--phases", "coverage,fuzzing", "--max-examples", "10", "--request-timeout", "20"),
            *("--warnings", "off", "--no-color", "--seed", "1", "--continue-on-failure"),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=SEARCH_S + 40,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"([0-9]+) generated, ([0-9]+) passed", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) > 100
    assert board.process.poll() is None
    records = [json.loads(line) for line in board.log.read_text().splitlines()]
    ours = [record for record in records if record["logger"].startswith("edgemoa")]
    assert ours
    assert not [record for record in ours if record["level"] in ("error", "critical")]
