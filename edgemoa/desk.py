"""The front desk: between the clients, who come and go, and the node, which keeps its promises.

A prompt is acknowledged when the node has taken it and the journal has it. From then on it is
worked on until it has its one outcome, whether its client is there or not, but for a client that
holds the line: when that one leaves, it takes its prompt back. An outcome is in the journal before
anybody hears it. What a prompt has said so far is kept while it is worked on, so that a client may
come back, or a second one look on.

What a crash left is submitted again as the node has room, oldest first, before anything new.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, Literal, Protocol, TypeAlias

import msgspec

from edgemoa.core.events import Accepted, Answered, Failed, Request, RequestEvent, Text
from edgemoa.errors import ConflictError, EdgemoaError
from edgemoa.journal import Entry, Journal

log = logging.getLogger(__name__)

ROOT: Final = "0"
State: TypeAlias = Literal["waiting", "working", "answered", "failed"]
_SHUT_DOWN: Final = "unavailable"  # the code of prompts that the board's end takes from the node


class Prompt(msgspec.Struct, frozen=True):
    """A prompt as it came in: what the node needs, and what the answer is told with.

    :param owner: whose it is: only that user (and root) hears of it again. A user's number, or
        the name of an API key.
    :param created: the time of the wall clock, in seconds, for the client alone.
    :param key: what the client calls it; empty for nothing. The same key is the same prompt.
    :param digest: of what the client said under that key.
    :param holds: whether the client holds the line, and takes the prompt back when it leaves.
    """

    request: Request
    model: str
    owner: str
    created: int
    key: str = ""
    digest: bytes = b""
    holds: bool = True


class Outcome(msgspec.Struct, frozen=True):
    """What became of a prompt."""

    model: str
    created: int
    end: Answered | Failed


class Ticket(msgspec.Struct, frozen=True):
    """How a prompt stands. ``said`` is what has happened with it so far, texts joined."""

    id: str
    model: str
    created: int
    state: State
    said: tuple[RequestEvent, ...] = ()
    waiting_before: int = 0

    @property
    def end(self) -> Answered | Failed | None:
        """Its outcome, if it has one."""
        last = self.said[-1] if self.said else None
        return last if isinstance(last, Answered | Failed) else None


_encoder = msgspec.msgpack.Encoder()
_prompts = msgspec.msgpack.Decoder(Prompt)
_outcomes = msgspec.msgpack.Decoder(Outcome)


class Work(Protocol):
    """What the desk needs of the node."""

    def submit(self, request: Request, *, promised: bool) -> None:
        """Hand it over; what becomes of it is told to :meth:`Desk.tell`. One that was promised is
        not refused."""

    def cancel(self, request_id: str) -> None:
        """Nobody wants it any longer."""

    def has_room(self) -> bool:
        """Whether the node takes prompts now."""


class Desk:
    """See the module. Everything but :meth:`open` and :meth:`close` runs in the event loop."""

    def __init__(self, journal: Journal, work: Work) -> None:
        self._journal = journal
        self._work = work
        self._feeds: dict[str, _Feed] = {}
        self._keys: dict[bytes, str] = {}  # of those in work
        self._backlog: deque[Prompt] = deque()
        self._ending: set[asyncio.Task[None]] = set()
        self._pumping = False

    def open(self) -> None:
        """Read the journal. Blocks on the disk.

        :raises EdgemoaError: it cannot be used.
        """
        for entry in self._journal.open():
            try:
                prompt = _prompts.decode(entry.request)
            except msgspec.DecodeError:
                log.error(  # noqa: TRY400
                    "an accepted prompt of another version cannot be read", extra={"id": entry.id}
                )
                continue
            feed = self._feeds[entry.id] = _Feed(prompt, entry.key)
            feed.durable = feed.keeps = True
            if entry.key is not None:
                self._keys[entry.key] = entry.id
            self._backlog.append(prompt)
        if self._backlog:
            log.info("prompts wait since before", extra={"prompts": len(self._backlog)})

    async def close(self) -> None:
        """Wait until the outcomes that are known are on the disk, and close the journal."""
        while self._ending:
            await asyncio.wait(self._ending)
        await asyncio.to_thread(self._journal.close)

    def __len__(self) -> int:
        """Prompts without an outcome."""
        return len(self._feeds)

    @property
    def backlog(self) -> int:
        """Prompts from before a restart that the node has not taken up yet."""
        return len(self._backlog)

    def new_id(self) -> str:
        """A name for a prompt, never used before, that nobody can guess."""
        return self._journal.new_id()

    def pump(self) -> None:
        """Hand over what waits since before, as far as there is room."""
        if self._pumping:
            return
        self._pumping = True  # what is handed over may tell something at once
        try:
            while self._backlog and self._work.has_room():
                self._work.submit(self._backlog.popleft().request, promised=True)
        finally:
            self._pumping = False

    # --- clients

    async def take(self, prompt: Prompt) -> str | Failed:
        """Accept a prompt, or say why not. When this returns its id, it is on the disk; where its
        key is known, it is the id of the prompt that has it, and nothing new is begun.

        :raises ConflictError: another prompt has that key.
        :raises DiskFullError, StateError: it cannot be written down, and is not accepted.
        """
        key = _key(prompt)
        known = None if key is None else await self._known(key, prompt)
        if known is not None:
            return known
        request_id = prompt.request.request_id
        feed = self._feeds[request_id] = _Feed(prompt, key)
        if key is not None:
            self._keys[key] = request_id
        mailbox = feed.join()
        self._work.submit(prompt.request, promised=False)
        try:
            first = await mailbox.get()
            if isinstance(first, Failed):
                return first
            await self._accept(feed)
        except BaseException:  # written down or not, it is not acknowledged
            self._work.cancel(request_id)
            raise
        finally:
            feed.leave(mailbox)
        return request_id

    async def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncGenerator[RequestEvent, None]:
        """All that becomes of a prompt, from its beginning to its one end; nothing if it is not
        known.

        :param holds: whether to take it back when this is closed early, unless somebody else
            listens, or it came with a key or to be fetched later.
        """
        feed = self._feeds.get(request_id)
        if feed is None:
            ticket = await self.find(request_id, owner)
            for event in ticket.said if ticket is not None else ():
                if isinstance(event, Answered):
                    yield Accepted(event.granted, 0)
                    yield Text(event.text)
                yield event
            return
        if not feed.is_of(owner):
            return
        if feed.accepting is not None:
            await asyncio.shield(feed.accepting)
        mailbox = feed.join()
        try:
            async for event in mailbox:
                yield event
        finally:
            feed.leave(mailbox)
            if holds and not (feed.mailboxes or feed.keeps or feed.ended):
                self._work.cancel(request_id)

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        """How a prompt stands, if it is this user's and still known."""
        feed = self._feeds.get(request_id)
        if feed is not None:
            return feed.ticket(self._before(request_id)) if feed.is_of(owner) else None
        entry = await self._journal.find(request_id)
        if entry is None or not entry.outcome or not _is_of(entry, owner):
            return None
        return _ticket(entry)

    def unfinished(self, owner: str) -> list[Ticket]:
        """All of this user's prompts without an outcome, oldest first."""
        return [
            feed.ticket(self._before(i))
            for i, feed in self._feeds.items()
            if feed.is_of(owner) and feed.durable
        ]

    async def forget(self, request_id: str, owner: str) -> bool:
        """Cancel a prompt, or have its answer deleted; returns whether it was there."""
        ticket = await self.find(request_id, owner)
        if ticket is None:
            return False
        if request_id in self._feeds:
            waiting = next((a for a in self._backlog if a.request.request_id == request_id), None)
            if waiting is not None:
                self._backlog.remove(waiting)
                self.tell(request_id, Failed("cancelled", "taken back before it was begun"))
            else:
                self._work.cancel(request_id)
        else:
            await self._journal.forget(request_id)
        return True

    # --- what the node tells

    def tell(self, request_id: str, event: RequestEvent) -> None:
        """Something happened with a prompt."""
        feed = self._feeds.get(request_id)
        if feed is None:
            return
        if isinstance(event, Answered | Failed):
            feed.ended = True
            ending = asyncio.get_running_loop().create_task(self._end(feed, event))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
        else:
            feed.put(event)

    async def _end(self, feed: _Feed, end: Answered | Failed) -> None:
        request_id = feed.prompt.request.request_id
        if feed.accepting is not None:
            await asyncio.wait((feed.accepting,))
            feed.durable = not (feed.accepting.cancelled() or feed.accepting.exception())
        try:
            if not feed.durable:
                pass  # refused, or not to be written down: it was never promised
            elif isinstance(end, Failed) and end.code == "cancelled":
                await self._journal.forget(request_id)
            elif isinstance(end, Failed) and end.code == _SHUT_DOWN and feed.keeps:
                log.info("a prompt waits for the next start", extra={"request_id": request_id})
            else:
                outcome = Outcome(feed.prompt.model, feed.prompt.created, end)
                await self._journal.finish(request_id, _encoder.encode(outcome))
        except EdgemoaError as error:
            text = "a prompt's end cannot be noted"
            log.error(text, extra={"request_id": request_id, "reason": str(error)})  # noqa: TRY400
        finally:
            _log_end(request_id, end, accepted=feed.durable)
            self._feeds.pop(request_id, None)
            if feed.key is not None and self._keys.get(feed.key) == request_id:
                del self._keys[feed.key]
            feed.put(end)
            self.pump()

    # --- inside

    async def _known(self, key: bytes, prompt: Prompt) -> str | None:
        """The id of the prompt that has this key."""
        request_id = self._keys.get(key)
        if request_id is None:
            entry = await self._journal.find_key(key)
            if entry is not None:
                _check_same(entry.digest, prompt.digest)
                return entry.id
            request_id = self._keys.get(key)  # asked twice at a time, the second finds it now
            if request_id is None:
                return None
        feed = self._feeds[request_id]
        _check_same(feed.prompt.digest, prompt.digest)
        if feed.accepting is not None:
            await asyncio.shield(feed.accepting)
        return request_id

    async def _accept(self, feed: _Feed) -> None:
        """Have it on the disk; whoever comes meanwhile waits for that, too."""
        prompt = feed.prompt
        entry = Entry(
            prompt.request.request_id,
            prompt.owner,
            feed.key,
            _encoder.encode(prompt),
            b"",
            prompt.digest,
        )
        feed.accepting = asyncio.ensure_future(self._journal.accept(entry))
        await asyncio.shield(feed.accepting)
        feed.durable = True

    def _before(self, request_id: str) -> int:
        for place, prompt in enumerate(self._backlog):
            if prompt.request.request_id == request_id:
                return place + 1
        return 0


class _Feed:
    """One prompt in work: what it has said, and who listens."""

    def __init__(self, prompt: Prompt, key: bytes | None) -> None:
        self.prompt = prompt
        self.key = key
        self.keeps = not prompt.holds or bool(prompt.key)  # it is worked on with nobody there
        self.durable = False
        self.ended = False
        self.accepting: asyncio.Future[None] | None = None
        self.mailboxes: set[_Mailbox] = set()
        self._said: deque[RequestEvent] = deque()

    def is_of(self, owner: str) -> bool:
        return owner in (self.prompt.owner, ROOT)

    def put(self, event: RequestEvent) -> None:
        _append(self._said, event)
        for mailbox in self.mailboxes:
            mailbox.put(event)

    def join(self) -> _Mailbox:
        mailbox = _Mailbox()
        for event in self._said:
            mailbox.put(event)
        self.mailboxes.add(mailbox)
        return mailbox

    def leave(self, mailbox: _Mailbox) -> None:
        self.mailboxes.discard(mailbox)

    def ticket(self, before: int) -> Ticket:
        state: State = "working" if self._said else "waiting"
        prompt, said = self.prompt, tuple(self._said)
        return Ticket(prompt.request.request_id, prompt.model, prompt.created, state, said, before)


class _Mailbox:
    """What one client has not heard yet. Text is joined, so that a slow reader costs no more
    memory than the answer itself, and its logprobs where it asked for some."""

    def __init__(self) -> None:
        self._events: deque[RequestEvent] = deque()
        self._there = asyncio.Event()

    def put(self, event: RequestEvent) -> None:
        _append(self._events, event)
        self._there.set()

    async def get(self) -> RequestEvent:
        while not self._events:
            self._there.clear()
            await self._there.wait()
        return self._events.popleft()

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """To the end."""
        while True:
            event = await self.get()
            yield event
            if isinstance(event, Answered | Failed):
                return


def _log_end(request_id: str, end: Answered | Failed, *, accepted: bool) -> None:
    """One line a prompt: where its client complains, the log can be asked about it."""
    fields: dict[str, Any] = {"request_id": request_id}
    if isinstance(end, Answered):
        fields |= {
            "layers": end.granted.layers,
            "proposers": end.granted.proposers,
            "left_out": len(end.left_out),
            "tokens": end.tokens,
            "total_ms": end.total_ms,
            "finish": end.finish,
        }
        log.info("answered", extra=fields)
    elif not accepted or end.code == "cancelled":  # the client was told, and may ask on and on
        log.debug("cancelled" if accepted else "not accepted", extra=fields | {"code": end.code})
    else:
        log.warning("not answered", extra=fields | {"code": end.code, "reason": end.reason})


def _append(events: deque[RequestEvent], event: RequestEvent) -> None:
    last = events[-1] if events else None
    if isinstance(event, Text) and isinstance(last, Text) and not (event.logprobs or last.logprobs):
        events[-1] = Text(last.text + event.text)
    else:
        events.append(event)


def _key(prompt: Prompt) -> bytes | None:
    """A user's keys are its own, whatever others call theirs."""
    if not prompt.key:
        return None
    return hashlib.sha256(f"{prompt.owner}\n{prompt.key}".encode()).digest()


def _check_same(known: bytes, digest: bytes) -> None:
    if known != digest:
        raise ConflictError(
            "another prompt was sent with this Idempotency-Key", hint="use a new key for it"
        )


def _is_of(entry: Entry, owner: str) -> bool:
    return owner in (entry.client, ROOT)


def _ticket(entry: Entry) -> Ticket:
    outcome = _outcomes.decode(entry.outcome)
    state: State = "answered" if isinstance(outcome.end, Answered) else "failed"
    return Ticket(entry.id, outcome.model, outcome.created, state, (outcome.end,))
