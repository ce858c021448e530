"""Zero-touch pairing: two boards that hold the same machine-made secret come to trust each other.

The joiner J dials the member M over TLS without showing a certificate, then (each a frame):

1. J to M: versions, nonce, J's certificate
2. M to J: version, nonce
3. J to M: HMAC(K, "J" | T), Sign_J("edgemoa/pair/v1/J" | T)
4. M to J: HMAC(K, "M" | T), Sign_M("edgemoa/pair/v1/M" | T), M's name
5. J to M: J's name

T is the hash of everything both have seen, M's TLS certificate first: a man in the middle has to
show another certificate to J than M's, so the two would not agree on T. The joiner confirms first,
so that whoever dials without the secret gets nothing at all. The secret has 136 random bits, so
that a proof that a stranger may collect cannot be tried out against guesses.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId, printable
from edgemoa.errors import ConfigError, PairingError, ProtocolError
from edgemoa.net import wire
from edgemoa.net.identity import Identity, read_certificate
from edgemoa.net.tls import Connection

_PREFIX: Final = "edgemoa-join-"
_SECRET_BYTES: Final = 17
_CHECK_BYTES: Final = 3
_NONCE_BYTES: Final = 32
_LABEL: Final = b"edgemoa/pair/v1"

Nonce = Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Name = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)]


class _Start(msgspec.Struct, frozen=True):
    versions: tuple[wire.Version, wire.Version]
    nonce: Nonce
    certificate: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]


class _Accept(msgspec.Struct, frozen=True):
    version: wire.Version
    nonce: Nonce


class _Proof(msgspec.Struct, frozen=True):
    mac: Mac
    signature: Signature
    name: Name = ""


class _Done(msgspec.Struct, frozen=True):
    name: Name


_starts = msgspec.msgpack.Decoder(_Start)
_accepts = msgspec.msgpack.Decoder(_Accept)
_proofs = msgspec.msgpack.Decoder(_Proof)
_dones = msgspec.msgpack.Decoder(_Done)


@dataclass(frozen=True, slots=True)
class JoinSecret:
    """What the boards of one group hold. Its text appears nowhere but in its file."""

    key: bytes = b""

    def __repr__(self) -> str:
        return "JoinSecret(...)"


@dataclass(frozen=True, slots=True)
class Candidate:
    """The other board, once it has proved itself."""

    id: BoardId
    public_key: bytes
    certificate: bytes
    name: str


def new_join_secret() -> str:
    """A new secret as text: 136 random bits and 24 that catch typing errors."""
    raw = secrets.token_bytes(_SECRET_BYTES)
    return _PREFIX + base64.b32encode(raw + _check(raw)).decode().lower()


def parse_join_secret(text: str) -> JoinSecret:
    """The secret that :func:`new_join_secret` wrote.

    :raises ConfigError: if it was not made by it: what a person thinks up can be guessed.
    """
    body = text.strip().lower()
    if body.startswith(_PREFIX) and body.isascii():
        try:
            raw = base64.b32decode(body.removeprefix(_PREFIX).upper())
        except binascii.Error:
            raw = b""
        secret = raw[:_SECRET_BYTES]
        if len(raw) == _SECRET_BYTES + _CHECK_BYTES and _check(secret) == raw[_SECRET_BYTES:]:
            info = _LABEL + b"/secret"
            return JoinSecret(HKDF(SHA256(), 32, salt=None, info=info).derive(secret))
    raise ConfigError(
        "the join secret is not one that edgemoa made, or has a typing error",
        hint="make one with `edgemoa join-secret new`; secrets thought up by people are refused",
    )


async def join(
    connection: Connection,
    identity: Identity,
    secret: JoinSecret,
    name: str,
    member: Candidate,
) -> Candidate:
    """The dialling board's side.

    :param member: who the TLS handshake says is there; its name is not known yet.
    :raises PairingError: if the other did not prove that it holds the secret.
    :raises ProtocolError: if it does not keep to the protocol.
    :raises OSError, EOFError: if the connection breaks; the usual sign of another secret.
    """
    start = _encode(
        _Start(
            (wire.MIN_VERSION, wire.MAX_VERSION),
            secrets.token_bytes(_NONCE_BYTES),
            identity.certificate,
        )
    )
    await _send(connection, start)
    accept = await _receive(connection)
    if envelope.decode(_accepts, accept, "pairing answer").version != wire.MAX_VERSION:
        raise ProtocolError("the other board chose a protocol version that was not offered")
    transcript = _transcript(member.certificate, start, accept)
    await _send(connection, _encode(_prove(identity, secret, b"J", transcript)))
    proof = envelope.decode(_proofs, await _receive(connection), "pairing proof")
    _check_proof(proof, member.public_key, secret, b"M", transcript)
    await _send(connection, _encode(_Done(name)))
    return Candidate(member.id, member.public_key, member.certificate, printable(proof.name))


async def admit(
    connection: Connection,
    identity: Identity,
    secret: JoinSecret,
    name: str,
    check: Callable[[BoardId], None],
) -> Candidate:
    """The listening board's side; raises as :func:`join` does.

    :param check: raises if the board must not be paired, before anything is proved to it.
    """
    start = await _receive(connection)
    opening = envelope.decode(_starts, start, "pairing request")
    low, high = opening.versions
    if not low <= wire.MAX_VERSION <= high:
        raise ProtocolError("the other board speaks no common protocol version")
    candidate = identify(opening.certificate)
    accept = _encode(_Accept(wire.MAX_VERSION, secrets.token_bytes(_NONCE_BYTES)))
    await _send(connection, accept)
    transcript = _transcript(identity.certificate, start, accept)
    proof = envelope.decode(_proofs, await _receive(connection), "pairing proof")
    _check_proof(proof, candidate.public_key, secret, b"J", transcript)
    check(candidate.id)
    await _send(connection, _encode(_prove(identity, secret, b"M", transcript, name)))
    done = envelope.decode(_dones, await _receive(connection), "end of pairing")
    return Candidate(
        candidate.id, candidate.public_key, candidate.certificate, printable(done.name)
    )


def identify(certificate: bytes) -> Candidate:
    """Who a certificate stands for.

    :raises ProtocolError: if it is not one that may be pinned.
    """
    public_key = read_certificate(certificate)
    return Candidate(envelope.board_id(public_key), public_key, certificate, "")


def _transcript(member_certificate: bytes, start: bytes, accept: bytes) -> bytes:
    digest = hashlib.sha256(_LABEL)
    for part in (member_certificate, start, accept):
        digest.update(len(part).to_bytes(4))
        digest.update(part)
    return digest.digest()


def _prove(
    identity: Identity, secret: JoinSecret, role: bytes, transcript: bytes, name: str = ""
) -> _Proof:
    return _Proof(
        hmac.digest(secret.key, role + transcript, "sha256"),
        identity.sign(_LABEL + b"/" + role + transcript),
        name,
    )


def _check_proof(
    proof: _Proof, public_key: bytes, secret: JoinSecret, role: bytes, transcript: bytes
) -> None:
    mac = hmac.digest(secret.key, role + transcript, "sha256")
    if not hmac.compare_digest(mac, proof.mac):
        raise PairingError(
            "the other board holds another join secret",
            hint="give both boards the same join secret",
        )
    if not envelope.Author.from_key(public_key).signed(
        proof.signature, _LABEL + b"/" + role + transcript
    ):
        raise PairingError("the other board does not hold the key that it shows")


def _check(raw: bytes) -> bytes:
    return hashlib.sha256(b"edgemoa/join/v1" + raw).digest()[:_CHECK_BYTES]


def _encode(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


async def _send(connection: Connection, body: bytes) -> None:
    connection.writer.write(wire.framed(body))
    await connection.writer.drain()


async def _receive(connection: Connection) -> bytes:
    # The run as a whole has a time limit, so a frame needs none of its own.
    return await wire.read_frame(connection.reader, limits.MAX_PAIRING_FRAME_BYTES, timeout=60.0)
