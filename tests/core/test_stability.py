"""The theory against the paper's and known numbers, exhaustive search, and a simulated queue."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core import stability

UNEQUAL = (1.0, 1.0, 1.0, 2.0, 4.0, 4.0)  # seconds of an inference on each board

alphas = st.lists(st.floats(0.05, 50), min_size=1, max_size=7)
small_loads = st.floats(0.01, 2.5)
spreads = st.floats(0, 6)


# --- work and loads


def test_theorem_1() -> None:
    assert stability.jobs_per_prompt(0, 3) == 1
    assert stability.jobs_per_prompt(2, 3) == 9
    assert stability.load(0.5, 0.2, 2, 3) == pytest.approx(0.9)
    assert stability.largest_rate([0.5], 2, 3) == pytest.approx(1 / 4.5)
    # Unequal boards with uniform picks: the slowest decides, (6).
    assert stability.largest_rate(UNEQUAL, 1, 2) == 0.0625


@given(st.floats(0.01, 100), st.floats(0, 10), st.integers(0, 4), st.integers(0, 6))
def test_two_classes_alike_are_the_papers_one(
    alpha: float, rate: float, layers: int, proposers: int
) -> None:
    seconds = stability.prompt_s(alpha, alpha, layers, proposers)
    assert seconds * rate == pytest.approx(stability.load(alpha, rate, layers, proposers))


def test_two_classes_in_a_typical_setting() -> None:
    """11 % more load than with one alpha at M = 1, 30 % at M = 2.

    So it is with k = 3, a prompt of 100 tokens, answers of 200, an instruction of 100, a board that
    reads 100 tokens per second and writes 13.
    """
    first = stability.service_s(100, 200, 100, 13)
    later = stability.service_s(100 + 4 * 200 + 100, 200, 100, 13)
    for layers, more in ((1, 1.11), (2, 1.30)):
        ratio = stability.prompt_s(first, later, layers, 3) / (
            first * stability.jobs_per_prompt(layers, 3)
        )
        assert ratio == pytest.approx(more, abs=0.01)
    assert stability.prompt_s(first, later, 2, 3) == pytest.approx(4 * first + 5 * later)
    assert stability.prompt_s(first, later, 0, 3) == first


def test_loads_with_uneven_picks() -> None:
    def loads(shares: list[list[float]]) -> list[float]:
        return stability.loads([2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [0.1, 0.1, 0.05], shares, 1)

    # alpha_i [(M + 1) lambda_i + M k sum_j lambda_j p_ji] with M = k = 1, alpha = 1, 2, 4.
    assert loads([[0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]]) == pytest.approx(
        [2 * 0.1 + 0.125, 2 * (2 * 0.1 + 0.125), 4 * 2 * 0.05]
    )
    assert loads([[0, 0, 0]] * 3) == pytest.approx([0.2, 0.4, 0.4])  # who picks nobody
    themselves, too_few, too_small = [[1.0, 0, 0]] * 3, [[0, 0.5, 0.4]] * 3, [[0.0, 1], [1.0, 0]]
    for wrong in (themselves, too_few, too_small):
        with pytest.raises(ValueError, match=r"picks|number of boards"):
            loads(wrong)


@given(st.integers(2, 8), st.integers(0, 3), st.integers(1, 7), st.floats(0.1, 5), st.floats(0, 1))
def test_uniform_picks_among_like_boards_are_theorem_1(
    n: int, layers: int, proposers: int, alpha: float, rate: float
) -> None:
    proposers = min(proposers, n - 1)
    shares = [[0 if i == j else 1 / (n - 1) for i in range(n)] for j in range(n)]
    own, helped = (part(alpha, alpha, layers) for part in (stability.own_s, stability.picked_s))
    found = stability.loads([own] * n, [helped] * n, [rate] * n, shares, proposers)
    assert found == pytest.approx([stability.load(alpha, rate, layers, proposers)] * n)
    assert stability.best_rate([alpha] * n, layers, proposers) == pytest.approx(
        stability.largest_rate([alpha], layers, proposers)
    )


# --- what no policy can exceed


def test_best_rate_of_six_unequal_boards() -> None:
    assert stability.best_rate(UNEQUAL, 1, 2) == pytest.approx(0.125)
    only_aggregate = stability.best_rate(UNEQUAL, 1, 2, own_jobs=[1] * 6)
    assert only_aggregate == pytest.approx(4 / 18)
    # The two slow ones skip proposing: those two alone are why the others wait.
    some = stability.best_rate(UNEQUAL, 1, 2, own_jobs=[2, 2, 2, 2, 1, 1])
    assert 0.125 < some < only_aggregate
    with pytest.raises(ValueError, match="6 proposers among 5"):
        stability.best_rate(UNEQUAL, 1, 6)


def _can_carry(
    rate: float,
    speeds: list[float],
    own: list[float],
    weights: list[float],
    plan: tuple[int, int],
) -> bool:
    """Min cut of the flow owners -> boards, over every set of boards on the sink's side."""
    n = len(speeds)
    layers, proposers = plan
    spare = [s / rate - o * w for s, o, w in zip(speeds, own, weights, strict=True)]
    demand = math.fsum(layers * proposers * w for w in weights)
    for size in range(n + 1):
        for cut in combinations(range(n), size):
            flow = math.fsum(spare[j] for j in cut)
            for i, weight in enumerate(weights):
                others = sum(1 for j in range(n) if j not in cut and j != i)
                flow += weight * min(layers * proposers, layers * others)
            if flow < demand * (1 - 1e-9):
                return False
    return min(spare) >= 0


@given(st.data(), alphas, st.integers(0, 3))
def test_best_rate_is_exactly_what_can_be_carried(
    data: st.DataObject, alpha: list[float], layers: int
) -> None:
    n = len(alpha)
    proposers = data.draw(st.integers(0, n - 1))
    own = data.draw(st.lists(st.floats(0.1, 4), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.floats(0.05, 3), min_size=n, max_size=n))
    best = stability.best_rate(alpha, layers, proposers, own_jobs=own, weights=weights)
    speeds = [1 / each for each in alpha]
    assert _can_carry(best * (1 - 1e-6), speeds, own, weights, (layers, proposers))
    assert not _can_carry(best * (1 + 1e-6), speeds, own, weights, (layers, proposers))


@given(alphas, st.integers(0, 3), st.integers(0, 6))
def test_best_rate_is_between_uniform_picks_and_one_pool(
    alpha: list[float], layers: int, proposers: int
) -> None:
    proposers = min(proposers, len(alpha) - 1)
    best = stability.best_rate(alpha, layers, proposers)
    assert best >= stability.largest_rate(alpha, layers, proposers) * (1 - 1e-9)
    jobs = len(alpha) * stability.jobs_per_prompt(layers, proposers)
    assert best <= sum(1 / each for each in alpha) / jobs * (1 + 1e-9)
    assert best <= 1 / (max(alpha) * (layers + 1)) * (1 + 1e-9)


def test_batches() -> None:
    # tau(b) = a b + t0: stable iff lambda (t0 / b + a) < 1, with any batch iff lambda a < 1.
    assert stability.batch_share_s(0.9, 0.1, 1) == pytest.approx(1)
    assert stability.batch_share_s(0.9, 0.1, 9) == pytest.approx(0.2)
    assert stability.batch_share_s(0.9, 0.1, math.inf) == 0.1


# --- waiting


def test_waiting() -> None:
    # M/M/1: 1 / (mu - lambda); M/D/1 waits half as long.
    assert stability.sojourn_s(0.8, 1, 2) == pytest.approx(5)
    assert stability.sojourn_s(0.8, 1, 1) == pytest.approx(3)
    assert stability.sojourn_s(1, 1, 2) == math.inf
    assert stability.latency_s(5, 0, 3) == 5
    assert stability.latency_s(5, 2, 2) == pytest.approx(5 * (1 + 2 * (1 + 1 / 2 + 1 / 3)))


# --- bounded queues


def simulated_blocking(
    load: float, draw: Callable[[], float], places: int, rng: Random, *, resume: float = 1.0
) -> float:
    """The share that is refused of many jobs."""
    now, last, refused, refusing = 0.0, 0.0, 0, False
    there = deque[float]()  # when those will leave that are there
    for _ in range(150_000):
        now += rng.expovariate(load)
        while there and there[0] <= now:
            there.popleft()
        refusing = len(there) >= (resume * places if refusing and there else places)
        if refusing:
            refused += 1
            continue
        last = max(last, now) + draw()
        there.append(last)
    return refused / 150_000


@pytest.mark.parametrize("load", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["fixed", "uniform", "lognormal", "exponential", "gamma"])
def test_blocking_against_simulation(load: float, kind: str) -> None:
    rng = Random(f"{load} {kind}")
    sigma = math.sqrt(math.log(1.5))
    scv, draw = {
        "fixed": (0, lambda: 1.0),
        "uniform": (1 / 3, lambda: rng.uniform(0, 2)),
        "lognormal": (0.5, lambda: rng.lognormvariate(-sigma * sigma / 2, sigma)),
        "exponential": (1, lambda: rng.expovariate(1)),
        "gamma": (2, lambda: rng.gammavariate(0.5, 2)),
    }[kind]
    places = stability.places_for(load, scv, 0.04, 100)
    assert places is not None
    simulated = simulated_blocking(load, draw, places, rng)
    assert stability.blocking(load, scv, places) == pytest.approx(simulated, rel=0.1)


@pytest.mark.parametrize("resume", [0.75, 0.3])
@pytest.mark.parametrize(("load", "cv", "places"), [(0.6, 1, 6), (0.8, 0, 5), (0.95, 1.5, 16)])
def test_blocking_where_a_full_queue_is_drained_first(
    load: float, cv: float, places: int, resume: float
) -> None:
    rng = Random(f"{load} {resume}")
    shape = 1 / (cv * cv) if cv else 0.0
    simulated = simulated_blocking(
        load, lambda: rng.gammavariate(shape, 1 / shape) if cv else 1.0, places, rng, resume=resume
    )
    predicted = stability.blocking(load, cv * cv, places, resume)
    assert predicted == pytest.approx(simulated, rel=0.1)
    assert predicted > 1.1 * stability.blocking(load, cv * cv, places)
    # Which takes some places more.
    assert (stability.places_for(load, cv * cv, 0.001, 200, resume) or 0) > (
        stability.places_for(load, cv * cv, 0.001, 200) or 200
    )


def test_blocking_of_the_design_notes() -> None:
    for places, share in ((4, 0.076), (8, 0.016), (16, 0.0010)):
        assert stability.two_moment_blocking(0.8, 0.25, places) == pytest.approx(share, rel=0.05)
    # It is somewhat off in the tail, which is why it is not what is used.
    assert stability.two_moment_blocking(0.6, 0, 5) > 1.25 * stability.blocking(0.6, 0, 5)


@given(small_loads, st.integers(1, 90))
def test_blocking_is_exact_where_service_is_exponential(load: float, places: int) -> None:
    weights = [load**n for n in range(places + 1)]
    exact = pytest.approx(weights[-1] / sum(weights), rel=1e-5, abs=1e-13)
    assert stability.blocking(load, 1, places) == exact
    assert stability.two_moment_blocking(load, 1, places) == exact
    assert stability.batch_blocking(load, [1.0], places) == exact


@given(small_loads, spreads)
def test_one_place_is_erlangs_loss(load: float, scv: float) -> None:
    assert stability.blocking(load, scv, 1) == pytest.approx(load / (1 + load))


@given(small_loads, spreads, st.integers(1, 120))
def test_blocking_is_a_probability_that_falls_with_places_and_rises_with_load(
    load: float, scv: float, places: int
) -> None:
    share = stability.blocking(load, scv, places)
    assert max(0, 1 - 1 / load) - 1e-12 <= share <= 1
    assert stability.blocking(load, scv, places + 1) <= share + 1e-12
    assert stability.blocking(load * 1.01, scv, places) >= share - 1e-12
    assert 0 <= stability.two_moment_blocking(load, scv, places) <= 1


def test_blocking_at_full_load_and_far_beyond() -> None:
    for near in (1 - 1e-7, 1, 1 + 1e-7):
        assert stability.two_moment_blocking(near, 0.25, 8) == pytest.approx(1.25 / 16.5, rel=1e-4)
    assert stability.blocking(1, 0.25, 8) == pytest.approx(1.25 / 16.5, rel=0.03)
    for load in (50, 1e4, 1e300):
        for scv in (0, 0.5, 1, 4):
            for formula in (stability.blocking, stability.two_moment_blocking):
                assert formula(load, scv, 30) == pytest.approx(1 - 1 / load)
    assert stability.blocking(0, 1, 3) == stability.two_moment_blocking(0, 1, 3) == 0


@given(st.floats(0.05, 1.5), spreads, st.floats(1e-6, 0.5))
def test_places_for_is_the_fewest_that_will_do(load: float, scv: float, target: float) -> None:
    found = stability.places_for(load, scv, target, 200)
    if found is None:
        assert stability.blocking(load, scv, 200) > target
        return
    assert stability.blocking(load, scv, found) <= target
    assert found == 1 or stability.blocking(load, scv, found - 1) > target


def test_the_geometric_tail_is_the_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(load, scv) for load in (0.6, 0.9, 1, 1.1) for scv in (0, 0.1, 1, 3)]
    quick = [stability.blocking(*case, 300) for case in cases]
    monkeypatch.setattr(stability, "CHAIN_PLACES", 400)
    monkeypatch.setattr(stability, "SETTLED", -1)
    assert quick == pytest.approx([stability.blocking(*case, 300) for case in cases], rel=0.005,
                                  abs=1e-11)  # fmt: skip


def test_batches_that_are_full() -> None:
    # Erlang's loss formula: two servers and no room to wait, load 1: (1/2) / (1 + 1 + 1/2).
    assert stability.batch_blocking(1, [1, 1], 2) == pytest.approx(0.2)
    # A step that takes as long for two as for one is two servers; one that takes twice is one.
    assert stability.batch_blocking(0.7, [1, 2], 6) == stability.batch_blocking(0.7, [1], 6)
    assert stability.batch_blocking(0, [1], 1) == 0


def test_all_let_in() -> None:
    assert stability.all_let_in(0.1, 2) == pytest.approx(0.81)
    assert stability.all_let_in(0.1, 0) == 1
    with pytest.raises(ValueError, match=r"probability of 1\.5"):
        stability.all_let_in(1.5, 2)


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: stability.jobs_per_prompt(-1, 2),
        lambda: stability.load(math.nan, 1, 1, 1),
        lambda: stability.largest_rate([], 1, 1),
        lambda: stability.largest_rate([0], 1, 1),
        lambda: stability.best_rate([1, 2], 1, 1, weights=[1]),
        lambda: stability.service_s(10, 10, 0, 1),
        lambda: stability.batch_share_s(1, 1, 0),
        lambda: stability.sojourn_s(1, math.inf, 1),
        lambda: stability.blocking(0.5, 1, 0),
        lambda: stability.two_moment_blocking(0.5, 1, 0),
        lambda: stability.batch_blocking(0.5, [1], 0),
        lambda: stability.blocking(0.5, -1, 3),
    ],
)
def test_nonsense_is_refused(nonsense: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"needed|boards|places"):
        nonsense()
