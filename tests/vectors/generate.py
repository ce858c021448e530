"""Writes the test vectors beside it: ``python tests/vectors/generate.py``. Same bytes each time.

Each file says what is right and what must be refused, and by which name. They change only when
the protocol's version does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from spake2 import SPAKE2_A, SPAKE2_B

from edgemoa.core import envelope
from edgemoa.core.messages import (
    Ack,
    Alive,
    Cancel,
    ChatMessage,
    Declined,
    Gossip,
    Leave,
    Message,
    Nack,
    News,
    Part,
    Ping,
    PingReq,
    Proposal,
    Propose,
    Queued,
    Sampling,
    Sync,
    View,
)
from edgemoa.core.roster import Roster
from edgemoa.models.library import ModelFile, content_id
from edgemoa.net import copies, pairing, sealed, wire
from edgemoa.net.identity import Identity, make_certificate, read_certificate

FOLDER = Path(__file__).parent
BOOT, TO_BOOT = 3 << 21 | 1, 9 << 21 | 7

Vectors = dict[str, Any]


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def identity(name: str) -> Identity:
    private = key(name)
    public = private.public_key().public_bytes_raw()
    der = make_certificate(private).public_bytes(serialization.Encoding.DER)
    return Identity(envelope.board_id(public), public, der, FOLDER, private)


ANN, BOB, CID = identity("ann"), identity("bob"), identity("cid")

MESSAGES: list[Message] = [
    Propose(
        "request-0001",
        1,
        (ChatMessage("system", "Be brief."), ChatMessage("user", "Why is the sky blue? 🌌")),
        Sampling(64, 0.7, 0.9, 5, ("\n\n",), 40, 0.05, 1.1, presence_penalty=-0.5),
        12_000,
        stream=True,
    ),
    Queued("request-0001", 1, 2, 900),
    Declined("request-0001", 1, "busy", 1500),
    Proposal(
        "request-0001", 2, "Rayleigh scattering.", "model", 20, 5, 100, 2000, "stop", 12, 900, 1500
    ),
    Cancel("request-0001", 8),
]
REPORT = Alive(BOOT, 7, "ann", True, "model", 1, 2, 900, 1_000, 2_000, 500)
NEWS = News(
    envelope.short_id(CID.board_id), 1, TO_BOOT, 3, envelope.short_id(ANN.board_id)
)  # CID is suspected, ANN found
HOPS: list[Message] = [
    REPORT,
    Leave(BOOT),
    Ping(8, 2, (NEWS,), REPORT, sure=True),
    Ack(8, 0),
    PingReq(9, envelope.short_id(CID.board_id), (NEWS,)),
    Nack(9),
    Gossip((NEWS, News(envelope.short_id(BOB.board_id), 0, TO_BOOT, 2**53 - 1, NEWS.by))),
    Sync(bytes(range(8))),
    View((NEWS,), ask=True),
    Part("request-0001", 2, 17, " of light 🌌"),
]


def sign(kind: str, body: bytes, author: Identity = ANN, **other: Any) -> bytes:
    return envelope.sign(
        kind,
        body,
        key=other.get("key", envelope.key_id(author.public_key)),
        signer=author.sign,
        boot=other.get("boot", BOOT),
        sequence=other.get("sequence", 1),
        to=other.get("to", BOB.board_id),
        to_boot=other.get("to_boot", TO_BOOT),
    )


def repacked(data: bytes, **changes: Any) -> bytes:
    parts = msgpack.unpackb(data)
    for name, value in changes.items():
        parts[("version", "type", "key", "payload", "signature").index(name)] = value
    return bytes(msgpack.packb(parts))


def payload(data: bytes) -> bytes:
    """ANN's envelope around a payload of any bytes."""
    signed = b"edgemoa/v1/cancel\0" + data
    parts = [1, "cancel", envelope.key_id(ANN.public_key), data, ANN.sign(signed)]
    return bytes(msgpack.packb(parts))


def body(kind: str, **changes: Any) -> bytes:
    """A message's bytes with some fields changed; None removes one."""
    message = next(m for m in MESSAGES if envelope.encode(m)[0] == kind)
    fields = msgspec.to_builtins(message) | changes
    return bytes(msgpack.packb({k: v for k, v in fields.items() if v is not None}))


def identities() -> Vectors:
    bob = BOB.board_id
    return {
        "good": [
            {
                "name": name,
                "private_key": hashlib.sha256(name.encode()).hexdigest(),
                "public_key": board.public_key.hex(),
                "board_id": board.board_id,
                "key_id": envelope.key_id(board.public_key).hex(),
                "short_id": envelope.short_id(board.board_id).hex(),
                "certificate": board.certificate.hex(),
            }
            for name, board in (("ann", ANN), ("bob", BOB), ("cid", CID))
        ],
        "bad": [
            {"name": name, "board_id": text, "error": "not a board's identity"}
            for name, text in (
                ("empty", ""),
                ("short", bob[:-1]),
                ("long", bob + "a"),
                ("upper case", bob.upper()),
                ("one character changed", ("b" if bob[0] == "a" else "a") + bob[1:]),
                ("last character changed", bob[:-1] + ("b" if bob[-1] == "a" else "a")),
                ("not base32", "1" + bob[1:]),
                ("not ASCII", "é" + bob[1:]),
            )
        ],
    }


def envelopes() -> Vectors:
    good: list[Vectors] = []
    for sequence, message in enumerate(MESSAGES, 1):
        kind, data = envelope.encode(message)
        good.append(
            {
                "name": kind,
                "envelope": sign(kind, data, sequence=sequence).hex(),
                "boot": BOOT,
                "sequence": sequence,
                "type": kind,
                "message": {k: v for k, v in msgspec.to_builtins(message).items() if k != "type"},
            }
        )
    cancel = {"request_id": "request-0001", "layer": 8}

    def also(name: str, data: bytes, kind: str = "cancel", message: Any = None) -> None:
        good.append(
            {
                "name": name,
                "envelope": data.hex(),
                "boot": BOOT,
                "sequence": 1,
                "type": kind,
                "message": message or cancel,
            }
        )

    also("unknown field", sign("cancel", body("cancel", later=[1, {"a": b"x"}])))
    also("without type", sign("cancel", body("cancel", type=None)))
    also(
        "defaults",
        sign("declined", body("declined", retry_after_ms=None)),
        "declined",
        {"request_id": "request-0001", "layer": 1, "reason": "busy", "retry_after_ms": 0},
    )
    also(
        "longer integers than needed",
        sign(
            "cancel",
            body("cancel", layer=None).replace(b"\x82", b"\x83", 1) + b"\xa5layer\xce\0\0\0\x08",
        ),
    )
    also(
        "a key twice: the last counts",
        sign("cancel", b"\x83\xa5layer\x01" + body("cancel", type=None)[1:]),
    )
    fine = sign(*envelope.encode(MESSAGES[-1]))
    start = body("cancel", layer=None).replace(b"\x82", b"\x83", 1) + b"\xa5layer"
    bad = [
        ("empty", b"", "not a valid envelope"),
        ("not an array", msgpack.packb({"a": 1}), "not a valid envelope"),
        ("array of 2**32 - 1", b"\xdd\xff\xff\xff\xff", "not a valid envelope"),
        ("map of 2**32 - 1", b"\xdf\xff\xff\xff\xff", "not a valid envelope"),
        ("trailing byte", fine + b"\0", "not a valid envelope"),
        ("truncated", fine[:-1], "not a valid envelope"),
        ("1000 levels deep", b"\x91" * 1000 + b"\xc0", "not a valid envelope"),
        ("a timestamp", msgpack.packb(msgpack.Timestamp(1, 1)), "not a valid envelope"),
        ("version is a bool", repacked(fine, version=True), "not a valid envelope"),
        ("payload is a string", repacked(fine, payload="abc"), "not a valid envelope"),
        ("short key id", repacked(fine, key=b"1234567"), "not a valid envelope"),
        ("short signature", repacked(fine, signature=bytes(63)), "not a valid envelope"),
        ("later version", repacked(fine, version=2), "envelope of unknown version"),
        ("unknown type", sign("later", body("cancel")), "envelope of unknown type"),
        ("hop message", sign("alive", body("cancel")), "envelope of unknown type"),
        (
            "unknown key",
            sign(*envelope.encode(MESSAGES[-1]), CID),
            "envelope signed by an unknown key",
        ),
        ("wrong signature", repacked(fine, signature=bytes(64)), "envelope with a wrong signature"),
        (
            "right signature, other type",
            repacked(fine, type="queued"),
            "envelope with a wrong signature",
        ),
        (
            "another's key id",
            sign(*envelope.encode(MESSAGES[-1]), CID, key=envelope.key_id(ANN.public_key)),
            "envelope with a wrong signature",
        ),
        ("payload not an array", payload(b"\x80"), "not a valid payload"),
        ("payload truncated", payload(b"\x95\x01"), "not a valid payload"),
        ("sequence 0", sign("cancel", body("cancel"), sequence=0), "not a valid payload"),
        ("negative boot", sign("cancel", body("cancel"), boot=-1), "not a valid payload"),
        ("short recipient", sign("cancel", body("cancel"), to="bob"), "not a valid payload"),
        (
            "for another board",
            sign("cancel", body("cancel"), to=CID.board_id),
            "envelope meant for another board or an earlier boot",
        ),
        (
            "for an earlier boot",
            sign("cancel", body("cancel"), to_boot=TO_BOOT - 1),
            "envelope meant for another board or an earlier boot",
        ),
    ]
    sampling = {"max_tokens": 1, "temperature": float("nan")}
    for name, kind, changed in (
        ("missing field", "cancel", body("cancel", layer=None)),
        ("bool for int", "cancel", body("cancel", layer=True)),
        ("float for int", "cancel", body("cancel", layer=1.0)),
        ("string for int", "cancel", body("cancel", layer="1")),
        ("bytes for string", "cancel", body("cancel", request_id=b"request-0001")),
        ("invalid UTF-8", "cancel", start.replace(b"0001", b"00\xc3\x28") + b"\x01"),
        ("extension for int", "cancel", start + b"\xd4\x05\0"),
        ("out of range", "cancel", body("cancel", layer=9)),
        ("too short", "cancel", body("cancel", request_id="short")),
        ("too long", "cancel", body("cancel", request_id="x" * 65)),
        ("another type inside", "cancel", body("cancel", type="queued")),
        ("not a map", "cancel", b"\x93\x01\x02\x03"),
        ("NaN", "propose", body("propose", sampling=sampling)),
        ("infinity", "propose", body("propose", sampling={"temperature": float("inf")})),
        ("above 0 only", "propose", body("propose", sampling={"top_p": 0})),
        ("unknown role", "propose", body("propose", messages=[{"role": "x", "content": ""}])),
        ("no turns", "propose", body("propose", messages=[])),
        ("turns are a map", "propose", body("propose", messages={})),
        ("513 turns", "propose", body("propose", messages=[{"role": "user", "content": ""}] * 513)),
    ):
        bad.append((name, sign(kind, changed), f"not a valid {kind} message"))
    return {
        "authors": [ANN.public_key.hex()],
        "to": BOB.board_id,
        "to_boot": TO_BOOT,
        "good": good,
        "bad": [{"name": n, "envelope": d.hex(), "error": e} for n, d, e in bad],
    }


def hops() -> Vectors:
    good = []
    for message in HOPS:
        kind, data = envelope.encode(message)
        told = {k: msgspec.to_builtins(getattr(message, k)) for k in message.__struct_fields__}
        good.append({"name": kind, "body": data.hex(), "type": kind, "message": told})
    fields = msgspec.to_builtins(HOPS[-1])
    fine = envelope.encode(HOPS[-1])[1]
    bad = [
        ("empty", b""),
        ("truncated", fine[:-1]),
        ("trailing byte", fine + b"\0"),
        ("of a signed type", envelope.encode(MESSAGES[-1])[1]),
        ("of no type", msgpack.packb({k: v for k, v in fields.items() if k != "type"})),
    ]
    for name, changes in (
        ("of unknown type", {"type": "later"}),
        ("before the text's first character", {"start": -1}),
        ("beyond what a text may be", {"start": 65_537}),
        ("nothing more", {"text": ""}),
        ("bytes for text", {"text": b"abc"}),
        ("layer 0", {"layer": 0}),
    ):
        bad.append((name, msgpack.packb({**fields, **changes})))
    one: list[Any] = [NEWS.board, NEWS.state, NEWS.boot, NEWS.incarnation, NEWS.by]
    for name, each in (
        ("news that are no array", {"board": NEWS.board}),
        ("news cut off", one[:-1]),
        ("a board's id of 7 bytes in news", [one[0][:-1], *one[1:]]),
        ("a board's id as text in news", ["01234567", *one[1:]]),
        ("a state beyond a byte", [one[0], 256, *one[2:]]),
        ("a negative incarnation", [*one[:3], -1, one[4]]),
        ("a boot that is no integer", [*one[:2], 1.0, *one[3:]]),
    ):
        bad.append((name, msgpack.packb({"type": "gossip", "news": [each]})))
    ping = {"type": "ping", "number": 1, "incarnation": 0}
    wrong: list[tuple[str, Vectors]] = [
        ("a ping with nil for its incarnation", {"incarnation": None}),
        ("a ping with a number as text", {"number": "1"}),
        ("a ping with too many news", {"news": [one] * 21}),
        ("a ping with a report that is none", {"report": {"type": "alive", "boot": 1}}),
        ("a ping with a report of another type", {"report": {"type": "leave", "boot": 1}}),
        ("a ping with 1 for true", {"sure": 1}),
    ]
    bad += [(name, msgpack.packb({**ping, **changes})) for name, changes in wrong]
    bad += [
        ("a digest of 9 bytes", msgpack.packb({"type": "sync", "digest": b"123456789"})),
        ("a view of too many", msgpack.packb({"type": "view", "news": [one] * 65})),
        ("ping_req for nobody", msgpack.packb({"type": "ping_req", "number": 1})),
    ]
    error = "not a valid hop message"
    return {
        "good": good,
        "bad": [{"name": n, "body": d.hex(), "error": error} for n, d in bad],
    }


def datagrams() -> Vectors:
    ann_secret, bob_secret = b"A" * 32, b"B" * 32
    forth = sealed.direction_key(ANN.board_id, BOB.board_id, ann_secret, bob_secret)
    back = sealed.direction_key(BOB.board_id, ANN.board_id, bob_secret, ann_secret)
    sealer = sealed.Sealer(forth, b"bob's id")
    plaintexts = [b"\x03" + bytes(7) + b"\x05", b"", b"x" * sealed.MAX_PLAINTEXT_BYTES]
    good = [{"plaintext": p.hex(), "datagram": sealer.seal(p).hex()} for p in plaintexts]
    fine = bytes.fromhex(good[0]["datagram"])
    failed = "datagram that does not decrypt"
    bad = [
        ("too short", fine[:31], "datagram too short"),
        ("truncated", fine[:-1], failed),
        ("other counter", fine[:15] + b"\x09" + fine[16:], failed),
        ("other key id", b"ann's id" + fine[8:], failed),
        ("changed", fine[:-1] + bytes([fine[-1] ^ 1]), failed),
        ("other direction", sealed.Sealer(back, b"bob's id").seal(plaintexts[0]), failed),
    ]
    return {
        "sender": ANN.board_id,
        "receiver": BOB.board_id,
        "sender_secret": ann_secret.hex(),
        "receiver_secret": bob_secret.hex(),
        "receiver_key_id": b"bob's id".hex(),
        "key": forth.hex(),
        "key_back": back.hex(),
        "good": good,
        "bad": [{"name": n, "datagram": d.hex(), "error": e} for n, d, e in bad],
    }


def pairings() -> Vectors:
    raw = bytes(range(17))
    check = hashlib.sha256(b"edgemoa/join/v1" + raw).digest()[:3]
    text = "edgemoa-join-" + base64.b32encode(raw + check).decode().lower()
    secret = pairing.parse_join_secret(text)
    start = pairing._encode(pairing._Start((1, 1), b"j" * 32, ANN.certificate))
    accept = pairing._encode(pairing._Accept(1, b"m" * 32))
    digest = pairing._transcript(BOB.certificate, start, accept)
    joiner = pairing._encode(pairing._prove(ANN, secret.key, b"J", digest))
    member = pairing._encode(pairing._prove(BOB, secret.key, b"M", digest, "bob"))
    middle = pairing._transcript(CID.certificate, start, accept)
    other = "the other board holds another join secret or code"
    wrong_key = "the other board does not hold the key that it shows"
    posing = pairing._encode(pairing._prove(CID, secret.key, b"J", digest))
    return {
        "join_secret": text,
        "key": secret.key.hex(),
        "joiner": ANN.public_key.hex(),
        "member": BOB.public_key.hex(),
        "member_certificate": BOB.certificate.hex(),
        "start": start.hex(),
        "accept": accept.hex(),
        "transcript": digest.hex(),
        "good": [
            {"role": "J", "proof": joiner.hex(), "name": ""},
            {"role": "M", "proof": member.hex(), "name": "bob"},
        ],
        "bad": [
            {"name": n, "role": r, "proof": p.hex(), "error": e}
            for n, r, p, e in (
                ("reflected", "M", joiner, other),
                (
                    "a man in the middle's certificate",
                    "J",
                    pairing._encode(pairing._prove(ANN, secret.key, b"J", middle)),
                    other,
                ),
                (
                    "another secret",
                    "J",
                    pairing._encode(pairing._prove(ANN, bytes(32), b"J", digest)),
                    other,
                ),
                ("another's key", "J", posing, wrong_key),
            )
        ],
        "bad_secrets": [
            {"name": n, "join_secret": s}
            for n, s in (
                ("empty", ""),
                ("made up by a person", "correct horse battery staple"),
                ("made up, with the prefix", "edgemoa-join-correcthorsebatterystaple"),
                ("one character changed", text[:-1] + ("a" if text[-1] != "a" else "b")),
                ("too short", text[:-1]),
                ("too long", text + "a"),
                ("without prefix", text.removeprefix("edgemoa-join-")),
            )
        ],
    }


class FixedSpake(pairing._Spake):
    """With a scalar that is always the same."""

    def __init__(self, side: Any, code: pairing.Code, name: str) -> None:
        fixed = hashlib.shake_256(name.encode()).digest
        self._run = side(
            code.digits.encode(),
            idA=ANN.board_id.encode(),
            idB=BOB.board_id.encode(),
            entropy_f=fixed,
        )


def codes() -> Vectors:
    """A run with a code, J being ANN and M being BOB."""
    code = pairing.Code("01234567")
    a, b = FixedSpake(SPAKE2_A, code, "ann"), FixedSpake(SPAKE2_B, code, "bob")
    half_a, half_b = a.start(), b.start()
    start = pairing._encode(pairing._CodeStart((1, 1), b"j" * 32, ANN.certificate, half_a))
    accept = pairing._encode(pairing._Accept(1, b"m" * 32, half_b))
    digest = pairing._transcript(BOB.certificate, start, accept)
    key = a.finish(half_b)
    wrong = FixedSpake(SPAKE2_A, pairing.Code("01234568"), "ann")
    wrong.start()
    other = "the other board holds another join secret or code"
    return {
        "code": code.digits,
        "joiner": ANN.public_key.hex(),
        "member": BOB.public_key.hex(),
        "member_certificate": BOB.certificate.hex(),
        "joiner_half": half_a.hex(),
        "member_half": half_b.hex(),
        "key": key.hex(),
        "start": start.hex(),
        "accept": accept.hex(),
        "transcript": digest.hex(),
        "good": [
            {"role": "J", "proof": proof(ANN, key, b"J", digest), "name": ""},
            {"role": "M", "proof": proof(BOB, key, b"M", digest, "bob"), "name": "bob"},
        ],
        "bad": [
            {"name": n, "role": r, "proof": p, "error": other}
            for n, r, p in (
                ("another code", "J", proof(ANN, wrong.finish(half_b), b"J", digest)),
                ("reflected", "M", proof(ANN, key, b"J", digest)),
            )
        ],
        "bad_halves": [
            {"name": n, "half": h.hex(), "error": "not a valid half of SPAKE2"}
            for n, h in (
                ("the other's own", half_a),
                ("zero", b"B\x01" + bytes(31)),
                ("no point", b"B" + b"\x02" + bytes(31)),
                ("of small order", b"B" + bytes(32)),
                ("of no side", b"C" + half_b[1:]),
            )
        ],
    }


def proof(who: Identity, key: bytes, role: bytes, digest: bytes, name: str = "") -> str:
    return pairing._encode(pairing._prove(who, key, role, digest, name)).hex()


def said(who: Identity, kind: str, *payload: Any, new: Identity | None = None) -> bytes:
    """A roster record by hand."""
    data: bytes = msgpack.packb(list(payload))
    signed = b"edgemoa/roster/v1/" + kind.encode() + b"\0" + data
    signatures = [who.sign(signed)] + ([new.sign(signed)] if new else [])
    return bytes(msgpack.packb([kind, data, *signatures]))


def rosters() -> Vectors:
    ann, bob, cid = ANN.board_id, BOB.board_id, CID.board_id
    admit = said(ANN, "admit", 1, ann, BOB.certificate, "attic")
    revoke = said(ANN, "revoke", 1001, ann, bob)
    replace = said(ANN, "replace", 2, ann, CID.certificate, new=CID)
    flipped = admit[:-1] + bytes([admit[-1] ^ 1])
    wrong, bad = "roster record with a wrong signature", "not a valid roster record"
    news = wire.RosterNews(
        b"d" * 32, (b"k" * 8,), (admit, revoke), (wire.Where(b"k" * 8, "192.0.2.1", 7946),)
    )
    return {
        "signer": ANN.public_key.hex(),
        "good": [
            {
                "record": admit.hex(),
                "kind": "admit",
                "version": 1,
                "by": ann,
                "board": bob,
                "successor": "",
                "name": "attic",
            },
            {
                "record": revoke.hex(),
                "kind": "revoke",
                "version": 1001,
                "by": ann,
                "board": bob,
                "successor": "",
                "name": "",
            },
            {
                "record": replace.hex(),
                "kind": "replace",
                "version": 2,
                "by": ann,
                "board": ann,
                "successor": cid,
                "name": "",
            },
        ],
        "digest": Roster(ann, ANN.public_key, ANN.sign, read_certificate, [admit]).digest.hex(),
        "digest_of": [admit.hex()],
        "packet": wire.roster_packet(news).hex(),
        "bye": wire.bye_packet("revoked by ann").hex(),
        "bad": [
            {"name": n, "record": d.hex(), "error": e}
            for n, d, e in (
                ("empty", b"", bad),
                ("truncated", admit[:-1], bad),
                ("trailing byte", admit + b"\0", bad),
                ("changed", flipped, wrong),
                ("another's signature", said(CID, "revoke", 9, ann, bob), wrong),
                ("version 0", said(ANN, "revoke", 0, ann, bob), bad),
                ("version 2**53", said(ANN, "revoke", 2**53, ann, bob), bad),
                ("version is a bool", said(ANN, "revoke", True, ann, bob), bad),
                ("no board", said(ANN, "revoke", 1, ann), bad),
                (
                    "a board with a typing error",
                    said(ANN, "revoke", 1, ann, "a" * 56),
                    "not a board's identity",
                ),
                ("a long name", said(ANN, "admit", 1, ann, BOB.certificate, "x" * 65), bad),
                ("no certificate", said(ANN, "admit", 1, ann, b"x", ""), "not a valid certificate"),
                ("of itself", said(ANN, "admit", 1, ann, ANN.certificate, ""), bad),
                ("a new key that did not sign", said(ANN, "replace", 1, ann, CID.certificate), bad),
                (
                    "a new key of another's",
                    said(ANN, "replace", 1, ann, CID.certificate, new=BOB),
                    wrong,
                ),
                ("the same key again", said(ANN, "replace", 1, ann, ANN.certificate, new=ANN), bad),
            )
        ],
    }


MODEL_ID = "0123456789abcdef" * 4


def copied_models() -> Vectors:
    offer = copies.Offer("smollm2-135m.x_y", MODEL_ID, 2**48, "Q4_1", 134_515_008)
    questions = (
        copies.GetModels(),
        copies.GetManifest(MODEL_ID),
        copies.GetFile(MODEL_ID, "_weights-1.bin", 2**48),
    )
    answers = (
        copies.Ready(),
        copies.Models((offer, copies.Offer("2", "f" * 64, 0))),
        copies.ManifestIs(b"{}"),
        copies.FileIs(5),
        copies.Refused("it lends to others now", 1000),
    )
    files = (ModelFile("weights.bin", 3, "a" * 64), ModelFile("model.onnx", 0, "0" * 64))
    file, model = msgspec.to_builtins(questions[2]), msgspec.to_builtins(offer)
    tag = {"type": "models"}
    return {
        "model_id": content_id(files),
        "files": [{"name": f.name, "sha256": f.sha256} for f in files],
        "good": [
            {"side": side, "packet": msgspec.msgpack.encode(m).hex(), "fields": fields(m)}
            for side, messages in (("question", questions), ("answer", answers))
            for m in messages
        ]
        + [
            {
                "side": "question",
                "packet": msgpack.packb({**file, "later": 1, "offset": 0}).hex(),
                "fields": {**file, "offset": 0},
            }
        ],
        "bad": [
            {"name": n, "side": s, "packet": p.hex(), "error": f"not a valid {s}"}
            for n, s, p in (
                ("an answer", "question", msgpack.packb({"type": "ready"})),
                ("a question", "answer", msgpack.packb({"type": "get_models"})),
                ("no type", "question", msgpack.packb({"model_id": MODEL_ID})),
                ("two values", "question", msgspec.msgpack.encode(questions[0]) + b"\0"),
                *(
                    (f"{key}: {value!r:.20}", "question", msgpack.packb({**file, key: value}))
                    for key, value in (
                        ("model_id", MODEL_ID.upper()),
                        ("model_id", MODEL_ID + "\n"),
                        ("model_id", MODEL_ID[1:]),
                        ("file", "../weights.bin"),
                        ("file", ".hidden"),
                        ("file", ""),
                        ("file", "weights.bin\n"),
                        ("file", "x" * 129),
                        ("file", b"weights.bin"),
                        ("offset", -1),
                        ("offset", 2**48 + 1),
                        ("offset", True),
                    )
                ),
                *(
                    (
                        f"{key}: {value!r:.20}",
                        "answer",
                        msgpack.packb({**tag, "models": [{**model, key: value}]}),
                    )
                    for key, value in (
                        ("name", "Upper"),
                        ("name", "x" * 65),
                        ("name", "../x"),
                        ("size_bytes", 1.0),
                        ("quantization", "x" * 65),
                        ("parameters", None),
                    )
                ),
                (
                    "a long reason",
                    "answer",
                    msgpack.packb({"type": "refused", "reason": "x" * 257}),
                ),
            )
        ],
    }


def fields(message: msgspec.Struct) -> Any:
    """The message as JSON shows it, with bytes in hex."""
    shown = msgspec.to_builtins(message, builtin_types=(bytes,))
    return {
        k: v.hex() if isinstance(v, bytes) else list(v) if isinstance(v, tuple) else v
        for k, v in shown.items()
    }


FILES = {
    "identity.json": identities,
    "envelope.json": envelopes,
    "hop.json": hops,
    "datagram.json": datagrams,
    "pairing.json": pairings,
    "code.json": codes,
    "roster.json": rosters,
    "copies.json": copied_models,
}


def rendered(name: str) -> str:
    return json.dumps(FILES[name](), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / file).write_text(rendered(file), encoding="utf-8")
