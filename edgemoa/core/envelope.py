"""Messages as bytes: identities, the codec, and signed envelopes.

Pure: bytes in, values out. An envelope is the msgpack array ``[version, type, key_id, payload,
signature]``; the Ed25519 signature covers ``b"edgemoa/v1/" + type + b"\\0" + payload`` exactly as
received: msgpack is not canonical, so nothing is ever encoded again to be checked. The payload
says from which boot of the sender it comes, its sequence number there, and for which board and
boot of that board it is meant, so that a captured envelope is of no use to anybody else or later.

Envelopes are written by ``msgpack`` and read by ``msgspec``, whose decoders are typed: a length, a
type or a range that a message does not allow is refused before anything is allocated for it, and
what is unknown is skipped, not built. Any bytes either parse or raise
:class:`~edgemoa.errors.ProtocolError`, which never shows them.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import operator
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import msgpack
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edgemoa.core import limits
from edgemoa.core.messages import HOP_MESSAGES, BoardId, Message
from edgemoa.errors import ProtocolError

VERSION: Final = 1
KEY_ID_BYTES: Final = 8
SIGNATURE_BYTES: Final = 64
BOARD_ID_CHARACTERS: Final = 56

_CHECK_BYTES: Final = 3
_SIGNED_PREFIX: Final = b"edgemoa/v1/"

Sequence = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Boot = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]

T = TypeVar("T")


class _Envelope(msgspec.Struct, array_like=True, frozen=True):
    version: Annotated[int, msgspec.Meta(ge=0, le=255)]
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    key_id: Annotated[bytes, msgspec.Meta(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
    payload: bytes
    signature: Annotated[
        bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)
    ]


class _Payload(msgspec.Struct, array_like=True, frozen=True):
    boot: Boot
    sequence: Sequence
    to: Annotated[str, msgspec.Meta(min_length=BOARD_ID_CHARACTERS, max_length=BOARD_ID_CHARACTERS)]
    to_boot: Boot
    body: bytes


@dataclass(frozen=True, slots=True)
class Author:
    """A board whose envelopes can be checked.

    :param id: its identity, which follows from its key.
    :param key: its public key, ready to verify with.
    """

    id: BoardId
    key: Ed25519PublicKey

    @classmethod
    def from_key(cls, public_key: bytes) -> Author:
        """:raises ProtocolError: if these are not the 32 bytes of an Ed25519 key."""
        try:
            key = Ed25519PublicKey.from_public_bytes(public_key)
        except ValueError:
            raise ProtocolError("not an Ed25519 public key") from None
        return cls(board_id(public_key), key)

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether the board signed ``data``."""
        try:
            self.key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified envelope: what it says, and its place among its author's messages to us."""

    message: Message
    boot: int
    sequence: int


# --- identities


def board_id(public_key: bytes) -> BoardId:
    """The identity that follows from a raw Ed25519 public key: 56 characters, lower case.

    SHA-256 of the key and 3 bytes that catch typing errors, in base32 without padding.
    """
    digest = hashlib.sha256(public_key).digest()
    return BoardId(base64.b32encode(digest + _check(digest)).decode().lower())


def check_board_id(text: str) -> BoardId:
    """``text`` as an identity, if its check characters are right.

    :raises ProtocolError: if they are not, or it is not 56 lower-case base32 characters.
    """
    plain = text.isascii() and text == text.lower() and "=" not in text
    if plain and len(text) == BOARD_ID_CHARACTERS:
        try:
            raw = base64.b32decode(text.upper())
        except binascii.Error:
            pass
        else:
            if _check(raw[:-_CHECK_BYTES]) == raw[-_CHECK_BYTES:]:
                return BoardId(text)
    raise ProtocolError("not a board's identity")


def short(board: BoardId) -> str:
    """The first characters of an identity, for people to tell boards apart."""
    return board[:8]


def short_id(board: BoardId) -> bytes:
    """Names the board in news, where every byte counts: 8 bytes."""
    return hashlib.sha256(board.encode()).digest()[:KEY_ID_BYTES]


def key_id(public_key: bytes) -> bytes:
    """Names the key in an envelope, so that a board may once have two: 8 bytes."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def _check(digest: bytes) -> bytes:
    return hashlib.sha256(b"edgemoa/id/v1" + digest).digest()[:_CHECK_BYTES]


# --- the codec

_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(_Envelope)
_payloads = msgspec.msgpack.Decoder(_Payload)
_hops: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    functools.reduce(operator.or_, HOP_MESSAGES)
)
_bodies: dict[str, msgspec.msgpack.Decoder[Any]] = {
    str(kind.__struct_config__.tag): msgspec.msgpack.Decoder(kind)
    for kind in typing.get_args(Message)
    if kind not in HOP_MESSAGES
}


def decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    """``data`` as the type that ``decoder`` was made for, and nothing after it.

    :param what: names the expected thing in the error.
    :raises ProtocolError: on anything else.
    """
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError):  # malformed, mistyped, invalid UTF-8; nested too deep
        raise ProtocolError(f"not a valid {what}") from None


def encode(message: Message) -> tuple[str, bytes]:
    """The message's type and its bytes."""
    return str(message.__struct_config__.tag), _encoder.encode(message)


def decode_hop(data: bytes) -> Message:
    """A message that travels unsigned inside an authenticated link.

    :raises ProtocolError: if it is none of those, or malformed.
    """
    message: Message = decode(_hops, data, "hop message")
    return message


# --- envelopes


def sign(
    kind: str,
    body: bytes,
    *,
    key: bytes,
    signer: Callable[[bytes], bytes],
    boot: int,
    sequence: int,
    to: BoardId,
    to_boot: int,
) -> bytes:
    """A signed envelope.

    :param kind: the message's type, and ``body`` its bytes, both from :func:`encode`.
    :param key: the signing key's :func:`key_id`.
    :param signer: Ed25519 signature (64 bytes) of what it is given.
    :param boot: the sender's boot epoch; ``sequence`` counts from 1 within it, per recipient.
    :param to: the recipient, and ``to_boot`` its boot epoch as far as the sender knows.
    """
    payload = msgpack.packb([boot, sequence, to, to_boot, body])
    signature = signer(_SIGNED_PREFIX + kind.encode() + b"\0" + payload)
    envelope: bytes = msgpack.packb([VERSION, kind, key, payload, signature])
    return envelope


def verify(data: bytes, authors: dict[bytes, Author], *, to: BoardId, to_boot: int) -> Opened:
    """The message in a signed envelope, once everything about it is in order.

    :param authors: by :func:`key_id`, the boards that may have signed it.
    :param to: this board, and ``to_boot`` its boot epoch: it must be meant for exactly them.
    :raises ProtocolError: otherwise. The signature is checked before the payload is decoded.
    """
    if len(data) > limits.MAX_FRAME_BYTES:
        raise ProtocolError("envelope over the size limit")
    envelope = decode(_envelopes, data, "envelope")
    if envelope.version != VERSION:
        raise ProtocolError("envelope of unknown version")
    body = _bodies.get(envelope.type)
    if body is None:
        raise ProtocolError("envelope of unknown type")
    author = authors.get(envelope.key_id)
    if author is None:
        raise ProtocolError("envelope signed by an unknown key")
    signed = _SIGNED_PREFIX + envelope.type.encode() + b"\0" + envelope.payload
    if not author.signed(envelope.signature, signed):
        raise ProtocolError("envelope with a wrong signature")
    payload = decode(_payloads, envelope.payload, "payload")
    if payload.to != to or payload.to_boot != to_boot:
        raise ProtocolError("envelope meant for another board or an earlier boot")
    message: Message = decode(body, payload.body, f"{envelope.type} message")
    return Opened(message, payload.boot, payload.sequence)
