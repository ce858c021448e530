"""Datagrams that only the two ends of a link can make or read, each accepted once.

A datagram is ``key id (8) | counter (8, big endian) | ChaCha20-Poly1305 ciphertext and tag``. The
key id is the receiver's, chosen by it at random for the link and told over TLS; there is one key
for each direction, from secrets that both told each other over TLS; the counter is the nonce and
never repeats under a key, as keys live no longer than the link.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edgemoa.core import limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import ProtocolError

KEY_ID_BYTES: Final = 8
_COUNTER_BYTES: Final = 8
_HEADER_BYTES: Final = KEY_ID_BYTES + _COUNTER_BYTES
OVERHEAD_BYTES: Final = _HEADER_BYTES + 16  # and the authentication tag
MAX_PLAINTEXT_BYTES: Final = limits.MAX_DATAGRAM_BYTES - OVERHEAD_BYTES
_INFO: Final = b"edgemoa/udp/v1\0"


class ReplayWindow:
    """Which of the last :data:`~edgemoa.core.limits.REPLAY_WINDOW` numbers have been seen."""

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0  # bit i: highest - i was seen

    def seen(self, number: int) -> bool:
        """Whether ``number`` was marked, or is too old to tell."""
        age = self._highest - number
        if age < 0:
            return False
        return age >= limits.REPLAY_WINDOW or bool(self._seen >> age & 1)

    def mark(self, number: int) -> None:
        """Remember ``number``, forgetting what falls out of the window."""
        ahead = number - self._highest
        if ahead >= limits.REPLAY_WINDOW:
            self._seen = 1
            self._highest = number
        elif ahead > 0:
            self._seen = (self._seen << ahead | 1) & ((1 << limits.REPLAY_WINDOW) - 1)
            self._highest = number
        elif -ahead < limits.REPLAY_WINDOW:
            self._seen |= 1 << -ahead


def direction_key(
    sender: BoardId, receiver: BoardId, sender_secret: bytes, receiver_secret: bytes
) -> bytes:
    """The key for datagrams from ``sender`` to ``receiver``: 32 bytes.

    Each secret is the 32 random bytes that the board put into its HELLO for this link.
    """
    low, high = (
        (sender_secret, receiver_secret) if sender < receiver else (receiver_secret, sender_secret)
    )
    info = _INFO + sender.encode() + b"\0" + receiver.encode()
    return HKDF(SHA256(), 32, salt=None, info=info).derive(low + high)


class Sealer:
    """Makes datagrams for one direction of a link."""

    def __init__(self, key: bytes, key_id: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._key_id = key_id
        self._counter = 0

    def seal(self, plaintext: bytes) -> bytes:
        """A datagram, :data:`OVERHEAD_BYTES` longer than ``plaintext``."""
        self._counter += 1
        counter = self._counter.to_bytes(_COUNTER_BYTES)
        header = self._key_id + counter
        return header + self._cipher.encrypt(b"\0\0\0\0" + counter, plaintext, header)


class Opener:
    """Opens datagrams of one direction of a link."""

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._window = ReplayWindow()

    def open(self, datagram: bytes) -> bytes:
        """The plaintext of a datagram, whose key id the caller has looked at.

        :raises ProtocolError: if it was changed, is not for this link, or came before.
        """
        if len(datagram) < OVERHEAD_BYTES:
            raise ProtocolError("datagram too short")
        header = datagram[:_HEADER_BYTES]
        counter_bytes = header[KEY_ID_BYTES:]
        counter = int.from_bytes(counter_bytes)
        if self._window.seen(counter):
            raise ProtocolError("datagram seen before")
        try:
            nonce = b"\0\0\0\0" + counter_bytes
            plaintext = self._cipher.decrypt(nonce, datagram[_HEADER_BYTES:], header)
        except InvalidTag:
            raise ProtocolError("datagram that does not decrypt") from None
        # Only now: a forged counter must not push true ones out of the window.
        self._window.mark(counter)
        return plaintext
