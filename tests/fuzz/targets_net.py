"""What other boards and strangers on the network send."""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgpack
import msgspec
from cryptography import x509
from generate import ANN, BOB, BOOT, CID, HOPS, MESSAGES, TO_BOOT, FixedSpake, key, said, sign
from spake2 import SPAKE2_A, SPAKE2_B
from targets import Target, hexes, vectors

from edgemoa.core import envelope, limits, roster
from edgemoa.core.messages import Message
from edgemoa.errors import ConfigError, PairingError, ProtocolError, UserError
from edgemoa.net import copies, pairing, sealed, wire
from edgemoa.net.identity import read_certificate
from edgemoa.net.tls import Connection
from edgemoa.net.trust import Plan, TrustKeeper
from edgemoa.store import Store

_AUTHORS: Final = {envelope.key_id(ANN.public_key): envelope.Author.from_key(ANN.public_key)}
_KINDS: Final = [envelope.encode(message)[0] for message in MESSAGES]
_WHOLE_PAYLOAD: Final = 0x80
_KEY: Final = sealed.direction_key(ANN.board_id, BOB.board_id, b"A" * 32, b"B" * 32)
_REFUSED: Final = (ProtocolError,)

# --- envelopes and what is in them


def _envelope(data: bytes) -> object:
    return envelope.verify(data, _AUTHORS, to=BOB.board_id, to_boot=TO_BOOT)


def _signed(data: bytes) -> object:
    """The first byte says of which type; the rest is the body, or the whole payload, that a paired
    board signs."""
    head, rest = data[0] if data else 0, data[1:]
    kind = _KINDS[(head & ~_WHOLE_PAYLOAD) % len(_KINDS)]
    if not head & _WHOLE_PAYLOAD:
        return _envelope(sign(kind, rest))
    signed = b"edgemoa/v1/" + kind.encode() + b"\0" + rest
    parts = [1, kind, envelope.key_id(ANN.public_key), rest, ANN.sign(signed)]
    return _envelope(msgpack.packb(parts))


def _signed_seeds() -> Iterable[bytes]:
    for number, message in enumerate(MESSAGES):
        body = envelope.encode(message)[1]
        yield bytes([number]) + body
        payload = msgpack.packb([BOOT, number + 1, BOB.board_id, TO_BOOT, body])
        yield bytes([number | _WHOLE_PAYLOAD]) + payload


def _hop(data: bytes) -> Message:
    return envelope.decode_hop(data)


# --- packets, frames and datagrams


def _packet(packet: bytes) -> object:
    """What a link makes of a packet, and HELLO of the first one."""
    match packet[0] if packet else None:
        case wire.PING | wire.PONG | wire.ACK:
            return wire.read_numbers(packet)
        case wire.HOP:
            return envelope.decode_hop(packet[1:])
        case wire.ENVELOPE:
            return _envelope(packet[1 + wire.NUMBER_BYTES :])
        case wire.ROSTER:
            return wire.read_roster(packet)
        case _:
            return wire.read_hello(packet)


def _packet_seeds() -> Iterable[bytes]:
    rosters = vectors("roster.json")
    yield from hexes(rosters, "packet", "bye")
    yield wire.hello_packet(wire.Hello((1, 1), BOOT, b"s" * 32, b"k" * 8, 7946, "ann"))
    yield wire.hello_packet(wire.Hello((2, 3), 2**53 - 1, b"s" * 32, b"k" * 8, 1, ""))
    for kind in (wire.ACK, wire.PING, wire.PONG):
        yield wire.numbered(kind, *range(1, 1 + wire.MAX_ACKS))
    yield from (bytes([wire.HOP]) + envelope.encode(message)[1] for message in HOPS[:3])
    fine = sign(*envelope.encode(MESSAGES[-1]))
    yield bytes([wire.ENVELOPE]) + (1).to_bytes(8) + fine


def _datagram(data: bytes) -> object:
    return _packet(sealed.Opener(_KEY).open(data))


def _sealed(plaintext: bytes) -> object:
    """A packet that a paired board seals; beyond what fits, nothing arrives."""
    return _datagram(sealed.Sealer(_KEY, b"bob's id").seal(plaintext))


def _frames(data: bytes) -> object:
    """The first two bytes say into which pieces the network cuts the rest."""
    size = 1 + int.from_bytes(data[:2])
    return _loop().run_until_complete(_read_frames(data[2:], size))


async def _read_frames(data: bytes, size: int) -> list[bytes]:
    reader = asyncio.StreamReader()
    found: list[bytes] = []
    try:
        for at in range(0, len(data), max(size, len(data) // 16)):
            reader.feed_data(data[at : at + max(size, len(data) // 16)])
        reader.feed_eof()
        while True:
            found.append(await wire.read_frame(reader, wire.MAX_HELLO_BYTES, 30.0))
            if not 0 < len(found[-1]) <= wire.MAX_HELLO_BYTES:
                raise AssertionError("a frame of a length that is not allowed was taken")
    except EOFError:
        return found


def _frame_seeds() -> Iterable[bytes]:
    packets = list(_packet_seeds())
    yield b"\0\0" + b"".join(map(wire.framed, packets[1:4]))
    yield b"\xff\xff" + wire.framed(packets[2]) * 3
    yield b"\0\x05\xff\xff\xff\xff"
    yield b"\0\x03" + wire.framed(bytes(wire.MAX_HELLO_BYTES))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


# --- the roster


@functools.cache
def _keeper() -> TrustKeeper:
    """BOB's, on a disk; it trusts ANN."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = Store(Path(folder.name))
    store.open()
    atexit.register(store.close)
    keeper = TrustKeeper(BOB, store)
    keeper.load()
    keeper.keep(keeper.plan(lambda r: r.admitted(ANN.certificate)))
    return keeper


def _merged(records: Iterable[bytes]) -> tuple[Plan, list[bytes]]:
    """What a paired board's records would change; nobody acts on it."""
    plan = _keeper().plan(lambda r: r.merged(records))
    if len(plan.pinned) > limits.MAX_GROUP_BOARDS:
        raise AssertionError("more boards are trusted than a group holds")
    return plan, plan.roster.known


def _record(data: bytes) -> object:
    read = roster.read(data, read_certificate)
    return read, _merged([data])[0].said


def _record_signed(data: bytes) -> object:
    """The first byte says what ANN says of a board, and whether CID signs it as the new key."""
    head, payload = data[0] if data else 0, data[1:]
    kind = (roster.ADMIT, roster.REVOKE, roster.REPLACE, "later")[head & 3]
    signed = b"edgemoa/roster/v1/" + kind.encode() + b"\0" + payload
    signatures = [ANN.sign(signed), *([CID.sign(signed)] if head & 4 else [])]
    return _record(msgpack.packb([kind, payload, *signatures]))


def _record_seeds() -> Iterable[bytes]:
    return hexes(vectors("roster.json"), "record")


def _record_signed_seeds() -> Iterable[bytes]:
    ann, bob, cid = ANN.board_id, BOB.board_id, CID.board_id
    for head, parts in (
        (0, (1, ann, CID.certificate, "attic")),
        (1, (1001, ann, cid)),
        (1, (2**53 - 1, ann, bob)),
        (6, (2, ann, CID.certificate)),
        (3, (1, ann)),
    ):
        yield bytes([head]) + msgpack.packb(parts)


def _roster(packet: bytes) -> object:
    """A whole telling, as net/gossip.py hears it."""
    news = wire.read_roster(bytes([wire.ROSTER]) + packet)
    return news, _merged(news.records)[0].said, {w.key_id: (w.host, w.port) for w in news.where}


def _roster_seeds() -> Iterable[bytes]:
    yield from (packet[1:] for packet in hexes(vectors("roster.json"), "packet"))
    records = (
        said(ANN, "admit", 1, ANN.board_id, CID.certificate, "attic"),
        said(CID, "revoke", 1001, CID.board_id, ANN.board_id),
        said(ANN, "revoke", 1001, ANN.board_id, CID.board_id),
        said(ANN, "replace", 3, ANN.board_id, CID.certificate, new=CID),
    )
    where = (wire.Where(b"k" * 8, "fe80::1", 65_535),)
    for count in range(1, 5):
        yield wire.roster_packet(wire.RosterNews(b"d" * 32, (), records[:count], where))[1:]


# --- certificates


def _certificate_signed(tbs: bytes) -> object:
    """A stranger signs whatever he likes with the key that he shows: the whole certificate but for
    its frame is his."""
    body = tbs + b"\x30\x05\x06\x03\x2b\x65\x70" + b"\x03\x41\x00" + CID.sign(tbs)
    return read_certificate(b"\x30\x82" + (len(body) & 0xFFFF).to_bytes(2) + body)


def _certificate_seeds() -> Iterable[bytes]:
    return [ANN.certificate, CID.certificate]


def _tbs_seeds() -> Iterable[bytes]:
    """CID's, and one with what boards do not write, which others might."""
    yield x509.load_der_x509_certificate(CID.certificate).tbs_certificate_bytes
    private = key("cid")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, CID.board_id)])
    first = x509.load_der_x509_certificate(CID.certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(7)
        .not_valid_before(first.not_valid_before_utc.replace(year=1990))
        .not_valid_after(first.not_valid_after_utc.replace(year=2040))
    )
    names = x509.SubjectAlternativeName(
        [x509.DNSName("a.example"), x509.DirectoryName(name), x509.UniformResourceIdentifier("x:y")]
    )
    usage = x509.KeyUsage(True, False, False, False, True, True, True, False, False)
    policy = x509.CertificatePolicies(
        [x509.PolicyInformation(x509.ObjectIdentifier("1.2.3"), ["http://a"])]
    )
    for extension in (x509.BasicConstraints(True, 0), names, usage, policy):
        made = builder.add_extension(extension, critical=True)
        made = made.add_extension(
            x509.SubjectKeyIdentifier(hashlib.sha256(b"").digest()), critical=False
        )
        yield made.sign(private, None).tbs_certificate_bytes


# --- pairing

_SECRET: Final = pairing.JoinSecret(bytes(32))


class _Wire(asyncio.Transport):
    """What the member writes goes nowhere but into a list, for the joiner to read."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True


def _pairing(data: bytes) -> object:
    """One frame, whichever the first byte says is due."""
    head, frame = data[0] % 4 if data else 0, data[1:]
    decoder: msgspec.msgpack.Decoder[Any] = (
        pairing._starts, pairing._accepts, pairing._proofs, pairing._dones
    )[head]  # fmt: skip
    found = envelope.decode(decoder, frame, "frame")
    if isinstance(found, pairing._Start | pairing._CodeStart):
        return found, pairing.identify(found.certificate)
    if isinstance(found, pairing.News):
        return found, [pairing.replaces(record) for record in found.records]
    if isinstance(found, pairing._Proof):
        pairing._check_proof(found, ANN.public_key, bytes(32), b"J", b"transcript")
    return found


def _pairing_seeds() -> Iterable[bytes]:
    for file in ("pairing.json", "code.json"):
        told = vectors(file)
        yield from (b"\0" + frame for frame in hexes(told, "start"))
        yield from (b"\1" + frame for frame in hexes(told, "accept"))
        yield from (b"\2" + frame for frame in hexes(told, "proof"))
    proof = pairing._prove(ANN, bytes(32), b"J", b"transcript", "ann")
    yield b"\2" + msgspec.msgpack.encode(proof)
    yield b"\3" + msgspec.msgpack.encode(pairing._Done("ann"))
    replaced = said(ANN, "replace", 2, ANN.board_id, CID.certificate, new=CID)
    yield b"\0" + msgspec.msgpack.encode(pairing.News((replaced, replaced)))


def _admission(data: bytes) -> object:
    """A whole run with a joiner who knows the secret and says something odd: the array holds its
    first frame, what to add to its proof, and its last frame."""
    start, proof, done = envelope.decode(_runs, data, "run")
    return _loop().run_until_complete(_admit(start, proof, done))


_runs: Final = msgspec.msgpack.Decoder(tuple[bytes, bytes, bytes])


async def _admit(start: bytes, proof: bytes, done: bytes) -> pairing.Candidate | None:
    reader, transport = asyncio.StreamReader(), _Wire()
    protocol = asyncio.StreamReaderProtocol(reader)
    writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
    connection = Connection(reader, writer, dialled=False)
    reader.feed_data(wire.framed(start))
    try:
        request = await pairing.receive(connection)
        run = asyncio.ensure_future(
            pairing.admit(connection, BOB, request, _SECRET, "bob", check=lambda _: None)
        )
        while not (transport.written or run.done()):  # noqa: ASYNC110 - a pass or two of the loop
            await asyncio.sleep(0)
        if transport.written:
            accept = transport.written[0][wire.LENGTH_BYTES :]
            transcript = pairing._transcript(BOB.certificate, start, accept)
            right = msgspec.msgpack.encode(pairing._prove(ANN, _SECRET.key, b"J", transcript))
            reader.feed_data(wire.framed(proof or right) + wire.framed(done))
        reader.feed_eof()
        return await run
    except EOFError:
        return None
    finally:
        writer.close()


def _admission_seeds() -> Iterable[bytes]:
    start = msgspec.msgpack.encode(pairing._Start((1, 1), b"j" * 32, ANN.certificate))
    done = msgspec.msgpack.encode(pairing._Done("ann"))
    yield msgpack.packb([start, b"", done])
    yield msgpack.packb([start, msgspec.msgpack.encode(pairing._Proof(bytes(32), bytes(64))), done])


@functools.cache
def _spake() -> tuple[FixedSpake, bytes]:
    """The member's side after its start, and the joiner's half."""
    code = pairing.Code("01234567")
    member, joiner = FixedSpake(SPAKE2_B, code, "bob"), FixedSpake(SPAKE2_A, code, "ann")
    member.start()
    return member, joiner.start()


def _half(half: bytes) -> object:
    member = copy.copy(_spake()[0])
    member._run = copy.copy(member._run)
    return member.finish(half)


def _half_seeds() -> Iterable[bytes]:
    return [*hexes(vectors("code.json"), "half"), _spake()[1]]


def _typed(data: bytes) -> object:
    """A code, a join secret or an identity, as a person types it: the first byte says which."""
    text = data[1:].decode("utf-8", "surrogateescape")
    parse = (pairing.parse_code, pairing.parse_join_secret, envelope.check_board_id)
    return parse[data[0] % 3 if data else 0](text)


def _typed_seeds() -> Iterable[bytes]:
    told = vectors("pairing.json")
    secrets = [told["join_secret"], *(bad["join_secret"] for bad in told["bad_secrets"])]
    boards = [ANN.board_id, *(bad["board_id"] for bad in vectors("identity.json")["bad"])]
    for kind, texts in enumerate((["01234567", "0123-45 67", "١٢٣٤٥٦٧٨"], secrets, boards)):
        yield from (bytes([kind]) + text.encode() for text in texts)


# --- models that are lent


def _copies(data: bytes) -> object:
    """The first byte says whose turn it is."""
    decoder: msgspec.msgpack.Decoder[Any] = (copies._asks, copies._answers)[data[:1] > b"\0"]
    return envelope.decode(decoder, data[1:], "frame")


def _copies_seeds() -> Iterable[bytes]:
    told = vectors("copies.json")
    for each in (*told["good"], *told["bad"]):
        yield bytes([each["side"] == "answer"]) + bytes.fromhex(each["packet"])


TARGETS: Final = [
    Target("envelope", _envelope, _REFUSED, lambda: hexes(vectors("envelope.json"), "envelope")),
    Target("envelope-signed", _signed, _REFUSED, _signed_seeds, head=1),
    Target("hop", _hop, _REFUSED, lambda: hexes(vectors("hop.json"), "body")),
    Target("packet", _packet, (ProtocolError, PairingError), _packet_seeds, head=1),
    Target(
        "datagram", _datagram, (ProtocolError, PairingError),
        lambda: hexes(vectors("datagram.json"), "datagram"), "bytes",
    ),
    Target("sealed", _sealed, (ProtocolError, PairingError), _packet_seeds, head=1),
    Target("frames", _frames, _REFUSED, _frame_seeds, "bytes"),
    Target("record", _record, _REFUSED, _record_seeds),
    Target("record-signed", _record_signed, _REFUSED, _record_signed_seeds, head=1),
    Target("roster", _roster, _REFUSED, _roster_seeds),
    Target("certificate", read_certificate, _REFUSED, _certificate_seeds, "bytes"),
    Target("certificate-signed", _certificate_signed, _REFUSED, _tbs_seeds, "bytes"),
    Target("pairing", _pairing, (ProtocolError, PairingError), _pairing_seeds, head=1),
    Target("pairing-run", _admission, (ProtocolError, PairingError), _admission_seeds),
    Target("pairing-half", _half, _REFUSED, _half_seeds, "bytes", figure=100_000),
    Target(
        "typed", _typed, (UserError, ConfigError, ProtocolError), _typed_seeds, "bytes", head=1
    ),
    Target("copies", _copies, _REFUSED, _copies_seeds, head=1),
]  # fmt: skip
