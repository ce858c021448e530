"""Envelopes and identities: any bytes either parse or raise ProtocolError.

What right and wrong ones look like is in ``tests/vectors``.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core import envelope, limits
from edgemoa.core.messages import (
    Alive,
    BoardId,
    Cancel,
    ChatMessage,
    Leave,
    Message,
    Proposal,
    Propose,
    Sampling,
)
from edgemoa.errors import ProtocolError

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
AUTHORS = {envelope.key_id(PUBLIC): envelope.Author.from_key(PUBLIC)}
TO = envelope.board_id(b"t" * 32)


def sign(message: Message, **other: Any) -> bytes:
    kind, body = envelope.encode(message)
    facts: dict[str, Any] = {"boot": 1, "sequence": 2, "to": TO, "to_boot": 3} | other
    return envelope.sign(
        other.pop("kind", kind),
        other.pop("body", body),
        key=envelope.key_id(PUBLIC),
        signer=KEY.sign,
        **{k: v for k, v in facts.items() if k in ("boot", "sequence", "to", "to_boot")},
    )


def verify(data: bytes) -> envelope.Opened:
    return envelope.verify(data, AUTHORS, to=TO, to_boot=3)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
messages = st.one_of(
    st.builds(
        Propose,
        st.text("abcdef", min_size=8, max_size=64),
        st.integers(1, limits.MAX_LAYERS),
        st.lists(
            st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), text),
            min_size=1,
            max_size=5,
        ).map(tuple),
        st.builds(
            Sampling,
            st.integers(1, limits.MAX_COMPLETION_TOKENS),
            st.floats(0, 2),
            st.floats(0.01, 1),
            st.integers(0, 2**31 - 1),
            st.lists(text.filter(bool), max_size=8).map(tuple),
        ),
        st.integers(0, 2**40),
    ),
    st.builds(Cancel, st.text("abcdef", min_size=8, max_size=64), st.integers(1, 8)),
)


@given(messages, st.integers(0, 2**53 - 1), st.integers(1, 2**53 - 1))
def test_what_is_signed_is_what_is_opened(message: Message, boot: int, sequence: int) -> None:
    opened = verify(sign(message, boot=boot, sequence=sequence))
    assert opened == envelope.Opened(message, boot, sequence)


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_raise_one_error(data: bytes) -> None:
    for parse in (
        verify,
        envelope.decode_hop,
        lambda d: verify(sign(Cancel("request-1", 1), body=d)),
        envelope.Author.from_key,
    ):
        with contextlib.suppress(ProtocolError):
            parse(data)


@given(st.text(max_size=60))
def test_any_text_is_an_identity_or_raises(candidate: str) -> None:
    with contextlib.suppress(ProtocolError):
        assert envelope.check_board_id(candidate) == candidate


@given(messages, st.data())
def test_a_changed_byte_is_noticed(message: Message, data: st.DataObject) -> None:
    right = sign(message)
    at = data.draw(st.integers(0, len(right) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != right[at]))
    with contextlib.suppress(ProtocolError):
        # Another encoding of the same envelope is no forgery: what is signed is the same.
        assert verify(right[:at] + bytes([value]) + right[at + 1 :]).message == message


def test_truncation_at_every_offset() -> None:
    right = sign(Cancel("request-1", 1))
    for end in range(len(right)):
        with pytest.raises(ProtocolError):
            verify(right[:end])
    hop = envelope.encode(Leave(5))[1]
    for end in range(len(hop)):
        with pytest.raises(ProtocolError):
            envelope.decode_hop(hop[:end])


def test_hop_messages() -> None:
    alive = Alive(1, 2, "name", True, "model", 3, 4, 5)
    assert envelope.decode_hop(envelope.encode(alive)[1]) == alive
    with pytest.raises(ProtocolError):
        envelope.decode_hop(envelope.encode(Cancel("request-1", 1))[1])


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * limits.MAX_FRAME_BYTES,
        b"\x95" + b"\x90" * (limits.MAX_FRAME_BYTES - 1),
        b"\xdd\xff\xff\xff\xff" + b"\x80" * 1_000_000,
        b"\xdd\x00\x0f\x42\x40" + b"\xc0" * 1_000_000,
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa8messages\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000,
        b"\x81\xa8messages\xdd\xff\xff\xff\xff",
        b"\x81\xa5later" + b"\x91" * 900_000,
        b"\x81\xa5later\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000,
    ],
)
def test_nothing_large_is_built_of_hostile_bytes(data: bytes) -> None:
    signed = sign(Cancel("request-1", 1), kind="propose", body=data)
    tracemalloc.start()
    try:
        for parse in (envelope.decode_hop, verify):
            with pytest.raises(ProtocolError):
                parse(data)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with pytest.raises(ProtocolError):
            verify(signed)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(signed) + limits.MIB  # copies of the bytes, no million objects


def test_a_large_proposal_fits_and_a_larger_envelope_does_not() -> None:
    proposal = Proposal("request-1", 1, "x" * limits.MAX_PROPOSAL_BYTES, "m", 1, 1, 1, 1, "stop")
    assert verify(sign(proposal)).message == proposal
    with pytest.raises(ProtocolError, match="size"):
        verify(bytes(limits.MAX_FRAME_BYTES + 1))


def test_an_error_never_shows_the_bytes() -> None:
    propose = Propose("request-1", 1, (ChatMessage("user", "canary"),), Sampling(), 1)
    body = envelope.encode(propose)[1].replace(b"user", b"cana")
    with pytest.raises(ProtocolError) as caught:
        verify(sign(propose, body=body))
    assert "cana" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_identities() -> None:
    board = envelope.board_id(PUBLIC)
    assert len(board) == envelope.BOARD_ID_CHARACTERS
    assert envelope.check_board_id(board) == board
    assert envelope.short(BoardId(board)) == board[:8]
