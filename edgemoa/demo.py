"""Several boards on this one machine: the whole of edgemoa in one command.

Each board is a daemon as on a real one: its own process, state directory, identity and model
process. They find each other by mDNS on loopback, pair by a secret made for this run, and answer
one prompt. Nothing of them is left when the command ends, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edgemoa.client import Client
from edgemoa.config import Config, settings, to_toml
from edgemoa.errors import BoardError, DaemonUnreachableError, EdgemoaError
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import ConsoleProgress
from edgemoa.models.pull import ensure
from edgemoa.net.pairing import new_join_secret
from edgemoa.show import Terminal, follow

START_TIMEOUT_S: Final = 60.0
LONGEST_PLACE_BYTES: Final = 72  # what a socket's path leaves beside what is put below it
STOP_TIMEOUT_S: Final = 5.0
_VERIFY: Final = "is the model whole? `edgemoa model verify NAME` checks it"


@dataclass
class LocalBoard:
    """One daemon of the group."""

    name: str
    process: subprocess.Popen[bytes]
    socket: Path
    log: Path
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.socket, timeout_s=None)


@contextlib.contextmanager
def group(
    boards: int, model: str, models_dir: Path, *flags: str, config: Config | None = None
) -> Iterator[list[LocalBoard]]:
    """Start ``boards`` daemons on loopback; stop and reap them at the end, whatever happens.

    :param flags: further ``section.key=value`` settings for each.
    :param config: settings of the user's for each; those of a board's own place are left out.
    """
    place = _new_place()
    started: list[LocalBoard] = []
    try:
        secret = place / "join-secret"
        secret.touch(mode=0o600)
        secret.write_text(new_join_secret() + "\n", encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // boards)
        for i in range(1, boards + 1):
            name = f"board-{i}"
            started.append(
                start_board(
                    place / name,
                    f"board.name={name}",
                    f"board.models_dir={models_dir}",
                    f"model.name={model}",
                    f"model.threads={threads}",
                    f"net.join_secret_file={secret}",
                    *flags,
                    config=config,
                )
            )
        yield started
    finally:
        stop(started)
        shutil.rmtree(place, ignore_errors=True)


def _new_place() -> Path:
    """A new folder with a short path, since those of Unix sockets are bounded."""
    usual = Path(tempfile.gettempdir())
    folder = usual if len(os.fsencode(usual)) <= LONGEST_PLACE_BYTES else Path("/tmp")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="edgemoa-", dir=folder))


def start_board(place: Path, *flags: str, config: Config | None = None) -> LocalBoard:
    """Start one daemon on loopback with its state in ``place``, with no other settings than
    ``config`` and ``flags``: neither files nor the environment of the user's own board count."""
    place.mkdir(exist_ok=True)
    file = place / "edgemoa.toml"
    given = config or Config()
    shared = Config(moa=given.moa, queue=given.queue, log=given.log)
    file.write_text(to_toml(shared), encoding="utf-8")
    socket, log = place / "api.sock", place / "log"
    flags = (
        f"board.state_dir={place / 'state'}",
        f"api.socket={socket}",
        "net.listen=127.0.0.1",
        "net.interfaces=127.0.0.1",
        "log.format=json",
        *flags,
    )
    argv = [sys.executable, "-m", "edgemoa", "serve", "--stop-at-eof", "--config", str(file)]
    for flag in flags:
        argv += ["--set", flag]
    ours = {f"EDGEMOA_{section}_{key}".upper() for section, key, *_ in settings()}
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,  # its end tells the board that we are gone, even if killed
            stdout=stderr,
            stderr=stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; we stop the boards in order
        )
    return LocalBoard(place.name, process, socket, log)


def stop(boards: list[LocalBoard]) -> None:
    """Stop daemons in good order, or kill them after a while; none is left."""
    for board in boards:
        board.process.terminate()
        if board.process.stdin is not None:
            board.process.stdin.close()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for board in boards:
        try:
            board.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            board.process.kill()
            board.process.wait()
        except BaseException:
            for other in boards:
                other.process.kill()
            raise


def wait_until_ready(boards: list[LocalBoard], terminal: Terminal | None = None) -> None:
    """Wait until the first board's model is loaded and it can ask every other board.

    :raises BoardError: a board ended, its model cannot be loaded, or it took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        status = _status(boards[0])
        at_hand = sum(1 for peer in status.get("peers", ()) if peer["accepting"])
        if status.get("ready") and at_hand == len(boards) - 1:
            return
        for board in boards:
            if board.process.poll() is not None:
                raise BoardError(
                    f"{board.name} ended with exit code {board.process.returncode}: "
                    f"{cause(board.log)}",
                    hint="mend that and try again",
                )
            if trouble := _status(board).get("engine", {}).get("trouble"):
                raise BoardError(f"{board.name}: {trouble}", hint=_VERIFY)
        if time.monotonic() > deadline:
            if not status.get("ready"):
                raise BoardError(f"{boards[0].name} still loads its model", hint=_VERIFY)
            raise BoardError(
                f"after {START_TIMEOUT_S:.0f} s {boards[0].name} has found {at_hand} of "
                f"{len(boards) - 1} boards",
                hint="does a firewall block UDP 5353, or TCP and UDP on loopback?",
            )
        if terminal is not None:
            ready = "loaded" if status.get("ready") else "loading"
            terminal.pending(
                f"{len(boards)} boards start: model {ready}, "
                f"{at_hand} of {len(boards) - 1} neighbours paired and ready"
            )
        time.sleep(0.05)


def _status(board: LocalBoard) -> dict[str, Any]:
    """The board's status; empty while it does not listen yet."""
    try:
        return board.client.get("/v1/status")
    except DaemonUnreachableError:
        return {}


def cause(log: Path) -> str:
    """Why a daemon ended, by its log, in a few words."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [line.removeprefix("edgemoa: ") for line in lines if line.startswith("edgemoa: ")]
    if said:
        return said[-1]
    for line in reversed(lines):
        with contextlib.suppress(ValueError, AttributeError):
            told = json.loads(line)
            return " ".join(str(told[key]) for key in ("event", "reason", "error") if key in told)
    return lines[-1][:300] if lines else "its log is empty"


def demo(
    *,
    prompt: str,
    boards: int,
    layers: int,
    proposers: int,
    max_tokens: int | None,
    library: ModelLibrary,
    config: Config,
    model: str,
    terminal: Terminal | None,
) -> dict[str, Any]:
    """Start a group, have it answer ``prompt``, stop it; returns the ``answered`` event.

    :raises EdgemoaError: whatever kept the prompt from being answered.
    """

    progress = ConsoleProgress()
    try:
        ensure(model, library, progress)
    finally:
        progress.close()
    began = time.monotonic()
    with group(boards, model, library.root, config=config) as started:
        wait_until_ready(started, terminal)
        ready_ms = round((time.monotonic() - began) * 1000)
        if terminal is not None:
            terminal.step(f"{boards} boards found each other and paired in {ready_ms / 1000:.1f} s")
        body: dict[str, Any] = {
            "model": "edgemoa",
            "messages": [{"role": "user", "content": prompt}],
            "edgemoa": {"layers": layers, "proposers": proposers, "events": True},
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            answered = follow(started[0].client.chat(body), terminal)
        except EdgemoaError as error:
            for board in started:
                if board.process.poll() is not None:
                    raise BoardError(f"{board.name} died: {cause(board.log)}") from error
            raise
    return answered | {"ready_ms": ready_ms}
