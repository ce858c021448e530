"""``edgemoa board``: what kind of board this is, what suits it, and having the system heed that."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa import cli_settings
from edgemoa.errors import ConfigError, EdgemoaError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoa.config import Config
    from edgemoa.profiles import Facts, Profile

_MIB: Final = 1 << 20
_GROUP: Final = "edgemoa"
_ETC: Final = Path("/etc/edgemoa")
_DROP_IN: Final = Path("/run/systemd/system/edgemoa.service.d/50-board.conf")
# Where NetworkManager reads settings that end with the boot; those in /etc go before them.
_WIFI: Final = Path("/run/NetworkManager/conf.d/50-edgemoa.conf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--profile", metavar="NAME", help="show another profile than this board's (board.profile)"
    )
    parser.add_argument("--list", action="store_true", help="only name every profile")
    parser.add_argument(
        "--apply",
        action="store_true",
        help="as root, at boot: take over what the board was provisioned with, and have systemd"
        " heed the profile (edgemoa-board.service does it)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, load: Callable[[], Config]) -> int:
    """Show the board, or do as asked.

    :param load: reads the settings.
    :raises EdgemoaError: settings, a profile or what the board was provisioned with is not valid.
    """
    if arguments.list:
        return _list(as_json=arguments.json)
    if arguments.apply:
        return _apply(load)
    from edgemoa import hardware, profiles

    if arguments.profile:
        arguments.settings.append(f"board.profile={arguments.profile}")
    config = load()
    facts = profiles.Facts(*hardware.facts())
    name, profile = profiles.of_machine(facts, config.board.profile)
    told = _told(config, facts, name, profile)
    told["found"] = config.board.profile == profiles.AUTO
    if arguments.json:
        print(json.dumps(told))
    else:
        print("\n".join(lines(told)))
    return 0


def _list(*, as_json: bool) -> int:
    from edgemoa import profiles

    known = profiles.load_all()
    if as_json:
        boards = [{"profile": name, "board": it.board} for name, it in known.items()]
        print(json.dumps({"profiles": boards}))
    else:
        for name, profile in known.items():
            print(f"{name:18} {profile.board}")
    return 0


def _told(config: Config, facts: Facts, name: str, profile: Profile | None) -> dict[str, Any]:
    """All that is shown, for scripts."""
    from edgemoa import hardware
    from edgemoa.config import Config as Defaults

    condition = hardware.condition()
    told: dict[str, Any] = {
        "machine": hardware.board_name(),
        "architecture": facts.machine,
        "cores": os.cpu_count(),
        "memory_bytes": facts.memory_bytes,
        "profile": name,
        "temperature_c": condition.temperature_c,
        "throttled": condition.throttled,
        "under_voltage": condition.under_voltage,
        "settings": [],
    }
    if profile is None:
        return told
    told |= {
        "board": profile.board,
        "service_memory_bytes": profile.service_bytes(facts),
        "model": profile.model,
        "model_in_use": _model_in_use(config),
        "slow_from_c": profile.slow_from_c,
        "throttle_at_c": min(profile.throttle_at_c, hardware.throttle_at_c() or 1000),
        "supply_w": profile.supply_w,
        "wifi_power_save": profile.wifi_power_save,
        "provider": config.model.provider,
        "threads": config.model.threads,
        "slots": config.model.slots,
    }
    for section, table in profile.settings.items():
        for key, value in table.items():
            built_in = getattr(getattr(Defaults(), section), key)
            now = getattr(getattr(config, section), key)
            told["settings"].append(
                {"setting": f"{section}.{key}", "profile": value, "built_in": built_in, "now": now}
            )
    return told


def _model_in_use(config: Config) -> str:
    from edgemoa.models.catalog import default_model

    return config.model.name or default_model(cli_settings.library(config))


def lines(told: dict[str, Any]) -> list[str]:
    """The same for a person."""
    memory = told["memory_bytes"] // _MIB
    shown = [
        f"machine      {told['machine'] or 'unknown'}, {told['architecture']}, "
        f"{told['cores']} cores, {memory} MiB of memory",
        f"profile      {told['profile']}" + (", as the machine was found to be" * told["found"]),
    ]
    if told["temperature_c"] is not None:
        slowed = ", slowed down by the system" if told["throttled"] else ""
        shown.append(f"now          {told['temperature_c']:.0f} °C{slowed}")
    if told["under_voltage"]:
        shown.append("             the supply is too weak")
    if "board" not in told:
        return [*shown, "             every setting is as it is built in, or as you set it"]
    share = told["service_memory_bytes"] // _MIB
    in_use = told["model_in_use"]
    suits = told["model"]
    shown += [
        f"for          {told['board']}",
        f"memory       {share} MiB for the service"
        if share
        else "memory       as much as there is",
        f"model        {in_use}"
        + ("" if suits == in_use else f"; this board is thought to bear {suits}:"),
    ]
    if suits != in_use:
        shown.append(
            f"             edgemoa model pull {suits} && edgemoa model set-default {suits}"
        )
    shown += [
        f"computes     {told['provider']}, threads and jobs at a time "
        + ("measured here" if not told["threads"] and not told["slots"] else "as set"),
        f"heat         work is slowed from {told['slow_from_c']} °C on; the system slows the "
        f"processor from {told['throttle_at_c']:.0f} °C on",
    ]
    if told["supply_w"]:
        shown.append(f"supply       {told['supply_w']:g} W")
    if told["wifi_power_save"] == "off":
        shown.append("Wi-Fi        its power save is off while the service is installed")
    for each in told["settings"]:
        yours = "" if each["now"] == each["profile"] else f", but {each['now']} is set"
        shown.append(f"setting      {each['setting']} = {each['profile']}{yours}")
    return shown


# --- at boot


def _apply(load: Callable[[], Config]) -> int:
    import subprocess

    from edgemoa import hardware, profiles

    if os.geteuid() != 0:
        raise UserError("only root may do that", hint="sudo edgemoa board --apply")
    trouble = _provision()
    config = load()
    facts = profiles.Facts(*hardware.facts())
    name, profile = profiles.of_machine(facts, config.board.profile)
    changed = _have(_DROP_IN, drop_in(name, profile, facts))
    if changed and Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "daemon-reload"], check=False)
    wifi = profile is not None and profile.wifi_power_save == "off"
    if Path("/etc/NetworkManager").is_dir():
        _have(_WIFI, "[connection]\n# 2: off\nwifi.powersave=2\n" if wifi else "")
    print(f"profile {name}", file=sys.stderr)
    if trouble is not None:
        raise trouble
    return 0


def _provision() -> EdgemoaError | None:
    """Take over what is on the card; what is wrong with it must not keep the board from the rest,
    and is written beside it, for who looks at the card."""
    import grp

    from edgemoa import profiles, provision
    from edgemoa.net.pairing import parse_join_secret

    file = provision.find()
    if file is None:
        return None
    note = file.with_name("edgemoa-error.txt")
    try:
        data = provision.read(file)
        wanted = provision.parse(data, str(file))
        if wanted.has_secret:
            parse_join_secret(wanted.join_secret)
        if wanted.profile not in ("", profiles.AUTO, profiles.NONE):
            profiles.load(wanted.profile)
        if provision.take_over(file, data, wanted, _ETC, grp.getgrnam(_GROUP).gr_gid):
            print(f"took over {file}", file=sys.stderr)
        note.unlink(missing_ok=True)
    except KeyError:
        return ConfigError(f"there is no group {_GROUP}", hint="install the package")
    except ConfigError as error:
        _have(note, f"{error}\n{error.hint}\n")
        return error
    except OSError as error:
        return ConfigError(f"{file}: {error.strerror}", hint="is its partition mounted read-only?")
    return None


def drop_in(name: str, profile: Profile | None, facts: Facts) -> str:
    """What systemd is to know of the service on this board; empty for nothing.

    The limit is one at which the model's process is ended, and started anew. No softer one: held
    back by that, the daemon, too, would stand still.
    """
    import glob

    if profile is None:
        return ""
    told = [f"# Of the profile {name}, written at each boot by `edgemoa board --apply`."]
    told.append("[Service]")
    if most := profile.service_bytes(facts):
        told.append(f"MemoryMax={most // _MIB}M")
    nodes = sorted({node for pattern in profile.devices for node in glob.glob(pattern)})  # noqa: PTH207
    if nodes:
        # What a GPU's libraries need: its device nodes, and code that they make as they run.
        told += ["PrivateDevices=no", "MemoryDenyWriteExecute=no"]
        told += ["SupplementaryGroups=" + " ".join(_there("video", "render"))]
        told += [f"DeviceAllow={node} rw" for node in nodes]
    return "\n".join(told) + "\n"


def _there(*groups: str) -> list[str]:
    import grp

    known = {each.gr_name for each in grp.getgrall()}
    return [group for group in groups if group in known]


def _have(file: Path, text: str) -> bool:
    """Have a file with this text, or none; whether that is new."""
    before = file.read_text() if file.exists() else ""
    if before == text:
        return False
    if text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    else:
        file.unlink()
    return True
