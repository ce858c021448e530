"""The models on this board: one folder for each, complete or not there at all.

::

    ROOT/NAME/model.json        what the model is, with the size and hash of each of its files
    ROOT/NAME/...               what the engine reads
    ROOT/.staging/NAME/         a model in the making; nobody looks here for models
    ROOT/.staging/NAME.lock     held (flock) by the one process that makes or removes NAME

A model is made in the staging folder and moved to its place by one rename, after its bytes have
reached the disk. A process that dies at any point leaves at most a staging folder without the
lock's holder; the next one to make a model removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
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
from edgemoa.models.progress import Progress

MANIFEST: Final = "model.json"
MANIFEST_FORMAT: Final = 1
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
STAGING: Final = ".staging"
SPARE_BYTES: Final = 32 << 20  # what a board needs free beside the model to keep working
CHUNK_BYTES: Final = 1 << 20


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model's folder."""

    name: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """``model.json``: what a model is. Written last, so that a folder with one is complete.

    ``model_id`` hashes the files: equal ids compute the same. ``source_sha256`` is the GGUF's.
    ``kv_bytes_per_token`` is what one token of context costs in memory, for each sequence.
    """

    name: str
    model_id: str
    source_sha256: str
    importer: int
    architecture: str
    quantization: str
    parameters: int
    context_length: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_size: int
    kv_bytes_per_token: int
    eos_token_ids: tuple[int, ...]
    text_start_token_id: int
    files: tuple[ModelFile, ...]
    format: int = MANIFEST_FORMAT

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


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
    """A model in the making. What is written to ``model`` becomes visible with :meth:`place`."""

    name: str
    folder: Path
    target: Path
    model: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"

    def place(self, manifest: Manifest) -> Path:
        """Write the manifest, see everything to the disk, and move the model to its place."""
        path = self.model / MANIFEST
        path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        for file in self.model.iterdir():
            _sync(file)
        _sync(self.model)
        self.model.rename(self.target)
        _sync(self.target.parent)
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

        Raises :class:`HashMismatchError` for the first file that is missing or differs.
        """
        folder = self.find(name)
        manifest = read_manifest(folder)
        hint = f"remove it and fetch it again: edgemoa model rm {name}; edgemoa model pull {name}"
        total, done = manifest.size_bytes, 0
        for file in manifest.files:
            path = folder / file.name
            if "/" in file.name or not path.is_file():
                raise HashMismatchError(f"{path} is missing", hint=hint)
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    progress("verify", min(done, total), total)
            if digest.hexdigest() != file.sha256:
                raise HashMismatchError(f"{path} is not what was imported", hint=hint)
        if content_id(manifest.files) != manifest.model_id:
            raise HashMismatchError(f"{folder / MANIFEST} was changed", hint=hint)
        return manifest

    def remove(self, name: str) -> None:
        """Take a model away, at once for everybody who looks for it."""
        folder = self.root / check_name(name)
        if not folder.is_dir():
            self.find(name)  # says what is missing
        with self._locked(name), _board_errors(self.root):
            leaving = self._staging_folder(name)
            shutil.rmtree(leaving, ignore_errors=True)
            folder.rename(leaving)
            shutil.rmtree(leaving)

    @contextmanager
    def staging(self, name: str, need_bytes: int, progress: Progress) -> Iterator[Staging]:
        """The one place where model ``name`` is made; empty at the start, gone at the end.

        Waits for another process that makes the same model. ``need_bytes`` is what will be written
        at most; raises :class:`DiskFullError` if that much is not free, or turns out not to be, and
        :class:`StateError` if the folder cannot be written.
        """
        check_name(name)
        with _board_errors(self.root):
            (self.root / STAGING).mkdir(parents=True, exist_ok=True)
        with self._locked(name, progress), _board_errors(self.root):
            self._sweep(name)
            free = shutil.disk_usage(self.root).free
            if free < need_bytes + SPARE_BYTES:
                raise DiskFullError(
                    f"{self.root} has {free / 1e6:.0f} MB free; "
                    f"this needs {(need_bytes + SPARE_BYTES) / 1e6:.0f} MB",
                    hint="free some space, or choose another place with --models DIR",
                )
            staging = Staging(name, self._staging_folder(name), self.root / name)
            staging.model.mkdir(parents=True)
            try:
                yield staging
            finally:
                shutil.rmtree(staging.folder, ignore_errors=True)

    def _staging_folder(self, name: str) -> Path:
        return self.root / STAGING / name

    @contextmanager
    def _locked(self, name: str, progress: Progress | None = None) -> Iterator[None]:
        with _board_errors(self.root):
            (self.root / STAGING).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                self.root / STAGING / f"{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644
            )
        try:
            if not _try_lock(descriptor):
                if progress:
                    progress("wait for another process that works on this model", 0, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self, held: str) -> None:
        """Remove what dead processes left: staging folders whose lock nobody holds."""
        for folder in (self.root / STAGING).iterdir():
            if not folder.is_dir():
                continue
            if folder.name == held:
                shutil.rmtree(folder)
                continue
            descriptor = os.open(
                folder.with_name(f"{folder.name}.lock"),
                os.O_CREAT | os.O_RDWR | os.O_CLOEXEC,
                0o644,
            )
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


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
