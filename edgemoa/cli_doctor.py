"""``edgemoa doctor``: what a report of a bug would be asked for, and what to do about each finding.

Each check tells what it found, and goes on without what it could not see: half of a broken board
is better than no report.
"""

from __future__ import annotations

import argparse
import grp
import importlib.metadata
import json
import os
import platform
import pwd
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from edgemoa import __version__, cli_settings, hardware, show
from edgemoa.errors import EdgemoaError

if TYPE_CHECKING:
    from edgemoa.config import Config

Level = Literal["ok", "warn", "fail"]

_PACKAGES: Final = ("onnxruntime-genai", "onnxruntime", "zeroconf", "msgpack", "cryptography")
_MIB: Final = 1 << 20
_LITTLE_MEMORY: Final = 700 * _MIB  # the smallest board of the catalog's smallest model has 1 GB
_LITTLE_DISK: Final = 200 * _MIB
_NO_DISK: Final = 32 * _MIB
_HOT_C: Final = 80.0  # where a Raspberry Pi begins to slow down
_SLOW_LOOP_MS: Final = 500.0
_COLOURS: Final = {"ok": "32", "warn": "33", "fail": "31"}


class Finding(NamedTuple):
    """
    :ivar todo: the next step; empty where nothing is to be done.
    """

    what: str
    level: Level
    told: str
    todo: str = ""


def run(arguments: argparse.Namespace, load: Callable[[], Config]) -> int:
    """Print every finding; 1 if something fails that the board needs.

    :param load: reads the settings.
    """
    found = []
    for finding in examine(arguments.socket, load):
        found.append(finding)
        if not arguments.json:
            _print(finding)
    failed = sum(each.level == "fail" for each in found)
    if arguments.json:
        told = [each._asdict() for each in found]
        print(json.dumps({"version": __version__, "failed": failed, "findings": told}))
    else:
        warned = sum(each.level == "warn" for each in found)
        print(f"\n{failed} failed, {warned} to look at, {len(found)} checked")
    return 1 if failed else 0


def examine(socket: str | None, load: Callable[[], Config]) -> Iterator[Finding]:
    """All checks, in the order in which a person would make them.

    :param socket: of the daemon, if it is not the configured one.
    """
    yield Finding("edgemoa", "ok", f"{__version__}, Python {platform.python_version()}")
    yield from _packages()
    yield from _machine()
    config: Config | None = None
    try:
        config = load()
    except EdgemoaError as error:
        yield _failed("settings", error)
    if config is not None:
        yield Finding("settings", "ok", "can be read")
        yield from _disk(config)
        yield from _models(config)
    yield from _daemon(_socket(socket, config))


def _packages() -> Iterator[Finding]:
    missing, there = [], []
    for name in _PACKAGES:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        again = f"{sys.executable} -m pip install --force-reinstall edgemoa"
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", again)
    else:
        yield Finding("packages", "ok", ", ".join(there))


def _machine() -> Iterator[Finding]:
    from edgemoa.engine import memory

    name = hardware.board_name() or "unknown board"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("board", "ok", f"{name}, {system}, {os.cpu_count()} cores")
    try:
        free, total = memory.available_bytes(), memory.total_bytes()
    except EdgemoaError as error:
        yield _failed("memory", error)
    else:
        told = f"{free // _MIB} of {total // _MIB} MiB free"
        little = total < _LITTLE_MEMORY
        todo = "use the smallest model of `edgemoa model list --remote`" if little else ""
        yield Finding("memory", "warn" if little else "ok", told, todo)
    state = hardware.condition()
    if state.temperature_c is not None:
        hot = state.temperature_c >= _HOT_C
        todo = "give the board a heat sink, a fan or more air" if hot else ""
        told = f"{state.temperature_c:.0f} °C"
        yield Finding("temperature", "warn" if hot else "ok", told, todo)
    if state.under_voltage:
        todo = "use the supply and cable that the maker names for this board"
        yield Finding("power", "warn", "the supply is too weak", todo)
    if state.throttled:
        todo = "see to cooling and supply; answers are slower until then"
        yield Finding("speed", "warn", "the system holds the processor back", todo)


def _disk(config: Config) -> Iterator[Finding]:
    folder = config.state_dir()
    try:
        about = folder.stat()
    except FileNotFoundError:
        yield Finding("state", "ok", f"{folder} is not there yet; the daemon makes it")
    except OSError as error:
        # Of a system's daemon, only that daemon and root may look.
        told = f"{folder} cannot be looked at: {error.strerror}"
        yield Finding("state", "warn", told, "ask again as root, or as the daemon's user")
    else:
        mode, owner = about.st_mode & 0o777, _user(about.st_uid)
        told = f"{folder}, of {owner}, mode {mode:o}"
        if mode & 0o077:
            yield Finding("state", "fail", f"{told}: others can read it", f"chmod 700 {folder}")
        elif os.geteuid() not in (about.st_uid, 0):
            todo = f"start the daemon as {owner}, or chown it, if another user is to run it"
            yield Finding("state", "warn", f"{told}, and you are {_user(os.geteuid())}", todo)
        else:
            yield Finding("state", "ok", told)
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    told = f"{free // _MIB} MiB free at {there}"
    if free < _LITTLE_DISK:
        level: Level = "fail" if free < _NO_DISK else "warn"
        todo = "make room: see `edgemoa model list` and `edgemoa model rm NAME`"
        yield Finding("disk", level, told, todo)
    else:
        yield Finding("disk", "ok", told)


def _models(config: Config) -> Iterator[Finding]:
    from edgemoa.models.catalog import default_model

    library = cli_settings.library(config)
    name = config.model.name or default_model(library)
    try:
        library.find(name)
    except EdgemoaError as error:
        yield _failed("model", error)
        return
    manifest = library.models().get(name)
    if manifest is None:
        todo = f"fetch it again: edgemoa model rm {name}; edgemoa model pull {name}"
        yield Finding("model", "fail", f"{name} in {library.root} is damaged", todo)
    elif manifest.is_outdated:
        todo = f"fetch it again: edgemoa model rm {name}; edgemoa model pull {name}"
        yield Finding("model", "warn", f"{name} was made by an older edgemoa", todo)
    else:
        yield Finding("model", "ok", f"{name}, {manifest.size_bytes // _MIB} MiB")


def _socket(given: str | None, config: Config | None) -> Path:
    from edgemoa.client import socket_path

    return config.socket_path() if config is not None and given is None else socket_path(given)


def _daemon(path: Path) -> Iterator[Finding]:
    from edgemoa.client import Client

    try:
        about = path.stat()
        told = f"{path}, of group {_group(about.st_gid)}, mode {about.st_mode & 0o777:o}"
        if os.access(path, os.R_OK | os.W_OK):
            yield Finding("socket", "ok", told)
        else:
            todo = f"sudo usermod -aG {_group(about.st_gid)} {_user(os.geteuid())}; log in again"
            yield Finding("socket", "fail", f"{told}: you may not use it", todo)
    except OSError:
        pass  # asking the daemon says why, and what to do
    client = Client(path, timeout_s=10)
    try:
        status = client.get("/v1/status")
        devices = client.get("/v1/devices")["devices"]
    except EdgemoaError as error:
        yield _failed("daemon", error)
        return
    told = f"{status['name']}, {status['id']}, process {status['pid']}"
    yield Finding("daemon", "ok", told)
    yield from _model_process(status)
    yield from _queue(status)
    yield from _peers(status, devices)


def _model_process(status: dict[str, Any]) -> Iterator[Finding]:
    engine = status["engine"]
    journal = "read the daemon's log: journalctl -u edgemoa"
    told = f"{status['model']}, {engine['restarts']} restarts"
    if engine["trouble"]:
        yield Finding("engine", "fail", f"{told}: {engine['trouble']}", journal)
    elif not status["ready"]:
        yield Finding("engine", "warn", f"{told}: loading", "wait, and ask again")
    elif engine["restarts"]:
        yield Finding("engine", "warn", told, f"{journal}; is there memory enough?")
    else:
        told = f"{told}, {status['backend']}, {status['slots']} jobs at a time"
        yield Finding("engine", "ok", told)
    if engine["note"]:
        yield Finding("engine", "warn", engine["note"], "see `edgemoa config` for the setting")


def _queue(status: dict[str, Any]) -> Iterator[Finding]:
    counters = status["counters"]
    told = (
        f"{status['running']} running, {status['waiting']} waiting, {counters['answered']} "
        f"answered, {counters['refused']} refused, {counters['failed']} failed"
    )
    full = status["prompts"] >= status["own_requests_cap"] > 0
    todo = "wait, add a board, or ask for less with --plan M0" if full else ""
    yield Finding("queue", "warn" if full else "ok", told, todo)
    if status["loop_lag_ms_max"] > _SLOW_LOOP_MS:
        told = f"the daemon was {show.seconds(round(status['loop_lag_ms_max']))} late at worst"
        yield Finding("speed", "warn", told, "is another program taking the processor or the card?")


def _peers(status: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[Finding]:
    paired = [device for device in devices if device["state"] == "paired"]
    pending = [device for device in devices if device["state"] == "pending"]
    linked = [device for device in paired if device["linked"]]
    told = f"{len(linked)} of {len(paired)} paired boards linked"
    if not paired:
        todo = "`edgemoa pair` on a board of the group, then `edgemoa join CODE` on this one"
        yield Finding("peers", "warn", f"no board is paired, {len(pending)} in sight", todo)
    elif not linked:
        todo = f"are they on, and does the network let port {status['port']} (TCP and UDP) through?"
        yield Finding("peers", "fail", told, todo)
    else:
        yield Finding("peers", "ok", told)
    for device in devices:
        if device["state"] == "paired" and not device["linked"]:
            why = device["detail"] or "not seen since this daemon started"
            todo = f"see that it runs and shares this network: `edgemoa doctor` on {device['name']}"
            yield Finding("peer", "warn", f"{device['name']}: {why}", todo)


def _failed(what: str, error: EdgemoaError) -> Finding:
    return Finding(what, "fail", str(error), error.hint)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _print(finding: Finding) -> None:
    level = f"{finding.level:<4}"
    if sys.stdout.isatty():
        level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
    print(f"{level}  {finding.what:<11}  {show.harmless(finding.told)}", flush=True)
    if finding.todo:
        print(f"{'':19}-> {show.harmless(finding.todo)}", flush=True)
