"""How a board runs a model best, as a measurement found it, and where that is kept.

Kept in the state directory, by board and model: what was measured for another one is not used. It
only saves time, so a file that cannot be read counts as none.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated, Final

import msgspec

from edgemoa.core import limits
from edgemoa.engine.memory import total_bytes
from edgemoa.errors import DiskFullError, StateError

log = logging.getLogger(__name__)

FILE: Final = "tuning.json"
MAX_FILE_BYTES: Final = 256 * limits.KIB
MOST_KEPT: Final = 16  # models; the latest
MEMORY_STEP: Final = 256 * limits.MIB  # kernels differ by some megabytes in what they count
MOST_BUSY: Final = 0.1
_RUNTIMES: Final = ("onnxruntime", "onnxruntime-genai")


Rate = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Whole = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class Threads(msgspec.Struct, frozen=True):
    """Tokens a second with so many threads: read, and written for one job alone."""

    threads: Whole
    prefill: Rate
    decode: Rate


class Jobs(msgspec.Struct, frozen=True):
    """Tokens a second that are written for so many jobs in all."""

    jobs: Whole
    decode: Rate


class Tuning(msgspec.Struct, frozen=True):
    """How many threads and jobs at a time do best, and what was measured of others."""

    threads: Whole
    slots: Whole
    by_threads: Annotated[tuple[Threads, ...], msgspec.Meta(max_length=64)] = ()
    by_jobs: Annotated[tuple[Jobs, ...], msgspec.Meta(max_length=64)] = ()
    busy: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0  # what others took of the processors

    @property
    def is_trusted(self) -> bool:
        """Whether the board was quiet enough for the figures to say much about it."""
        return self.busy <= MOST_BUSY


class Board(msgspec.Struct, frozen=True):
    """What a measurement holds for. ``runtimes`` are versions: each has kernels of its own.

    What the settings name is not chosen by the measurement, and is not to outlast them.
    """

    model_id: str
    backend: str  # as configured
    provider: str
    cores: int
    memory_mb: int
    runtimes: str
    threads: int = 0  # as configured; 0: to be found. Likewise:
    slots: int = 0
    cache_mb: int = 0


class _Kept(msgspec.Struct, frozen=True):
    board: Board
    tuning: Tuning


class _File(msgspec.Struct, frozen=True):
    format: Annotated[int, msgspec.Meta(ge=1, le=1)]
    kept: Annotated[tuple[_Kept, ...], msgspec.Meta(max_length=MOST_KEPT)]


def cores() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def this_board(
    model_id: str,
    backend: str,
    provider: str,
    *,
    threads: int = 0,
    slots: int = 0,
    cache_mb: int = 0,
) -> Board:
    """This board with a model. Raises :class:`EngineError` where the kernel says nothing."""
    memory = round(total_bytes() / MEMORY_STEP) * MEMORY_STEP >> 20
    runtimes = " ".join(map(_version, _RUNTIMES))
    return Board(model_id, backend, provider, cores(), memory, runtimes, threads, slots, cache_mb)


def _version(package: str) -> str:
    # 2 MB of modules: not in the model process, which imports this one for its structs.
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def kept(state_dir: Path, board: Board) -> Tuning | None:
    """What was found for a board and its model, if it was."""
    return next((each.tuning for each in _read(state_dir / FILE) if each.board == board), None)


def keep(state_dir: Path, board: Board, tuning: Tuning) -> None:
    """Keep what was found, in place of what was found for the same before.

    :raises StateError: if the state directory cannot be written.
    :raises DiskFullError: if there is no room.
    """
    file = state_dir / FILE
    others = [each for each in _read(file) if each.board != board]
    now = _File(1, (_Kept(board, tuning), *others[: MOST_KEPT - 1]))
    data = msgspec.json.format(msgspec.json.encode(now), indent=1)
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=state_dir, prefix=f".{FILE}.")
        try:
            with os.fdopen(number, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StateError
        raise kind(
            f"{file} cannot be written: {error.strerror}", hint="check board.state_dir"
        ) from error


def _read(file: Path) -> tuple[_Kept, ...]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise msgspec.DecodeError("too large")  # noqa: TRY301 - one end for all
        return msgspec.json.decode(data, type=_File).kept
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError):
        log.warning("what was measured before cannot be read", extra={"file": str(file)})
        return ()
