"""Routes, and what is said of them: the OpenAPI document is made of the very list that requests are
served by, and of the types that they are decoded into, so neither knows more than the other.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from aiohttp import web

from edgemoa import __version__
from edgemoa.api import ollama, openai
from edgemoa.errors import (
    EdgemoaError,
    ForbiddenError,
    OverloadedError,
    UnauthorizedError,
)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON: Final = "application/json"
_REF: Final = "#/components/schemas/{name}"
_ROLE: Final = re.compile(r":\w+:`(?:[\w.]+\.)?(\w+)`")
_ALWAYS: Final = (UnauthorizedError, ForbiddenError, EdgemoaError)


class Parameter(NamedTuple):
    """A parameter, which its handler checks."""

    name: str
    where: Literal["path", "query", "header"]
    about: str
    schema: Mapping[str, Any]


class Pieces(NamedTuple):
    """A stream: the type of each event's data, or of each line."""

    kind: Any


class Told(NamedTuple):
    """A response: what it is, and its type, by its media type: that of the JSON, :class:`Pieces`,
    or None for text."""

    about: str
    media: Mapping[str, Any]
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way to ask.

    :param about: what for, in a sentence.
    :param told: the responses, by their status; all but the errors.
    :param asks: the type of the body; None for no body.
    :param errors: those that it is known to end with, besides those that any request can.
    :param head: whether HEAD is served, too.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    about: str
    told: Mapping[int, Told]
    asks: Any = None
    parameters: Sequence[Parameter] = ()
    errors: Sequence[type[EdgemoaError] | int] = ()
    head: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """All that it is served by."""
        return (self.method, "HEAD") if self.head else (self.method,)

    def served(self) -> web.RouteDef:
        """As aiohttp has it."""
        more = {"allow_head": self.head} if self.method == "GET" else {}
        return web.RouteDef(self.method, self.path, self.handler, more)


def ok(about: str, kind: Any, **more: Any) -> dict[int, Told]:
    """The usual response: 200, and JSON."""
    return {200: Told(about, {JSON: kind}, **more)}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    kinds: list[Any] = [openai.Error, ollama.OllamaError]
    for route in routes:
        kinds += [] if route.asks is None else [route.asks]
        for told in route.told.values():
            found = (k.kind if isinstance(k, Pieces) else k for k in told.media.values())
            kinds += [kind for kind in found if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    known = list(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = _operation(route, method, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgemoa",
            "version": __version__,
            "description": "A board's local API, in OpenAI's shapes and in Ollama's.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": _plain(components),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Over TCP, unless api.keyless is set. `edgemoa api-key new`",
                },
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(route: Route, method: str, known: list[tuple[Any, Any]]) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_")
    operation: dict[str, Any] = {"operationId": name, "summary": route.about}
    if route.parameters:
        operation["parameters"] = [
            {
                "name": each.name,
                "in": each.where,
                "description": each.about,
                "required": each.where == "path",
                "schema": dict(each.schema),
            }
            for each in route.parameters
        ]
    if route.asks is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": _schema(route.asks, known)}},
        }
    responses = {
        str(status): _response(told, known, bare=method == "HEAD")
        for status, told in route.told.items()
    }
    for status, errors in _by_status([*route.errors, *_ALWAYS]).items():
        if str(status) not in responses:
            shape = ollama.OllamaError if route.path.startswith("/api/") else openai.Error
            told = Told(_about(status, errors), {JSON: shape}, _headers(errors))
            responses[str(status)] = _response(told, known, bare=method == "HEAD")
    operation["responses"] = dict(sorted(responses.items()))
    return operation


def _response(told: Told, known: list[tuple[Any, Any]], *, bare: bool) -> dict[str, Any]:
    response: dict[str, Any] = {"description": told.about}
    if told.headers:
        response["headers"] = {
            name: {"description": about, "schema": {"type": "string"}}
            for name, about in told.headers.items()
        }
    if told.media and not bare:
        response["content"] = {
            media: {"schema": _schema(kind, known)} for media, kind in told.media.items()
        }
    return response


def _schema(kind: Any, known: Iterable[tuple[Any, Any]]) -> Any:
    if kind is None:
        return {"type": "string"}
    if isinstance(kind, Pieces):
        each = {"contentMediaType": JSON, "contentSchema": _schema(kind.kind, known)}
        return {"type": "string", "description": "Of each event's data, or line"} | each
    return next(schema for each, schema in known if each is kind)


def _plain(schema: Any) -> Any:
    """A schema whose descriptions, which are docstrings, are Markdown."""
    if isinstance(schema, dict):
        return {
            name: _ROLE.sub(r"`\1`", value).replace("``", "`")
            if name == "description" and isinstance(value, str)
            else _plain(value)
            for name, value in schema.items()
        }
    return [_plain(each) for each in schema] if isinstance(schema, list) else schema


def _by_status(
    errors: Iterable[type[EdgemoaError] | int],
) -> dict[int, list[type[EdgemoaError]]]:
    found: dict[int, list[type[EdgemoaError]]] = {}
    for error in errors:
        if isinstance(error, int):
            found.setdefault(error, [])
        else:
            found.setdefault(error.http_status, []).append(error)
    return found


def _about(status: int, errors: Sequence[type[EdgemoaError]]) -> str:
    codes = ", ".join(f"`{code}`" for code in dict.fromkeys(error.code for error in errors))
    return f"{HTTPStatus(status).phrase}{': ' if codes else ''}{codes}"


def _headers(errors: Sequence[type[EdgemoaError]]) -> dict[str, str]:
    return {"Retry-After": "seconds"} if OverloadedError in errors else {}
