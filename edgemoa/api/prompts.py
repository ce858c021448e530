"""The routes by which the model is asked: chat and text completions, embeddings, and prompts that
are left, in OpenAI's shapes and in Ollama's.

Whatever the shape, a prompt is read, measured and taken in one way, and its answer told in one way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec
from aiohttp import web

from edgemoa.api import completions, embeddings, ollama, openai, requests
from edgemoa.api.answers import Events, Shape, encode, json_response, tell
from edgemoa.api.arrivals import Arrivals, Place, peer
from edgemoa.api.chats import ChatTelling, Chunk, Completion
from edgemoa.api.completions import TextChunk
from edgemoa.api.requests import Ticketed
from edgemoa.api.routes import JSON, Parameter, Pieces, Route, Told, ok
from edgemoa.api.service import Service, failure
from edgemoa.core.events import Answered, Failed, Request
from edgemoa.core.messages import ChatMessage
from edgemoa.desk import Prompt, Ticket
from edgemoa.errors import (
    BoardError,
    ConflictError,
    DeadlineError,
    DiskFullError,
    EdgemoaError,
    EngineError,
    InvalidPromptError,
    ModelInvalidError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    SchemaError,
    StateError,
    UserError,
)

MAX_EMBEDDING: Final = 4  # requests for vectors at a time
_MS_PER_S: Final = 1000
_EVENTS: Final = "text/event-stream"
_NDJSON: Final = "application/x-ndjson"
_STREAM: Final = "The answer; streamed, events, of which the last is `[DONE]`"
_LINES: Final = "The answer; streamed, a line for each piece of it"
_PROMPT_ERRORS: Final = (
    *(UserError, InvalidPromptError, PromptTooLongError, SchemaError, ModelNotFoundError),
    *(ConflictError, OverloadedError, EngineError, BoardError, StateError),
    *(DeadlineError, DiskFullError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE.value),
)
_EMBED_ERRORS: Final = (
    *(UserError, InvalidPromptError, PromptTooLongError, ModelInvalidError, ModelNotFoundError),
    *(OverloadedError, EngineError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE.value),
)
_HELLO: Final = (ChatMessage("user", "Hello"),)

T = TypeVar("T")


class _Named(Shape, Protocol):
    """A shape in which prompts are told by name and time."""

    id: str
    created: int


_Reader: TypeAlias = Callable[[bytes], tuple[list[openai.ChatRequest], _Named]]
"""What a body asks for, and how it is to be answered."""


class Prompts:
    """See the module.

    :param arriving_bytes: that requests may take, all together, until they are accepted or refused.
    """

    def __init__(self, service: Service, arriving_bytes: int) -> None:
        self._service = service
        self._arrivals = Arrivals(service, arriving_bytes)
        self._embedding = 0

    def stop(self) -> None:
        """Nothing more is asked."""
        self._arrivals.stop()

    def routes(self) -> list[Route]:
        """The routes, to be added to an application."""
        key = Parameter(
            "Idempotency-Key",
            "header",
            "what the client calls its prompt: the same is not answered twice",
            {"type": "string", "maxLength": requests.MAX_KEY_CHARS, "pattern": "^[ -~]*$"},
        )
        one = Parameter("id", "path", "of the request", {"type": "string", "minLength": 1})
        return [
            Route(
                method="POST",
                path="/v1/chat/completions",
                handler=self._chat,
                about="An answer to a conversation, whole or streamed",
                asks=openai.ChatRequest,
                told={200: Told(_STREAM, {JSON: Completion, _EVENTS: Pieces(Chunk)})},
                parameters=[key],
                errors=_PROMPT_ERRORS,
            ),
            Route(
                method="POST",
                path="/v1/completions",
                handler=self._complete,
                about="How a text goes on",
                asks=completions.CompletionRequest,
                told={200: Told(_STREAM, {JSON: TextChunk, _EVENTS: Pieces(TextChunk)})},
                parameters=[key],
                errors=_PROMPT_ERRORS,
            ),
            Route(
                method="POST",
                path="/v1/embeddings",
                handler=self._embeddings,
                about="Texts as vectors, by this board's own model",
                asks=embeddings.EmbeddingRequest,
                told=ok("The vectors", embeddings.Embeddings),
                errors=_EMBED_ERRORS,
            ),
            Route(
                method="POST",
                path=requests.PATH,
                handler=self._leave,
                about="Leave a prompt, and come back for its answer",
                asks=openai.ChatRequest,
                told={202: Told("Accepted", {JSON: Ticketed}, {"Location": "where it is"})},
                parameters=[key],
                errors=_PROMPT_ERRORS,
            ),
            Route(
                method="GET",
                path=requests.PATH,
                handler=self._unfinished,
                about="Your prompts that have no outcome yet",
                told=ok("The prompts, the oldest first", requests.Unfinished),
            ),
            Route(
                method="GET",
                path=requests.PATH + "/{id}",
                handler=self._find,
                about="How a prompt stands; its answer",
                told={
                    200: Told(
                        _STREAM,
                        {JSON: Ticketed, _EVENTS: Pieces(Chunk)},
                        {"Location": "where it is"},
                    )
                },
                parameters=[
                    one,
                    Parameter(
                        "wait",
                        "query",
                        f"seconds to wait for the end, {requests.MAX_WAIT_S} at most",
                        {"type": "integer", "minimum": 0, "maximum": 99_999},
                    ),
                ],
                errors=(UserError, NotFoundError),
            ),
            Route(
                method="GET",
                path=requests.PATH + "/{id}/trace",
                handler=self._trace,
                about="How an answer came about, without the answer",
                told=ok("How it came about, or how far it has come", requests.Trace),
                parameters=[one],
                errors=(NotFoundError,),
            ),
            Route(
                method="DELETE",
                path=requests.PATH + "/{id}",
                handler=self._forget,
                about="Take a prompt back, or have its answer deleted",
                told=ok("It is gone", requests.Deleted),
                parameters=[one],
                errors=(NotFoundError,),
            ),
            Route(
                method="POST",
                path="/api/chat",
                handler=self._ollama_chat,
                about="An answer to a conversation, in lines of JSON or whole",
                asks=ollama.ChatAsk,
                told={200: Told(_LINES, {JSON: ollama.ChatTold, _NDJSON: Pieces(ollama.ChatTold)})},
                parameters=[key],
                errors=_PROMPT_ERRORS,
            ),
            Route(
                method="POST",
                path="/api/generate",
                handler=self._ollama_generate,
                about="An answer to a prompt, in lines of JSON or whole",
                asks=ollama.GenerateAsk,
                told={
                    200: Told(
                        _LINES, {JSON: ollama.GenerateTold, _NDJSON: Pieces(ollama.GenerateTold)}
                    )
                },
                parameters=[key],
                errors=_PROMPT_ERRORS,
            ),
            Route(
                method="POST",
                path="/api/embed",
                handler=self._ollama_embed,
                about="Texts as vectors",
                asks=ollama.EmbedAsk,
                told=ok("The vectors", ollama.EmbedTold),
                errors=_EMBED_ERRORS,
            ),
            Route(
                method="POST",
                path="/api/embeddings",
                handler=self._ollama_embeddings,
                about="A text as a vector",
                asks=ollama.EmbeddingsAsk,
                told=ok("The vector", ollama.EmbeddingTold),
                errors=_EMBED_ERRORS,
            ),
        ]

    # --- OpenAI's shapes

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        def read(body: bytes) -> tuple[list[openai.ChatRequest], _Named]:
            ask = openai.decode(body, openai.chat_decoder)
            return [ask], ChatTelling.of(ask, bool(ask.logprobs))

        return await self._answer(http, read)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        def read(body: bytes) -> tuple[list[openai.ChatRequest], _Named]:
            ask = openai.decode(body, completions.decoder)
            asks = ask.asks(self._service.own_model()[0])
            return asks, completions.TextTelling.of(ask, ask.logprobs is not None, len(asks))

        return await self._answer(http, read)

    async def _embeddings(self, http: web.Request) -> web.Response:
        ask = await self._read(http, embeddings.decoder)
        if not ask.input:
            raise InvalidPromptError("there is nothing to embed", hint="put texts into 'input'")
        vectors, tokens = await self._embed(ask.model, ask.input, ask.dimensions)
        model = self._service.own_model()[0]
        # Of many texts it takes a while, and others are not to wait for it.
        return await _large(lambda: embeddings.embeddings_json(ask, model, vectors, tokens))

    # --- Ollama's shapes

    async def _ollama_chat(self, http: web.Request) -> web.StreamResponse:
        return await self._ollama(http, lambda body: openai.decode(body, ollama.chat_decoder))

    async def _ollama_generate(self, http: web.Request) -> web.StreamResponse:
        return await self._ollama(http, lambda body: openai.decode(body, ollama.generate_decoder))

    async def _ollama(
        self, http: web.Request, decode: Callable[[bytes], ollama.ChatAsk | ollama.GenerateAsk]
    ) -> web.StreamResponse:
        def read(body: bytes) -> tuple[list[openai.ChatRequest], _Named]:
            ask = decode(body)
            shape = ollama.Telling.of(ask)
            if ask.loads:
                openai.plan_of(ollama.name_of(ask.model), self._service.own_model()[0])
                return [], shape
            return [ask.ask()], shape

        return await self._answer(http, read)

    async def _ollama_embed(self, http: web.Request) -> web.Response:
        began = time.monotonic()
        ask = await self._read(http, ollama.embed_decoder)
        vectors, tokens = await self._embed(
            ollama.name_of(ask.model), ask.input or [], ask.dimensions or None
        )
        duration_ms = round((time.monotonic() - began) * _MS_PER_S)
        return await _large(lambda: ollama.embed_json(ask.model, vectors, tokens, duration_ms))

    async def _ollama_embeddings(self, http: web.Request) -> web.Response:
        ask = await self._read(http, ollama.embeddings_decoder)
        vectors, _ = await self._embed(ollama.name_of(ask.model), ask.prompt or [], None)
        found = [number for each in vectors for number in embeddings.numbers(each)]
        return json_response(ollama.EmbeddingTold(found))

    # --- prompts that are left

    async def _leave(self, http: web.Request) -> web.Response:
        """Take a prompt whose client comes back for the answer."""

        def read(body: bytes) -> tuple[list[openai.ChatRequest], _Named]:
            ask = openai.decode(body, openai.chat_decoder)
            if (ask.n or 1) > 1:
                raise UserError("a prompt that is left has one answer", hint="leave 'n' out")
            return [ask], ChatTelling.of(ask, logprobs=False)

        with self._arrivals.place() as place:
            _, (prompt,) = await self._arrive(http, place, read, holds=False)
            request_id = await self._take(prompt)
        ticket = await self._service.find(request_id, prompt.owner)
        if ticket is None:
            raise NotFoundError("the prompt has been taken back")
        return _ticket(ticket, 202)

    async def _unfinished(self, http: web.Request) -> web.Response:
        tickets = self._service.unfinished(peer(http)[0])
        return json_response(requests.Unfinished([requests.ticket_json(t) for t in tickets]))

    async def _find(self, http: web.Request) -> web.StreamResponse:
        """How a prompt stands; with ``?wait=`` not before its end, or so many seconds; or all that
        happens with it, as events."""
        request_id, owner = http.match_info["id"], peer(http)[0]
        wait_s, ticket = requests.wait_s(http), await self._ticket(http)
        if requests.wants_events(http):
            shape = ChatTelling(
                request_id, ticket.created, ticket.model, stream=True, events=True, usage=True
            )
            follow = self._service.follow(request_id, owner)
            async with contextlib.aclosing(Events(follow)) as events:
                return await tell(http, shape, events)
        if ticket.end is None and wait_s:
            await self._await_end(request_id, owner, wait_s)
            ticket = await self._service.find(request_id, owner) or ticket
        return _ticket(ticket)

    async def _trace(self, http: web.Request) -> web.Response:
        ticket = await self._ticket(http)
        return json_response(requests.trace_json(ticket, _bad_end(ticket)))

    async def _ticket(self, http: web.Request) -> Ticket:
        ticket = await self._service.find(http.match_info["id"], peer(http)[0])
        if ticket is None:
            raise NotFoundError(
                "no such request here", hint="it was deleted, its time is over, or it is another's"
            )
        return ticket

    async def _await_end(self, request_id: str, owner: str, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        follow = self._service.follow(request_id, owner)
        async with contextlib.aclosing(Events(follow)) as events:
            while (left := until - asyncio.get_running_loop().time()) > 0:
                happened = await events.next_within(left)
                if happened is not None and isinstance(happened[1], Answered | Failed):
                    return

    async def _forget(self, http: web.Request) -> web.Response:
        request_id = http.match_info["id"]
        if not await self._service.forget(request_id, peer(http)[0]):
            raise NotFoundError("no such request here")
        return json_response(requests.Deleted(request_id))

    # --- what they share

    async def _answer(self, http: web.Request, read: _Reader) -> web.StreamResponse:
        """Take the prompts that a body holds, and tell what becomes of them."""
        with self._arrivals.place() as place:
            shape, prompts = await self._arrive(http, place, read)
            ids = await self._take_all(prompts)
        if not prompts:  # the model is to be there, no more
            await self._arrivals.measure(_HELLO)
            shape.created = int(time.time())
            return json_response(shape.whole([], []))
        first = prompts[0]
        shape.id, shape.created = ids[0], first.created
        if shape.id != first.request.request_id:  # known by its key
            known = await self._service.find(shape.id, first.owner)
            shape.created = known.created if known is not None else shape.created
        follow = [self._service.follow(each, first.owner, holds=True) for each in ids]
        async with contextlib.aclosing(Events(*follow)) as events:
            return await tell(http, shape, events, len(ids))

    async def _arrive(
        self, http: web.Request, place: Place, read: _Reader, *, holds: bool = True
    ) -> tuple[_Named, list[Prompt]]:
        """Read prompts, and see whether they can be taken; several answers to one are as many
        prompts, each with its own seed. Of all that was sent only what the board needs is left in
        memory then."""
        if refusal := self._service.refusal():
            raise failure(refusal)  # before anything is read
        (owner, client), key = peer(http), requests.idempotency_key(http)
        asks, shape = read(await self._arrivals.read(http, place))
        digest = openai.digest(http.path, asks) if key else b""
        prompts: list[Prompt] = []
        for ask in asks:
            request = await self._request(ask, client)
            for _ in range(ask.n or 1):
                at = len(prompts)
                seed = (request.sampling.seed + at) & 0x7FFFFFFF
                one = msgspec.structs.replace(
                    request,
                    request_id=self._service.new_request_id(),
                    sampling=msgspec.structs.replace(request.sampling, seed=seed),
                )
                own = f"{key}\n{at}" if key and at else key  # no client's has a line end in it
                created = int(time.time())
                prompts.append(Prompt(one, ask.model, owner, created, own, digest, holds))
        return shape, prompts

    async def _read(self, http: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
        with self._arrivals.place() as place:
            return openai.decode(await self._arrivals.read(http, place), decoder)

    async def _request(self, ask: openai.ChatRequest, client: str) -> Request:
        own_model = self._service.own_model()[0]
        layers, proposers, max_tokens, deadline_ms = self._service.plan()
        openai.plan_of(ask.model, own_model)  # the first thing to be told: no such model
        messages, given = ask.prompt()
        layers, proposers = ask.plan(own_model, layers, proposers, alone=given != "turns")
        sampling = ask.sampling(max_tokens, secrets.randbits(31))
        wishes = ask.wishes(sampling.max_tokens, given)
        prompt_tokens = await self._arrivals.measure(messages, wishes.schema, given)
        context_tokens = self._service.own_model()[1]  # known by now, even at the first start
        if prompt_tokens >= context_tokens:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens, the model's context {context_tokens}",
                hint="shorten the prompt or the conversation",
            )
        return Request(
            request_id="",
            messages=messages,
            prompt_tokens=prompt_tokens,
            layers=layers,
            proposers=proposers,
            sampling=sampling,
            deadline_ms=ask.edgemoa.deadline_ms or deadline_ms,
            wishes=wishes,
            strict=ask.edgemoa.strict,
            client=client,
            streamed=bool(ask.stream),
        )

    async def _take_all(self, prompts: Sequence[Prompt]) -> list[str]:
        """All of them, or none; at a time, so that the disk is waited for once."""
        taking = [asyncio.ensure_future(self._take(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*taking)
        except BaseException:
            for each in taking:
                each.cancel()
            await asyncio.wait(taking)
            for prompt, each in zip(prompts, taking, strict=True):
                taken = not (each.cancelled() or each.exception()) and each.result()
                if taken == prompt.request.request_id:
                    await self._service.forget(taken, prompt.owner)
            raise

    async def _take(self, prompt: Prompt) -> str:
        taken = await self._service.take(prompt)
        if isinstance(taken, Failed):
            raise failure(taken)
        return taken

    async def _embed(
        self, model: str, texts: embeddings.Texts, dimensions: int | None
    ) -> tuple[list[bytes], int]:
        """A vector for each text, and how many tokens were read."""
        openai.plan_of(model, self._service.own_model()[0])
        if self._embedding >= MAX_EMBEDDING:
            raise OverloadedError("too many texts are embedded at a time", hint="try again in 1 s")
        self._embedding += 1
        try:
            vectors: list[bytes] = []
            tokens = 0
            for batch in embeddings.batches(texts):
                for vector in await self._service.embed(batch):
                    vectors.append(vector.data)
                    tokens += vector.tokens
                embeddings.check_dimensions(dimensions, vectors[0])
            return vectors, tokens
        finally:
            self._embedding -= 1


async def _large(make: Callable[[], object]) -> web.Response:
    """A response that takes a while to be put into JSON."""
    body = await asyncio.to_thread(lambda: encode(make()))
    return web.Response(body=body, content_type="application/json")


def _bad_end(ticket: Ticket) -> EdgemoaError | None:
    failed = requests.failed(ticket)
    return failure(failed) if failed else None


def _ticket(ticket: Ticket, status: int = 200) -> web.Response:
    told = requests.ticket_json(ticket, _bad_end(ticket))
    return json_response(told, status, {"Location": f"{requests.PATH}/{ticket.id}"})
