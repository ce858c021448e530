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
from edgemoa.config import settings
from edgemoa.errors import BoardError, DaemonUnreachableError, EdgemoaError
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import ConsoleProgress
from edgemoa.models.pull import ensure
from edgemoa.net.pairing import new_join_secret
from edgemoa.show import Terminal, follow

START_TIMEOUT_S: Final = 60.0
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
    boards: int, model: str, models_dir: Path, *flags: str, command: tuple[str, ...] = ()
) -> Iterator[list[LocalBoard]]:
    """Start ``boards`` daemons on loopback; stop and reap them at the end, whatever happens.

    :param flags: further ``section.key=value`` settings for each.
    :param command: what starts a daemon, where not ``python -m edgemoa serve``.
    """
    place = Path(tempfile.mkdtemp(prefix="edgemoa-"))  # short: Unix sockets have short paths
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
                    command=command,
                )
            )
        yield started
    finally:
        stop(started)
        shutil.rmtree(place, ignore_errors=True)


def start_board(place: Path, *flags: str, command: tuple[str, ...] = ()) -> LocalBoard:
    """Start one daemon on loopback with its state in ``place``."""
    place.mkdir(exist_ok=True)
    socket, log = place / "api.sock", place / "log"
    flags = (
        f"board.state_dir={place / 'state'}",
        f"api.socket={socket}",
        "net.listen=127.0.0.1",
        "net.interfaces=127.0.0.1",
        "log.format=json",
        *flags,
    )
    argv = [*(command or (sys.executable, "-m", "edgemoa", "serve")), "--stop-at-eof"]
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
        status: dict[str, Any] = {}
        with contextlib.suppress(DaemonUnreachableError):
            status = boards[0].client.get("/v1/status")
        at_hand = sum(1 for peer in status.get("peers", ()) if peer["accepting"])
        if status.get("ready") and at_hand == len(boards) - 1:
            return
        for board in boards:
            if board.process.poll() is not None:
                raise BoardError(
                    f"{board.name} ended with exit code {board.process.returncode}: "
                    f"{last_line(board.log)}",
                    hint="mend that and try again",
                )
        trouble = status.get("engine", {}).get("trouble")
        if trouble or time.monotonic() > deadline:
            if trouble:
                raise BoardError(f"{boards[0].name}: {trouble}", hint=_VERIFY)
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


def last_line(log: Path) -> str:
    """The end of a daemon's log, in a few words."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not lines:
        return "its log is empty"
    with contextlib.suppress(ValueError, AttributeError):
        told = json.loads(lines[-1])
        return " ".join(str(told[key]) for key in ("event", "reason", "error") if key in told)
    return lines[-1][:300]


def demo(
    *,
    prompt: str,
    boards: int,
    layers: int,
    proposers: int,
    max_tokens: int | None,
    library: ModelLibrary,
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
    with group(boards, model, library.root) as started:
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
                    raise BoardError(f"{board.name} died: {last_line(board.log)}") from error
            raise
    return answered | {"ready_ms": ready_ms}
