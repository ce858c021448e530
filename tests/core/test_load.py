"""What a board learns of its own speed, and of how often work comes."""

from __future__ import annotations

from random import Random
from statistics import mean, pvariance

import msgspec
import pytest

from edgemoa.core.events import WorkDone
from edgemoa.core.load import (
    HORIZON_MS,
    LEAST_SPAN_MS,
    PRIOR_SERVICE_MS,
    Arrivals,
    Average,
    Learned,
    ServiceTimes,
)
from edgemoa.core.rates import DecodeRate, PrefillRate, Rates


def done(model_ms: int, prompt_tokens: int = 100, cached_tokens: int = 0) -> WorkDone:
    return WorkDone("", "stop", prompt_tokens, 50, 0, 9_999, cached_tokens, model_ms)


def test_an_average_begins_as_the_plain_one_and_then_follows() -> None:
    average, values = Average(), [3.0, 5.0, 10.0, 2.0]
    for value in values:
        average.add(value)
    assert average.mean == pytest.approx(mean(values))
    assert average.variance == pytest.approx(pvariance(values))
    for _ in range(100):
        average.add(20.0)
    assert average.mean == pytest.approx(20, rel=0.01)
    assert average.scv < 0.01


def test_service_times_follow_what_is_measured() -> None:
    times = ServiceTimes()
    assert times.mean_ms("proposal") == PRIOR_SERVICE_MS
    times.observe("proposal", done(1_000))
    assert times.mean_ms("proposal") == 1_000
    assert times.mean_ms("aggregation") == 1_000  # nothing better is known
    for _ in range(60):
        times.observe("proposal", done(2_000))  # it throttles
    assert 1_990 < times.mean_ms("proposal") <= 2_000
    assert times.measured().keys() == {"proposal"}


def test_what_a_job_takes_among_others_follows_from_the_engines_rates() -> None:
    times = ServiceTimes()
    times.measured_rates(
        Rates(
            prefill=(PrefillRate(100, 1.0),),
            decode=tuple(DecodeRate(rows, 100, 8.0 + 2.0 * rows) for rows in (1, 2, 4)),
        )
    )
    assert times.mean_ms("proposal") == PRIOR_SERVICE_MS  # no telling how large one is
    read_ahead = msgspec.structs.replace(
        done(1_000, prompt_tokens=120, cached_tokens=90), ahead_tokens=70
    )
    times.observe("proposal", read_ahead)
    assert times.mean_ms("proposal") == pytest.approx(100 + 50 * 10, rel=0.02)
    assert times.mean_ms("proposal", batch=4) == pytest.approx(100 + 50 * 4, rel=0.02)


def test_what_was_learned_is_there_at_the_next_start() -> None:
    times, chance = ServiceTimes(), Random(5)
    for _ in range(50):
        times.observe("proposal", done(round(chance.expovariate(1 / 1_000))))
    times.measured_rates(Rates((PrefillRate(100, 1.0),), (DecodeRate(1, 100, 10.0),)))
    kept = msgspec.json.decode(msgspec.json.encode(times.learned("m")), type=Learned)
    again = ServiceTimes()
    again.recall(kept)
    assert kept.model == "m"
    assert again.mean_ms("proposal", 1) == pytest.approx(times.mean_ms("proposal", 1))
    assert again.scv("proposal") == pytest.approx(times.scv("proposal"))
    for _ in range(40):
        again.observe("proposal", done(5_000, prompt_tokens=100))
    assert again.measured()["proposal"] == pytest.approx(5_000, rel=0.05)  # and does not stick


@pytest.mark.parametrize("per_s", [0.05, 0.5, 5.0])
def test_a_rate_is_learned_within_minutes_and_follows(per_s: float) -> None:
    chance, rates = Random(1), []
    for _ in range(40):
        arrivals, now_ms = Arrivals(1_000_000), 1_000_000.0
        while now_ms < 1_000_000 + 5 * HORIZON_MS:
            now_ms += chance.expovariate(per_s / 1000)
            arrivals.observe(round(now_ms))
        rates.append(arrivals.per_ms(round(now_ms)) * 1000)
        assert arrivals.per_ms(round(now_ms) + 5 * HORIZON_MS) * 1000 < 0.05 * per_s * 5
    assert mean(rates) == pytest.approx(per_s, rel=0.15)


def test_the_first_ones_are_no_rate_yet() -> None:
    arrivals = Arrivals(0)
    assert arrivals.per_ms(0) == 0
    arrivals.observe(10)
    assert arrivals.per_ms(10) < 1.2 / LEAST_SPAN_MS


def test_how_even_arrivals_are() -> None:
    even, random, chance = Arrivals(0), Arrivals(0), Random(2)
    now_ms = 0
    for i in range(300):
        even.observe(i * 1_000)
        now_ms += round(chance.expovariate(1 / 1_000))
        random.observe(now_ms)
    assert even.scv == pytest.approx(0, abs=0.01)
    assert 0.3 < random.scv < 3
