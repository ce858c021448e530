"""What this board lends: its library of models, as :class:`edgemoa.net.copies.Shelf` wants it.

Nothing that a paired board says becomes a path: a model is looked up by its id among those that
are there, a file among those that the model's manifest lists.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgemoa.errors import EdgemoaError, ModelNotFoundError, StateError
from edgemoa.models.library import MANIFEST, Manifest, ModelLibrary
from edgemoa.net.copies import MAX_MANIFEST_BYTES, Offer


class LibraryShelf:
    """See the module. Everything here blocks on the disk."""

    def __init__(self, library: ModelLibrary) -> None:
        self._library = library

    def offers(self) -> list[Offer]:
        """What is there, in the order of names, but for what cannot be: nobody would believe it."""
        offers = []
        for name, manifest in self._library.models().items():
            told = {
                "name": name,
                "model_id": manifest.model_id,
                "size_bytes": manifest.size_bytes,
                "quantization": manifest.quantization or "",
                "parameters": manifest.parameters or 0,
            }
            with contextlib.suppress(msgspec.ValidationError):
                offers.append(msgspec.convert(told, Offer))
        return offers

    def manifest(self, model_id: str) -> bytes:
        """The ``model.json`` of a model.

        :raises ModelNotFoundError: if it is not there; StateError if it cannot be read.
        """
        folder, _ = self._find(model_id)
        stream, size = _open(folder / MANIFEST)
        with stream:
            if size > MAX_MANIFEST_BYTES:
                raise StateError(f"the manifest of {folder.name} is too large to be lent")
            try:
                return stream.read(MAX_MANIFEST_BYTES)
            except OSError as error:
                raise _unreadable(folder / MANIFEST) from error

    def open(self, model_id: str, file: str) -> tuple[BinaryIO, int]:
        """A file that the model's manifest lists, and its size. Its name is no path: the protocol
        has none.

        :raises ModelNotFoundError: if there is none; StateError if it cannot be read.
        """
        folder, manifest = self._find(model_id)
        listed = next((f for f in manifest.files if f.name == file), None)
        if listed is None:
            raise ModelNotFoundError(f"{folder.name} has no such file")
        stream, size = _open(folder / file)
        if size != listed.size_bytes:
            stream.close()
            raise StateError(f"{file} of {folder.name} is damaged")
        return stream, size

    def _find(self, model_id: str) -> tuple[Path, Manifest]:
        for name, manifest in self._library.models().items():
            if manifest.model_id == model_id:
                return self._library.root / name, manifest
        raise ModelNotFoundError("that model is not there any more")


def _open(path: Path) -> tuple[BinaryIO, int]:
    """A regular file: no link to another, nothing that could block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _unreadable(path)
    return os.fdopen(descriptor, "rb"), status.st_size


def _unreadable(path: Path) -> EdgemoaError:
    return StateError(f"{path.name} of {path.parent.name} cannot be read")
