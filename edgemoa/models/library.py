"""The models on this board: one folder for each, complete or not there at all.

::

    ROOT/NAME/model.json        what the model is, with the size and hash of each of its files
    ROOT/NAME/...               what the engine reads
    ROOT/.locks/NAME            held (flock) by the one process that makes or removes NAME
    ROOT/.locks/.choices        held by the one that writes .default or a file of .pins
    ROOT/.staging/NAME/         a model in the making; nobody looks here for models
    ROOT/.arriving/NAME/files/  what has been fetched for it so far, kept for the next try
    ROOT/.arriving/NAME/source  what those files are (parts of)
    ROOT/.pins/NAME.json        what was fetched as NAME of the catalog first; it stays that
    ROOT/.default               the name of the model that is used where nobody chose one

A model is made in the staging folder and moved to its place by one rename, after its bytes have
reached the disk. A process that dies at any point leaves at most a staging folder without the
lock's holder, which the next one to make a model removes (what was to be replaced goes back to its
place), and what had arrived, which the next one to fetch the same goes on with. To fetch a model::

    with library.staging(name, need_bytes, progress, source="what, and which version of it") as s:
        if (s.target / MANIFEST).is_file(): ...   # another process made it while this one waited
        part = s.arriving / "weights.bin.part"    # may be there already: go on where it ends
        ...                                       # fetch the rest, check the whole, and then
        s.take(part, "weights.bin")               # no copy; or convert it into s.model / "..."
        s.place(manifest)                         # visible, and what had arrived is gone
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from edgemoa.errors import (
    DiskFullError,
    EdgemoaError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    StateError,
    UserError,
)
from edgemoa.models.progress import Progress, printable, silent

MANIFEST: Final = "model.json"
MANIFEST_FORMAT: Final = 1
IMPORTER_VERSION: Final = 8  # raise it when the same GGUF gives other files
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LOCKS: Final = ".locks"
STAGING: Final = ".staging"
ARRIVING: Final = ".arriving"
PINS: Final = ".pins"
DEFAULT: Final = ".default"
CHOICES: Final = ".choices"  # the lock of what is no model: the default and the pins
REPLACED: Final = "replaced"  # in a staging folder: the model that makes way for the new one
KEEP_ARRIVING_S: Final = 7 * 86_400  # what arrived of a model is kept so long for the next try
SPARE_BYTES: Final = 32 << 20  # what a board needs free beside the model to keep working
CHUNK_BYTES: Final = 1 << 20


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model's folder."""

    name: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``model.json``: what a model is. Written last, so that a folder with one is complete.

    ``model_id`` hashes the files: equal ids compute the same. ``importer`` is the version of the
    import that made the files, or 0 where they came ready-made; what is not known of those is None.
    ``source_sha256`` is the GGUF's, ``source`` says where it came from.
    ``kv_bytes_per_token`` is what one token of context costs in memory, for each sequence.
    ``weights`` counts them by the type that they have in the GGUF. A base model has no chat
    template: it goes on with a text.
    """

    name: str
    model_id: str
    importer: int
    architecture: str
    context_length: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_size: int
    kv_bytes_per_token: int
    eos_token_ids: tuple[int, ...]
    files: tuple[ModelFile, ...]
    parameters: int | None = None
    quantization: str | None = None
    source_sha256: str | None = None
    text_start_token_id: int | None = None
    source: str = ""
    weights: dict[str, int] = {}
    has_chat_template: bool | None = None
    format: int = MANIFEST_FORMAT

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def is_outdated(self) -> bool:
        """An earlier importer made it: it works, but the same GGUF gives a better one now."""
        return 0 < self.importer < IMPORTER_VERSION


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name of the catalog stood for when this board fetched it first."""

    source: str
    revision: str
    sha256: str


def default_model_dir() -> Path:
    """``$EDGEMOA_MODELS``, ``$XDG_DATA_HOME/edgemoa/models``, or the same in ``~/.local/share``."""
    if own := os.environ.get("EDGEMOA_MODELS"):
        return Path(own).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "edgemoa" / "models"


def content_id(files: tuple[ModelFile, ...]) -> str:
    """The id of a model made of these files: SHA-256 over their names and hashes, sorted."""
    lines = sorted(f"{file.sha256}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(["edgemoa model\n", *lines]).encode()).hexdigest()


def chunks(path: Path) -> Iterator[bytes]:
    """The content of a file of the user's; raises :class:`UserError` where it cannot be read."""
    with reading(path), path.open("rb") as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


def hash_file(path: Path, tell: Callable[[int], None], *also: hashlib._Hash) -> str:
    """The SHA-256 of a file of the user's, in hexadecimal; ``also`` are fed with the same bytes.

    ``tell`` is called with the number of bytes read so far. Raises :class:`UserError` where the
    file cannot be read.
    """
    sha256, done = hashlib.sha256(), 0
    for chunk in chunks(path):
        for digest in (sha256, *also):
            digest.update(chunk)
        done += len(chunk)
        tell(done)
    return sha256.hexdigest()


def check_regular(path: Path) -> None:
    """Raises :class:`UserError` for a pipe, a socket or a device: reading one may never end. What
    is not there, or is a folder, is for others to refuse.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{path} is no regular file", hint="write what comes from it to a file, and name that"
        )


def taken(name: str, source: str = "") -> UserError:
    """The error that a model of this name is there, and is not the one that was asked for."""
    return UserError(
        f"there is a model {name!r} already" + (f", from {printable(source)}" if source else ""),
        hint=f"choose another --name, or remove it first: edgemoa model rm {name}",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says about a file of the user's, as a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from None


def check_name(name: str) -> str:
    """``name`` if it can be a model's; raises :class:`UserError` otherwise."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be the name of a model",
            hint="use up to 64 of a-z, 0-9, '.', '_' and '-', with a letter or digit first",
        )
    return name


def read_manifest(folder: Path) -> Manifest:
    """Raises :class:`ModelInvalidError` if the folder has no manifest that this version reads."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise ModelInvalidError(
            f"{folder} holds no model: {MANIFEST} cannot be read ({error.strerror})"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelInvalidError(f"{folder / MANIFEST} is damaged: {error}") from None
    if manifest.format != MANIFEST_FORMAT:
        raise ModelInvalidError(
            f"{folder / MANIFEST} is of format {manifest.format}; "
            f"this edgemoa reads format {MANIFEST_FORMAT}",
            hint="remove the model and import it again",
        )
    return manifest


@dataclass(slots=True)
class Staging:
    """A model in the making. What is written to ``model`` becomes visible with :meth:`place`.

    ``folder`` is for what is needed meanwhile, and gone at the end. ``kept`` is where that lies
    which outlives an interruption, see :attr:`arriving`. ``origin`` is written to the manifest as
    its ``source`` where that has none.
    """

    name: str
    folder: Path
    target: Path
    kept: Path
    source: str
    origin: str = ""
    model: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"

    @property
    def arriving(self) -> Path:
        """The folder of what is fetched, made on demand. It holds what an earlier try for the same
        ``source`` left there, and stays until the model has been placed.

        It is on the file system of ``model``. What is in it may have been cut off anywhere, or
        changed: check it before it is used.
        """
        files = self.kept / "files"
        if not files.is_dir():
            self.kept.mkdir(parents=True, exist_ok=True)
            (self.kept / "source").write_text(self.source, "utf-8")
            files.mkdir()
        return files

    def take(self, path: Path, name: str) -> None:
        """Make an arrived file the model's file ``name``, without copying it.

        It stays in ``arriving`` as well where the file system has hard links, so that a failure
        further on does not cost the fetch.
        """
        target = self.model / name
        try:
            os.link(path, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            path.rename(target)  # a file system without hard links

    def forget_arrived(self) -> None:
        """Remove what has arrived: it is of no use to a next try."""
        shutil.rmtree(self.kept, ignore_errors=True)

    def place(self, manifest: Manifest) -> Path:
        """Write the manifest, see everything to the disk, and move the model to its place."""
        if not manifest.source:
            manifest = msgspec.structs.replace(manifest, source=self.origin)
        path = self.model / MANIFEST
        path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        for file in self.model.iterdir():
            _sync(file)
        _sync(self.model)
        if self.target.exists():  # one that is replaced; whoever runs it keeps its files
            self.target.rename(self.folder / REPLACED)
        self.model.rename(self.target)  # where this fails, what was replaced is put back
        _sync(self.target.parent)
        self.forget_arrived()
        return self.target


@dataclass(frozen=True, slots=True)
class ModelLibrary:
    """The folder of models, by default :func:`default_model_dir`."""

    root: Path

    def models(self) -> dict[str, Manifest]:
        """The models that are there, by the name of their folder; what is no model is passed over.

        The folder's name counts: one that was copied from another board may have a new one.
        """
        try:
            folders = sorted(path for path in self.root.iterdir() if NAME.fullmatch(path.name))
        except OSError:
            return {}
        models = {}
        for folder in folders:
            with suppress(ModelInvalidError):
                models[folder.name] = read_manifest(folder)
        return models

    def find(self, name: str) -> Path:
        """The folder of a model; raises :class:`ModelNotFoundError` if it is not there."""
        folder = self.root / check_name(name)
        if not (folder / MANIFEST).is_file():
            raise ModelNotFoundError(
                f"there is no model {name!r} on this board",
                hint=f"fetch it: edgemoa model pull {name}",
            )
        return folder

    def verify(self, name: str, progress: Progress) -> Manifest:
        """Read every file again and compare it with the manifest.

        Raises :class:`HashMismatchError` for the first file that is missing or differs, and for
        files that the manifest does not list: the engine might read them.
        """
        folder = self.find(name)
        manifest = read_manifest(folder)
        hint = f"remove it and fetch or import it again: edgemoa model rm {name}"
        total, before = manifest.size_bytes, 0
        for file in manifest.files:
            path, shown = folder / file.name, folder / printable(file.name)
            if "/" in file.name or not path.is_file():
                raise HashMismatchError(f"{shown} is missing", hint=hint)

            def tell(done: int, before: int = before) -> None:
                progress("verify", min(before + done, total), total)

            if hash_file(path, tell) != file.sha256:
                raise HashMismatchError(f"{shown} is not what was imported", hint=hint)
            before += file.size_bytes
        if content_id(manifest.files) != manifest.model_id:
            raise HashMismatchError(f"{folder / MANIFEST} was changed", hint=hint)
        listed = {MANIFEST, *(file.name for file in manifest.files)}
        if more := sorted(path.name for path in folder.iterdir() if path.name not in listed):
            raise HashMismatchError(
                f"{folder} holds what was not imported: {printable(', '.join(more))}",
                hint=f"take it out of that folder, or {hint}",
            )
        return manifest

    def default(self) -> str | None:
        """The model that was chosen with :meth:`set_default`, whether it is there or not."""
        try:
            name = (self.root / DEFAULT).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return name if NAME.fullmatch(name) else None

    def set_default(self, name: str | None) -> None:
        """Choose what is used where nobody says; None takes the choice back.

        Raises :class:`ModelNotFoundError` for a model that is not there.
        """
        if name is not None:
            self.find(name)
        with self._locked(CHOICES), _board_errors(self.root):
            if name is None:
                (self.root / DEFAULT).unlink(missing_ok=True)
            else:
                _write(self.root / DEFAULT, f"{name}\n".encode())

    def pin(self, name: str) -> Pin | None:
        """What was recorded with :meth:`set_pin`; raises :class:`StateError` if it is damaged."""
        path = self.root / PINS / f"{check_name(name)}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Pin)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise StateError(
                f"{path} cannot be read: {error}",
                hint=f"fetch the model as it is now: edgemoa model pull {name} --unpin",
            ) from None

    def set_pin(self, name: str, pin: Pin) -> None:
        """Record what ``name`` of the catalog stands for on this board."""
        with self._locked(CHOICES), _board_errors(self.root):
            (self.root / PINS).mkdir(parents=True, exist_ok=True)
            _write(self.root / PINS / f"{check_name(name)}.json", msgspec.json.encode(pin))

    def remove(self, name: str, progress: Progress = silent) -> None:
        """Take a model away, at once for everybody who looks for it, and what has arrived of it.

        Waits for a process that makes this model, and tells ``progress`` so.
        """
        folder, arrived = self.root / check_name(name), self.root / ARRIVING / name
        leaving = self.root / STAGING / name
        if not any(path.is_dir() for path in (folder, arrived, leaving / REPLACED)):
            self.find(name)  # says what is missing
        with self._locked(name, progress), _board_errors(self.root):
            shutil.rmtree(arrived, ignore_errors=True)
            shutil.rmtree(leaving, ignore_errors=True)
            if folder.is_symlink():  # put there by hand: what it leads to is not the library's
                folder.unlink()
            elif folder.is_dir():
                leaving.mkdir()
                folder.rename(leaving / "model")
                shutil.rmtree(leaving)
            if self.default() == name:
                self.set_default(None)

    @contextmanager
    def staging(
        self, name: str, need_bytes: int, progress: Progress, *, source: str = ""
    ) -> Iterator[Staging]:
        """The one place where model ``name`` is made; empty at the start, gone at the end.

        Waits for another process that makes the same model. ``need_bytes`` is what will be written
        at most, to ``arriving`` too; what has arrived already counts. ``source`` says what will
        arrive: what an earlier try left is kept only if it was for the same. Raises
        :class:`DiskFullError` if that much is not free, or turns out not to be, and
        :class:`StateError` if the folder cannot be written. Any other ``OSError`` in its body is
        taken for one of this folder's: turn those of other files and of sockets into errors first.
        """
        check_name(name)
        with self._locked(name, progress), _board_errors(self.root):
            self._sweep(name)
            staging = Staging(
                name=name,
                folder=self.root / STAGING / name,
                target=self.root / name,
                kept=self.root / ARRIVING / name,
                source=source,
            )
            if source and _read_source(staging.kept) != source:
                staging.forget_arrived()
            self.check_room(need_bytes - _disk_bytes(staging.kept) if source else need_bytes)
            staging.model.mkdir(parents=True)
            try:
                yield staging
            finally:
                self._put_back(staging.folder)
                shutil.rmtree(staging.folder, ignore_errors=True)

    def check_room(self, need_bytes: int) -> None:
        """Raises :class:`DiskFullError` unless so much is free, and a little more."""
        free = shutil.disk_usage(self.root).free
        if free < need_bytes + SPARE_BYTES:
            raise DiskFullError(
                f"{self.root} has {free / 1e6:.0f} MB free; "
                f"this needs {(need_bytes + SPARE_BYTES) / 1e6:.0f} MB",
                hint="free some space, or choose another place with --models DIR",
            )

    def _lock_file(self, name: str) -> int:
        """A descriptor to lock; the file itself is never removed, or two could hold it at once."""
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        return os.open(self.root / LOCKS / name, flags, 0o644)

    @contextmanager
    def _locked(self, name: str, progress: Progress | None = None) -> Iterator[None]:
        with _board_errors(self.root):
            for folder in (LOCKS, STAGING, ARRIVING):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            descriptor = self._lock_file(name)
        try:
            if not _try_lock(descriptor):
                if progress:
                    progress("wait for another process that works on this model", 0, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self, held: str) -> None:
        """Remove what dead processes left: staging folders whose lock nobody holds, and what has
        arrived of models that are there or that nobody went on with for a long time.
        """
        for folder in [p for kind in (STAGING, ARRIVING) for p in (self.root / kind).iterdir()]:
            if not folder.is_dir():
                continue
            if folder.name == held:
                self._sweep_one(folder)
                continue
            descriptor = self._lock_file(folder.name)
            try:
                # Its maker may have been through, and have removed it, before this got the lock.
                if _try_lock(descriptor) and folder.is_dir():
                    self._sweep_one(folder)
            finally:
                os.close(descriptor)

    def _sweep_one(self, folder: Path) -> None:
        """The model's lock is held."""
        if folder.parent.name == STAGING:
            self._put_back(folder)
        if (
            folder.parent.name == STAGING
            or (self.root / folder.name / MANIFEST).is_file()
            or _is_old(folder)
        ):
            shutil.rmtree(folder)

    def _put_back(self, staging: Path) -> None:
        """Give a model its place again that was to be replaced, where the new one did not come."""
        replaced, target = staging / REPLACED, self.root / staging.name
        if replaced.exists() and not target.exists():
            replaced.rename(target)
            _sync(target.parent)


def _write(path: Path, content: bytes) -> None:
    """Replace a small file as a whole. The caller holds a lock: whatever one who died on the way
    left behind is overwritten by the next.
    """
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    _sync(new)
    new.rename(path)
    _sync(path.parent)


def _is_old(folder: Path) -> bool:
    """Whether nothing in an arriving folder was written for long."""
    touched = [folder.stat().st_mtime]
    touched += [path.lstat().st_mtime for path in folder.rglob("*")]
    return time.time() - max(touched) > KEEP_ARRIVING_S


def _read_source(folder: Path) -> str | None:
    try:
        return (folder / "source").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _disk_bytes(folder: Path) -> int:
    """What the files below take on the disk; less than their sizes where they have holes."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _board_errors(root: Path) -> Iterator[None]:
    """What the system says about writing below ``root``, as errors of this board."""
    try:
        yield
    except EdgemoaError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no space was left below {root}",
                hint="free some space, or choose another place with --models DIR",
            ) from error
        raise StateError(
            f"models cannot be kept below {root}: {error.strerror or error}",
            hint="choose a folder that can be written, with --models DIR or EDGEMOA_MODELS",
        ) from error
