"""Who may ask over TCP, and how they are told apart.

The Unix socket needs none of this: its permissions and the kernel say who is there. Over TCP,
which is off unless it is switched on, a client shows a key; what a browser was made to send by a
page from elsewhere is refused, whatever it shows.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import secrets
import ssl
import stat
from base64 import b32encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from edgemoa.errors import ConfigError, ForbiddenError, StateError, UnauthorizedError, UserError

FILE_NAME: Final = "api-keys"
MAX_KEYS: Final = 256
_KEY_BYTES: Final = 20
_PREFIX: Final = "edgemoa-key-"
_MAX_FILE_BYTES: Final = 64 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE: Final = re.compile(rf"({_NAME.pattern}) ([0-9a-f]{{64}})")
_MAX_PORT: Final = 65_535


def parse_listen(text: str) -> tuple[str, int]:
    """Address and port to listen on.

    :raises ConfigError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    try:
        number = int(port) if port.isascii() and port.isdigit() else -1
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        number, address = -1, ipaddress.ip_address("127.0.0.1")
    if not colon or not 0 <= number <= _MAX_PORT:
        raise ConfigError(
            f"api.listen: '{text}' is not an address and a port",
            hint='write e.g. "127.0.0.1:11434", "[::1]:11434" or, for all, "0.0.0.0:11434"',
        )
    return str(address), number


@dataclass(frozen=True)
class Door:
    """A way in over TCP.

    :param keys: that clients have to show one of; None for none.
    :param names: of this board, in lower case, beside its addresses.
    :param tls: with what it is encrypted; None for not at all.
    """

    host: str
    port: int
    keys: Keys | None
    names: frozenset[str]
    tls: ssl.SSLContext | None = None


def open_door(
    listen: str, *, keyless: bool, certificate: str, private_key: str, keys: Keys, name: str
) -> Door:
    """The way in that the settings ask for. Blocks on the disk.

    :raises ConfigError: they cannot be used, or would let in whoever is on the network.
    :raises StateError: the keys cannot be read.
    """
    host, port = parse_listen(listen)
    near = is_loopback(host)
    if bool(certificate) != bool(private_key):
        raise ConfigError(
            "api.tls_certificate and api.tls_key go together", hint="set both, or neither"
        )
    if not near and not certificate:
        raise ConfigError(
            f"api.listen: {host} can be reached from elsewhere, and keys and prompts would travel"
            " in the clear",
            hint="set api.tls_certificate and api.tls_key, or listen on 127.0.0.1",
        )
    if keyless and not near:
        raise ConfigError(
            "api.keyless is for 127.0.0.1 and ::1 alone", hint="`edgemoa api-key new NAME`"
        )
    if not keyless and not keys.names():
        raise ConfigError(
            "api.listen is set, and there is no API key that a client could show",
            hint="`edgemoa api-key new NAME` makes one; on 127.0.0.1, api.keyless = true does"
            " without, and lets in every user and program of this machine",
        )
    tls = _tls(certificate, private_key) if certificate else None
    known = frozenset({name.lower(), f"{name.lower()}.local"})
    return Door(host, port, None if keyless else keys, known, tls)


def _tls(certificate: str, private_key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(Path(certificate).expanduser(), Path(private_key).expanduser())
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"api.tls_certificate or api.tls_key cannot be used: {error.strerror or error}",
            hint="both are PEM files that the daemon's user may read",
        ) from error
    return context


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(host).is_loopback


@dataclass
class Keys:
    """The keys that clients may show: names and hashes, in a file of the state directory.

    A key has 160 bits of chance, so a plain hash of it tells nothing.
    """

    state_dir: Path
    _names: dict[str, str] = field(default_factory=dict)  # by hash
    _read: tuple[int, int, int] = (0, 0, 0)  # the file that was read: inode, time, size

    @property
    def file(self) -> Path:
        """Where they are."""
        return self.state_dir / FILE_NAME

    def names(self) -> list[str]:
        """Their names, in the order in which they were made. Blocks on the disk.

        :raises StateError: the file cannot be used.
        """
        self._look()
        return list(self._names.values())

    def who(self, key: str) -> str:
        """The name of a key that is shown. Blocks on the disk, where the file has changed.

        :raises UnauthorizedError: it is none of them.
        :raises StateError: the file cannot be used.
        """
        self._look()
        name = self._names.get(_hash(key))
        if name is None:
            raise UnauthorizedError(
                "that API key is not known here", hint="`edgemoa api-key new NAME` makes one"
            )
        return name

    def new(self, name: str) -> str:
        """Make a key; it is told here and never again. Blocks on the disk.

        :raises UserError: the name is taken, or cannot be one, or there are too many.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"'{name}' cannot be a key's name", hint="use letters, digits, . _ -")
        if name in self.names():
            raise UserError(f"there is a key '{name}'", hint=f"`edgemoa api-key revoke {name}`")
        if len(self._names) >= MAX_KEYS:
            raise UserError(f"there are {MAX_KEYS} keys, as many as may be", hint="revoke some")
        key = _PREFIX + b32encode(secrets.token_bytes(_KEY_BYTES)).decode().lower()
        self._write({**self._names, _hash(key): name})
        return key

    def revoke(self, name: str) -> None:
        """Take a key back; a running board knows at its next request. Blocks on the disk.

        :raises UserError: there is none of that name.
        """
        if name not in self.names():
            raise UserError(f"there is no key '{name}'", hint="`edgemoa api-key list` shows them")
        self._write({h: n for h, n in self._names.items() if n != name})

    def _look(self) -> None:
        try:
            with self.file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                seen = (status.st_ino, status.st_mtime_ns, status.st_size)
                if seen == self._read:
                    return
                if stat.S_IMODE(status.st_mode) & 0o077:
                    raise StateError(
                        f"{self.file} can be read by other users", hint=f"chmod 600 {self.file}"
                    )
                text = stream.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            self._names, self._read = {}, (0, 0, 0)
            return
        except OSError as error:
            raise StateError(
                f"cannot read {self.file}: {error.strerror}", hint="check its permissions"
            ) from error
        lines = [_LINE.fullmatch(line) for line in text.decode("ascii", "replace").splitlines()]
        if len(text) > _MAX_FILE_BYTES or None in lines:
            raise StateError(f"{self.file} is damaged", hint="remove it and make new keys")
        self._names = {match[2]: match[1] for match in lines if match}
        self._read = seen

    def _write(self, names: dict[str, str]) -> None:
        text = "".join(f"{name} {digest}\n" for digest, name in names.items())
        aside = self.file.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(self.file)
        except OSError as error:
            raise StateError(
                f"cannot write {self.file}: {error.strerror}", hint="is the disk full, or not ours?"
            ) from error
        self._names = names
        self._read = (0, 0, 0)


def check_origin(host: str, origin: str | None, names: Iterable[str]) -> None:
    """See that no page from elsewhere makes a browser ask here.

    A name that an attacker owns can be made to point here (DNS rebinding), so what the client
    thinks it talks to has to be an address or a name of this board; and what comes from a page at
    all is refused.

    :param host: the Host header.
    :param origin: the Origin header, which browsers send.
    :param names: what this board is called, in lower case.
    :raises ForbiddenError: it is from elsewhere.
    """
    if origin is not None:
        raise ForbiddenError(
            "this is not for web pages", hint="ask from a program; browsers send an Origin"
        )
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        name = ""
    if name == "localhost" or name.endswith(".localhost") or name in names:
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise ForbiddenError(
            "the Host header names another machine",
            hint="use this board's address or its name",
        ) from None


def shown_key(headers: Iterable[tuple[str, str]]) -> str:
    """The key in ``Authorization: Bearer`` or ``X-API-Key``.

    :raises UnauthorizedError: there is none.
    """
    for name, value in headers:
        if name.lower() == "authorization" and value[:7].lower() == "bearer ":
            return value[7:].strip()
        if name.lower() == "x-api-key":
            return value.strip()
    raise UnauthorizedError("an API key is needed here", hint='send "Authorization: Bearer KEY"')


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
