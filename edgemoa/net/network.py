"""The network as the daemon sees it: send to a board, hear from boards, know who is there.

This joins the parts: sockets, discovery, pairing, links. What is said lives in the core; who is
trusted lives in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from edgemoa import config
from edgemoa.core import limits, roster
from edgemoa.core.envelope import short
from edgemoa.core.messages import BoardId, Message, printable
from edgemoa.errors import (
    BoardError,
    ConfigError,
    EdgemoaError,
    NetworkError,
    OverloadedError,
    PairingError,
    PeerError,
    ProtocolError,
    UserError,
)
from edgemoa.net import pairing, tls, wire
from edgemoa.net.copies import Borrower, Lender, Shelf
from edgemoa.net.discovery import Discovery, Hints
from edgemoa.net.gossip import Gossip, trusted_by_key
from edgemoa.net.identity import Identity
from edgemoa.net.link import Link, greet
from edgemoa.net.pairing import Candidate, Code, JoinSecret, News, Request, Window
from edgemoa.net.peer import Budget, Peer
from edgemoa.net.rates import Rates
from edgemoa.net.sockets import Sockets
from edgemoa.net.tasks import Tasks
from edgemoa.net.trust import Plan, TrustKeeper, Update
from edgemoa.store import PairedBoard, Store

log = logging.getLogger(__name__)

Address = tuple[str, int]

_FLUSH_S: Final = 0.5
_SUITS_AT_A_TIME: Final = 16
_CONNECTIONS_PER_S: Final = 20.0  # from one address
_CONNECTIONS_BURST: Final = 64.0
_SEED_S: Final = (0.5, 30.0)  # between looks at a seed: at first, and in the end
_MAX_BORROWED: Final = 24  # connections to copy models over that this board opened
_SETTLED_S: Final = 2.0  # a link that lived shorter did not work
_UNVOUCHED: Final = "only a board that was revoked vouched for it"
_CODE_HINT: Final = "look at it again; after a few tries, `edgemoa pair` has to show a new one"
_BREAKS: Final = (OSError, EOFError, TimeoutError, UnicodeError)
"""What a connection that does not come about, or ends, raises (TLS errors are OSErrors; texts in
certificates and host names can be undecodable)."""


class Handlers(Protocol):
    """What the network tells; called in the event loop, so none of these may block."""

    def on_message(self, sender: BoardId, message: Message) -> None:
        """A paired board says this, once."""

    def on_undelivered(self, to: BoardId, message: Message) -> None:
        """It is not known that ``message`` arrived, and it is no longer tried. Once at most."""

    def on_paired(self, board: BoardId, name: str) -> None:
        """The board is trusted from now on; also called for each known board at the start."""

    def on_unpaired(self, board: BoardId, reason: str) -> None:
        """The board is trusted no longer."""

    def on_linked(self, board: BoardId, boot: int) -> None:
        """What is sent reaches this boot of the board from now on. Told of each new link, before
        anything that comes over it, also where it takes the place of another."""

    def on_unlinked(self, board: BoardId) -> None:
        """Its link has ended, and there is no other."""


@dataclass(frozen=True, slots=True)
class Device:
    """A board, for people to look at.

    :param address: where it is or was last, "" if unknown.
    :param linked: whether messages can reach it now.
    :param last_seen_age_ms: since it was last heard and authenticated; None if not in this run.
    :param detail: why it is not paired, or not linked.
    """

    id: BoardId
    name: str
    state: Literal["paired", "pending", "revoked"]
    address: str
    linked: bool
    last_seen_age_ms: int | None
    detail: str


DatagramHook = Callable[[bytes], Iterable[bytes]]
"""Gets each datagram before it is sent and says what is sent instead; for tests of loss."""


class Network:
    """See the module. The store must be open, and stay so until :meth:`stop` has returned.

    :param settings: where to listen and whom to look for.
    :param name: what people call this board.
    :param boot: this run's boot epoch, from :meth:`Store.count_boot`.
    :param rng: for jitter.
    :param join_secret: boards that hold the same one pair by themselves; None to pair with nobody.
    :param shelf: the models that paired boards may copy; None for none.
    """

    def __init__(
        self,
        settings: config.Net,
        *,
        name: str,
        identity: Identity,
        store: Store,
        boot: int,
        handlers: Handlers,
        rng: random.Random,
        join_secret: JoinSecret | None,
        shelf: Shelf | None = None,
        timings: wire.Timings | None = None,
        datagram_hook: DatagramHook | None = None,
    ) -> None:
        self.boot_epoch = boot
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._name = name
        self._identity = identity
        self._store = store
        self._handlers = handlers
        self._rng = rng
        self._secret = join_secret
        self._timings = timings or wire.Timings()
        self._hook = datagram_hook
        self._lender = Lender(shelf, self._timings)
        self._borrowed = 0
        self._sockets = Sockets()
        self._tasks = Tasks()
        self._budget = Budget()
        self._peers: dict[BoardId, Peer] = {}
        self._keepers: dict[BoardId, asyncio.Task[None]] = {}
        self._links: dict[bytes, tuple[Link, Peer]] = {}
        self._hints = Hints(kept=self._peers.__contains__)
        self._discovery: Discovery | None = None
        self._contexts: tls.Contexts | None = None
        self._trust = TrustKeeper(identity, store)
        self._half_open: dict[socket.socket, asyncio.Task[None]] = {}
        self._rates = Rates(_CONNECTIONS_PER_S, _CONNECTIONS_BURST, limits.MAX_DISCOVERED)
        self._pairings = 0
        self._suits: dict[BoardId, str] = {}  # boards that this one tries to pair with: how it goes
        self._courting = asyncio.Semaphore(_SUITS_AT_A_TIME)
        self._trusting = asyncio.Lock()
        self._changes: set[asyncio.Task[Plan]] = set()
        self._window: Window | None = None
        self._joining = False
        self._gossip = Gossip(
            timings=self._timings,
            tasks=self._tasks,
            rng=rng,
            roster=lambda: self._trust.roster,
            change=self._change,
            hint=self._told_where,
        )

    @property
    def port(self) -> int:
        """TCP and UDP port; known once started."""
        return self._sockets.port

    @property
    def lent_bytes(self) -> int:
        """What paired boards have copied of this board's models, in this run."""
        return self._lender.lent_bytes

    # --- what the daemon calls

    async def start(self) -> None:
        """Take the port, and look for others from now on.

        :raises AddressInUseError: if the port is taken.
        :raises ConfigError: if an address or a seed cannot be used.
        :raises StateError: if the store cannot be used.
        """
        seeds = [_parse_seed(seed) for seed in self._settings.seeds]
        try:
            self._sockets.bind(self._settings.listen, self._settings.port)
            await asyncio.to_thread(self._trust.load)
            boards = self._trust.boards
            former = (f.certificate for f in self._trust.former.values() if f.certificate)
            self._contexts = tls.make_contexts(
                self._identity, (b.certificate for b in boards), former
            )
        except BaseException:
            self._sockets.close()
            raise
        for board in boards:
            self._add_peer(board)
            self._handlers.on_paired(board.id, self._peers[board.id].known_as)
        self._tasks.spawn(self._gossip.remind(), "remind of the roster")
        self._sockets.receive(self._on_datagram)
        self._tasks.spawn(self._listen(), "listen")
        for host, port in seeds:
            self._tasks.spawn(self._follow_seed(host, port), "seed")
        if self._settings.mdns:
            self._discovery = Discovery(
                self._identity.board_id,
                self.port,
                self._settings.interfaces,
                self._found,
                self._gone,
                moved=self._moved,
                kept=self._peers.__contains__,
            )
            self._discovery.start()
        log.info(
            "listening",
            extra={"board": self._identity.board_id, "port": self.port, "paired": len(boards)},
        )

    async def stop(self) -> None:
        """Send what can still be sent, within half a second, and close everything. No handler is
        called after this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._flush()
        if self._discovery is not None:
            await self._discovery.stop()
        await self._tasks.close()
        if self._changes:
            await asyncio.wait(self._changes)
            await self._tasks.close()  # of boards that were let in meanwhile
        self._gossip.stop()
        for peer in self._peers.values():
            peer.silence()
        for sock in self._half_open:
            sock.close()
        self._sockets.close()

    def send(self, to: BoardId, message: Message) -> None:
        """Deliver ``message`` to a paired board, or call ``on_undelivered`` once, later. Hop
        messages are sent if the board is there, and forgotten if not."""
        peer = self._peers.get(to)
        if peer is not None:
            peer.send(message)
        else:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._handlers.on_undelivered, to, message)

    def devices(self) -> list[Device]:
        """Every paired board, in the order of pairing, then those that were only heard of, then
        those that were revoked."""
        paired = [self._paired_device(peer) for peer in self._peers.values()]
        known = self._trust.former
        former = {b for b, r in self._trust.roster.gone.items() if r.kind == roster.REVOKE}
        former &= known.keys()
        pending = [
            self._pending_device(b) for b in self._hints if b not in self._peers and b not in former
        ]
        return paired + pending + [self._revoked_device(b) for b in sorted(former)]

    @contextlib.asynccontextmanager
    async def borrow(self, board: BoardId) -> AsyncIterator[Borrower]:
        """A connection to a paired board, to copy models over.

        :raises UserError: if it is not paired.
        :raises NetworkError: if it cannot be reached; PeerError if it does not take part.
        :raises OverloadedError: if there are too many of them.
        """
        peer = self._peers.get(board)
        if peer is None:
            raise UserError("that board is not paired with this one", hint="see `edgemoa devices`")
        if self._borrowed >= _MAX_BORROWED:
            raise OverloadedError("too many copies run at a time", hint="try again in a moment")
        self._borrowed += 1
        try:
            connection = await self._dial_lender(peer)
            with peer.copying(connection):
                borrower = Borrower(connection, peer.name, self._timings)
                await borrower.greeted()
                yield borrower
        finally:
            self._borrowed -= 1

    async def unpair(self, board: BoardId, reason: str) -> None:
        """Trust a board no longer, here and in the whole group; its links are cut.

        :raises StateError, DiskFullError: if that could not be written down; then it stays paired.
        """
        if board in self._peers:
            await self._change(lambda r: r.revoked(board), reason=reason)

    # --- what people decide

    def open_window(self) -> tuple[str, float]:
        """Let boards pair with this one by a code from now on; returns the code, as people read
        it, and for how many seconds it is good. A code that was shown before is not any more."""
        self.close_window()
        self._window = Window(pairing.new_code(), self._now(), self._timings.window)
        log.info("boards may pair by a code", extra={"for_s": round(self._timings.window)})
        return self._window.code.shown, self._timings.window

    def close_window(self) -> None:
        """Let no more boards pair by the code."""
        if self._window is not None:
            self._window.close("it was closed")

    def window(self) -> dict[str, object]:
        """How pairing by a code goes: ``open``, ``left_s``, ``failures``, ``joined`` (names),
        ``closed`` (why). The code is not told again."""
        window = self._window
        if window is None:
            return {"open": False, "left_s": 0, "failures": 0, "joined": [], "closed": "none was"}
        why = window.why_closed(self._now())
        return {
            "open": not why,
            "left_s": round(window.left_s(self._now())),
            "failures": window.failures,
            "joined": list(window.joined),
            "closed": why,
        }

    async def join(self, text: str, address: str = "") -> Device:
        """Pair with the board that shows this code, if it is found within half a minute.

        :param address: where it is, as "host:port"; "" to try every board that is heard of.
        :raises UserError: if it cannot be a code, or one is being tried already.
        :raises PairingError: if it was not good anywhere, in :attr:`Window.TRIES` runs.
        :raises NetworkError: if no board was found that lets others pair.
        """
        self._check_started()
        code = pairing.parse_code(text)
        place = _parse_seed(address) if address else None
        if self._joining:
            raise UserError("a code is being tried already", hint="wait until that has ended")
        self._joining = True
        try:
            async with asyncio.timeout(self._timings.join):
                return await self._find_window(code, place)
        except TimeoutError:
            raise NetworkError(
                "no board was found that shows a code",
                hint="is `edgemoa pair` running there, and do `edgemoa devices` see each other?",
            ) from None
        finally:
            self._joining = False

    async def _find_window(self, code: Code, place: Address | None) -> Device:
        spent: set[BoardId] = set()  # boards that had their one guess at the code
        while True:
            for address in await self._places(place):
                other = await self._try_code(code, address, spent, named=place is not None)
                if other is not None:
                    await self._pair_with(other, (address,))
                    return self._paired_device(self._peers[other.id])
                if len(spent) >= Window.TRIES:
                    raise PairingError("too many boards refused the code", hint=_CODE_HINT)
            if spent and place is not None:
                raise PairingError("the code is not the one that is shown there", hint=_CODE_HINT)
            await asyncio.sleep(self._timings.retry_min * 2)

    async def _try_code(
        self, code: Code, address: Address, spent: set[BoardId], *, named: bool
    ) -> Candidate | None:
        """One run at one address, unless the board there has had one. Whoever is there can try one
        code against what this board proves, and a stranger may be there."""
        try:
            connection = await tls.dial(address, self._tls.stranger, self._timings.handshake)
        except _BREAKS:
            return None
        try:
            member = pairing.identify(connection.certificate or b"")
            if member.id in spent or (member.id in self._peers and not named):
                return None
            self._check_trustable(member.id)
            async with asyncio.timeout(self._timings.pairing):
                other = await pairing.join(
                    connection,
                    self._identity,
                    code,
                    self._name,
                    member,
                    before_proof=lambda: spent.add(member.id),
                )
            await connection.close()
        except _BREAKS:
            return None
        except PeerError as error:
            self._count(str(error), logging.WARNING)
            return None
        else:
            return other
        finally:
            connection.abort()

    async def accept(self, board: BoardId, address: str = "") -> Device:
        """Trust the board of that identity, as whoever calls has compared. It has to accept this
        one, too. A revoked board may be let in again by this.

        :raises UserError: if it is this board.
        :raises NetworkError: if it is not found.
        """
        self._check_started()
        place = _parse_seed(address) if address else None
        if board not in self._peers:
            former = self._trust.former.get(board)
            if former is not None and former.certificate:
                # Its identity is the hash of its key, so this is the key that was compared.
                known = replace(pairing.identify(former.certificate), name=former.name)
                await self._pair_with(known, self._hints.get(board), again=True)
            else:
                await self._accept_at(board, place)
        return self._paired_device(self._peers[board])

    async def _accept_at(self, board: BoardId, place: Address | None) -> None:
        places = self._hints.get(board) if place is None else await self._places(place)
        for address in places:
            with contextlib.suppress(*_BREAKS, ProtocolError):
                connection = await tls.dial(address, self._tls.stranger, self._timings.handshake)
                try:
                    found = pairing.identify(connection.certificate or b"")
                finally:
                    await connection.close()
                if found.id == board:
                    await self._pair_with(found, (address,), again=True)
                    return
        raise NetworkError(
            "no board of that identity answers",
            hint="is it on, and in `edgemoa devices`? else say where it is with --address",
        )

    async def rename(self, board: BoardId, name: str) -> None:
        """Call a board by another name, in the whole group; "" gives it back its own.

        :raises UserError: if it is not paired.
        """
        if board not in self._peers:
            raise UserError("that board is not paired with this one", hint="see `edgemoa devices`")
        plan = await self._change(lambda r: r.renamed(board, name) if r.trusts(board) else r)
        log.info("renamed", extra={"board": board, "records": len(plan.said)})

    def _check_started(self) -> None:
        if self._contexts is None:
            raise NetworkError("the daemon is still starting", hint="try again in a moment")

    async def _places(self, place: Address | None) -> tuple[Address, ...]:
        if place is None:
            heard = [b for b in self._hints if b not in self._peers and not self._why_not(b)]
            return tuple(dict.fromkeys(a for b in heard for a in self._hints.get(b)))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(*place, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return ()
        return tuple((str(info[4][0]), place[1]) for info in found)

    # --- trust

    def _add_peer(self, board: PairedBoard) -> None:
        peer = Peer(
            board,
            identity=self._identity,
            boot=self.boot_epoch,
            events=self._handlers,
            budget=self._budget,
            timings=self._timings,
            hear=self._gossip.hear,
        )
        peer.given = self._trust.roster.trusted[board.id].name
        self._peers[board.id] = peer
        self._keepers[board.id] = self._tasks.spawn(
            self._keep_linked(peer), f"keep linked {short(board.id)}"
        )

    def _why_not(self, board: BoardId) -> str:
        """Why a board must not be trusted, for people; "" if nothing is known against it."""
        record = self._trust.roster.why_not(board)
        if record is None:
            return ""
        if record.kind == roster.REPLACE:
            return "its key was replaced by a new one"
        return f"revoked by {self._called(record.by)}"

    def _called(self, board: BoardId) -> str:
        if board == self._identity.board_id:
            return self._name or short(board)
        peer = self._peers.get(board)
        return short(board) if peer is None else peer.name

    def _check_trustable(self, board: BoardId) -> None:
        if board == self._identity.board_id:
            raise PairingError("a board does not pair with itself")
        if why := self._why_not(board):
            raise PairingError(
                f"the board was {why}" if why.startswith("revoked") else why,
                hint="`edgemoa devices accept` lets it in again",
            )
        if board not in self._peers and len(self._peers) >= limits.MAX_GROUP_BOARDS - 1:
            raise PairingError(f"the group is full ({limits.MAX_GROUP_BOARDS} boards)")

    async def _pair_with(
        self, other: Candidate, addresses: tuple[Address, ...], *, again: bool = False
    ) -> None:
        """The board has proved itself. Done twice, it changes nothing.

        :param again: also if it was revoked.
        :raises PairingError: if it was, perhaps while it proved itself; or the group is full.
        """
        if other.id in self._trust.roster.direct and other.id in self._peers:
            return

        def admit(known: roster.Roster) -> roster.Roster:
            if not again and known.why_not(other.id) is not None:
                raise PairingError(f"{other.name or short(other.id)} was revoked meanwhile")
            return known.admitted(other.certificate)

        board = PairedBoard(other.id, other.public_key, other.certificate, other.name, addresses)
        await self._change(admit, (board,))

    async def _change(
        self, update: Update, known: Iterable[PairedBoard] = (), reason: str = ""
    ) -> Plan:
        """Change whom this board trusts: first what can fail, then what is written down, and only
        then what is done.

        :param reason: why boards are not trusted any more, if not by what others said.
        :raises PairingError, ProtocolError: as ``update`` does; StateError, DiskFullError: it could
            not be written down; OSError: the TLS settings cannot be made. Then nothing has changed.

        Whoever waits may be cancelled; what is being written down is then done all the same.
        """
        task = asyncio.create_task(self._change_whole(update, known, reason), name="change trust")
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: asyncio.Task[Plan]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # it is raised where it is waited for, if anywhere

    async def _change_whole(
        self, update: Update, known: Iterable[PairedBoard], reason: str
    ) -> Plan:
        async with self._trusting:
            plan = await asyncio.to_thread(self._trust.plan, update, known)
            contexts = self._contexts
            if plan.added or plan.removed:
                try:
                    contexts = tls.make_contexts(self._identity, plan.pinned, plan.told)
                except OSError as error:
                    if not plan.removed:
                        raise
                    # The roster decides who may speak; that the contexts forget somebody can wait.
                    log.warning("the TLS settings are still the old ones: %s", error.strerror)
            await asyncio.to_thread(self._trust.keep, plan)
            self._contexts = contexts
            removed = [(board, reason or self._why_not(board) or _UNVOUCHED)
                       for board, _ in plan.removed]  # fmt: skip
            for board, why in removed:
                peer, keeper = self._peers.pop(board), self._keepers.pop(board)
                keeper.cancel()
                peer.drop(why)
                log.warning("unpaired", extra={"board": board, "reason": why})
                self._handlers.on_unpaired(board, why)
            for added in plan.added:
                self._add_peer(added)
                peer = self._peers[added.id]
                log.info("paired", extra={"board": added.id, "board_name": peer.name})
                self._handlers.on_paired(added.id, peer.known_as)
            for board, record in plan.roster.trusted.items():
                if self._peers[board].given != record.name:
                    self._peers[board].given = record.name
                    self._handlers.on_paired(board, self._peers[board].known_as)
            if plan.said:
                self._gossip.spread(plan.said, now=bool(plan.removed))
            return plan

    def _told_where(self, places: Mapping[bytes, Address]) -> None:
        """A paired board says where others are. Only those are looked for there that are trusted,
        and not linked."""
        boards = trusted_by_key(self._trust.roster) if places else {}
        for key, address in places.items():
            peer = self._peers.get(boards[key]) if key in boards else None
            if peer is not None and peer.link is None:
                known = self._hints.get(peer.board.id)
                if address not in known:
                    self._found(peer.board.id, (*known, address))

    # --- hearing of boards

    def _found(self, board: BoardId, addresses: tuple[Address, ...]) -> None:
        if board == self._identity.board_id:
            return
        news = self._hints.put(board, addresses)
        peer = self._peers.get(board)
        if peer is None:
            self._court()
        elif news:
            peer.changed.set()

    def _gone(self, board: BoardId) -> None:
        self._hints.drop(board)

    def _moved(self) -> None:
        """This machine is somewhere else: who could not be reached may be now."""
        for peer in self._peers.values():
            peer.changed.set()

    async def _follow_seed(self, host: str, port: int) -> None:
        """Find out who is at a seed, again and again while that board is not linked."""
        loop = asyncio.get_running_loop()
        wait = _SEED_S[0]
        while True:
            with contextlib.suppress(*_BREAKS, ValueError, ProtocolError):
                for info in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    address: Address = (str(info[4][0]), port)
                    board = await self._who_is_at(address)
                    self._found(board, (address,))
                    peer = self._peers.get(board)
                    if peer is not None and peer.link is not None:
                        wait = _SEED_S[1]
            await asyncio.sleep(wait * self._rng.uniform(0.75, 1.25))
            wait = min(2 * wait, _SEED_S[1])

    async def _who_is_at(self, address: Address) -> BoardId:
        connection = await tls.dial(address, self._tls.stranger, self._timings.handshake)
        try:
            return pairing.identify(connection.certificate or b"").id
        finally:
            await connection.close()

    # --- pairing

    def _court(self) -> None:
        """Try to pair with whoever was heard of and is not paired, so many at a time."""
        if self._secret is None:
            return
        for board in self._hints:
            if len(self._suits) >= limits.MAX_SUITS:
                return
            if not (board in self._peers or board in self._suits or self._why_not(board)):
                self._suits[board] = "pairing"
                self._tasks.spawn(self._suit(board, self._secret), f"pair {short(board)}")

    async def _suit(self, board: BoardId, secret: JoinSecret) -> None:
        """Try until the board is paired, revoked, or no longer heard of. Slow down while it
        refuses."""
        timings = self._timings
        lost, refused = timings.retry_min, timings.refused_min
        try:
            if self._identity.board_id > board:  # both heard of each other; one call is enough
                await asyncio.sleep(timings.yield_pairing * self._rng.uniform(1, 2))
            while board not in self._peers and board in self._hints and not self._why_not(board):
                async with self._courting:
                    proved_wrong = await self._propose(board, secret)
                if board in self._peers:
                    return
                wait = refused if proved_wrong else lost
                if proved_wrong:
                    refused = min(2 * refused, timings.refused_max)
                else:
                    lost = min(2 * lost, timings.retry_max)
                await asyncio.sleep(wait * self._rng.uniform(0.75, 1.25))
        finally:
            del self._suits[board]
        self._court()

    async def _propose(self, board: BoardId, secret: JoinSecret) -> bool:
        """One try at each address; True if a board was there and would not pair."""
        for address in self._hints.get(board):
            try:
                connection = await tls.dial(address, self._tls.stranger, self._timings.handshake)
            except _BREAKS:
                self._suits[board] = "it announces itself but does not answer"
                continue
            try:
                async with asyncio.timeout(self._timings.pairing):
                    member = pairing.identify(connection.certificate or b"")
                    if member.id != board:
                        self._suits[board] = "another board answers at its address"
                        continue
                    other = await pairing.join(
                        connection, self._identity, secret, self._name, member
                    )
                await self._pair_with(other, (address,))
                await connection.close()
            except TimeoutError:
                self._suits[board] = "it does not answer in time"
            except _BREAKS:
                self._suits[board] = "it refused: does it hold the same join secret?"
                return True
            except EdgemoaError as error:
                self._suits[board] = str(error)
                self._count(str(error), logging.WARNING, board)
                return True
            else:
                return False
            finally:
                connection.abort()
        return False

    async def _admit(self, connection: tls.Connection) -> None:
        """Somebody without a certificate called: it may pair, or show that a key was changed."""
        if self._pairings >= limits.MAX_PAIRINGS:
            self._count("pairing request refused", logging.DEBUG)
            return
        self._pairings += 1
        try:
            async with asyncio.timeout(self._timings.pairing):
                request = await pairing.receive(connection)
                if isinstance(request.asked, News):
                    await self._learn(request.asked)
                elif request.by_code:
                    await self._admit_by_code(connection, request)
                else:
                    await self._admit_by_secret(connection, request)
        except _BREAKS:
            self._count("pairing abandoned", logging.DEBUG)
        except PeerError as error:
            self._count(str(error), logging.WARNING)
        except BoardError as error:
            log.error("cannot pair: %s", error)  # noqa: TRY400
        finally:
            self._pairings -= 1

    async def _admit_by_secret(self, connection: tls.Connection, request: Request) -> None:
        if self._secret is None:
            self._count("pairing request refused", logging.DEBUG)
            return
        other = await pairing.admit(
            connection, self._identity, request, self._secret, self._name,
            check=self._check_trustable,
        )  # fmt: skip
        await self._pair_with(other, ())

    async def _admit_by_code(self, connection: tls.Connection, request: Request) -> None:
        window = self._window
        if window is None:
            self._count("pairing request refused", logging.DEBUG)
            return
        with window.run(self._now()) as confirm:
            if confirm is None:
                self._count("pairing request refused", logging.DEBUG)
                return

            def check(board: BoardId) -> None:
                confirm()
                self._check_trustable(board)

            other = await pairing.admit(
                connection, self._identity, request, window.code, self._name, check=check
            )
        await self._pair_with(other, ())
        window.joined.append(self._called(other.id))

    async def _learn(self, news: News) -> None:
        """Records by which a board that is paired changed its key, while this one was off."""
        told = [d for d in news.records if pairing.replaces(d)]
        await self._change(lambda r: r.merged(told))

    # --- connections

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, host = await self._sockets.accept()
            except OSError as error:  # no descriptors left, for example
                self._count(f"cannot accept: {error.strerror}", logging.WARNING)
                await asyncio.sleep(0.1)
                continue
            if not self._rates.take(host, loop.time()):
                self._count("too many connections from one address", logging.DEBUG)
                sock.close()
                continue
            if len(self._half_open) >= limits.MAX_HALF_OPEN:
                # The oldest makes room: it had the most time to say who it is.
                oldest, task = next(iter(self._half_open.items()))
                del self._half_open[oldest]
                task.add_done_callback(functools.partial(_close_after, oldest))
                task.cancel()
                self._count("half-open connection dropped", logging.DEBUG)
            self._half_open[sock] = self._tasks.spawn(self._serve(sock), f"serve {host}")

    async def _serve(self, sock: socket.socket) -> None:
        try:
            connection = await tls.accept(sock, self._tls.server, self._timings.handshake)
        except _BREAKS:
            self._half_open.pop(sock, None)
            self._count("TLS handshake failed", logging.DEBUG)
            return
        try:
            if connection.certificate is None:
                self._half_open.pop(sock, None)
                await self._admit(connection)
                await connection.close()
                return
            try:
                peer = self._peer_of(connection)
            except PairingError as error:
                self._count(str(error), logging.DEBUG)
                self._half_open.pop(sock, None)
                if not connection.for_copies:
                    await self._refuse(connection, str(error))
                return
            if connection.for_copies:
                self._half_open.pop(sock, None)
                with contextlib.suppress(*_BREAKS), peer.copying(connection):
                    await self._lender.serve(connection, peer.board.id)
                return
            link = await self._greet(connection, peer)
            self._half_open.pop(sock, None)
            await self._run_link(link, peer)
        except _BREAKS:
            self._count("connection lost before HELLO", logging.DEBUG)
        except PeerError as error:
            self._count(str(error), logging.WARNING)
        finally:
            self._half_open.pop(sock, None)
            connection.abort()

    def _peer_of(self, connection: tls.Connection) -> Peer:
        """The paired board whose very key is at the other end: that the certificate passed says
        only that some pinned one stands behind it.

        :raises PeerError: if it is none.
        """
        who = pairing.identify(connection.certificate or b"")
        peer = self._peers.get(who.id)
        if peer is None and (why := self._why_not(who.id)):
            raise PairingError(why)
        if peer is None or peer.board.public_key != who.public_key:
            raise PeerError("a connection under a key that is not paired")
        if peer.gray_s:
            raise PeerError("a board that misbehaved calls before its time")
        return peer

    async def _refuse(self, connection: tls.Connection, reason: str) -> None:
        """End a connection to a board that has proved its key, and say why."""
        connection.writer.write(wire.framed(wire.bye_packet(reason)))
        await connection.close()

    async def _keep_linked(self, peer: Peer) -> None:
        """Dial a paired board whenever there is no link to it."""
        timings, uniform = self._timings, self._rng.uniform
        wait = timings.retry_min
        while True:
            peer.changed.clear()
            if peer.link is not None:
                await peer.changed.wait()
                wait = timings.retry_min
                continue
            if peer.gray_s:
                await asyncio.sleep(peer.gray_s)
            if self._identity.board_id > peer.board.id:
                await asyncio.sleep(timings.yield_dial * uniform(1, 2))
            if await self._dial(peer):
                wait = timings.retry_min
            elif peer.link is None:
                peer.changed.clear()  # a link that ended at once is no news
            # Never faster than this, whatever is announced; sooner than planned if there is news.
            await asyncio.sleep(timings.retry_min * uniform(0.5, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait * uniform(0.75, 1.25)):
                    await peer.changed.wait()
            wait = min(2 * wait, timings.retry_max)

    async def _dial(self, peer: Peer) -> bool:
        """Try each address; where the board answers, serve the link until it ends. Returns whether
        it lived long enough to call it one."""
        loop = asyncio.get_running_loop()
        addresses = self._addresses(peer)
        if not addresses:
            peer.detail = peer.detail or "not heard of yet"
        for address in addresses:
            if peer.link is not None:
                break
            try:
                connection = await tls.dial(address, self._tls.member, self._timings.handshake)
            except ssl.SSLError:
                peer.detail = "another board answers at its address"
                continue
            except _BREAKS:
                peer.detail = "does not answer"
                continue
            try:
                if self._peer_of(connection) is not peer:
                    peer.detail = "another board answers at its address"
                    continue
                link = await self._greet(connection, peer)
                since = loop.time()
                await self._run_link(link, peer)
                return loop.time() - since > _SETTLED_S
            except _BREAKS:
                peer.detail = "it answers, but does not accept this board: paired there?"
                await self._show_succession(address, peer)
            except PeerError as error:
                peer.detail = str(error)
                self._count(str(error), logging.WARNING, peer.board.id)
            finally:
                connection.abort()
        return False

    async def _show_succession(self, address: Address, peer: Peer) -> None:
        """If this board has changed its key, the other one may not have heard."""
        if not self._identity.succession:
            return
        with contextlib.suppress(*_BREAKS, ProtocolError):
            connection = await tls.dial(address, self._tls.stranger, self._timings.handshake)
            try:
                if pairing.identify(connection.certificate or b"").id == peer.board.id:
                    await pairing.tell(connection, self._identity.succession)
                    await closed_by_peer(connection, self._timings.pairing)
            finally:
                await connection.close()

    def _addresses(self, peer: Peer) -> Iterable[Address]:
        """Where to try, first where it last proved itself: anybody can announce it elsewhere."""
        known = peer.board.addresses
        return dict.fromkeys([*known[:1], *self._hints.get(peer.board.id), *known[1:]])

    async def _dial_lender(self, peer: Peer) -> tls.Connection:
        for address in self._addresses(peer):
            try:
                connection = await tls.dial(address, self._tls.borrower, self._timings.handshake)
            except _BREAKS:
                continue
            if not self._is(peer, connection):
                connection.abort()
            elif connection.for_copies:
                return connection
            else:
                connection.abort()
                raise PeerError(f"{peer.name} cannot lend models", hint="upgrade edgemoa there")
        raise NetworkError(f"{peer.name} does not answer", hint="is it on, and on this network?")

    def _is(self, peer: Peer, connection: tls.Connection) -> bool:
        try:
            return self._peer_of(connection) is peer
        except PeerError:
            return False

    async def _greet(self, connection: tls.Connection, peer: Peer) -> Link:
        own = wire.Hello(
            versions=(wire.MIN_VERSION, wire.MAX_VERSION),
            boot=self.boot_epoch,
            secret=secrets.token_bytes(wire.SECRET_BYTES),
            key_id=secrets.token_bytes(wire.KEY_ID_BYTES),
            port=self.port,
            name=self._name,
        )
        hello = await greet(connection, own, self._timings)
        return Link(
            connection,
            own_id=self._identity.board_id,
            peer_id=peer.board.id,
            own=own,
            hello=hello,
            receiver=peer,
            sendto=self._send_datagram,
            timings=self._timings,
        )

    async def _run_link(self, link: Link, peer: Peer) -> None:
        why = await peer.twins.refusal(link, peer.link)
        if why:
            self._count(why, logging.WARNING, peer.board.id)
            peer.detail = why
            await self._refuse(link.connection, why)
            return
        # Unpaired while the handshake was under way?
        if self._peers.get(peer.board.id) is not peer or not peer.attach(link):
            return
        peer.detail = ""
        self._links[link.key_id] = (link, peer)
        self._tasks.spawn(self._remember(peer, link), "remember")
        self._gossip.linked(link, peer)
        extra = {"board": peer.board.id, "address": link.connection.address[0]}
        log.info("linked", extra=extra)
        self._handlers.on_linked(peer.board.id, link.hello.boot)
        reason = "stopping"
        try:
            reason = await link.run()
        finally:
            del self._links[link.key_id]
            self._gossip.unlinked(link)
            peer.detach(link)
            if peer.link is None:
                peer.detail = reason
            log.info("link ended", extra={**extra, "reason": reason})
        # Not where this task is cancelled, since everything stops then.
        if peer.link is None and self._peers.get(peer.board.id) is peer:
            self._handlers.on_unlinked(peer.board.id)

    async def _remember(self, peer: Peer, link: Link) -> None:
        """Note where the board was and what it calls itself, if that is new."""
        connection = link.connection
        here = connection.address if connection.dialled else link.udp_address
        addresses = tuple(dict.fromkeys([here, *peer.board.addresses]))[: limits.MAX_ADDRESSES]
        board = replace(peer.board, name=printable(link.hello.name), addresses=addresses)
        if board == peer.board:
            return
        peer.board = board
        try:
            async with self._trusting:
                await asyncio.to_thread(self._trust.seen, board)
        except BoardError as error:
            log.warning("cannot note where a board is: %s", error)

    # --- datagrams

    def _on_datagram(self, datagram: bytes) -> None:
        known = self._links.get(datagram[: wire.KEY_ID_BYTES])
        if known is None:  # anybody may send anything: no answer, no line in the log
            self.counters["datagram of no link"] += 1
            return
        link, peer = known
        try:
            link.receive_datagram(datagram)
        except ProtocolError as error:
            self._count(str(error), logging.DEBUG, peer.board.id)

    def _send_datagram(self, datagram: bytes, address: Address) -> None:
        if self._hook is None:
            self._sockets.send(datagram, address)
        else:
            for one in self._hook(datagram):
                self._sockets.send(one, address)

    # --- small things

    @property
    def _tls(self) -> tls.Contexts:
        assert self._contexts is not None, "start() made it"  # noqa: S101
        return self._contexts

    def _count(self, what: str, level: int, board: BoardId | None = None) -> None:
        """Count an event, and log it the 1st, 2nd, 4th, 8th ... time: strangers can cause some of
        them as often as they like."""
        self.counters[what] += 1
        times = self.counters[what]
        if times & (times - 1) == 0:
            log.log(
                level, "%s", what, extra={"times": times, **({"board": board} if board else {})}
            )

    async def _flush(self) -> None:
        linked = [p for p in self._peers.values() if p.link is not None]
        while any(p.outbox and p.link is not None for p in linked):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for peer in linked:
            if peer.link is not None:
                await peer.link.flush()

    def _paired_device(self, peer: Peer) -> Device:
        age = peer.heard_age()
        where = peer.board.addresses or self._hints.get(peer.board.id)
        return Device(
            id=peer.board.id,
            name=peer.known_as,
            state="paired",
            address=_show(where),
            linked=peer.link is not None,
            last_seen_age_ms=None if age is None else int(age * 1000),
            detail=peer.twins.note or peer.detail
            if not peer.gray_s
            else f"it misbehaved ({peer.conduct.reason}); left alone for {peer.gray_s:.0f} s more",
        )

    def _pending_device(self, board: BoardId) -> Device:
        if self._secret is None:
            detail = "not paired: `edgemoa pair` there, then `edgemoa join CODE` here, or so"
        else:
            detail = self._suits.get(board, "waiting for its turn to pair")
        return Device(board, "", "pending", _show(self._hints.get(board)), False, None, detail)

    def _revoked_device(self, board: BoardId) -> Device:
        former = self._trust.former[board]
        where = _show(self._hints.get(board))
        return Device(board, former.name, "revoked", where, False, None, self._why_not(board))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def closed_by_peer(connection: tls.Connection, seconds: float) -> None:
    """Wait until the other side has read all, and closes, or for so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await connection.reader.read(1)


def _parse_seed(seed: str) -> Address:
    host, colon, port = seed.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) <= 65_535):
        raise ConfigError(f"'{seed}' is not a seed", hint=_SEED_FORM)
    host = host.strip("[]")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigError(f"'{host}' is not a host name", hint=_SEED_FORM) from None
    return host, int(port)


_SEED_FORM: Final = 'write "host:port", e.g. "pi4.lan:7946"'


def _show(addresses: tuple[Address, ...]) -> str:
    if not addresses:
        return ""
    host, port = addresses[0]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _close_after(sock: socket.socket, _: asyncio.Task[None]) -> None:
    sock.close()
