"""The routes that say which models there are, in OpenAI's shapes and in Ollama's; and who it is
that answers, for Ollama's clients, which look for that first.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from edgemoa import __version__
from edgemoa.api import ollama, openai
from edgemoa.api.answers import json_response
from edgemoa.api.arrivals import read_small
from edgemoa.api.routes import Parameter, Route, Told, ok
from edgemoa.api.service import Service
from edgemoa.errors import ModelNotFoundError, NotFoundError, UserError

_LEAVE_IT: tuple[tuple[str, str], ...] = (
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
)


class Version(msgspec.Struct):
    """``version`` is that of Ollama, whose API this is like."""

    version: str = ollama.VERSION
    edgemoa: str = __version__


def routes(service: Service) -> list[Route]:
    """The routes, to be added to an application."""

    async def models(_: web.Request) -> web.Response:
        card = service.card()
        return json_response(openai.models(card.name, card.created))

    async def model(http: web.Request) -> web.Response:
        name, card = http.match_info["id"], service.card()
        openai.plan_of(name, card.name)
        return json_response(openai.Model(name, card.created))

    async def running(_: web.Request) -> web.Response:
        return web.Response(text=ollama.RUNNING)

    async def version(_: web.Request) -> web.Response:
        return json_response(Version())

    async def tags(_: web.Request) -> web.Response:
        return json_response(ollama.tags_json(service.card()))

    async def loaded(_: web.Request) -> web.Response:
        return json_response(ollama.ps_json(service.card(), service.own_model()[1]))

    async def show(http: web.Request) -> web.Response:
        ask, card = openai.decode(await read_small(http), ollama.show_decoder), service.card()
        name = ollama.name_of(ask.model or ask.name)
        openai.plan_of(name, card.name)
        return json_response(
            ollama.show_json(card if name == card.name else ollama.group_card(card))
        )

    async def other(http: web.Request) -> web.Response:
        raise NotFoundError(
            f"{http.method} {http.path} is not supported",
            hint="models come and go with `edgemoa model` on the board",
        )

    return [
        Route(
            method="GET",
            path="/v1/models",
            handler=models,
            about='What "model" may be',
            told=ok("The group, and this board's model alone", openai.Models),
            head=True,
        ),
        Route(
            method="GET",
            path="/v1/models/{id}",
            handler=model,
            about="A model, or a plan of the group",
            told=ok("It is there", openai.Model),
            parameters=[
                Parameter("id", "path", "its name", {"type": "string", "minLength": 1}),
            ],
            errors=(UserError, ModelNotFoundError),
            head=True,
        ),
        Route(
            method="GET",
            path="/",
            handler=running,
            about="That somebody is here, as Ollama says it",
            told={200: Told("It is", {"text/plain": None})},
            head=True,
        ),
        Route(
            method="GET",
            path="/api/version",
            handler=version,
            about="Which version of Ollama's API this is like",
            told=ok("It, and edgemoa's own", Version),
            head=True,
        ),
        Route(
            method="GET",
            path="/api/tags",
            handler=tags,
            about='What "model" may be, as Ollama says it',
            told=ok("The group, and this board's model alone", ollama.OllamaModels),
            head=True,
        ),
        Route(
            method="GET",
            path="/api/ps",
            handler=loaded,
            about="Which models are loaded",
            told=ok("The same, once it is loaded", ollama.OllamaModels),
            head=True,
        ),
        Route(
            method="POST",
            path="/api/show",
            handler=show,
            about="What a model is and can do",
            asks=ollama.ShowAsk,
            told=ok("It", ollama.Shown),
            errors=(UserError, ModelNotFoundError),
        ),
        *(
            Route(
                method="DELETE" if method == "DELETE" else "POST",
                path=path,
                handler=other,
                about="Not supported: models come and go with `edgemoa model` on the board",
                told={},
                errors=(NotFoundError,),
            )
            for method, path in _LEAVE_IT
        ),
    ]
