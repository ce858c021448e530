"""Pairing: two boards come to trust each other, by a secret that both hold or a code that a person
carries from one to the other.

The joiner J dials the member M over TLS without showing a certificate, then (each a frame):

1. J to M: what it wants, versions, nonce, J's certificate; with a code, its half of SPAKE2
2. M to J: version, nonce; with a code, its half of SPAKE2
3. J to M: HMAC(K, "J" | T), Sign_J("edgemoa/pair/v1/J" | T)
4. M to J: HMAC(K, "M" | T), Sign_M("edgemoa/pair/v1/M" | T), M's name
5. J to M: J's name

T is the hash of everything both have seen, M's TLS certificate first: a man in the middle has to
show another certificate to J than M's, so the two would not agree on T. The joiner confirms first,
so that whoever dials without the secret gets nothing at all.

A join secret has 136 random bits, so that a proof that a stranger may collect cannot be tried out
against guesses; K follows from it. A code has 8 digits, and K comes from SPAKE2: who takes part in
a run can try one code, there and then, and learns nothing to try others with later. So what counts
is the number of runs, which :class:`Window` bounds at M, and whoever calls :func:`join` at J.

A fourth thing may be wanted without a certificate: to show signed records by which a board changed
its key, to a board that was off when it did (:class:`News`). They speak for themselves.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2 import SPAKE2_A, SPAKE2_B

from edgemoa.core import envelope, limits, roster
from edgemoa.core.messages import BoardId, printable
from edgemoa.errors import ConfigError, PairingError, ProtocolError, UserError
from edgemoa.net import wire
from edgemoa.net.identity import MAX_SUCCESSION, Identity, read_certificate
from edgemoa.net.tls import Connection

_PREFIX: Final = "edgemoa-join-"
_SECRET_BYTES: Final = 17
_CHECK_BYTES: Final = 3
_NONCE_BYTES: Final = 32
_HALF_BYTES: Final = 33  # a side, and a point
_CODE_DIGITS: Final = 8
_LABEL: Final = b"edgemoa/pair/v1"

Nonce = Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Half = Annotated[bytes, msgspec.Meta(min_length=_HALF_BYTES, max_length=_HALF_BYTES)]
Name = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)]


class _Start(msgspec.Struct, frozen=True, tag="secret"):
    versions: tuple[wire.Version, wire.Version]
    nonce: Nonce
    certificate: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]


class _CodeStart(msgspec.Struct, frozen=True, tag="code"):
    versions: tuple[wire.Version, wire.Version]
    nonce: Nonce
    certificate: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]
    spake: Half


class News(msgspec.Struct, frozen=True, tag="news"):
    """Records by which a board changed its key."""

    records: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=limits.MAX_RECORD_BYTES)], ...],
        msgspec.Meta(min_length=1, max_length=MAX_SUCCESSION),
    ]


class _Accept(msgspec.Struct, frozen=True):
    version: wire.Version
    nonce: Nonce
    spake: Half | None = None


class _Proof(msgspec.Struct, frozen=True):
    mac: Mac
    signature: Signature
    name: Name = ""


class _Done(msgspec.Struct, frozen=True):
    name: Name


_starts: msgspec.msgpack.Decoder[_Start | _CodeStart | News] = msgspec.msgpack.Decoder(
    _Start | _CodeStart | News
)
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
class Code:
    """What a person reads on one board and types on another."""

    digits: str

    def __repr__(self) -> str:
        return "Code(...)"

    @property
    def shown(self) -> str:
        """As it is shown to people."""
        return f"{self.digits[:4]}-{self.digits[4:]}"


def new_code() -> Code:
    """A new code: 8 random digits."""
    return Code(f"{secrets.randbelow(10**_CODE_DIGITS):0{_CODE_DIGITS}}")


def parse_code(text: str) -> Code:
    """The code that a person typed, with or without spaces and hyphens.

    :raises UserError: if it cannot be one.
    """
    digits = text.translate({ord(c): None for c in " -\t\r\n"})
    if len(digits) == _CODE_DIGITS and digits.isascii() and digits.isdigit():
        return Code(digits)
    raise UserError(
        f"that is not a code: it has {_CODE_DIGITS} digits",
        hint="`edgemoa pair` on a board of the group shows one",
    )


class Window:
    """The time in which boards may pair with this one by a code. Times are seconds on the caller's
    monotonic clock.

    Each run that is begun counts as a failed one until the joiner has proved that it knows the
    code. The fifth closes the window, so nobody has more than five tries at a code.
    """

    TRIES: Final = 5

    def __init__(self, code: Code, now: float, seconds: float) -> None:
        self.code = code
        self.joined: list[str] = []
        """Names of the boards that came in."""
        self.failures = 0
        """Runs that were begun and not confirmed, those under way included."""
        self._ends = now + seconds
        self._running = 0
        self._closed = ""

    def left_s(self, now: float) -> float:
        """For how long it is open yet; 0 if it is closed."""
        return 0.0 if self.why_closed(now) else self._ends - now

    def why_closed(self, now: float) -> str:
        """ "" while it is open."""
        if not self._closed and now >= self._ends:
            self.close("its time is over")
        if not self._closed and self.failures >= self.TRIES and not self._running:
            self.close(f"{self.TRIES} tries failed: somebody may be guessing")
        return self._closed

    def close(self, reason: str) -> None:
        """End it, if it has not ended."""
        self._closed = self._closed or reason

    @contextlib.contextmanager
    def run(self, now: float) -> Iterator[Callable[[], None] | None]:
        """One run; gives what to call when the joiner has proved itself. None if none may begin."""
        if self.why_closed(now) or self.failures >= self.TRIES:
            yield None
            return
        self.failures += 1
        self._running += 1
        confirmed = False

        def confirm() -> None:
            nonlocal confirmed
            confirmed = True

        try:
            yield confirm
        finally:
            self._running -= 1
            self.failures -= confirmed


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
    shared: JoinSecret | Code,
    name: str,
    member: Candidate,
    *,
    before_proof: Callable[[], None] = lambda: None,
) -> Candidate:
    """The dialling board's side.

    :param member: who the TLS handshake says is there; its name is not known yet.
    :param before_proof: called when the other has let the run begin, before anything is proved.
    :raises PairingError: if the other did not prove that it holds the secret, or knows the code.
    :raises ProtocolError: if it does not keep to the protocol.
    :raises OSError, EOFError: if the connection breaks; the usual sign of another secret.
    """
    spake: _Spake | None = None
    versions = (wire.MIN_VERSION, wire.MAX_VERSION)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    if isinstance(shared, Code):
        spake = _Spake(SPAKE2_A, shared, identity.board_id, member.id)
        half = await asyncio.to_thread(spake.start)
        start = _encode(_CodeStart(versions, nonce, identity.certificate, half))
    else:
        start = _encode(_Start(versions, nonce, identity.certificate))
    await _send(connection, start)
    accept = await _receive(connection)
    answer = envelope.decode(_accepts, accept, "pairing answer")
    if answer.version != wire.MAX_VERSION:
        raise ProtocolError("the other board chose a protocol version that was not offered")
    key = await _key(shared, spake, answer.spake)
    transcript = _transcript(member.certificate, start, accept)
    before_proof()
    await _send(connection, _encode(_prove(identity, key, b"J", transcript)))
    proof = envelope.decode(_proofs, await _receive(connection), "pairing proof")
    _check_proof(proof, member.public_key, key, b"M", transcript)
    await _send(connection, _encode(_Done(name)))
    return Candidate(member.id, member.public_key, member.certificate, printable(proof.name))


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody without a certificate wants: the first frame, as it came and as it reads."""

    packet: bytes
    asked: _Start | _CodeStart | News

    @property
    def by_code(self) -> bool:
        """Whether it is to pair by a code, and not by a join secret."""
        return isinstance(self.asked, _CodeStart)


async def receive(connection: Connection) -> Request:
    """Wait for the first frame.

    :raises ProtocolError: if it is none.
    :raises OSError, EOFError: if the connection breaks.
    """
    packet = await _receive(connection)
    return Request(packet, envelope.decode(_starts, packet, "pairing request"))


async def admit(
    connection: Connection,
    identity: Identity,
    request: Request,
    shared: JoinSecret | Code,
    name: str,
    *,
    check: Callable[[BoardId], None],
) -> Candidate:
    """The listening board's side; raises as :func:`join` does.

    :param check: called when the other has proved itself, before anything is proved to it; raises
        if the board must not be paired.
    """
    asked = request.asked
    if isinstance(asked, News) or request.by_code != isinstance(shared, Code):
        raise ProtocolError("not a valid pairing request")
    low, high = asked.versions
    if not low <= wire.MAX_VERSION <= high:
        raise ProtocolError("the other board speaks no common protocol version")
    candidate = identify(asked.certificate)
    spake: _Spake | None = None
    half: bytes | None = None
    if isinstance(shared, Code):
        spake = _Spake(SPAKE2_B, shared, candidate.id, identity.board_id)
        half = await asyncio.to_thread(spake.start)
    accept = _encode(_Accept(wire.MAX_VERSION, secrets.token_bytes(_NONCE_BYTES), half))
    key = await _key(shared, spake, asked.spake if isinstance(asked, _CodeStart) else None)
    await _send(connection, accept)
    transcript = _transcript(identity.certificate, request.packet, accept)
    proof = envelope.decode(_proofs, await _receive(connection), "pairing proof")
    _check_proof(proof, candidate.public_key, key, b"J", transcript)
    check(candidate.id)
    await _send(connection, _encode(_prove(identity, key, b"M", transcript, name)))
    done = envelope.decode(_dones, await _receive(connection), "end of pairing")
    return Candidate(
        candidate.id, candidate.public_key, candidate.certificate, printable(done.name)
    )


async def tell(connection: Connection, records: tuple[bytes, ...]) -> None:
    """Show the records by which this board changed its key.

    :raises OSError: if the connection breaks.
    """
    await _send(connection, _encode(News(records)))


class _Spake:
    """One side of SPAKE2, which takes some 10 ms: call its methods in a thread."""

    def __init__(
        self, side: type[SPAKE2_A | SPAKE2_B], code: Code, joiner: BoardId, member: BoardId
    ) -> None:
        self._run = side(code.digits.encode(), idA=joiner.encode(), idB=member.encode())

    def start(self) -> bytes:
        half: bytes = self._run.start()
        return half

    def finish(self, half: bytes) -> bytes:
        try:
            shared: bytes = self._run.finish(half)
        except Exception:  # whatever its parser makes of a stranger's bytes
            raise ProtocolError("not a valid half of SPAKE2") from None
        return HKDF(SHA256(), 32, salt=None, info=_LABEL + b"/code").derive(shared)


async def _key(shared: JoinSecret | Code, spake: _Spake | None, half: bytes | None) -> bytes:
    """What the proofs are made with."""
    if isinstance(shared, JoinSecret):
        return shared.key
    if spake is None or half is None:
        raise ProtocolError("not a valid half of SPAKE2")
    return await asyncio.to_thread(spake.finish, half)


def replaces(record: bytes) -> bool:
    """Whether that is a record by which a board changed its key.

    :raises ProtocolError: if it is malformed.
    """
    read = roster.read(record, read_certificate)
    return read is not None and read.kind == roster.REPLACE


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
    identity: Identity, key: bytes, role: bytes, transcript: bytes, name: str = ""
) -> _Proof:
    return _Proof(
        hmac.digest(key, role + transcript, "sha256"),
        identity.sign(_LABEL + b"/" + role + transcript),
        name,
    )


def _check_proof(
    proof: _Proof, public_key: bytes, key: bytes, role: bytes, transcript: bytes
) -> None:
    mac = hmac.digest(key, role + transcript, "sha256")
    if not hmac.compare_digest(mac, proof.mac):
        raise PairingError(
            "the other board holds another join secret or code",
            hint="give both boards the same join secret, or type the code that the one shows",
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
