"""The local API's bodies, as far as they are understood before a model is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
from targets import Target

from edgemoa.api import completions, embeddings, ollama, openai
from edgemoa.api.doors import check_origin
from edgemoa.core import limits
from edgemoa.core.events import Wishes
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.errors import ForbiddenError, UserError

OWN: Final = "smollm2-135m-instruct"
JSON_MULTIPLE: Final = 48
"""An empty object takes 2 bytes and a comma in JSON, and 64 in memory, beside 8 to find it by."""

_TURNS: Final = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Why is the sky blue? 🌌"}]},
]
_CALLS: Final = [
    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
    {"function": {"name": "now", "arguments": {}}},
]
_TALK: Final[list[dict[str, Any]]] = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": _CALLS},
    {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
]
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"type": "integer"}},
                "$defs": {"n": {"type": "number"}},
            },
        },
    },
    {"function": {"name": "now"}},
]
_COMMON: Final[dict[str, Any]] = {
    "model": "edgemoa:M2k3",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 64,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"50256": -100, "7": 1.5},
    "seed": -1,
    "stop": ["\n\n", "END"],
    "edgemoa": {"layers": 1, "proposers": 2, "deadline_ms": 60_000, "strict": True, "trace": True},
    "n": 2,
}
_SCHEMA: Final = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "null"}}}}


def _chat(body: bytes) -> tuple[object, ...]:
    return _understood([openai.decode(body, openai.chat_decoder)], "/v1/chat/completions")


def _text(body: bytes) -> tuple[object, ...]:
    ask = openai.decode(body, completions.decoder)
    return _understood(ask.asks(OWN), "/v1/completions")


def _ollama_chat(body: bytes) -> tuple[object, ...]:
    ask = openai.decode(body, ollama.chat_decoder)
    ollama.Telling.of(ask)
    return _understood([ask.ask()], "/api/chat")


def _ollama_generate(body: bytes) -> tuple[object, ...]:
    ask = openai.decode(body, ollama.generate_decoder)
    ollama.Telling.of(ask)
    return _understood([ask.ask()], "/api/generate")


def _understood(asks: list[openai.ChatRequest], path: str) -> tuple[object, ...]:
    """What api/prompts.py makes of requests before it counts their tokens."""
    openai.digest(path, asks)
    made: list[tuple[tuple[ChatMessage, ...], tuple[int, int], Sampling, Wishes]] = []
    for ask in asks:
        openai.plan_of(ask.model, OWN)
        messages, given = ask.prompt()
        plan = ask.plan(OWN, 1, 2, alone=given != "turns")
        sampling = ask.sampling(512, 7)
        made.append((messages, plan, sampling, ask.wishes(sampling.max_tokens, given)))
        if sum(len(turn.content.encode()) for turn in messages) > limits.MAX_PROMPT_BYTES:
            raise AssertionError("a conversation beyond its bound was taken")
        msgspec.msgpack.encode(messages)  # as other boards, and the model process, are told
        msgspec.json.encode(made[-1])  # as the journal keeps it
    return (*asks, *made)


def _embeddings(body: bytes) -> object:
    ask = openai.decode(body, embeddings.decoder)
    openai.plan_of(ask.model, OWN)
    return [ask, list(embeddings.batches(ask.input))]


def _ollama_small(body: bytes) -> object:
    """The first byte says which of Ollama's small requests it is."""
    kind = body[0] % 3 if body else 0
    if kind == 0:
        ask = openai.decode(body[1:], ollama.embed_decoder)
        return [ask, list(embeddings.batches(ask.input or []))]
    if kind == 1:
        return openai.decode(body[1:], ollama.embeddings_decoder)
    return openai.decode(body[1:], ollama.show_decoder)


def _origin(data: bytes) -> object:
    """A Host header and, behind a line end, an Origin."""
    host, _, origin = data.decode("latin-1").partition("\n")
    check_origin(host, origin or None, {"pi", "pi.local"})
    return host


def _jsons(*values: object) -> Iterator[bytes]:
    for value in values:
        yield json.dumps(value).encode()


def _chat_seeds() -> Iterable[bytes]:
    return _jsons(
        {"messages": _TURNS},
        {"messages": _TURNS, **_COMMON, "logprobs": True, "top_logprobs": 3},
        {"messages": _TURNS, "response_format": {"type": "json_schema", "json_schema": _SCHEMA}},
        {"messages": _TURNS, "response_format": {"type": "json_object", "schema": {}}},
        {"messages": _TALK, "tools": _TOOLS, "tool_choice": "auto", "parallel_tool_calls": False},
        {"messages": _TURNS, "tools": _TOOLS, "tool_choice": "required"},
        {
            "messages": _TURNS,
            "tools": _TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "add"}},
        },
        {"messages": _TURNS, "model": OWN, "edgemoa": {"plan": "M0k0"}, "repeat_penalty": 1.2},
        {"messages": _TURNS, "functions": [], "audio": None, "modalities": ["text"]},
    )


def _text_seeds() -> Iterable[bytes]:
    return _jsons(
        {"prompt": "Once"},
        {"prompt": ["Once", "Twice"], **_COMMON, "model": OWN, "best_of": 2, "logprobs": 3},
        {"prompt": "a", "echo": False, "suffix": "", "response_format": {"type": "text"}},
    )


def _ollama_seeds() -> Iterable[bytes]:
    options = {"num_predict": 5, "temperature": 0.5, "stop": "\n", "repeat_last_n": 0, "num_ctx": 9}
    more = {"options": options, "format": "json", "think": False, "keep_alive": "5m"}
    return _jsons(
        {"model": "edgemoa:latest", "messages": [{"role": "user", "content": "Hello"}], **more},
        {"messages": [{**_TALK[0], "images": []}, *_TALK[1:2]], "tools": _TOOLS},
        {"messages": [_TALK[0], {"role": "tool", "tool_name": "now", "content": "4"}]},
        {"messages": [], "format": {"type": "object"}, "logprobs": True, "top_logprobs": 1},
    )


def _generate_seeds() -> Iterable[bytes]:
    return _jsons(
        {"prompt": "Hello", "system": "Be brief.", "options": {"mirostat": 0, "tfs_z": 1}},
        {"prompt": "Hello", "raw": True, "stream": False, "format": {"type": "array"}},
        {"prompt": "", "template": "", "context": [], "images": [], "edgemoa": {"trace": True}},
    )


def _embedding_seeds() -> Iterable[bytes]:
    return _jsons(
        {"input": "text", "model": OWN, "encoding_format": "base64", "dimensions": 576},
        {"input": ["text", "more", "🌌"], "encoding_format": "float"},
    )


def _small_seeds() -> Iterable[bytes]:
    embed = {"model": OWN, "input": ["a", "b"], "dimensions": 0, "truncate": True}
    asks = ((0, embed), (1, {"model": OWN, "prompt": "a"}), (2, {"name": OWN}))
    return (bytes([kind]) + json.dumps(ask).encode() for kind, ask in asks)


def _origin_seeds() -> Iterable[bytes]:
    hosts = "localhost:11434", "127.0.0.1", "[::1]:80", "pi.local.", "a.localhost", "[fe80::1%eth0]"
    return [*(host.encode() for host in hosts), b"evil.example\nhttps://evil.example"]


_REFUSED: Final = (UserError,)

TARGETS: Final = [
    Target(name, parse, _REFUSED, seeds, "json", head, JSON_MULTIPLE)
    for name, parse, seeds, head in (
        ("api-chat", _chat, _chat_seeds, 0),
        ("api-text", _text, _text_seeds, 0),
        ("api-embeddings", _embeddings, _embedding_seeds, 0),
        ("api-ollama-chat", _ollama_chat, _ollama_seeds, 0),
        ("api-ollama-generate", _ollama_generate, _generate_seeds, 0),
        ("api-ollama-small", _ollama_small, _small_seeds, 1),
    )
] + [Target("api-origin", _origin, (ForbiddenError,), _origin_seeds, "bytes")]
