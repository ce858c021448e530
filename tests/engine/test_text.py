"""Tokens to text, and picking them: the parts that need no model."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.messages import Sampling
from edgemoa.engine.sampling import Sampler
from edgemoa.engine.text import (
    LEAST_COPIES,
    LEAST_LOOP,
    LONGEST_PERIOD,
    Detokenizer,
    Loop,
    StopText,
)
from edgemoa.errors import EngineError


class Bytes:
    """Tokens that are bytes, or with ``space`` words with a space before them."""

    def __init__(self, words: list[bytes] | None = None) -> None:
        self.words = words or [bytes([byte]) for byte in range(256)]
        self.strips_first_space = words is not None

    def piece(self, number: int) -> bytes:
        return self.words[number]


def detokenize_by_character(text: str) -> list[str]:
    """A character when its last byte is there, and nothing before."""
    return [
        *itertools.chain.from_iterable(
            [*[""] * (len(character.encode()) - 1), character] for character in text
        )
    ]


def detokenize(data: bytes) -> list[str]:
    return [*map(Detokenizer(Bytes()).push, data)]


@given(st.text(st.characters(exclude_characters="\ufffd", codec="utf-8")))
def test_text_comes_back_whole_and_only_in_whole_characters(text: str) -> None:
    assert detokenize(text.encode()) == detokenize_by_character(text)


@given(st.binary(max_size=12))
def test_a_stream_is_what_the_whole_is(data: bytes) -> None:
    whole = data.decode(errors="replace")
    shown = "".join(detokenize(data))
    assert whole.startswith(shown)
    assert not whole.removeprefix(shown).strip("\ufffd")  # but for what is cut off at the end
    assert len(whole) - len(shown) <= 3


@given(
    st.text(),
    st.binary(max_size=6),
    st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")),
)
def test_bytes_that_are_no_character_cost_no_text_around_them(
    before: str, noise: bytes, after: str
) -> None:
    text = "".join(detokenize(before.encode() + noise + b"|" + after.encode()))
    assert text.startswith(before)
    assert text.endswith("|" + after)


def test_a_character_cut_off_at_the_end_is_left_out() -> None:
    assert "".join(detokenize("né😀".encode()[:-1])) == "né"


def test_the_space_before_the_first_word_alone_is_left_out() -> None:
    words = Bytes([b"", b" Hello", b" world", b" ", b" again", b"\xf0\x9f", b"\x98\x80"])
    for numbers, pieces in [
        ([0, 1, 2, 3, 4], ["", "Hello", " world", " ", " again"]),
        ([3, 1], ["", " Hello"]),
        ([5, 6, 1], ["", "😀", " Hello"]),
    ]:
        detokenizer = Detokenizer(words)
        assert [detokenizer.push(number) for number in numbers] == pieces


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1), max_size=3))
def test_a_stop_string_ends_the_text_wherever_the_pieces_meet(
    pieces: list[str], stops: list[str]
) -> None:
    stop = StopText(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += stop.push(piece)
        if stop.stopped:
            break
    else:
        shown += stop.finish()
    # The text as it grew: it ends as soon as any stop string is there, before the first of them.
    expected = "".join(pieces)
    for grown in itertools.accumulate(pieces):
        found = [grown.find(each) for each in stops if each in grown]
        if found:
            expected = grown[: min(found)]
            break
    assert shown == expected
    assert stop.stopped == any(each in "".join(pieces) for each in stops)


def test_text_is_shown_as_soon_as_it_cannot_become_a_stop_string() -> None:
    stop = StopText(("\n\nUser:",))
    assert [stop.push(piece) for piece in ("a\n", "\n", "b", "\n\nUse", "r")] == [
        "a", "", "\n\nb", "", "",
    ]  # fmt: skip
    assert stop.finish() == "\n\nUser"


def loops(tokens: list[int]) -> bool:
    """What :class:`Loop` says of the last token, by its definition."""
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(LEAST_COPIES * period, LEAST_LOOP)
        end = tokens[-length:]
        if len(end) == length and end[period:] == end[:-period]:
            return True
    return False


@given(
    st.lists(st.integers(0, 3), max_size=90),
    st.lists(st.integers(0, 3), min_size=1, max_size=90),
    st.integers(1, 70),
    st.none() | st.integers(0, 300),
)
def test_a_loop_is_copies_of_one_period(
    before: list[int], period: list[int], copies: int, broken_at: int | None
) -> None:
    tokens = before + (period * copies)[:400]
    if broken_at is not None and broken_at < len(tokens):
        tokens[broken_at] += 4
    loop = Loop()
    for end, token in enumerate(tokens, 1):
        assert loop.push(token) == loops(tokens[:end])


def test_what_is_no_loop_goes_on() -> None:
    for tokens in (
        [*range(100)] * 9,  # too long a period
        [*range(80)] * 3 + [*range(79)],  # not four copies yet
        [7] * 63,
        [*[7] * 63, 8] * 3 + [7] * 63,  # 64 tokens, not four times
    ):
        loop = Loop()
        assert not any(map(loop.push, tokens))


def logits(*shares: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(shares, np.float32))


def draw(sampling: Sampling, *shares: float, times: int = 2000) -> dict[int, float]:
    sampler = Sampler(sampling)
    counted = Counter(sampler.pick(logits(*shares)) for _ in range(times))
    return {token: count / times for token, count in sorted(counted.items())}


def test_temperature_zero_takes_the_likeliest() -> None:
    for temperature in (0, 1e-60, 1e-4, 1e-3):
        sampling = Sampling(temperature=temperature, seed=5)
        assert draw(sampling, 0.3, 0.4, 0.3, times=20) == {1: 1.0}


def test_tokens_are_drawn_by_their_shares() -> None:
    drawn = draw(Sampling(temperature=1), 0.1, 0, 0.6, 0.3)
    assert drawn == pytest.approx({0: 0.1, 2: 0.6, 3: 0.3}, abs=0.04)


def test_tokens_are_drawn_by_their_shares_from_a_large_vocabulary() -> None:
    shares = [0.0] * 1000
    shares[3], shares[255], shares[256], shares[999] = 0.1, 0.2, 0.3, 0.4
    drawn = draw(Sampling(temperature=1), *shares)
    assert drawn == pytest.approx({3: 0.1, 255: 0.2, 256: 0.3, 999: 0.4}, abs=0.04)


def test_a_low_temperature_sharpens() -> None:
    drawn = draw(Sampling(temperature=0.5), 0.2, 0.6, 0.2)
    assert drawn == pytest.approx({0: 1 / 11, 1: 9 / 11, 2: 1 / 11}, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.001, {1}), (0.49, {1}), (0.6, {1, 3}), (0.79, {1, 3}), (0.85, {0, 1, 3}), (1, {*range(4)})],
)  # fmt: skip
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    drawn = draw(Sampling(temperature=1, top_p=top_p), 0.1, 0.5, 0.1, 0.3)
    assert set(drawn) == kept


def test_a_seed_means_the_same_tokens() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, top_p=0.9, seed=seed))
        return [sampler.pick(logits(*[0.05] * 20)) for _ in range(50)]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    row = logits(0.5, 0.5)
    row[1] = bad
    with pytest.raises(EngineError, match="no valid numbers"):
        Sampler(Sampling(temperature=temperature)).pick(row)
