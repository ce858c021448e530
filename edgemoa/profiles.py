"""Profiles of boards: what suits each kind, one TOML file each, and which of them this machine is.

The files are in ``firmware_configs/`` at the top of a checkout, and inside the package when it is
installed. A profile's settings are defaults: whatever the user sets goes before them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from edgemoa.errors import ConfigError

AUTO: Final = "auto"  # what the machine is found to be
NONE: Final = "none"  # no profile: settings as they are built in
SHARE: Final = 0.7  # of the machine's memory, for the service, where a profile does not say
MOST: Final = 0.9  # of it, whatever a profile says: one may be forced on a smaller board
# What is sold as so many GB shows less: firmware, GPU and kernel keep some. A Pi of 512 MB shows
# 420, a Jetson of 8 GB 7.4. Sizes are powers of two, so that a third more tells them apart.
_SHOWN: Final = 4 / 3
_GIB: Final = 1 << 30
_MIB: Final = 1 << 20

Machine = Literal["aarch64", "x86_64"]
Celsius = Annotated[int, Meta(ge=30, le=120)]
DeviceNodes = Annotated[str, Meta(pattern=r"^/dev/[A-Za-z0-9/_*-]+$")]


class Facts(msgspec.Struct, frozen=True):
    """What a machine says of itself.

    :ivar compatible: of its device tree, the most exact first; empty where it has none.
    :ivar machine: its architecture, as the kernel calls it.
    :ivar memory_bytes: that the kernel has to give; 0 is not known.
    """

    compatible: tuple[str, ...]
    machine: str
    memory_bytes: int


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What suits one kind of board.

    :ivar board: what people call it.
    :ivar compatible: how its device tree calls it; any of them.
    :ivar machine: of a profile for all boards of an architecture, instead of ``compatible``.
    :ivar memory_gb: that it is sold with, in GiB; 0 for any.
    :ivar service_memory_mb: what daemon and model may have of it, in MiB; 0 for :data:`SHARE`.
    :ivar model: the largest of the catalog that answers at a bearable speed there.
    :ivar supply_w: what its power supply has to give; 0 is not known.
    :ivar slow_from_c: from this temperature on work is slowed, the more the hotter.
    :ivar throttle_at_c: from here the system itself slows the processor.
    :ivar wifi_power_save: whether the radio may sleep.
    :ivar devices: device nodes that its execution provider needs.
    :ivar settings: by section and key, as in a configuration file.
    """

    board: Annotated[str, Meta(min_length=1, max_length=64)]
    model: str
    slow_from_c: Celsius
    throttle_at_c: Celsius
    compatible: tuple[str, ...] = ()
    machine: Machine | None = None
    memory_gb: Annotated[float, Meta(ge=0)] = 0
    service_memory_mb: Annotated[int, Meta(ge=0)] = 0
    supply_w: Annotated[float, Meta(ge=0)] = 0
    wifi_power_save: Literal["off", "leave"] = "leave"
    devices: tuple[DeviceNodes, ...] = ()
    settings: dict[str, dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if bool(self.compatible) == bool(self.machine):
            raise ValueError("a profile has either `compatible` or `machine`")
        if self.slow_from_c >= self.throttle_at_c:
            raise ValueError("`slow_from_c` is to be below `throttle_at_c`")
        if "board" in self.settings:
            raise ValueError("a profile does not say where a board keeps things")

    def service_bytes(self, facts: Facts) -> int:
        """What the service may have of this machine's memory; 0 where that is not known."""
        told = self.service_memory_mb * _MIB or round(facts.memory_bytes * SHARE)
        return min(told, round(facts.memory_bytes * MOST) or told)


def choose(facts: Facts, profiles: Mapping[str, Profile]) -> str:
    """The name of the profile for a machine, or :data:`NONE`.

    The device tree's most exact word counts; of several sizes of a board the largest that is there.
    A board that is smaller than each of them gets that of its architecture.
    """
    gb = facts.memory_bytes / _GIB
    for word in facts.compatible:
        sizes = [
            (profile.memory_gb, name)
            for name, profile in profiles.items()
            if word in profile.compatible and profile.memory_gb <= gb * _SHOWN
        ]
        if sizes:
            return max(sizes)[1]
    return next((n for n, p in profiles.items() if p.machine == facts.machine), NONE)


def profiles_folder() -> Path:
    """Where the files are: in the installed package, or at the top of the checkout."""
    package = Path(__file__).parent
    installed = package / "data" / "firmware_configs"
    return installed if installed.is_dir() else package.parent / "firmware_configs"


def names(folder: Path | None = None) -> list[str]:
    """The name of every profile."""
    return sorted(path.stem for path in (folder or profiles_folder()).glob("*.toml"))


def load(name: str, folder: Path | None = None) -> Profile:
    """One profile.

    :raises ConfigError: there is none of that name, or it is not valid.
    """
    known = names(folder)
    if name not in known:
        raise ConfigError(
            f"there is no profile {name!r} of a board",
            hint=f"board.profile is one of {', '.join([AUTO, NONE, *known])}",
        )
    path = (folder or profiles_folder()) / f"{name}.toml"
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Profile)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="install edgemoa anew"
        ) from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the profile {path} is not valid: {error}", hint="correct it, or install edgemoa anew"
        ) from None


def load_all(wanted: Iterable[str] | None = None) -> dict[str, Profile]:
    """Every profile, or those that are wanted, by name. Raises as :func:`load`."""
    return {name: load(name) for name in (names() if wanted is None else wanted)}


def of_machine(facts: Facts, asked: str = AUTO) -> tuple[str, Profile | None]:
    """The profile that counts on a machine, with its name; none for :data:`NONE`.

    :param asked: what ``board.profile`` says.
    :raises ConfigError: there is none of that name, or one is not valid.
    """
    name = choose(facts, load_all()) if asked == AUTO else asked
    return name, None if name == NONE else load(name)
