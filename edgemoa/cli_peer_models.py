"""``edgemoa model pull NAME --from-peer [BOARD]``: models that paired boards hold.

The daemon, which is the one that other boards know, is only the way here. This process checks what
comes, keeps it for the next try if it breaks off, and makes the model visible once it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from edgemoa import cli_settings
from edgemoa.client import Client
from edgemoa.errors import (
    BoardError,
    DaemonUnreachableError,
    EdgemoaError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    OverloadedError,
    ProtocolError,
    UserError,
)
from edgemoa.models.library import (
    CHUNK_BYTES,
    MANIFEST,
    MANIFEST_FORMAT,
    Manifest,
    ModelFile,
    ModelLibrary,
    check_name,
    content_id,
    read_manifest,
)
from edgemoa.models.progress import ConsoleProgress, Progress
from edgemoa.models.ready import check_folder

MAX_FILES: Final = 64
MAX_NUMBER: Final = 2**48
MAX_TEXT: Final = 512
PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # no path, and nothing hidden
SHA256: Final = re.compile(r"[0-9a-f]{64}")
PROGRAM: Final = b"\x7fELF"  # a model's settings can name a library of its folder to be loaded
GAIN_BYTES: Final = 1 << 20  # less is no reason for new patience, unless a file ends with it
TIMEOUT_S: Final = 60.0  # for the daemon, which has shorter ones for the other board
NICENESS: Final = 10  # checking what comes leaves the processor to prompts
KEPT: Final = "what has arrived is kept: run the same command again to go on"
ELSEWHERE: Final = "look there: edgemoa model verify; or take it from another: --from-peer BOARD"
REMOTE: Final = "see what paired boards hold: edgemoa model list --remote"


class PeerModel(msgspec.Struct, frozen=True):
    """A model that a paired board lends; see :class:`edgemoa.net.copies.Offer`."""

    name: str
    model_id: str
    size_bytes: int
    quantization: str = ""
    parameters: int = 0


class PeerBoard(msgspec.Struct, frozen=True):
    """A paired board and what it lends; ``detail`` says why that is not known."""

    id: str
    name: str
    models: tuple[PeerModel, ...]
    detail: str = ""

    @property
    def label(self) -> str:
        return self.name or self.id[:8]

    def holds(self, model_id: str) -> bool:
        return any(model.model_id == model_id for model in self.models)


class PeerModels(msgspec.Struct, frozen=True):
    """What all paired boards lend, and where this board's daemon keeps its models."""

    models_dir: str
    boards: tuple[PeerBoard, ...]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a copy that has begun goes on without a byte: in seconds."""

    gone: float = 60.0  # while no board with the model is there
    busy: float = 600.0  # while those that are there lend to others
    retry: tuple[float, float] = (0.5, 8.0)  # between rounds: at first, and in the end


@dataclass(slots=True)
class Copy:
    """What came of it. ``boards`` are those that bytes came from."""

    folder: Path
    model_id: str
    size_bytes: int
    copied_bytes: int = 0
    boards: list[str] = field(default_factory=list)


def pull_from_peer(args: argparse.Namespace) -> int:
    """The command. ``args`` has ``name``, ``from_peer`` (a board's name or the beginning of its ID;
    empty for any), ``models``, ``json`` and ``socket``."""
    socket = getattr(args, "socket", None) or os.environ.get("EDGEMOA_API_SOCKET")
    client = Client(Path(socket).expanduser() if socket else None, timeout_s=TIMEOUT_S)
    os.nice(NICENESS)
    progress = ConsoleProgress()
    try:
        copy = copy_model(args.name, args.from_peer or "", client, progress, root=args.models)
    finally:
        progress.close()
    if getattr(args, "json", False):
        print(json.dumps({"name": args.name, **asdict(copy)}, default=str))
    else:
        print(copy.folder)
    return 0


def peer_models(client: Client) -> PeerModels:
    """What paired boards lend.

    :raises EdgemoaError: the daemon cannot be asked.
    """
    return msgspec.convert(client.get("/v1/peers/models"), PeerModels)


def copy_model(
    name: str,
    board: str,
    client: Client,
    progress: Progress,
    *,
    root: Path | None = None,
    patience: Patience | None = None,
) -> Copy:
    """Copy a model from a paired board into the library, or go on with an earlier try.

    :param board: whose model is meant; where it is empty, the boards that hold ``name`` have to
        agree on what it is. Others that hold the very same take over from one that goes away.
    :param root: the folder of models; by default the daemon's.
    :raises EdgemoaError: it cannot be had; no part of it is visible, what has arrived is kept.
    """
    check_name(name)
    there = peer_models(client)
    library = ModelLibrary(root or Path(there.models_dir))
    cli_settings.as_owner(library.root)
    model, boards = choose(name, board, there.boards)
    here = library.root / name
    if (here / MANIFEST).is_file():
        return _already(here, model.model_id)
    if here.exists():
        raise UserError(
            f"{here} is in the way: it is there, but holds no model",
            hint=f"look at it, then remove it: edgemoa model rm {name}",
        )
    source = _Source(client, model.model_id, boards, progress, patience or Patience())
    manifest = check_manifest(source.manifest(), model.model_id)
    copy = Copy(here, model.model_id, manifest.size_bytes)
    arrives = f"a paired board's model {model.model_id}"
    with library.staging(name, manifest.size_bytes, progress, source=arrives) as staging:
        if (staging.target / MANIFEST).is_file():  # by the process that was waited for
            return _already(staging.target, model.model_id)
        done = 0

        def arrived(of_file: int) -> None:
            progress(source.stage, done + of_file, copy.size_bytes)

        for file in manifest.files:
            part = staging.arriving / file.name
            _fetch(file, part, source, arrived)
            done += file.size_bytes
        for file in manifest.files:
            staging.take(staging.arriving / file.name, file.name)
        try:
            check_folder(staging.model, (file.name for file in manifest.files))
        except ModelInvalidError as error:
            staging.forget_arrived()
            error.hint = "it is what that board holds; take the model from another"
            raise
        # Where that board has it from is its word, and would be told as ours.
        staging.place(msgspec.structs.replace(manifest, name=name, source=arrives))
    copy.copied_bytes, copy.boards = source.copied_bytes, list(source.gave)
    return copy


def choose(
    name: str, board: str, boards: tuple[PeerBoard, ...]
) -> tuple[PeerModel, list[PeerBoard]]:
    """The model that is meant, and the boards to copy it from, in the order to try.

    :raises UserError: if it cannot be told which is meant; ModelNotFoundError if nobody has it.
    :raises NetworkError: if the board that was named is not there.
    """
    first = _named(board, boards) if board else None
    held = {
        model.model_id: model
        for one in ([first] if first else boards)
        for model in one.models
        if model.name == name
    }
    silent_boards = [f"{one.label} ({one.detail})" for one in boards if one.detail]
    if not held and silent_boards and not first:
        raise NetworkError(
            f"no paired board that answers holds a model {name!r}, "
            f"and these do not answer: {', '.join(silent_boards)}",
            hint="try again in a moment; see `edgemoa devices`",
        )
    if not held:
        where = first.label if first else "no paired board that is there"
        has = f"{where} does not hold" if first else f"{where} holds"
        raise ModelNotFoundError(f"{has} a model {name!r}", hint=REMOTE)
    if len(held) > 1:
        holders = [
            f"{one.label} ({model.model_id[:8]})"
            for one in boards
            for model in one.models
            if model.name == name
        ]
        raise UserError(
            f"boards hold different models under the name {name!r}: {', '.join(sorted(holders))}",
            hint=f"say whose: edgemoa model pull {name} --from-peer BOARD",
        )
    (model,) = held.values()
    others = [one for one in boards if one is not first and one.holds(model.model_id)]
    random.shuffle(others)  # so that many boards that copy at once do not all ask the same one
    return model, [first, *others] if first else others


def _named(board: str, boards: tuple[PeerBoard, ...]) -> PeerBoard:
    found = [one for one in boards if board in (one.name, one.id)]
    found = found or [one for one in boards if len(board) >= 4 and one.id.startswith(board)]
    if len(found) != 1:
        known = ", ".join(sorted(one.label for one in boards)) or "none"
        what = "more than one paired board is" if found else "no paired board is"
        raise UserError(
            f"{what} called {board!r}; paired are: {known}",
            hint="give its name, or the beginning of its ID: edgemoa devices",
        )
    if found[0].detail:
        raise NetworkError(
            f"{found[0].label} cannot be asked: {found[0].detail}",
            hint="is it on, and on this network? see `edgemoa devices`",
        )
    return found[0]


def check_manifest(data: bytes, model_id: str) -> Manifest:
    """What another board says of its model, if it can be true, and is of the model asked for.

    :raises ModelInvalidError: otherwise.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _untrue(f"its manifest is damaged: {error}") from None
    if manifest.format != MANIFEST_FORMAT:
        raise _untrue(f"its manifest is of format {manifest.format}, not {MANIFEST_FORMAT}")
    files = manifest.files
    if not 0 < len(files) <= MAX_FILES or len({file.name.lower() for file in files}) < len(files):
        raise _untrue("its manifest lists no files, too many, or one twice")
    for file in files:
        if not PLAIN.fullmatch(file.name) or file.name.lower() == MANIFEST:
            raise _untrue("its manifest lists a file under a name that is not allowed")
        if not SHA256.fullmatch(file.sha256) or not 0 <= file.size_bytes <= MAX_NUMBER:
            raise _untrue("its manifest lists a file of a size or hash that cannot be")
    for value in msgspec.structs.astuple(manifest):
        if isinstance(value, str) and (len(value) > MAX_TEXT or not value.isprintable()):
            raise _untrue("its manifest holds text that is not allowed")
        if isinstance(value, int) and not 0 <= value <= MAX_NUMBER:
            raise _untrue("its manifest holds a number that cannot be")
    if manifest.model_id != model_id or content_id(files) != model_id:
        raise _untrue("its manifest is of another model")
    return manifest


def _untrue(what: str) -> ModelInvalidError:
    return ModelInvalidError(
        f"the other board's model cannot be copied: {what}",
        hint=ELSEWHERE,
    )


def _already(folder: Path, model_id: str) -> Copy:
    manifest = read_manifest(folder)
    if manifest.model_id != model_id:
        raise UserError(
            f"there is another model called {folder.name!r} on this board",
            hint=f"remove it first: edgemoa model rm {folder.name}",
        )
    return Copy(folder, model_id, manifest.size_bytes)


_BREAKS: Final = (EdgemoaError, http.client.HTTPException, OSError, EOFError)


class _Source:
    """Where the bytes of one model come from: boards that hold it, one after another."""

    def __init__(
        self,
        client: Client,
        model_id: str,
        boards: list[PeerBoard],
        progress: Progress,
        patience: Patience,
    ) -> None:
        self.copied_bytes = 0
        self.gave: dict[str, None] = {}  # the boards that something came from, in order
        self._client = client
        self._model_id = model_id
        self._boards = boards
        self._progress = progress
        self._patience = patience
        self._failed: set[str] = set()  # boards that did not answer, since the last gain
        self._refused: set[str] = set()  # boards that will not do
        self._wait_s = patience.retry[0]
        self._quiet_since = time.monotonic()
        self._gained = 0  # bytes since then

    @property
    def stage(self) -> str:
        return f"copy from {self._boards[0].label}"

    def manifest(self) -> bytes:
        """The manifest, unchecked."""
        while True:
            try:
                with self._client.open(self._path()) as response:
                    return response.read()
            except _BREAKS as error:
                self._look_elsewhere(error)

    def pieces(self, file: ModelFile, offset: int) -> Iterator[bytes]:
        """Bytes of the file from ``offset`` on. They may end early: ask again from there."""
        try:
            with self._client.open(f"{self._path()}/{file.name}", offset) as response:
                if response.length != file.size_bytes - offset:
                    raise ProtocolError(f"{self._boards[0].label} has {file.name} in another size")
                left = response.length
                while left:
                    piece = _read(response, min(left, CHUNK_BYTES))
                    left -= len(piece)
                    self.copied_bytes += len(piece)
                    self._got(len(piece), to_end=not left)
                    yield piece
        except _BREAKS as error:
            self._look_elsewhere(error)

    def _path(self) -> str:
        return f"/v1/peers/{self._boards[0].id}/models/{self._model_id}"

    def _got(self, count: int, *, to_end: bool) -> None:
        self.gave[self._boards[0].label] = None
        self._gained += count
        if self._gained < GAIN_BYTES and not to_end:
            return
        self._gained = 0
        self._failed.clear()
        self._wait_s = self._patience.retry[0]
        self._quiet_since = time.monotonic()

    def _look_elsewhere(self, error: Exception) -> None:
        """Another board, or the same one in a moment.

        :raises EdgemoaError: it is no use.
        """
        now = self._boards[0]
        if isinstance(error, DaemonUnreachableError):
            raise DaemonUnreachableError(str(error), hint=KEPT) from error
        if not isinstance(error, EdgemoaError):
            error = NetworkError(f"{now.label} went away in the middle")
        (self._failed if isinstance(error, BoardError) else self._refused).add(now.id)
        if not self._left(self._refused):
            raise type(error)(str(error), hint=ELSEWHERE) from error
        if not self._left(self._refused | self._failed):
            busy = isinstance(error, OverloadedError)
            quiet_s = time.monotonic() - self._quiet_since
            if quiet_s > (self._patience.busy if busy else self._patience.gone):
                raise type(error)(str(error), hint=KEPT) from error
            self._progress(f"wait: {error}", 0, 0)
            time.sleep(self._wait_s)
            self._wait_s = min(2 * self._wait_s, self._patience.retry[1])
            self._failed.clear()
            self._boards = self._holders() or self._boards
        left = self._left(self._refused | self._failed) or self._left(self._refused)
        self._boards = [*left, *(board for board in self._boards if board not in left)]

    def _left(self, without: set[str]) -> list[PeerBoard]:
        return [board for board in self._boards if board.id not in without]

    def _holders(self) -> list[PeerBoard]:
        try:
            return [b for b in peer_models(self._client).boards if b.holds(self._model_id)]
        except DaemonUnreachableError as error:
            raise DaemonUnreachableError(str(error), hint=KEPT) from error
        except EdgemoaError:
            return []


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    """At least a byte."""
    data = response.read1(size)
    if not data:
        raise EOFError
    return data


def _fetch(file: ModelFile, part: Path, source: _Source, arrived: Callable[[int], None]) -> None:
    """Bring a file to ``part``, whole and checked, from what is there already on.

    :param arrived: told how many bytes of it are there.
    :raises HashMismatchError, ModelInvalidError: it is not what it should be; nothing of it stays.
    """
    while True:
        digest, have, head = _arrived(part, file.size_bytes)
        resumed = have > 0
        with part.open("ab") as stream:
            while have < file.size_bytes:
                for piece in source.pieces(file, have):
                    # Before it is written: what never arrives whole would stay.
                    head += piece[: len(PROGRAM) - len(head)]
                    if head == PROGRAM:
                        part.unlink()
                        raise ModelInvalidError(
                            f"{file.name} is a program, which no model needs",
                            hint="do not trust that board",
                        )
                    stream.write(piece)
                    digest.update(piece)
                    have += len(piece)
                    arrived(have)
        if digest.hexdigest() == file.sha256:
            break
        part.unlink()
        if not resumed:  # else a power cut may have spoiled what had arrived earlier
            raise HashMismatchError(
                f"{file.name} from {', '.join(source.gave)} is not what its manifest says",
                hint=ELSEWHERE,
            )


def _arrived(part: Path, size: int) -> tuple[hashlib._Hash, int, bytes]:
    """The hash so far of what has arrived of a file, how much that is, and its first bytes."""
    digest, have, head = hashlib.sha256(), 0, b""
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    if part.is_file():
        with part.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                have += len(chunk)
                head = head or chunk[: len(PROGRAM)]
    if head == PROGRAM:  # of a version that looked at whole files only
        part.unlink()
        return _arrived(part, size)
    return digest, have, head
