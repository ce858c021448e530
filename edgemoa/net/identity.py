"""Who this board is: one Ed25519 key, kept in one file, and the certificate that follows from it.

The identity is the key. The certificate only carries it through TLS: self-signed, the same bytes
each time it is made, valid from 1950 to 9999 because boards have no clock to trust, and never a
certificate authority (a peer that pinned it would accept what it signs).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from edgemoa.core import envelope, limits, roster
from edgemoa.core.messages import BoardId
from edgemoa.errors import DiskFullError, ProtocolError, StateError

FILE_NAME: Final = "identity.pem"
_MAX_FILE_BYTES: Final = 8 * limits.KIB
MAX_SUCCESSION: Final = 5  # of the latest keys; all of it is told in one frame
_BLOCK: Final = b"EDGEMOA REPLACED KEY"
_REPLACED: Final = re.compile(
    rb"-----BEGIN " + _BLOCK + rb"-----\n([A-Za-z0-9+/=\n]+)-----END " + _BLOCK + rb"-----\n"
)
_NOT_A_CERTIFICATE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_NOT_BEFORE: Final = datetime.datetime(1950, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_RESTORE: Final = (
    "restore it from a backup, or move it away: the board then makes a new identity "
    "and has to be paired again"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """This board's key and what follows from it.

    :param board_id: the identity that others know.
    :param public_key: 32 raw bytes.
    :param certificate: DER.
    :param file: key and certificate in PEM, as the TLS library wants to read them itself.
    :param succession: roster records by which former keys of this board were replaced, up to this
        one, for boards that have not heard of it.
    """

    board_id: BoardId
    public_key: bytes
    certificate: bytes
    file: Path
    _key: Ed25519PrivateKey = field(repr=False)
    succession: tuple[bytes, ...] = ()

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._key.sign(data)


def load_identity(state_dir: Path) -> Identity:
    """The identity in ``state_dir``, made on the first start. Blocks on the disk.

    :raises StateError: if the file cannot be read, is damaged, or others could have read it.
    :raises DiskFullError: if there is no room to write it.
    """
    file = state_dir / FILE_NAME
    with _errors(file):
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            _write(file, _pem(Ed25519PrivateKey.generate()), os.link)
        return _load(file)


def rotate_identity(state_dir: Path, version: int) -> tuple[Identity, Identity]:
    """Give the board a new key; returns its former identity and the new one. Blocks on the disk.

    The new key and the record by which other boards come to trust it are in one file, which takes
    the place of the old one at once: a power cut leaves either. The old key is gone then.

    :param version: of the roster record about this board by which it is trusted now, or later.
    :raises StateError, DiskFullError: as :func:`load_identity` does; then nothing has changed.
    """
    old = load_identity(state_dir)
    key = Ed25519PrivateKey.generate()
    with _errors(old.file):
        for data in old.succession:
            known = roster.read(data, read_certificate)
            version = max(version, known.version if known else 0)
        certificate = make_certificate(key).public_bytes(serialization.Encoding.DER)
        record = roster.write_replace(old.board_id, old.sign, certificate, key.sign, version + 1)
        succession = (*old.succession, record)[-MAX_SUCCESSION:]
        _write(old.file, _pem(key, succession), os.replace)
        return old, _load(old.file)


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no room to write {file}", hint="free some disk space and start again"
            ) from error
        raise StateError(
            f"cannot use {file}: {error.strerror}",
            hint="check that the state directory exists and belongs to the user of the daemon",
        ) from error


def _pem(key: Ed25519PrivateKey, succession: tuple[bytes, ...] = ()) -> bytes:
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + make_certificate(key).public_bytes(serialization.Encoding.PEM)
    for record in succession:
        pem += b"-----BEGIN %b-----\n" % _BLOCK + base64.encodebytes(record)
        pem += b"-----END %b-----\n" % _BLOCK
    return pem


def _write(file: Path, pem: bytes, into_place: Callable[[Path, Path], None]) -> None:
    """Whole or not at all, also when the power fails: written aside, synced, then put into place.

    :param into_place: ``os.link`` fails rather than replaces an identity that another process just
        made; ``os.replace`` replaces.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            into_place(aside, file)
        except FileExistsError:
            return
    finally:
        aside.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _load(file: Path) -> Identity:
    with file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise StateError(
                f"{file} does not belong to the user that edgemoa runs as",
                hint=f"chown it to that user, e.g. `chown edgemoa {file}`",
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise StateError(
                f"{file} can be read by other users of this machine",
                hint=f"`chmod 600 {file}`; if somebody may have copied it, move it away instead",
            )
        pem = stream.read(_MAX_FILE_BYTES)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
        succession = tuple(base64.b64decode(block) for block in _REPLACED.findall(pem))
        for record in succession:
            roster.read(record, read_certificate)
    except (ValueError, TypeError, ProtocolError):  # TypeError: the key is encrypted
        raise StateError(f"{file} is damaged", hint=_RESTORE) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"{file} holds a key of another kind", hint=_RESTORE)
    if certificate != make_certificate(key):
        raise StateError(f"{file} holds a certificate of another key", hint=_RESTORE)
    public_key = key.public_key().public_bytes_raw()
    return Identity(
        envelope.board_id(public_key),
        public_key,
        certificate.public_bytes(serialization.Encoding.DER),
        file,
        key,
        succession,
    )


def make_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """The self-signed certificate of a key; always the same one (Ed25519 signs without chance)."""
    public_key = key.public_key().public_bytes_raw()
    name = _name(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(hashlib.sha256(public_key).digest()[:16]) >> 1 | 1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, algorithm=None)
    )


def _name(key: Ed25519PublicKey) -> x509.Name:
    common_name = envelope.board_id(key.public_bytes_raw())
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def read_certificate(der: bytes) -> bytes:
    """The raw public key in a board's certificate, if it is one that may be pinned.

    :raises ProtocolError: if it is malformed, not self-signed with Ed25519, or could act as an
        authority for others.
    """
    if len(der) > limits.MAX_CERTIFICATE_BYTES:
        raise ProtocolError("certificate over the size limit")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not isinstance(key, Ed25519PublicKey) or constraints.ca:
            raise ProtocolError("not a board's certificate")
        # Nothing else in it: TLS libraries decode what a verified certificate says, and trip.
        name = _name(key)
        if len(certificate.extensions) > 1 or {certificate.subject, certificate.issuer} != {name}:
            raise ProtocolError("not a board's certificate")
        certificate.verify_directly_issued_by(certificate)
        # The one part that the signature does not cover is its own frame: how many bits of the
        # last byte do not count. One certificate has one encoding.
        if not der.endswith(b"\x03\x41\x00" + certificate.signature):
            raise ProtocolError("not a valid certificate")
    except _NOT_A_CERTIFICATE:
        raise ProtocolError("not a valid certificate") from None
    return key.public_bytes_raw()
