"""Whether a model of the catalog fits this board, and why not."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgemoa.models.catalog import Entry
from edgemoa.models.library import SPARE_BYTES

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Room:
    """What this board has, in bytes. None is not known."""

    memory_total: int | None
    memory_available: int | None
    disk_free: int | None


def room(library_root: Path) -> Room:
    """What there is now; the disk is the one that models are kept on."""
    return Room(_memory("MemTotal"), _memory("MemAvailable"), _disk_free(library_root))


def obstacle(entry: Entry, room: Room, *, on_board: bool) -> str:
    """What keeps this board from running the model, in a few words; nothing if it fits.

    What only the moment forbids (memory that others use, a full disk) says so.
    """
    memory, disk = entry.memory.bytes, entry.pull_bytes + SPARE_BYTES
    if room.memory_total is not None and memory > room.memory_total:
        return f"needs {gb(memory)} of memory, this board has {gb(room.memory_total)}"
    if not on_board and room.disk_free is not None and disk > room.disk_free:
        return f"needs {gb(disk)} of disk to be fetched, {gb(room.disk_free)} are free"
    if room.memory_available is not None and memory > room.memory_available:
        return f"needs {gb(memory)} of memory, {gb(room.memory_available)} are free now"
    return ""


def gb(size_bytes: int) -> str:
    """A size for a person."""
    return f"{size_bytes / 1e9:.1f} GB"


def _memory(key: str) -> int | None:
    try:
        found = re.search(rf"(?m)^{key}:\s+(\d+) kB$", MEMINFO.read_text("ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return int(found[1]) * 1024 if found else None


def _disk_free(path: Path) -> int | None:
    """Of the file system that the path is on, or would be."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None
