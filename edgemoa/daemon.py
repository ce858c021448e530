"""The daemon: owns the clock, chance, signals and logging, and joins the shells to the core.

Whatever happens (a message, a finished job, a prompt, a deadline) becomes one call of the node,
and the effects that it returns are carried out here, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, Final, Literal

import msgspec

from edgemoa import hardware
from edgemoa.api.doors import Door, Keys, open_door
from edgemoa.api.server import Api
from edgemoa.api.service import Card, Lender, PeerModels, Vector
from edgemoa.api.service import Device as DeviceState
from edgemoa.config import Config
from edgemoa.core import limits
from edgemoa.core.events import (
    Effect,
    EngineInfo,
    Failed,
    Given,
    ReadAhead,
    Request,
    RequestEvent,
    Send,
    StartWork,
    StopWork,
    Tell,
    TokenLogprob,
    WorkDone,
    WorkFailed,
)
from edgemoa.core.load import Learned
from edgemoa.core.messages import BoardId, ChatMessage, Message
from edgemoa.core.moa import Synthesis
from edgemoa.core.node import Node, NodeSettings
from edgemoa.core.rates import Rates
from edgemoa.core.status import snapshot
from edgemoa.desk import Desk, Prompt, Ticket
from edgemoa.engine import tuning
from edgemoa.engine.engine import Engine
from edgemoa.engine.memory import available_bytes
from edgemoa.engine.tuning import Tuning
from edgemoa.errors import ConfigError, EdgemoaError, EngineError, ModelNotFoundError
from edgemoa.journal import Journal
from edgemoa.models.library import MANIFEST, ModelLibrary, read_manifest
from edgemoa.net.identity import load_identity
from edgemoa.net.network import Device, Network
from edgemoa.net.pairing import JoinSecret, parse_join_secret
from edgemoa.shelf import LibraryShelf
from edgemoa.store import Store
from edgemoa.systemd import listening_socket, notify, watchdog_s

log = logging.getLogger(__name__)

FIRST_TUNING_S: Final = 8.0  # that the first start with a model may take longer, or so
STOP_GRACE_S: Final = 20.0  # to finish what runs, after SIGTERM
PEER_MODELS_S: Final = 8.0  # for a paired board to say what it lends
ASKED_AT_A_TIME: Final = 16
LAG_PROBE_S: Final = 0.05
LEARNED_KEPT_EVERY_S: Final = 1_800.0  # a storage card wears out
HARDWARE_EVERY_S: Final = 10.0
MODEL_EVERY_S: Final = 2.0
MOST_QUEUE_BYTES: Final = 64 * limits.MIB
_M_MMAP_THRESHOLD: Final = -3  # of glibc's mallopt
_LARGE_BYTES: Final = 128 * limits.KIB  # of a piece of memory
_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
MAX_SECRET_FILE_BYTES: Final = 4 * limits.KIB


class Daemon:
    """One board's process. :meth:`run` is its life."""

    def __init__(
        self,
        config: Config,
        library: ModelLibrary,
        *,
        stop_at_eof: bool = False,
        wait_for_model: bool = False,
    ) -> None:
        self._config = config
        self._wait_for_model = wait_for_model
        self._library = library
        self._stop_at_eof = stop_at_eof
        self._stopping = asyncio.Event()
        self._in_a_hurry = asyncio.Event()
        self._went_idle = asyncio.Event()
        self._engine_started = asyncio.Event()
        self._defect = False
        self._stopped = False
        self._asking = asyncio.Semaphore(ASKED_AT_A_TIME)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._lag_ms_max = 0.0
        self._condition = hardware.Condition(None, None, None)
        self._probing = False
        self._board: tuning.Board
        self._card = Card(config.model.name)
        self._engine_trouble = ""  # why there is no model process, while there is none
        self._learned: Learned | None = None  # as it was kept last
        self._node: Node
        self._network: Network
        self._engine: Engine | None = None  # until there is a model
        self._desk: Desk

    async def run(self) -> int:
        """Start, serve until told to stop, stop in good order; returns the exit code.

        :raises EdgemoaError: it could not be started; nothing is left running.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._failed_unseen)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_stop)
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            notify("READY=1", "STATUS=serving")
            self._live(watchdog_s())
            log.info("serving", extra={"socket": str(self._config.socket_path())})
            await self._stopping.wait()
            notify("STOPPING=1")
            await self._drain()
        return 70 if self._defect else 0

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        name = config.board.name or socket.gethostname()[: limits.MAX_NAME_BYTES]
        # What can be wrong is found out before anything is started, the cheapest first.
        model_dir = await asyncio.to_thread(self._find_model)
        strategy = await asyncio.to_thread(_strategy, config)
        join_secret = await asyncio.to_thread(_join_secret, config)
        state_dir = config.state_dir()
        identity = await asyncio.to_thread(load_identity, state_dir)
        store = Store(state_dir)
        await asyncio.to_thread(store.open)
        stack.push_async_callback(asyncio.to_thread, store.close)
        boot = await asyncio.to_thread(store.count_boot)
        kept = config.api
        journal = Journal(state_dir, kept.keep_answers_h * 3600, kept.keep_answers_mb * limits.MIB)
        self._desk = Desk(journal, self)
        await asyncio.to_thread(self._desk.open)
        stack.push_async_callback(self._desk.close)
        chance = SystemRandom()
        self._network = Network(
            config.net,
            name=name,
            identity=identity,
            store=store,
            boot=boot,
            handlers=self,
            rng=Random(chance.getrandbits(64)),
            join_secret=join_secret,
            shelf=LibraryShelf(self._library),
        )
        queue_bytes = _queue_bytes(config.queue.memory_mb)
        settings = NodeSettings(
            name=name,
            boot=boot,
            own_requests=_bound(config.queue.own_requests),
            peer_jobs=_bound(config.queue.peer_jobs),
            queue_bytes=queue_bytes - queue_bytes // 3,
            promise_ms=config.moa.promise_s * 1000,
            pick=config.queue.pick,
            own_proposal=config.queue.own_proposal,
            aggregator=config.moa.aggregator,
            answer_max_tokens=config.moa.max_tokens,
            learned=await asyncio.to_thread(self._recall, store),
            quorum=config.moa.quorum,
            layer_deadline_ms=config.moa.layer_deadline_s * 1000,
            proposal_max_tokens=config.moa.proposal_max_tokens,
            proposal_temperature=config.moa.proposal_temperature,
            strategy=strategy,
        )
        rng = Random(chance.getrandbits(64))
        self._node = Node(identity.board_id, settings, rng, self._now_ms())
        api = Api(
            self,
            config.socket_path(),
            config.api.socket_mode,
            queue_bytes // 3,
            gate=self._network,
            door=await asyncio.to_thread(_door, config, name),
            listening=listening_socket(),
        )
        await api.start()
        stack.push_async_callback(api.stop)
        stack.push_async_callback(self._network.stop)
        await self._network.start()
        stack.push_async_callback(self._stop_engine)
        if model_dir is not None:
            await self._start_engine(model_dir)
        else:
            awaiting = asyncio.create_task(self._await_model())
            stack.callback(awaiting.cancel)
        stack.callback(self._last_words)
        stack.push_async_callback(self._remember, store)
        keeping = asyncio.create_task(self._keep_learning(store))
        stack.callback(keeping.cancel)
        watching = asyncio.create_task(self._watch_hardware())
        stack.callback(watching.cancel)
        self._tell(self._node.tick)
        if self._stop_at_eof:
            await _at_eof(sys.stdin.fileno(), self._told_to_stop, stack)

    def _find_model(self) -> Path | None:
        """The model's folder; None if it is not there and is to be waited for. Blocks on the disk.

        :raises ModelNotFoundError: it is not there.
        """
        try:
            return self._library.find(self._config.model.name)
        except ModelNotFoundError as error:
            if not self._wait_for_model:
                raise
            self._engine_trouble = f"{error}; {error.hint}"
            return None

    async def _await_model(self) -> None:
        """Somebody fetches it, maybe from a peer, with which this board can pair meanwhile."""
        log.warning("waiting for a model", extra={"reason": self._engine_trouble})
        while (model_dir := await asyncio.to_thread(self._find_model)) is None:  # noqa: ASYNC110
            await asyncio.sleep(MODEL_EVERY_S)
        self._engine_trouble = ""
        try:
            await self._start_engine(model_dir)
        except EdgemoaError as error:
            self._engine_trouble = str(error)
            log.error("the model cannot be used", extra={"reason": str(error)})  # noqa: TRY400

    async def _start_engine(self, model_dir: Path) -> None:
        config = self._config
        tuned = await asyncio.to_thread(self._tuned, model_dir)
        self._card = await asyncio.to_thread(_card, config.model.name, model_dir)
        self._engine = Engine(
            model_dir,
            config.model.name,
            config.model.threads or (tuned.threads if tuned else tuning.cores()),
            self,
            backend=config.model.backend,
            provider=config.model.provider,
            slots=config.model.slots,
            most_slots=tuned.slots if tuned else 0,
            memory_mb=config.model.memory_mb,
            tune_s=0.0 if tuned or config.model.threads else FIRST_TUNING_S,
            ends_loops=config.model.end_loops,
        )
        await self._engine.start()
        self._engine_started.set()

    async def _stop_engine(self) -> None:
        if self._engine is not None:
            await self._engine.stop()

    async def _model(self) -> Engine:
        """The model's process, which may be about to start: the API listens a moment earlier.

        :raises EngineError: there is no model on this board.
        """
        if self._engine is None and self._engine_trouble:
            raise EngineError(self._engine_trouble, hint="fetch it, or ask another board")
        await self._engine_started.wait()
        assert self._engine is not None  # noqa: S101 - it was started
        return self._engine

    def _tuned(self, model_dir: Path) -> Tuning | None:
        """What was found before of how this board runs the model best. Blocks on the disk."""
        model = self._config.model
        self._board = tuning.this_board(
            read_manifest(model_dir).model_id,
            model.backend,
            model.provider,
            threads=model.threads,
            slots=model.slots,
            cache_mb=model.memory_mb,
        )
        return tuning.kept(self._config.state_dir(), self._board)

    def _keep_tuning(self, found: Tuning) -> None:
        """Keep it for the next start. Blocks on the disk."""
        try:
            tuning.keep(self._config.state_dir(), self._board, found)
        except EdgemoaError as error:
            log.warning("what was measured is not kept", extra={"reason": str(error)})

    def _recall(self, store: Store) -> Learned | None:
        """What this board learned of its speed before. Blocks on the disk."""
        kept = store.learned(self._config.model.name)
        try:
            return None if kept is None else msgspec.json.decode(kept, type=Learned)
        except msgspec.DecodeError:
            log.warning("what was learned before cannot be read; it is learned anew")
            return None

    async def _keep_learning(self, store: Store) -> None:
        """Now and then: what a power cut takes away is learned again within minutes."""
        while True:
            await asyncio.sleep(LEARNED_KEPT_EVERY_S)
            _trim_memory()
            await self._remember(store)

    async def _watch_hardware(self) -> None:
        """Know how the machine is; the log has when it began to be slowed down, and when not any
        more."""
        while True:
            was, now = self._condition, await asyncio.to_thread(hardware.condition)
            self._condition = now
            if bool(now.throttled) != bool(was.throttled):
                told = (
                    "the system holds the processor back" if now.throttled else "full speed again"
                )
                log.warning(told, extra=msgspec.structs.asdict(now))
            await asyncio.sleep(HARDWARE_EVERY_S)

    async def _remember(self, store: Store) -> None:
        learned = self._node.learned()
        if learned is None or learned == self._learned:
            return
        self._learned = learned
        try:
            data = msgspec.json.encode(learned)
            await asyncio.to_thread(store.learn, learned.model, data)
        except EdgemoaError as error:
            log.warning("what was learned is not kept", extra={"reason": str(error)})

    # --- the node and its effects

    def _now_ms(self) -> int:
        return round(asyncio.get_running_loop().time() * 1000)

    def _tell(self, happened: Callable[[int], list[Effect]]) -> None:
        """Tell the node what happened and carry out what it wants done about it.

        Whatever goes wrong in there is a defect, whoever caused the call; it must not become a
        peer's or a client's error by the way it came.
        """
        try:
            self._carry_out(happened(self._now_ms()))
        except Exception as error:
            self._stop_for_defect("the node failed", error)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to=to, message=message):
                    self._network.send(to, message)
                case StartWork(job=job) if self._engine is not None:
                    self._engine.work(job)
                    self._probe_lag()
                case ReadAhead(request_id=request_id, messages=messages) if (
                    self._engine is not None
                ):
                    self._engine.read_ahead(request_id, messages)
                case StopWork(job_id=job_id) if self._engine is not None:
                    self._engine.cancel(job_id)
                case Tell(request_id=request_id, event=event):
                    self._desk.tell(request_id, event)
        if self._node.draining and self._node.idle:
            self._went_idle.set()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._stopped:
            return
        due_ms = self._node.next_deadline_ms()
        if self._timer is not None and self._timer_ms <= due_ms:
            return  # a tick that comes early only sets the next timer
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = due_ms
        self._timer = asyncio.get_running_loop().call_at(due_ms / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._tell(self._node.tick)

    # --- what the network tells

    def on_message(self, sender: BoardId, message: Message) -> None:
        """A paired board said something."""
        self._tell(lambda now: self._node.receive(sender, message, now))

    def on_undelivered(self, to: BoardId, message: Message) -> None:
        """Something could not be brought to its board."""
        self._tell(lambda now: self._node.undelivered(to, message, now))

    def on_paired(self, board: BoardId, name: str) -> None:
        """A board may be spoken to from now on."""
        self._tell(lambda now: self._node.pair(board, name, now))

    def on_unpaired(self, board: BoardId, reason: str) -> None:
        """A board may no longer be spoken to."""
        self._tell(lambda now: self._node.unpair(board, now))

    def on_linked(self, board: BoardId, boot: int) -> None:
        """Messages reach a board from now on."""
        self._tell(lambda now: self._node.linked(board, boot, now))

    def on_unlinked(self, board: BoardId) -> None:
        """Messages reach it no longer."""
        self._tell(lambda now: self._node.unlinked(board, now))

    # --- what the engine tells

    def on_ready(self, info: EngineInfo) -> None:
        """The model takes work."""
        self._engine_trouble = ""
        if self._engine is not None and (found := self._engine.tuning) is not None:
            log.info("tuned", extra={"threads": found.threads, "slots": found.slots})
            if found.is_trusted:
                asyncio.get_running_loop().run_in_executor(None, self._keep_tuning, found)
            else:
                log.warning("the board was busy; it will be tuned again at the next start")
        self._tell(lambda now: self._node.engine_is_ready(info, now))
        self._desk.pump()

    def on_lost(self, reason: str) -> None:
        """The model process is gone."""
        self._engine_trouble = reason
        self._tell(self._node.engine_is_lost)

    def on_text(self, job_id: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """A piece of an answer."""
        self._tell(lambda now: self._node.wrote(job_id, text, now, logprobs))

    def on_done(self, job_id: int, result: WorkDone) -> None:
        """A job is finished."""
        told = {"tokens": result.tokens, "work_ms": result.work_ms}
        log.debug("job done", extra=self._job(job_id) | told)
        self._tell(lambda now: self._node.finished(job_id, result, now))

    def on_failed(self, job_id: int, failure: WorkFailed) -> None:
        """A job could not be done."""
        log.warning("job failed", extra=self._job(job_id) | {"reason": failure.reason})
        self._tell(lambda now: self._node.failed(job_id, failure, now))

    def _job(self, job_id: int) -> dict[str, Any]:
        """What the log calls it: the prompt's name is the same on all boards that work on it."""
        work = self._node.queue.running.get(job_id)
        if work is None:
            return {}
        whose = {} if work.own else {"asked_by": work.source}
        return {"request_id": work.request_id, "kind": work.job.kind, **whose}

    def on_rates(self, rates: Rates) -> None:
        """How fast the model is here."""
        self._node.measured(rates)

    # --- what the API asks

    def plan(self) -> tuple[int, int, int, int]:
        """See :class:`edgemoa.api.service.Service`."""
        moa = self._config.moa
        return moa.layers, moa.proposers, moa.max_tokens, moa.deadline_s * 1000

    def own_model(self) -> tuple[str, int]:
        """See :class:`edgemoa.api.service.Service`."""
        info = self._node.engine
        return self._config.model.name, info.context_tokens if info else 0

    def card(self) -> Card:
        """See :class:`edgemoa.api.service.Service`."""
        info = self._node.engine
        if info is None:
            return self._card
        return replace(self._card, calls_tools=info.calls_tools, embeds=info.embeds)

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """See :class:`edgemoa.api.service.Service`."""
        told = await (await self._model()).embed(texts)
        return [Vector(each.vector, each.tokens) for each in told.embeddings]

    async def measure(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """See :class:`edgemoa.api.service.Service`."""
        return await (await self._model()).measure(messages, given)

    async def check_schema(self, schema: str) -> None:
        """See :class:`edgemoa.api.service.Service`."""
        await (await self._model()).check_schema(schema)

    def refusal(self) -> Failed | None:
        """See :class:`edgemoa.api.service.Service`."""
        return self._node.turned_away(self._now_ms())

    def new_request_id(self) -> str:
        """See :class:`edgemoa.api.service.Service`."""
        return self._desk.new_id()

    async def take(self, prompt: Prompt) -> str | Failed:
        """See :class:`edgemoa.api.service.Service`."""
        return await self._desk.take(prompt)

    def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        """See :class:`edgemoa.api.service.Service`."""
        return self._desk.follow(request_id, owner, holds=holds)

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        """See :class:`edgemoa.api.service.Service`."""
        return await self._desk.find(request_id, owner)

    def unfinished(self, owner: str) -> list[Ticket]:
        """See :class:`edgemoa.api.service.Service`."""
        return self._desk.unfinished(owner)

    async def forget(self, request_id: str, owner: str) -> bool:
        """See :class:`edgemoa.api.service.Service`."""
        return await self._desk.forget(request_id, owner)

    # --- what the desk asks

    def submit(self, request: Request, *, promised: bool) -> None:
        """See :class:`edgemoa.desk.Work`."""
        self._tell(lambda now: self._node.submit(request, now, promised=promised))

    def cancel(self, request_id: str) -> None:
        """See :class:`edgemoa.desk.Work`."""
        self._tell(lambda now: self._node.cancel(request_id, now))

    def has_room(self) -> bool:
        """See :class:`edgemoa.desk.Work`."""
        node = self._node
        return node.engine_ready and not self._stopped and node.refusal(self._now_ms()) is None

    def status(self) -> dict[str, Any]:
        """See :class:`edgemoa.api.service.Service`."""
        status: dict[str, Any] = msgspec.to_builtins(snapshot(self._node, self._now_ms()))
        status["engine"] = {
            "pid": self._engine.pid if self._engine else None,
            "restarts": self._engine.restarts if self._engine else 0,
            "trouble": self._engine_trouble,
            "note": self._engine.note if self._engine else "",
        }
        status["pid"] = os.getpid()
        status["backlog"] = self._desk.backlog
        status["port"] = self._network.port
        status["lent_bytes"] = self._network.lent_bytes
        status["loop_lag_ms_max"] = round(self._lag_ms_max, 1)
        status["hardware"] = msgspec.to_builtins(self._condition)
        return status

    def devices(self) -> list[DeviceState]:
        """See :class:`edgemoa.api.service.Service`."""
        peers = {peer.id: peer for peer in snapshot(self._node, self._now_ms()).peers}
        devices = []
        for device in self._network.devices():
            told: DeviceState = msgspec.to_builtins(device)
            peer = peers.get(device.id)
            if peer is not None:
                told |= {
                    "name": device.name or peer.name,
                    "presence": peer.presence,
                    "model": peer.model,
                    "utilisation": peer.utilisation,
                    "waiting": peer.waiting,
                    "expected_wait_ms": peer.expected_wait_ms,
                }
            devices.append(told)
        return devices

    async def peer_models(self) -> PeerModels:
        """See :class:`edgemoa.api.service.Service`."""
        paired = [d for d in self._network.devices() if d.state == "paired"]
        boards = await asyncio.gather(*(self._lends(device) for device in paired))
        return {"models_dir": str(self._library.root), "boards": boards}

    async def _lends(self, device: Device) -> Lender:
        told: Lender = {"id": device.id, "name": device.name, "models": [], "detail": ""}
        if not device.linked:
            return {**told, "detail": device.detail or "it is not there now"}
        async with self._asking:
            try:
                async with asyncio.timeout(PEER_MODELS_S), self._network.borrow(device.id) as there:
                    return {**told, "models": msgspec.to_builtins(await there.offers())}
            except TimeoutError:
                return {**told, "detail": "it does not answer in time"}
            except EdgemoaError as error:
                return {**told, "detail": str(error)}

    async def peer_manifest(self, board: BoardId, model_id: str) -> bytes:
        """See :class:`edgemoa.api.service.Service`."""
        async with self._network.borrow(board) as lender:
            return await lender.manifest(model_id)

    @contextlib.asynccontextmanager
    async def peer_file(
        self, board: BoardId, model_id: str, file: str, offset: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """See :class:`edgemoa.api.service.Service`."""
        async with self._network.borrow(board) as lender:
            yield await lender.file(model_id, file, offset)

    # --- the end

    def _told_to_stop(self) -> None:
        if self._stopping.is_set():
            self._in_a_hurry.set()  # told twice: stop now
        self._stopping.set()

    def _failed_unseen(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's exception handler: something failed that nobody waited for."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _SCARCE:
            # asyncio accepts again by itself when there are files to be had.
            log.warning("out of files or memory for connections", extra={"errno": error.errno})
            return
        if _is_of_zeroconf(error):
            log.warning("mDNS failed", extra={"cause": type(error).__name__})
            return
        self._stop_for_defect(str(context.get("message", "unknown")), error)

    def _stop_for_defect(self, what: str, error: BaseException | None) -> None:
        """A state that may be wrong is not kept up: say so and stop; the supervisor starts anew."""
        log.error("defect: %s", what, exc_info=error)
        self._defect = True
        self._in_a_hurry.set()
        self._stopping.set()

    async def _drain(self) -> None:
        """Finish what runs, within bounds; hand back what has not begun."""
        log.info("stopping", extra={"prompts": len(self._node.runs)})
        self._tell(self._node.drain)
        waits = [
            asyncio.ensure_future(event.wait()) for event in (self._went_idle, self._in_a_hurry)
        ]
        await asyncio.wait(waits, timeout=STOP_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _last_words(self) -> None:
        self._tell(self._node.stop)
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    # --- how responsive it is

    def _live(self, within_s: float | None) -> None:
        """Show systemd's watchdog that the event loop turns."""
        if within_s is not None:
            notify("WATCHDOG=1")
            asyncio.get_running_loop().call_later(within_s / 2, self._live, within_s)

    def _probe_lag(self) -> None:
        """While the model works, watch how late the event loop gets to what is due."""
        if not self._probing:
            self._probing = True
            self._next_probe()

    def _next_probe(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + LAG_PROBE_S
        loop.call_at(due_s, self._probe, due_s)

    def _probe(self, due_s: float) -> None:
        late_ms = (asyncio.get_running_loop().time() - due_s) * 1000
        self._lag_ms_max = max(self._lag_ms_max, late_ms)
        if self._node.queue.running:
            self._next_probe()
        else:
            self._probing = False


def _is_of_zeroconf(error: object) -> bool:
    """Whether mDNS raised this by itself, in a timer or reader of its own. What it hears comes
    from anybody, so that must not stop the daemon."""
    if not isinstance(error, BaseException):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = str(Path(__file__).parent)
    return any("zeroconf" in f for f in files) and not any(f.startswith(ours) for f in files)


def _bound(setting: int | Literal["auto"]) -> int | None:
    return None if setting == "auto" else setting


def _give_back_memory() -> None:
    """Have the allocator give back each large piece of memory that is freed. Left to itself, glibc
    takes for large only what is larger than all that was freed before, and keeps the rest."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _trim_memory() -> None:
    """Give back what was freed in small pieces, by a flood for example: a millisecond or two."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _queue_bytes(memory_mb: int) -> int:
    """What prompts and proposals may take up here: a third each for its own, for peers', and for
    requests that arrive."""
    if memory_mb:
        return memory_mb * limits.MIB
    return min(available_bytes() // 8, MOST_QUEUE_BYTES)


def _card(name: str, model_dir: Path) -> Card:
    """What the model's manifest says of it. Blocks on the disk.

    :raises ModelInvalidError: it has none that can be read.
    """
    manifest = read_manifest(model_dir)
    return Card(
        name,
        digest=manifest.model_id,
        size_bytes=manifest.size_bytes,
        created=round((model_dir / MANIFEST).stat().st_mtime),
        architecture=manifest.architecture,
        parameters=manifest.parameters or 0,
        quantization=manifest.quantization or "",
        context_length=manifest.context_length,
        layers=manifest.layers,
    )


def _strategy(config: Config) -> Synthesis:
    if not config.moa.aggregation_prompt_file:
        return Synthesis()
    file = Path(config.moa.aggregation_prompt_file).expanduser()
    instruction = _read_text(file, "moa.aggregation_prompt_file")
    if not instruction:
        raise ConfigError(
            f"moa.aggregation_prompt_file: {file} is empty",
            hint="write what the model is to do with the answers; {request} repeats the request",
        )
    return Synthesis(instruction)


def _door(config: Config, name: str) -> Door | None:
    """The way in over TCP, if there is to be one. Blocks on the disk."""
    api = config.api
    if not api.listen:
        return None
    return open_door(
        api.listen,
        keyless=api.keyless,
        certificate=api.tls_certificate,
        private_key=api.tls_key,
        keys=Keys(config.state_dir()),
        name=name,
    )


def _join_secret(config: Config) -> JoinSecret | None:
    if not config.net.join_secret_file:
        return None
    file = Path(config.net.join_secret_file).expanduser()
    return parse_join_secret(_read_text(file, "net.join_secret_file"))


def _read_text(file: Path, setting: str) -> str:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_SECRET_FILE_BYTES + 1)
        if len(text) > MAX_SECRET_FILE_BYTES:
            raise ConfigError(f"{setting}: {file} is too large", hint="is it the right file?")
        return text.decode().strip()
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot read {file}: {error.strerror}",
            hint="check the path and its permissions",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}: {file} is not UTF-8", hint="encode it as UTF-8") from error


async def _at_eof(fd: int, then: Any, stack: contextlib.AsyncExitStack) -> None:
    """Call ``then`` when ``fd`` ends: whoever started this daemon is gone."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            then()

    loop.add_reader(fd, readable)
    stack.callback(loop.remove_reader, fd)


def serve(
    config: Config,
    library: ModelLibrary,
    *,
    stop_at_eof: bool = False,
    wait_for_model: bool = False,
) -> int:
    """Run the daemon until it is told to stop; returns the exit code.

    :raises EdgemoaError: it could not be started.
    """
    _give_back_memory()

    async def main() -> int:
        daemon = Daemon(config, library, stop_at_eof=stop_at_eof, wait_for_model=wait_for_model)
        return await daemon.run()

    try:
        return asyncio.run(main())
    except EdgemoaError as error:
        notify(f"STATUS={error}")
        raise
