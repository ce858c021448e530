"""Boards as on a LAN: real daemons, each on a host of its own (a network namespace), joined by a
switch that loses, delays, doubles and cuts as it is told (:mod:`lan.switch`).

    with Bed(Path("/tmp/x")) as bed:
        boards = bed.boards(3)
        until(lambda: all(b.knows(*boards) for b in boards))
        bed.usual(loss=0.1)
        bed.cut(boards[:1], boards[1:])

Nothing is left at the end, even of one who is killed: namespaces and cables belong to the switch,
and the switch and the daemons end when their standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec

from edgemoa.client import Client
from edgemoa.config import settings
from edgemoa.demo import cause
from edgemoa.errors import EdgemoaError
from edgemoa.models.library import MANIFEST, MANIFEST_FORMAT, Manifest
from edgemoa.net.pairing import new_join_secret

HERE: Final = Path(__file__).resolve().parent
STOP_S: Final = 5.0
PORT: Final = 7946
MODEL: Final = "none"  # of boards whose engine is a stand-in
ALONE: Final = ("unshare", "--user", "--map-root-user")
TOOLS: Final = ("ip", "nsenter", "unshare")

T = TypeVar("T")


class NoBedError(Exception):
    """Namespaces cannot be made here; says why."""


class Host:
    """A machine on the LAN: a network namespace with ``eth0``, which has ``address``.

    :param enter: the command that runs the rest of its line there.
    """

    def __init__(self, name: str, address: str, enter: Sequence[str]) -> None:
        self.name = name
        self.address = address
        self._enter = list(enter)

    def ip(self, line: str) -> None:
        """Run ``ip`` there."""
        subprocess.run([*self._enter, "ip", *line.split()], check=True, capture_output=True)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process there. Ctrl-C is not for it: the bed ends what it started."""
        return subprocess.Popen([*self._enter, *argv], start_new_session=True, **options)


class Board:
    """A daemon on a host. Its state outlives its process: it can be started again.

    :param argv: what starts it, without its settings.
    :param environment: variables beside those of this process, which are for edgemoa none.
    """

    def __init__(
        self,
        host: Host,
        place: Path,
        argv: Sequence[str],
        flags: Iterable[str],
        environment: Mapping[str, str],
    ) -> None:
        place.mkdir()
        self.host = host
        self.name = host.name
        self.log = place / "log"
        self.state_dir = place / "state"
        self._argv = list(argv)
        given = {
            "board.name": host.name,
            "board.state_dir": str(self.state_dir),
            "api.socket": str(place / "api.sock"),
            "net.port": str(PORT),
            "log.format": "json",
        }
        self._flags = [*(f"{key}={value}" for key, value in given.items()), *flags]
        self.client = Client(place / "api.sock", timeout_s=60)
        ours = {f"EDGEMOA_{section}_{key}".upper() for section, key, *_ in settings()}
        self._environment = {k: v for k, v in os.environ.items() if k not in ours}
        self._environment |= {"PYTHONPATH": str(HERE.parents[1]), **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Of the daemon, once it was started."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it, once more after it ended."""
        argv = [*self._argv, "serve", "--stop-at-eof"]
        for flag in self._flags:
            argv += ["--set", flag]
        with self.log.open("ab") as told:
            self._process = self.host.popen(
                argv, stdin=subprocess.PIPE, stdout=told, stderr=told, env=self._environment
            )

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP freezes it, SIGCONT thaws it."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a board that loses its power."""
        self.process.kill()
        self.process.wait()
        self._close()

    def stop(self, *, wait: bool = True) -> None:
        """In good order; killed where that takes too long."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self._close()
        if not wait:
            return
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def status(self) -> dict[str, Any]:
        """What it shows of itself; empty while it does not listen.

        :raises RuntimeError: it has ended by itself.
        """
        if not self.runs and self.process.returncode not in {0, -signal.SIGKILL}:
            raise RuntimeError(f"{self.name} ended: {cause(self.log)}")
        try:
            return self.client.get("/v1/status")
        except EdgemoaError:
            return {}

    def sees(self) -> dict[str, str]:
        """What it believes of each paired board, by name: alive, suspect, gone or unheard; or
        ``unlinked`` for one that is alive and cannot be asked."""
        told = {}
        for peer in self.status().get("peers", ()):
            alive_only = peer["presence"] == "alive" and not peer["accepting"]
            told[peer["name"]] = "unlinked" if alive_only else peer["presence"]
        return told

    def knows(self, *boards: Board) -> bool:
        """Whether it can ask each of these, but itself."""
        seen = self.sees()
        return all(seen.get(board.name) == "alive" for board in boards if board is not self)

    def ask(self, prompt: str, *, max_tokens: int = 64, **edgemoa: Any) -> dict[str, Any]:
        """A prompt's answer and how it came about.

        :raises EdgemoaError: it was refused, or failed.
        """
        answer = self.client.ask(prompt, max_tokens=max_tokens, **edgemoa)
        return answer.trace | {"text": answer.text}

    def events(self) -> list[dict[str, Any]]:
        """What it logged, line by line."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


class Bed:
    """See the module.

    :param token_ms: what a token takes of the stand-in for a model.
    :param capture: a file for every frame that is sent (pcap); None for none.
    :raises NoBedError: there are no namespaces to be had, or no tools to make them.
    """

    def __init__(self, *, token_ms: float = 1.0, capture: Path | None = None) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if sys.platform != "linux" or missing:
            raise NoBedError(f"this needs Linux with {', '.join(missing or TOOLS)}")
        self._token_ms = token_ms
        self._hosts = 0
        self.all: list[Board] = []
        self._switch, self._enter = _open_switch()
        self.place = Path(tempfile.mkdtemp(prefix="edgemoa-"))
        secret = self.place / "join-secret"
        secret.touch(mode=0o600)
        secret.write_text(new_join_secret() + "\n", encoding="utf-8")
        self.models_dir = self.place / "models"
        write_no_model(self.models_dir / MODEL)
        if capture is not None:
            self._tell("capture", file=str(capture))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        running = [board for board in self.all if board.runs]
        for board in running:
            board.stop(wait=False)
        until_s = time.monotonic() + STOP_S
        for board in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                board.process.wait(max(until_s - time.monotonic(), 0))
            board.kill()
        _close(self._switch)
        shutil.rmtree(self.place, ignore_errors=True)

    # --- hosts and boards

    def host(self, name: str) -> Host:
        """A machine more."""
        self._hosts += 1
        address = f"10.77.0.{self._hosts}"
        told = self._tell("host", name=name, address=address)
        file = f"/proc/{self._switch.pid}/fd/{told['namespace']}"
        return Host(name, address, [*self._enter, f"--net={file}", "--"])

    def board(
        self,
        name: str,
        *flags: str,
        secret: bool = True,
        models_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> Board:
        """A board more, and its host.

        :param flags: ``section.key=value`` each.
        :param secret: whether it holds the secret by which the boards pair.
        :param models_dir: with a real engine, for ``model.name`` in there; None for a stand-in.
        :param environment: variables for it alone.
        :param start: whether it is on.
        """
        argv = [sys.executable, str(HERE / "board.py"), str(self._token_ms)]
        if models_dir is not None:
            argv = [sys.executable, "-m", "edgemoa"]
        given = [f"board.models_dir={models_dir or self.models_dir}"]
        given += [] if models_dir is not None else [f"model.name={MODEL}"]
        given += [f"net.join_secret_file={self.place / 'join-secret'}"] if secret else []
        place = self.place / name
        board = Board(self.host(name), place, argv, [*given, *flags], environment or {})
        self.all.append(board)
        if start:
            board.start()
        return board

    def boards(self, number: int, *flags: str, **options: Any) -> list[Board]:
        """So many of them: board-1, board-2 and so on."""
        return [self.board(f"board-{i}", *flags, **options) for i in range(1, number + 1)]

    # --- the network between them

    def usual(self, **rule: float) -> None:
        """What holds between any two, where nothing else was said: see :class:`lan.switch.Rule`."""
        self._tell("usual", **rule)

    def rule(
        self, senders: Iterable[Board | Host], to: Iterable[Board | Host], **rule: float
    ) -> None:
        """What holds in that direction."""
        self._tell("rule", senders=[b.name for b in senders], to=[b.name for b in to], **rule)

    def cut(self, a: Iterable[Board | Host], b: Iterable[Board | Host]) -> None:
        """Nothing passes between these and those."""
        a, b = list(a), list(b)
        self.rule(a, b, loss=1)
        self.rule(b, a, loss=1)

    def heal(self) -> None:
        """End of all cuts and rules; what is usual stays."""
        self._tell("heal")

    def sent(self) -> dict[str, dict[str, int]]:
        """What each host sent so far: bytes of packets by kind (arp, tcp, udp, mdns, other), and
        how many ``frames``."""
        return self._tell("sent")

    def end_capture(self) -> None:
        """Close the file."""
        self._tell("capture", file="")

    @property
    def switch_cpu_s(self) -> float:
        """Processor time that the switch has used."""
        return cpu_s(self._switch.pid)

    def _tell(self, what: str, **given: Any) -> dict[str, Any]:
        answer = _ask(self._switch, {"do": what, **given})
        if "error" in answer:
            raise NoBedError(answer["error"])
        return answer


def _open_switch() -> tuple[subprocess.Popen[bytes], list[str]]:
    """A switch, and the command that enters its hosts: with no more rights than any user has, or
    as root where that is not enough."""
    why = []
    for prefix in (ALONE, ()) if os.geteuid() == 0 else (ALONE,):
        process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "switch.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        user = [f"--user=/proc/{process.pid}/ns/user", "--preserve-credentials"] if prefix else []
        answer = _ask(process, {"do": "host", "name": "", "address": "10.77.0.254"})
        if "error" not in answer:
            enter = ["nsenter", *user]
            trial = [*enter, f"--net=/proc/{process.pid}/fd/{answer['namespace']}", "--", "true"]
            if not (said := subprocess.run(trial, check=False, capture_output=True).stderr):
                return process, enter
            answer = {"error": said.decode(errors="replace").strip()}
        why.append(answer["error"])
        _close(process)
    raise NoBedError(f"no network namespaces can be made here: {'; '.join(why)}")


def _ask(process: subprocess.Popen[bytes], told: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else "the switch ended without a word"}
    answer: dict[str, Any] = json.loads(line)
    return answer


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    process.kill()
    process.wait()


def write_no_model(folder: Path) -> None:
    """What the daemon looks at of a model, for an engine that needs none."""
    folder.mkdir(parents=True)
    manifest = Manifest(
        format=MANIFEST_FORMAT, name=folder.name, model_id="0" * 64, importer=0,
        architecture="none", context_length=8192, vocabulary=1, layers=1, kv_heads=1, head_size=1,
        kv_bytes_per_token=1, eos_token_ids=(0,), files=(),
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def until(true: Callable[[], T], seconds: float = 20.0, every_s: float = 0.05) -> T:
    """Wait for something to become true; returns it.

    :raises TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain")
        time.sleep(every_s)
    return value
