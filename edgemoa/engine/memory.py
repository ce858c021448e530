"""How much memory this board could give to a process, by the kernel's word, and giving some back.

``MemAvailable`` is of the whole machine. A service or a container may have less: its control group
then says how much, and so may each group that it lies in.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgemoa.errors import EngineError

_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")
_MADV_DONTNEED: Final = 4
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.+)")
# Names of the limits, of what is used, and of what of that can be taken back, which is the part of
# memory.stat that was read from files and not used lately; for both versions of control groups.
_NAMES: Final = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def available_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Memory that this process could still take, without anything being driven out of memory.

    :param proc: and ``groups``: where the kernel says so.
    :raises EngineError: it does not.
    """
    rooms = [_machine(proc, "MemAvailable")]
    for version, folder in _own_groups(proc, groups):
        limits, used, idle = _NAMES[version]
        most = [limit for name in limits if (limit := _number(folder / name)) is not None]
        taken = _number(folder / used)
        if most and taken is not None:
            rooms.append(min(most) - taken + _stat(folder / "memory.stat", idle))
    return max(0, min(rooms))


def total_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Memory that this process and its like may have at all. Raises as :func:`available_bytes`."""
    totals = [_machine(proc, "MemTotal")]
    for version, folder in _own_groups(proc, groups):
        limits = (_number(folder / name) for name in _NAMES[version][0])
        totals += [limit for limit in limits if limit is not None]
    return min(totals)


@dataclass(frozen=True, slots=True)
class Mapped:
    """A part of a file that this process has mapped, and not changed."""

    file: Path
    address: int
    size: int


def mapped_files() -> list[Mapped]:
    """All of these, libraries included, but no devices."""
    found: list[Mapped] = []
    try:
        lines = (_PROC / "self" / "smaps").read_text(errors="replace").splitlines()
    except OSError:  # only for savings
        return found
    mapped: Mapped | None = None
    for line in lines:
        if parts := _MAPPING.fullmatch(line):
            start, end, name = int(parts[1], 16), int(parts[2], 16), parts[3]
            is_file = name.startswith("/") and not name.startswith("/dev/")
            mapped = Mapped(Path(name), start, end - start) if is_file else None
        elif line.startswith("Anonymous:") and line.split()[1] != "0":
            mapped = None  # changed
        elif mapped and line.split() == ["Swap:", "0", "kB"]:  # not even before it was swapped out
            found.append(mapped)
    return found


def release(parts: Iterable[Mapped]) -> None:
    """Leave to the kernel what is in memory of parts that are mapped still, and not changed to this
    day: what is asked for once more is mapped again."""
    libc = ctypes.CDLL(None)
    for part in parts:
        libc.madvise(ctypes.c_void_p(part.address), ctypes.c_size_t(part.size), _MADV_DONTNEED)


def _machine(proc: Path, wanted: str) -> int:
    try:
        lines = (proc / "meminfo").read_text("ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, amount = line.partition(":")
        if name == wanted:
            return int(amount.split()[0]) * 1024
    raise EngineError("The kernel does not say how much memory there is.")


def _own_groups(proc: Path, groups: Path) -> Iterator[tuple[int, Path]]:
    """The folders of this process's control group and those that it lies in, with the version."""
    try:
        lines = (proc / "self" / "cgroup").read_text(errors="replace").splitlines()
    except OSError:  # a kernel without them
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        top = groups / "memory" if version == 1 else groups
        # In a container the path may be that of the host, of which only the group's own is shown,
        # as the top.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield version, top.joinpath(*parts[:depth])


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, or ``max``."""
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _stat(file: Path, wanted: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text("ascii").splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == wanted), 0)
    except (OSError, ValueError, IndexError):
        return 0
