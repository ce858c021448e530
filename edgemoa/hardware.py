"""What the machine says of itself: what it is, how hot, and whether it is being slowed for that.

Read from files of the kernel when somebody asks; what a board does not tell is None.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path("/")
_MAX_READ_BYTES: Final = 4096
_MAX_ZONES: Final = 64
_HOTTEST_C: Final = 150  # a sensor that says more, or less than the cold of Siberia, is broken
_COLDEST_C: Final = -60
_PLAUSIBLE_TRIP_C: Final = 50
# The firmware's word of a Raspberry Pi, as `vcgencmd get_throttled` shows it. Bits of the official
# documentation of that command.
_PI_THROTTLED: Final = Path("sys/devices/platform/soc/soc:firmware/get_throttled")
_PI_UNDER_VOLTAGE_BIT: Final = 0
_PI_SLOWED_BITS: Final = (1, 2, 3)  # frequency capped, throttled, soft temperature limit


class Condition(msgspec.Struct, frozen=True):
    """How the machine is now.

    :ivar temperature_c: of its hottest processor zone, in degrees Celsius.
    :ivar throttled: whether the system holds the processor back, for heat or a weak supply.
    :ivar under_voltage: whether the supply is too weak.
    """

    temperature_c: float | None
    throttled: bool | None
    under_voltage: bool | None


def board_name(root: Path = ROOT) -> str:
    """What the device tree or the firmware calls the machine; empty if nobody does."""
    for file in ("sys/firmware/devicetree/base/model", "sys/class/dmi/id/product_name"):
        name = "".join(c for c in _text(root / file) if c.isprintable()).strip()
        if name:
            return name[:64]
    return ""


def facts(root: Path = ROOT) -> tuple[tuple[str, ...], str, int]:
    """What tells one kind of machine from another: the device tree's ``compatible``, the most exact
    word first; the architecture; and the memory, in bytes, 0 if nobody says."""
    words = _text(root / "sys/firmware/devicetree/base/compatible").split("\0")
    found = re.search(r"(?m)^MemTotal:\s+(\d{1,12}) kB$", _text(root / "proc/meminfo"))
    memory_bytes = int(found[1]) * 1024 if found else 0
    return tuple(word for word in words if word), os.uname().machine, memory_bytes


def throttle_at_c(root: Path = ROOT) -> float | None:
    """From which temperature on the kernel slows the processor, in degrees Celsius, where it says:
    the lowest of its passive trip points."""
    found = []
    for kind in _some(root / "sys/class/thermal", "thermal_zone*/trip_point_*_type"):
        value = _number(kind.with_name(kind.name.replace("_type", "_temp")))
        if _text(kind).strip() == "passive" and value is not None:
            found.append(value / 1000)
    return min((each for each in found if _PLAUSIBLE_TRIP_C < each < _HOTTEST_C), default=None)


def written_bytes(root: Path = ROOT) -> int | None:
    """What this process has had the kernel write to storage, in bytes, less what was taken back
    before it got there."""
    told = dict(line.partition(": ")[::2] for line in _text(root / "proc/self/io").splitlines())
    try:
        return max(0, int(told["write_bytes"]) - int(told["cancelled_write_bytes"]))
    except (KeyError, ValueError):
        return None


def condition(root: Path = ROOT) -> Condition:
    """See :class:`Condition`."""
    flags = _number(root / _PI_THROTTLED, base=16)
    cooling = _cooling(root)
    slowed = None if flags is None else any(flags >> bit & 1 for bit in _PI_SLOWED_BITS)
    told = [each for each in (slowed, cooling) if each is not None]
    return Condition(
        temperature_c=_temperature_c(root),
        throttled=any(told) if told else None,
        under_voltage=_alarm(root) if flags is None else bool(flags >> _PI_UNDER_VOLTAGE_BIT & 1),
    )


def _temperature_c(root: Path) -> float | None:
    found = []
    for zone in _some(root / "sys/class/thermal", "thermal_zone*"):
        value = _number(zone / "temp")  # millidegrees
        if value is not None and _COLDEST_C * 1000 < value < _HOTTEST_C * 1000:
            found.append(value / 1000)
    return max(found, default=None)


def _cooling(root: Path) -> bool | None:
    """Whether the kernel cools the processor by slowing it down."""
    states = []
    for device in _some(root / "sys/class/thermal", "cooling_device*"):
        kind = _text(device / "type").strip().lower()
        if "cpufreq" in kind or kind == "processor":
            states.append(_number(device / "cur_state"))
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _alarm(root: Path) -> bool | None:
    """The kernel's driver for a Pi's supply, where the firmware's flags are not shown."""
    for sensor in _some(root / "sys/class/hwmon", "hwmon*"):
        if _text(sensor / "name").strip() == "rpi_volt":
            value = _number(sensor / "in0_lcrit_alarm")
            return None if value is None else bool(value)
    return None


def _some(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))[:_MAX_ZONES]
    except OSError:
        return []


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_READ_BYTES).decode(errors="replace").rstrip("\0")
    except OSError:
        return ""


def _number(file: Path, base: int = 10) -> int | None:
    try:
        return int(_text(file).strip(), base)
    except ValueError:
        return None
