"""Where a command finds this board's settings and models, and as which user it works on them."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoa.config import Config
    from edgemoa.models.library import ModelLibrary

CONFIG_FILES: Final = ("/etc/edgemoa/edgemoa.toml", "~/.config/edgemoa/edgemoa.toml")
PROVISIONED: Final = "/etc/edgemoa/provisioned.toml"  # of the board's first boot, below the former


def load(file: str | None = None, flags: Sequence[str] = ()) -> Config:
    """The settings: of ``flags``, the environment, ``file`` or the first of :data:`CONFIG_FILES`,
    what the board was provisioned with, and its profile.

    :raises ConfigError: they cannot be read, or are not valid.
    """
    from edgemoa import config

    path = Path(file) if file else None
    if path is None:
        path = next((found for name in CONFIG_FILES if (found := _exists(name))), None)
    below = _exists(PROVISIONED) if path == Path(CONFIG_FILES[0]) else None
    return config.load(path, below=below, flags=flags, profile=_profile_settings)


def _profile_settings(asked: str) -> Mapping[str, Mapping[str, Any]]:
    from edgemoa import hardware, profiles

    if asked == profiles.NONE:
        return {}
    _, profile = profiles.of_machine(profiles.Facts(*hardware.facts()), asked)
    return profile.settings if profile else {}


def library(config: Config) -> ModelLibrary:
    """The models of this board."""
    from edgemoa.models.library import ModelLibrary, default_model_dir

    configured = config.board.models_dir
    return ModelLibrary(Path(configured).expanduser() if configured else default_model_dir())


def as_owner(folder: Path) -> None:
    """Where root works on what another user's daemon keeps, become that user, for good: what root
    made there the daemon could not change.

    :raises StateError: that user is not known, or it cannot be become.
    """
    if os.geteuid() != 0:
        return
    try:
        uid = next(p for p in (folder, *folder.parents) if p.exists()).stat().st_uid
        if uid == 0:
            return
        user = pwd.getpwuid(uid)
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(uid)
    except (KeyError, OSError) as error:
        raise StateError(
            f"cannot work as the owner of {folder}: {error}", hint=f"chown -R it: {folder}"
        ) from error
    os.environ |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}


def _exists(name: str) -> Path | None:
    """The file if it is there; one that cannot be looked at is an error, not an absence."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # the last: no home directory
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read {name}: {error.strerror}", hint="check its permissions"
        ) from error
    return path
