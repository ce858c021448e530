"""The routes that say which models there are, in OpenAI's shapes and in Ollama's; and who it is
that answers, for Ollama's clients, which look for that first.
"""

from __future__ import annotations

from aiohttp import web

from edgemoa import __version__
from edgemoa.api import ollama, openai
from edgemoa.api.answers import json_response
from edgemoa.api.service import Service
from edgemoa.core import limits
from edgemoa.errors import NotFoundError, UserError


def routes(service: Service) -> list[web.RouteDef]:
    """The routes, to be added to an application."""

    async def models(_: web.Request) -> web.Response:
        card = service.card()
        return json_response(openai.models_json(card.name, card.created))

    async def model(http: web.Request) -> web.Response:
        name, card = http.match_info["id"], service.card()
        openai.plan_of(name, card.name)
        return json_response(openai.model_json(name, card.created))

    async def running(_: web.Request) -> web.Response:
        return web.Response(text=ollama.RUNNING)

    async def version(_: web.Request) -> web.Response:
        return json_response({"version": ollama.VERSION, "edgemoa": __version__})

    async def tags(_: web.Request) -> web.Response:
        return json_response(ollama.tags_json(service.card()))

    async def loaded(_: web.Request) -> web.Response:
        return json_response(ollama.ps_json(service.card(), service.own_model()[1]))

    async def show(http: web.Request) -> web.Response:
        body = await http.content.read(4 * limits.KIB + 1)
        while 0 < len(body) <= 4 * limits.KIB and (more := await http.content.readany()):
            body += more
        if len(body) > 4 * limits.KIB:
            raise UserError("the request is too long", hint="name a model")
        ask, card = openai.decode(body, ollama.show_decoder), service.card()
        name = ollama.name_of(ask.model or ask.name)
        own = openai.plan_of(name, card.name) == (0, 0) and name == card.name
        return json_response(ollama.show_json(card if own else ollama.group_card(card)))

    async def other(http: web.Request) -> web.Response:
        raise NotFoundError(
            f"{http.method} {http.path} is not supported",
            hint="models come and go with `edgemoa model` on the board",
        )

    return [
        web.get("/v1/models", models),
        web.get("/v1/models/{id}", model),
        web.get("/", running),
        web.get("/api/version", version),
        web.get("/api/tags", tags),
        web.get("/api/ps", loaded),
        web.post("/api/show", show),
        *(web.post(f"/api/{what}", other) for what in ("pull", "push", "create", "copy")),
        web.delete("/api/delete", other),
    ]
