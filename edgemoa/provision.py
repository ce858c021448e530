"""What somebody wrote for a board before its first boot: one small file on its storage card.

Its settings count below those of the board's own configuration file, so that whatever is changed
there later wins. The join secret is taken over once, and then wiped where it was read: a card's
boot partition is readable by anybody who holds the card.
"""

from __future__ import annotations

import os
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from edgemoa.config import quoted
from edgemoa.core import limits
from edgemoa.errors import ConfigError

# Where it is looked for: Raspberry Pi OS since bookworm, before that, and where cloud-init and
# other tools may put it.
PLACES: Final = (
    Path("/boot/firmware/edgemoa.toml"),
    Path("/boot/edgemoa.toml"),
    Path("/etc/edgemoa/provision.toml"),
)
SETTINGS: Final = "provisioned.toml"  # in /etc/edgemoa: what became of it
SECRET: Final = "join-secret"  # likewise  # noqa: S105 - the name of a file
_WIPED: Final = "-"
_MAX_BYTES: Final = 64 * limits.KIB


class Provision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One board's file.

    :ivar name: what people call the board; its host name if empty.
    :ivar model: that it fetches and answers with; the usual one if empty.
    :ivar profile: of its kind of board; as it is found to be if empty.
    :ivar join_secret: of the group; dashes once a board has it.
    """

    name: Annotated[str, Meta(max_length=limits.MAX_NAME_BYTES)] = ""
    model: Annotated[str, Meta(max_length=limits.MAX_NAME_BYTES)] = ""
    profile: Annotated[str, Meta(max_length=limits.MAX_NAME_BYTES)] = ""
    join_secret: Annotated[str, Meta(max_length=256)] = ""

    @property
    def has_secret(self) -> bool:
        """Whether there is one to be taken over."""
        return bool(self.join_secret.strip(_WIPED))

    def settings(self, secret_file: Path | None) -> str:
        """The same as a configuration file; empty where it says nothing.

        :param secret_file: where the join secret is kept, if there is one.
        """
        lines = []
        for section, key, value in (
            ("board", "name", self.name),
            ("board", "profile", self.profile),
            ("model", "name", self.model),
            ("net", "join_secret_file", str(secret_file or "")),
        ):
            if value:
                if f"[{section}]" not in lines:
                    lines.append(f"[{section}]")
                lines.append(f"{key} = {quoted(value)}")
        return "".join(f"{line}\n" for line in lines)


def to_toml(provision: Provision) -> str:
    """The file to put on a board's boot partition."""
    told = {key: getattr(provision, key) for key in Provision.__struct_fields__}
    lines = [f"{key} = {quoted(value)}" for key, value in told.items() if value]
    return "# For the first boot of a board with edgemoa.\n" + "".join(f"{it}\n" for it in lines)


def parse(data: bytes, origin: str) -> Provision:
    """What a file says.

    :raises ConfigError: it is not one.
    """
    try:
        return msgspec.convert(tomllib.loads(data.decode()), Provision)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{origin} cannot be used: {error}",
            hint='it may have name, model, profile and join_secret, each as key = "value"',
        ) from None


def find(places: tuple[Path, ...] = PLACES) -> Path | None:
    """The first of ``places`` that is there."""
    return next((place for place in places if place.is_file()), None)


def read(file: Path) -> bytes:
    """The bytes of a file that somebody put on the card.

    :raises ConfigError: it cannot be read, or is too large for one.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="is it a file?") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{file} is too large", hint="is it the right file?")
    return data


def take_over(file: Path, data: bytes, provision: Provision, etc: Path, gid: int) -> bool:
    """Make what ``file`` says the board's own; whether anything is new.

    What a power cut interrupts is done at the next boot: the secret is wiped where it was read only
    when it is safe in ``etc``.

    :param data: what was read from ``file``, and says ``provision``.
    :param etc: the folder of the configuration.
    :param gid: of the daemon, which is to read the secret.
    :raises ConfigError: the secret is not written in one piece.
    :raises OSError: something cannot be written.
    """
    secret_file, changed = etc / SECRET, False
    secret = provision.join_secret.encode()
    if provision.has_secret:
        if secret not in data:
            raise ConfigError(
                f"the join secret in {file} cannot be wiped afterwards",
                hint="write it as it was printed, without escapes",
            )
        changed = _put(secret_file, secret + b"\n", 0o640, gid)
    kept = secret_file if provision.join_secret and secret_file.exists() else None
    text = provision.settings(kept).encode()
    changed |= _put(etc / SETTINGS, b"# Taken over by `edgemoa board --apply`.\n" + text, 0o644, 0)
    if provision.has_secret:
        with file.open("r+b") as stream:  # the same blocks, not a new file beside them
            stream.write(data.replace(secret, _WIPED.encode() * len(secret)))
            stream.flush()
            os.fsync(stream.fileno())
    return changed


def _put(file: Path, data: bytes, mode: int, gid: int) -> bool:
    """Have a file with these bytes, whole or as it was; whether it had others."""
    try:
        about = file.stat()
        same = file.read_bytes() == data and stat.S_IMODE(about.st_mode) == mode
        if same and about.st_gid == gid:
            return False
    except FileNotFoundError:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(number, "wb") as stream:
            stream.write(data)
            os.fchown(stream.fileno(), -1, gid)
            os.fchmod(stream.fileno(), mode)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True
