"""The OpenAPI document: all routes, nothing else, and what is said of them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from test_server import ScriptedBoard

from edgemoa.api.gate import Gate
from edgemoa.api.server import DOCUMENT, Api
from edgemoa.client import Client


async def served(path: Path) -> tuple[set[tuple[str, str]], dict[str, Any]]:
    """What the server's router knows, and the document that it serves."""
    api = Api(ScriptedBoard(), path, 0o600, gate=cast(Gate, object()))
    await api.start()
    try:
        assert api._runner is not None
        known = {
            (route.method.lower(), route.resource.canonical)
            for route in api._runner.app.router.routes()
            if route.resource is not None
        }
        return known, await asyncio.to_thread(Client(path).get, DOCUMENT)
    finally:
        await api.stop()


@pytest.fixture
def known(tmp_path: Path) -> tuple[set[tuple[str, str]], dict[str, Any]]:
    return asyncio.run(served(tmp_path / "api.sock"))


def test_every_route_is_in_it_and_nothing_else(
    known: tuple[set[tuple[str, str]], dict[str, Any]],
) -> None:
    routes, document = known
    described = {(method, path) for path, item in document["paths"].items() for method in item}
    assert described == routes
    assert len(routes) > 40


def test_it_says_all_of_a_route(known: tuple[set[tuple[str, str]], dict[str, Any]]) -> None:
    _, document = known
    names = set()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            names.add(operation["operationId"])
            inside = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert inside == set(re.findall(r"{(\w+)}", path))
            assert {"401", "403", "500"} <= operation["responses"].keys()
            reads = "requestBody" in operation
            assert not reads or method == "post"
            assert not reads or "400" in operation["responses"]
            for status, response in operation["responses"].items():
                assert response["description"]
                assert (method == "head") == ("content" not in response), (path, method, status)
    assert len(names) == sum(map(len, document["paths"].values()))
    chat = document["paths"]["/v1/chat/completions"]["post"]
    expected = "200 400 401 403 404 409 413 429 500 503 504 507"
    assert sorted(chat["responses"]) == expected.split()
    assert chat["responses"]["429"]["headers"]["Retry-After"]
    ollama = document["paths"]["/api/chat"]["post"]["responses"]["400"]["content"]
    assert ollama["application/json"]["schema"]["$ref"].endswith("/OllamaError")


def test_its_types_have_plain_names_and_are_all_used(
    known: tuple[set[tuple[str, str]], dict[str, Any]],
) -> None:
    _, document = known
    text = json.dumps(document)
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert used == document["components"]["schemas"].keys()
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for name in used)
    assert ":class:" not in text
    assert "``" not in text
