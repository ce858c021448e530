"""How fast the model is: averages of what was measured, and what follows from them."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.rates import DecodeRate, Meter, PrefillRate, Rates


def measured(noise: float, rows: tuple[int, ...] = (1, 2, 4, 8)) -> Rates:
    """By a board whose steps take 5 + b (1.2 + .002 x) ms, and whose tokens .8 + .0005 x."""
    meter, chance = Meter(), Random(1)
    for _ in range(300):
        for context in (30, 300, 1_000, 2_500):
            for batch in rows:
                step_ms = 5 + batch * (1.2 + 0.002 * context)
                meter.observe_decode(batch, context, step_ms * chance.uniform(1 - noise, 1 + noise))
            chunk_ms = 64 * (0.8 + 0.0005 * (context + 32))
            meter.observe_prefill(64, context, chunk_ms * chance.uniform(1 - noise, 1 + noise))
    return meter.rates()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_laws_are_found_in_what_was_measured(noise: float) -> None:
    rates = measured(noise)
    assert rates.step() == pytest.approx((5, 1.2, 0.002), rel=0.02 + noise / 2)
    assert rates.token() == pytest.approx((0.8, 0.0005), rel=0.02 + noise / 2)
    # Of a batch and a context that was never seen.
    expected = 700 * (0.8 + 0.0005 * 450) + 100 * (5 / 6 + 1.2 + 0.002 * 850)
    assert rates.estimate(800, 100, 6, cached_tokens=100) == pytest.approx(expected, rel=0.03)


def test_what_batches_save_is_not_made_up() -> None:
    rates = measured(0.0, rows=(1,))
    for context in (50, 2_000):
        alone = rates.estimate(context, 1, 1, context)
        assert alone == pytest.approx(6.2 + 0.002 * context, rel=0.02)
        assert rates.estimate(context, 1, 8, context) == pytest.approx(alone, rel=0.01)


def test_without_measurements_there_is_no_estimate() -> None:
    assert Rates().estimate(10, 10, 1) is None
    assert Rates(prefill=(PrefillRate(1, 1.0),)).estimate(10, 10, 1) is None


times_ms = st.floats(0, 1e9)
counts = st.integers(0, 2**31)


@given(
    st.lists(st.builds(PrefillRate, counts, times_ms), min_size=1, max_size=8),
    st.lists(st.builds(DecodeRate, counts, counts, times_ms), min_size=1, max_size=8),
    st.integers(1, 64),
)
def test_no_figures_break_an_estimate(
    prefill: list[PrefillRate], decode: list[DecodeRate], batch: int
) -> None:
    estimate = Rates(tuple(prefill), tuple(decode)).estimate(100, 100, batch)
    assert estimate is not None
    assert 0 <= estimate < float("inf")


def test_what_is_no_time_is_not_let_in() -> None:
    for time_ms in (float("nan"), float("inf"), -1.0):
        data = msgspec.msgpack.encode(Rates((PrefillRate(1, time_ms),)))
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(data, type=Rates)


def test_averages_follow_a_board_that_slows_down() -> None:
    meter = Meter()
    for step_ms in [10.0] * 500 + [20.0] * 200:
        meter.observe_decode(2, 100, step_ms)
        meter.observe_prefill(50, 100, 5 * step_ms)
    meter.observe_prefill(2, 100, 1_000)  # a short one that had bad luck counts little
    (decode,), (prefill,) = meter.rates().decode, meter.rates().prefill
    assert 19 < decode.step_ms <= 20
    assert 1.9 < prefill.ms_per_token < 5


def test_there_are_few_figures_however_much_is_measured() -> None:
    meter = Meter()
    for context in range(0, 32_768, 7):
        for rows in range(1, 9):
            meter.observe_decode(rows, context, 1.0)
        meter.observe_prefill(16, context, 1.0)
    rates = meter.rates()
    assert len(rates.decode) == 8 * 9  # contexts to 128, 256, ... 32,768
    assert len(msgspec.msgpack.encode(rates)) < 8_000
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rates), type=Rates) == rates
