"""A second implementation of the wire's formats, written from ``edgemoa/PROTOCOL.md`` alone.

It shares no code with the package, nor its msgpack library; the two only have the vectors in
common. It decodes and checks; what it refuses, it names as the specification does.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import math
from typing import Any

import msgpack
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class RefusedError(Exception):
    """The name of what is wrong."""


MIB = 1 << 20
KIB = 1 << 10
INT, FLOAT, STR, LIST = int, float, str, list
BOOL = (bool, 0, 1)
REQUEST_ID = (STR, 8, 64)
LAYER = (INT, 1, 8)
COUNT = (INT, 0, 2**31)
MILLIS = (INT, 0, 2**40)
EPOCH = (INT, 0, 2**53 - 1)
NAME = (STR, 0, 64)
TURN = {"role": ("system", "user", "assistant"), "content": (STR, 0, 256 * KIB)}
SAMPLING: dict[str, Any] = {
    "max_tokens": (INT, 1, 32_768, 256),
    "temperature": (FLOAT, 0, 2, 0.0),
    "top_p": (FLOAT, 5e-324, 1, 1.0),
    "seed": (INT, 0, 2**31 - 1, 0),
    "stop": (LIST, 0, 8, (STR, 1, 256), []),
    "top_k": (INT, 0, 2**31 - 1, 0),
    "min_p": (FLOAT, 0, 1, 0.0),
    "repetition_penalty": (FLOAT, 0.1, 10, 1.0),
    "presence_penalty": (FLOAT, -2, 2, 0.0),
    "frequency_penalty": (FLOAT, -2, 2, 0.0),
}
MESSAGES: dict[str, dict[str, Any]] = {
    "propose": {
        "request_id": REQUEST_ID,
        "layer": LAYER,
        "messages": (LIST, 1, 512, TURN),
        "sampling": SAMPLING,
        "time_left_ms": MILLIS,
        "is_answer": (*BOOL, False),
        "stream": (*BOOL, False),
    },
    "queued": {
        "request_id": REQUEST_ID,
        "layer": LAYER,
        "position": COUNT,
        "expected_wait_ms": MILLIS,
    },
    "declined": {
        "request_id": REQUEST_ID,
        "layer": LAYER,
        "reason": (STR, 0, 256),
        "retry_after_ms": (*MILLIS, 0),
    },
    "proposal": {
        "request_id": REQUEST_ID,
        "layer": LAYER,
        "text": (STR, 0, 64 * KIB),
        "model": NAME,
        "prompt_tokens": COUNT,
        "tokens": COUNT,
        "queue_ms": MILLIS,
        "work_ms": MILLIS,
        "finish": ("stop", "length", "loop"),
        "cached_tokens": (*COUNT, 0),
        "prefill_ms": (*MILLIS, 0),
        "model_ms": (*MILLIS, 0),
    },
    "cancel": {"request_id": REQUEST_ID, "layer": LAYER},
}
ALIVE: dict[str, Any] = {
    "boot": EPOCH,
    "sequence": EPOCH,
    "name": NAME,
    "accepting": BOOL,
    "model": NAME,
    "waiting": COUNT,
    "running": COUNT,
    "expected_wait_ms": MILLIS,
    "proposal_ms": (*MILLIS, 0),
    "aggregation_ms": (*MILLIS, 0),
    "utilisation_permille": (*COUNT, 0),
}
SHORT_ID = (bytes, 8, 8)
NEWS = (tuple, SHORT_ID, (INT, 0, 255), EPOCH, EPOCH, SHORT_ID)  # an array
TIDINGS: tuple[Any, ...] = (LIST, 0, 20, NEWS, [])
ASKED: dict[str, Any] = {
    "number": EPOCH,
    "incarnation": EPOCH,
    "news": TIDINGS,
    "report": (None, {"type": ("alive",), **ALIVE}),  # or nothing
    "sure": (*BOOL, False),
}
HOPS: dict[str, dict[str, Any]] = {
    "alive": ALIVE,
    "leave": {"boot": EPOCH},
    "ping": ASKED,
    "ack": ASKED,
    "ping_req": {"number": EPOCH, "board": SHORT_ID, "news": TIDINGS},
    "nack": {"number": EPOCH},
    "gossip": {"news": (LIST, 0, 20, NEWS)},
    "sync": {"digest": SHORT_ID},
    "view": {"news": (LIST, 0, 64, NEWS), "ask": (*BOOL, False)},
    "part": {
        "request_id": REQUEST_ID,
        "layer": LAYER,
        "start": (INT, 0, 64 * KIB),
        "text": (STR, 1, 64 * KIB),
    },
}

BYTES = (INT, 0, 2**48)
HEX, LOWER, UPPER = "0123456789abcdef", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = HEX[:10]
ALPHABETS = {  # of the texts that may become names: first character, the others
    "model_id": (HEX, HEX),
    "name": (LOWER + DIGITS, LOWER + DIGITS + "._-"),
    "file": (LOWER + UPPER + DIGITS + "_", LOWER + UPPER + DIGITS + "._-"),
}
OFFER: dict[str, Any] = {
    "name": (STR, 1, 64),
    "model_id": (STR, 64, 64),
    "size_bytes": BYTES,
    "quantization": (*NAME, ""),
    "parameters": (*BYTES, 0),
}
QUESTIONS: dict[str, dict[str, Any]] = {
    "get_models": {},
    "get_manifest": {"model_id": (STR, 64, 64)},
    "get_file": {"model_id": (STR, 64, 64), "file": (STR, 1, 128), "offset": (*BYTES, 0)},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "ready": {},
    "models": {"models": (LIST, 0, 256, OFFER)},
    "manifest": {"manifest": (bytes, 0, 64 * KIB)},
    "file": {"length": BYTES},
    "refused": {"reason": (STR, 0, 256), "retry_after_ms": (*MILLIS, 0)},
}


def board_id(public_key: bytes) -> str:
    digest = hashlib.sha256(public_key).digest()
    check = hashlib.sha256(b"edgemoa/id/v1" + digest).digest()[:3]
    return base64.b32encode(digest + check).decode().lower()


def check_board_id(text: str) -> str:
    try:
        raw = base64.b32decode(text.upper())
    except ValueError:
        raw = b""
    if (
        text != text.lower()
        or len(raw) != 35
        or hashlib.sha256(b"edgemoa/id/v1" + raw[:32]).digest()[:3] != raw[32:]
    ):
        raise RefusedError("not a board's identity")
    return text


def key_id(public_key: bytes) -> bytes:
    return hashlib.sha256(public_key).digest()[:8]


def short_id(board: str) -> bytes:
    return hashlib.sha256(board.encode()).digest()[:8]


def unpack(data: bytes, what: str) -> Any:
    try:
        return msgpack.unpackb(
            data,
            strict_map_key=False,
            max_ext_len=0,
            max_array_len=1024,
            max_map_len=1024,
            max_str_len=MIB,
            max_bin_len=MIB,
        )
    except (ValueError, OverflowError, RecursionError, TypeError):
        raise RefusedError(f"not a valid {what}") from None


def fits(value: Any, rule: Any) -> Any:
    """``value`` as ``rule`` describes it; TypeError or ValueError if it is not so."""
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            raise TypeError
        return {name: field(value, name, rule[name]) for name in rule}
    if isinstance(rule[0], str):
        if value not in rule:
            raise ValueError
        return value
    if rule[0] is None:
        return None if value is None else fits(value, rule[1])
    if rule[0] is tuple:
        if type(value) is not list or len(value) < len(rule) - 1:
            raise TypeError
        return [fits(v, r) for v, r in zip(value, rule[1:], strict=False)]
    kind, low, high = rule[:3]
    if kind is FLOAT and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError
    size = value if kind in (INT, FLOAT, bool) else len(value)
    if not low <= size <= high or (kind is FLOAT and math.isnan(value)):
        raise ValueError
    return [fits(v, rule[3]) for v in value] if kind is LIST else value


def array(value: Any, what: str, *rules: Any) -> list[Any]:
    """The first elements of an array, one for each rule; later versions may add some."""
    if type(value) is list and len(value) >= len(rules):
        with contextlib.suppress(ValueError, TypeError):
            return [fits(v, rule) for v, rule in zip(value, rules, strict=False)]
    raise RefusedError(f"not a valid {what}")


def field(value: dict[Any, Any], name: str, rule: Any) -> Any:
    if name in value:
        return fits(value[name], rule)
    if isinstance(rule, tuple) and rule[0] is None:
        return None
    if isinstance(rule, tuple) and len(rule) == (5 if rule[0] is LIST else 4):
        return rule[-1]
    raise ValueError


def open_envelope(data: bytes, authors: list[bytes], to: str, to_boot: int) -> dict[str, Any]:
    if len(data) > MIB:
        raise RefusedError("envelope over the size limit")
    version, kind, key, payload, signature = array(
        unpack(data, "envelope"),
        "envelope",
        (INT, 0, 255),
        (STR, 1, 32),
        (bytes, 8, 8),
        (bytes, 0, MIB),
        (bytes, 64, 64),
    )
    if version != 1:
        raise RefusedError("envelope of unknown version")
    if kind not in MESSAGES:
        raise RefusedError("envelope of unknown type")
    author = next((a for a in authors if key_id(a) == key), None)
    if author is None:
        raise RefusedError("envelope signed by an unknown key")
    try:
        signed = b"edgemoa/v1/" + kind.encode() + b"\0" + payload
        Ed25519PublicKey.from_public_bytes(author).verify(signature, signed)
    except InvalidSignature:
        raise RefusedError("envelope with a wrong signature") from None
    boot, sequence, meant, meant_boot, body = array(
        unpack(payload, "payload"),
        "payload",
        (INT, 0, 2**53 - 1),
        (INT, 1, 2**53 - 1),
        (STR, 56, 56),
        (INT, 0, 2**53 - 1),
        (bytes, 0, MIB),
    )
    if (meant, meant_boot) != (to, to_boot):
        raise RefusedError("envelope meant for another board or an earlier boot")
    fields = unpack(body, f"{kind} message")
    try:
        fits(fields.get("type", kind), (kind,))
        message = fits(fields, MESSAGES[kind])
    except (ValueError, TypeError, AttributeError):
        raise RefusedError(f"not a valid {kind} message") from None
    return {"boot": boot, "sequence": sequence, "type": kind, "message": message}


def shown(value: Any) -> Any:
    """As the vectors have it: bytes in base64."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case list():
            return [shown(each) for each in value]
        case dict():
            return {name: shown(each) for name, each in value.items()}
    return value


def open_hop(body: bytes) -> dict[str, Any]:
    fields = unpack(body, "hop message")
    try:
        kind = fields["type"]
        return {"type": kind, "message": shown(fits(fields, HOPS[kind]))}
    except (KeyError, ValueError, TypeError):
        raise RefusedError("not a valid hop message") from None


def direction_key(
    sender: str, receiver: str, sender_secret: bytes, receiver_secret: bytes
) -> bytes:
    secrets = dict(sorted({sender: sender_secret, receiver: receiver_secret}.items()))
    info = f"edgemoa/udp/v1\0{sender}\0{receiver}".encode()
    return HKDF(SHA256(), 32, None, info).derive(b"".join(secrets.values()))


def open_datagram(key: bytes, datagram: bytes) -> bytes:
    if len(datagram) < 32:
        raise RefusedError("datagram too short")
    try:
        return ChaCha20Poly1305(key).decrypt(
            bytes(4) + datagram[8:16], datagram[16:], datagram[:16]
        )
    except InvalidTag:
        raise RefusedError("datagram that does not decrypt") from None


def join_key(text: str) -> bytes:
    raw = base64.b32decode(text.removeprefix("edgemoa-join-").upper())
    if len(raw) != 20 or hashlib.sha256(b"edgemoa/join/v1" + raw[:17]).digest()[:3] != raw[17:]:
        raise RefusedError("not a join secret")
    return HKDF(SHA256(), 32, None, b"edgemoa/pair/v1/secret").derive(raw[:17])


def transcript(member_certificate: bytes, start: bytes, accept: bytes) -> bytes:
    parts = (member_certificate, start, accept)
    return hashlib.sha256(
        b"edgemoa/pair/v1" + b"".join(len(p).to_bytes(4, "big") + p for p in parts)
    ).digest()


def check_proof(proof: bytes, key: bytes, role: str, digest: bytes, public_key: bytes) -> str:
    fields = unpack(proof, "pairing proof")
    if not hmac.compare_digest(
        fields["mac"], hmac.new(key, role.encode() + digest, "sha256").digest()
    ):
        raise RefusedError("the other board holds another join secret or code")
    signed = b"edgemoa/pair/v1/" + role.encode() + digest
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(fields["signature"], signed)
    except InvalidSignature:
        raise RefusedError("the other board does not hold the key that it shows") from None
    return str(fields["name"])


def code_key(shared: bytes) -> bytes:
    """What proofs are made with, from what SPAKE2 gave."""
    return HKDF(SHA256(), 32, None, b"edgemoa/pair/v1/code").derive(shared)


ID = (STR, 56, 56)
VERSION = (INT, 1, 2**53 - 1)
CERTIFICATE = (bytes, 0, KIB)
RECORDS: dict[str, tuple[Any, ...]] = {
    "admit": (VERSION, ID, CERTIFICATE, NAME),
    "revoke": (VERSION, ID, ID),
    "replace": (VERSION, ID, CERTIFICATE),
}


def key_in(certificate: bytes) -> bytes:
    """Its public key; of what section 1 demands of certificates only what the vectors try."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError:
        raise RefusedError("not a valid certificate") from None
    assert isinstance(key, Ed25519PublicKey)
    return key.public_bytes_raw()


def open_record(data: bytes, signer: bytes) -> dict[str, Any]:
    what = "roster record"
    kind, payload, signature = array(
        unpack(data, what), what, (STR, 1, 32), (bytes, 0, 2 * KIB), (bytes, 64, 64)
    )
    rest = unpack(data, what)[3:]
    version, by, about, *name = array(unpack(payload, what), what, *RECORDS[kind])
    check_board_id(by)
    public = b"" if kind == "revoke" else key_in(about)
    board = check_board_id(about) if kind == "revoke" else board_id(public)
    if by == board and kind != "revoke":
        raise RefusedError(f"not a valid {what}")
    if [len(s) for s in rest] != ([64] if kind == "replace" else []):
        raise RefusedError(f"not a valid {what}")
    signed = b"edgemoa/roster/v1/" + kind.encode() + b"\0" + payload
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, signed)
        if kind == "replace":
            Ed25519PublicKey.from_public_bytes(public).verify(rest[0], signed)
    except InvalidSignature:
        raise RefusedError(f"{what} with a wrong signature") from None
    replaced = kind == "replace"
    return {
        "kind": kind,
        "version": version,
        "by": by,
        "board": by if replaced else board,
        "successor": board if replaced else "",
        "name": name[0] if name else "",
    }


def roster_digest(records: list[bytes]) -> bytes:
    each = [hashlib.sha256(r).digest() for r in sorted(records)]
    return hashlib.sha256(b"".join(each)).digest()


def open_roster_packet(packet: bytes) -> dict[str, Any]:
    return fits(  # type: ignore[no-any-return]
        unpack(packet[1:], "roster packet"),
        {
            "digest": (bytes, 32, 32),
            "known": (LIST, 0, 64, (bytes, 8, 8)),
            "records": (LIST, 0, 320, (bytes, 0, 2 * KIB), []),
        },
    )


def copying(packet: bytes, side: str) -> dict[str, Any]:
    """A question or an answer of a board that copies a model."""
    said = unpack(packet, side)
    try:
        rules = {"question": QUESTIONS, "answer": ANSWERS}[side][said["type"]]
        told: dict[str, Any] = fits(said, rules)
        texts = [
            (key, part[key])
            for part in (told, *told.get("models", ()))
            for key in ALPHABETS
            if key in part
        ]
    except (KeyError, ValueError, TypeError):
        raise RefusedError(f"not a valid {side}") from None
    for key, text in texts:
        first, others = ALPHABETS[key]
        if text[0] not in first or set(text) - set(others):
            raise RefusedError(f"not a valid {side}")
    return {"type": said["type"], **told}


def model_id(files: list[dict[str, str]]) -> str:
    lines = sorted(f"{file['sha256']}  {file['name']}\n".encode() for file in files)
    return hashlib.sha256(b"edgemoa model\n" + b"".join(lines)).hexdigest()
