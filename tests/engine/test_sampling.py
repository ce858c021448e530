"""Picking tokens, against the definition written down in double precision, and token by token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoa.core.messages import Sampling
from edgemoa.engine.sampling import LEAST_LOGPROB, Sampler, likeliest, logprobs
from edgemoa.errors import EngineError

Row = npt.NDArray[np.float32]


def shares(
    row: Row,
    sampling: Sampling,
    *,
    bias: Mapping[int, float] | None = None,
    prompt: Iterable[int] = (),
    written: Iterable[int] = (),
    spared: Iterable[int] = (),
    allowed: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float64]:
    """The distribution to draw from, step by step as ``sampling.py`` says it, token by token."""
    values = [float(value) for value in row]
    for token, added in (bias or {}).items():
        values[token] += added
    written = list(written)
    for token in {*prompt, *written} - {*spared}:
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in Counter(written).items():
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if allowed is not None:
        values = [v if fits else -math.inf for v, fits in zip(values, allowed, strict=True)]
    peak = max(values)
    weights = [math.exp((value - peak) / sampling.temperature) for value in values]
    order = sorted(range(len(row)), key=lambda token: (-weights[token], token))
    kept = order[: sampling.top_k or len(order)]
    share = sampling.top_p * sum(weights[token] for token in kept)
    nucleus, so_far = [], 0.0
    for token in kept:
        nucleus.append(token)
        so_far += weights[token]
        if so_far >= share:
            break
    result = np.zeros(len(row))
    for token in nucleus:
        if weights[token] >= sampling.min_p:
            result[token] = weights[token]
    result /= result.sum()
    return result


def row_of(seed: int, size: int, spread: float = 2.5) -> Row:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 900},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.99},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.2},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
]


def fits(counts: Mapping[int, int], expected: npt.NDArray[np.float64], draws: int) -> None:
    """Pearson's test, rare tokens taken together; five standard deviations are let through."""
    assert all(expected[token] > 0 for token in counts)
    common = np.flatnonzero(expected * draws >= 8)
    seen = np.array([counts.get(int(token), 0) for token in common], float)
    wanted = expected[common] * draws
    if (rest := draws - wanted.sum()) >= 8:
        seen = np.append(seen, draws - seen.sum())
        wanted = np.append(wanted, rest)
    freedom = len(wanted) - 1
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@pytest.mark.parametrize("size", [40, 3000])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_tokens_are_drawn_as_defined(options: dict[str, Any], size: int) -> None:
    row, draws = row_of(3, size), 3000
    sampling = Sampling(seed=11, **options)
    sampler = Sampler(sampling)
    counts = Counter(sampler.pick(row) for _ in range(draws))
    fits(counts, shares(row, sampling), draws)


@pytest.mark.parametrize("share", [0.9, 0.05])
@pytest.mark.parametrize("options", [*CASES[:2], *CASES[-2:]], ids=str)
def test_only_what_is_allowed_is_drawn_by_its_share(options: dict[str, Any], share: float) -> None:
    row, draws = row_of(4, 2000), 3000
    allowed = np.random.default_rng(8).random(len(row)) < share
    allowed[np.argmax(row)] = False
    sampling = Sampling(seed=12, **options)
    sampler = Sampler(sampling)
    counts = Counter(sampler.pick(row, allowed) for _ in range(draws))
    fits(counts, shares(row, sampling, allowed=allowed), draws)
    greedy = Sampler(Sampling()).pick(row, allowed)
    assert greedy == max(np.flatnonzero(allowed), key=lambda token: row[token])


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 2),
        "top_k": st.integers(0, 2100),
        "top_p": st.floats(0.001, 1),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(2, 2000), spread=st.sampled_from([0.0, 0.3, 2.5, 12.0]), options=OPTIONS)
def test_what_is_drawn_is_among_what_is_left(
    size: int, spread: float, options: dict[str, Any]
) -> None:
    row = row_of(options["seed"], size, spread)
    picked = {Sampler(Sampling(**options)).pick(row) for _ in range(3)}
    # A hair's breadth more, for sums in single precision; of equal tokens, any may be the last.
    top_p, min_p = min(1.0, options["top_p"] * (1 + 1e-5)), options["min_p"] * (1 - 1e-5)
    left = shares(row, Sampling(**options | {"top_p": top_p, "min_p": min_p}))
    least = min(row[left > 0])
    assert all(row[token] >= least for token in picked)
    assert len(picked) == 1  # by one seed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_and_bias_are_those_of_the_definition(temperature: float) -> None:
    """A text of many steps, each checked against the definition given the text so far."""
    options: dict[str, Any] = {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7, "seed": 2,
    }  # fmt: skip
    prompt, spared, bias = [3, 4, 4, 5, 9], frozenset({9}), {1: 2.5, 2: -100.0}
    sampling = Sampling(temperature=temperature, top_k=5, **options)
    sampler = Sampler(sampling, bias=bias, prompt=prompt, spared=spared)
    warm = Sampling(temperature=temperature or 1, top_k=5 if temperature else 1, **options)
    written: list[int] = []
    for step in range(600):
        row = row_of(step % 3, 12)
        before = row.copy()
        token = sampler.pick(row)
        expected = shares(row, warm, bias=bias, prompt=prompt, written=written, spared=spared)
        assert expected[token] > 0
        assert np.array_equal(row, before)  # it is the back end's
        written.append(token)
    assert 2 not in written
    assert len(set(written)) > 8


def test_each_penalty_by_hand() -> None:
    row = np.array([4.0, 3.0, -1.0], np.float32)

    def greedy(**options: Any) -> list[int]:
        sampler = Sampler(Sampling(**options), prompt=[0])
        return [sampler.pick(row) for _ in range(5)]

    assert greedy() == [0] * 5
    assert greedy(repetition_penalty=1.4)[0] == 1  # 4 / 1.4 < 3; then 3 / 1.4 < 4 / 1.4
    assert greedy(repetition_penalty=1.4)[1:] == [0] * 4
    assert greedy(presence_penalty=1.5) == [0, 1, 0, 0, 0]  # 2.5 and 1.5 from then on
    assert greedy(frequency_penalty=0.6) == [0, 0, 1, 0, 1]


def test_tokens_that_end_an_answer_are_not_penalized() -> None:
    row = np.array([4.0, 3.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2), prompt=[0, 0], spared=frozenset({0}))
    assert [sampler.pick(row) for _ in range(3)] == [0, 0, 0]


def test_numbers_that_the_row_does_not_have_are_passed_over() -> None:
    sampling = Sampling(repetition_penalty=1.4, presence_penalty=1)
    sampler = Sampler(sampling, bias={7: 100.0, 1: 0.5}, prompt=[9, 0])
    assert sampler.pick(np.array([1.0, 0.5], np.float32)) == 1


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 2.0, 7.25]), min_size=1, max_size=900
    ),
    count=st.integers(1, 1000),
)
def test_the_likeliest_are_those_of_a_stable_sort(values: list[float], count: int) -> None:
    row = np.array(values, np.float32)
    expected = sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    assert likeliest(row, count).tolist() == expected


def test_logprobs_are_those_of_a_softmax() -> None:
    row = row_of(9, 5000, 6.0)
    row[17] = -np.inf
    exact = row.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    tokens = np.array([0, 4999, int(row.argmax())])
    assert logprobs(row, tokens) == pytest.approx(exact[tokens].tolist(), abs=1e-4)
    assert logprobs(row, np.array([17])) == [LEAST_LOGPROB]


@pytest.mark.parametrize("options", [{}, *CASES[:1], {"repetition_penalty": 1.2}], ids=str)
def test_without_numbers_nothing_is_picked(options: dict[str, Any]) -> None:
    everything = np.ones(300, np.bool_)
    for allowed in (None, everything):
        for bad in (np.nan, np.inf):
            row = row_of(1, 300)
            row[123] = bad
            with pytest.raises(EngineError, match="no valid numbers"):
                Sampler(Sampling(**options), prompt=[1]).pick(row, allowed)
        with pytest.raises(EngineError, match="no valid numbers"):
            nothing = np.full(300, -np.inf, np.float32)
            Sampler(Sampling(**options), prompt=[1]).pick(nothing, allowed)
    with pytest.raises(EngineError, match="Nothing that the answer's schema allows"):
        Sampler(Sampling(**options)).pick(row_of(1, 300), ~everything)
    row = row_of(1, 300)
    row[:290] = -np.inf
    only = np.arange(300) < 290
    with pytest.raises(EngineError, match="no valid numbers"):
        Sampler(Sampling(**options)).pick(row, only)


def test_tokens_without_weight_are_never_drawn() -> None:
    row = np.full(600, -np.inf, np.float32)
    row[[5, 300, 301]] = 1.0
    for options in CASES:
        sampler = Sampler(Sampling(seed=3, **options))
        assert {sampler.pick(row) for _ in range(60)} <= {5, 300, 301}
