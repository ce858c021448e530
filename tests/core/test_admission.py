"""Caps, and the ladder below a request."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core import stability
from edgemoa.core.admission import (
    BLOCKING,
    DESIGN_UTILISATION,
    FULL,
    RESUME,
    Cap,
    Grant,
    Ladder,
    Plan,
    cap,
    grant_anyway,
    headroom,
    rungs,
)
from edgemoa.core.messages import BoardId
from edgemoa.core.picking import Outlook

ME = BoardId("me")


def outlook(
    board: str = "me", wait_ms: float = 0, rho: float = 0.5, alpha_ms: float = 1_000
) -> Outlook:
    return Outlook(BoardId(board), wait_ms, alpha_ms, 2 * alpha_ms, rho)


def peers(n: int, **changes: Any) -> list[Outlook]:
    return [outlook(f"p{i}", **changes) for i in range(n)]


def granted(
    ladder: Ladder,
    own: Outlook,
    others: list[Outlook],
    asked: Plan = Plan(2, 3, True),  # noqa: B008 - frozen
    *,
    prompts_per_s: float = 0.0,
    promise_s: float = 1e6,
) -> Grant:
    return ladder.grant(
        asked,
        own,
        others,
        prompts_per_ms=prompts_per_s / 1000,
        peers_utilisation=0.2,
        promise_ms=promise_s * 1000,
    )


def bound(**changes: Any) -> Cap:
    figures = {
        "service_ms": 1_000.0, "scv": 1.0, "slots": 1, "promise_ms": 1_000_000,
        "budget_bytes": 1 << 30, "usual_bytes": 1_000.0, "setting": None,
    }  # fmt: skip
    return cap(**{**figures, **changes})


def test_a_cap_is_the_least_of_its_reasons() -> None:
    by_blocking = bound()
    assert by_blocking.requests == by_blocking.blocking
    assert stability.blocking(DESIGN_UTILISATION, 1.0, by_blocking.blocking, RESUME) <= BLOCKING
    assert stability.blocking(DESIGN_UTILISATION, 1.0, by_blocking.blocking - 1, RESUME) > BLOCKING
    assert bound(promise_ms=5_500).requests == 5
    assert bound(usual_bytes=2.0**27).requests == 8
    assert bound(setting=3).requests == 3
    assert bound(setting=0).requests == 0
    assert bound(setting=10_000).requests == by_blocking.requests
    assert bound(promise_ms=1, budget_bytes=1).requests == 1  # never none by itself
    assert bound(scv=0.0).blocking < by_blocking.blocking < bound(scv=3.0).blocking
    assert bound(slots=8).blocking == by_blocking.blocking + 7


def test_rungs_go_down_by_proposers_then_by_layers() -> None:
    assert list(rungs(2, 2)) == [(2, 2), (2, 1), (1, 2), (1, 1), (0, 0)]
    work = [stability.jobs_per_prompt(m, k) for m, k in rungs(3, 3)]
    assert work[-1] == 1
    assert all(later <= 2 * sooner for sooner, later in pairwise(work))


def test_idle_boards_give_what_was_asked_for() -> None:
    grant = granted(Ladder(1e9), outlook(), peers(3))
    assert (grant.plan, grant.why) == (Plan(2, 3), "")


def test_too_few_boards_give_fewer_proposers() -> None:
    grant = granted(Ladder(1e9), outlook(), peers(2))
    assert grant.plan == Plan(2, 2)
    assert "2 at hand" in grant.why
    alone = granted(Ladder(1e9), outlook(), [])
    assert alone.plan == Plan(0, 0)
    assert "no other board" in alone.why


def test_full_boards_are_left_alone() -> None:
    full = outlook("full", wait_ms=5_000, rho=1.2)
    grant = granted(Ladder(1e9), outlook(), [*peers(2), full])
    assert grant.plan == Plan(2, 2)
    assert "1 of 3 boards are full" in grant.why
    # A burst alone is no reason, nor is a load that does not show.
    assert granted(Ladder(1e9), outlook(), [*peers(2), outlook("b", 5_000, 0.5)]).plan == Plan(2, 3)
    assert granted(Ladder(1e9), outlook(), [*peers(2), outlook("b", 500, 1.2)]).plan == Plan(2, 3)


def test_a_long_queue_is_full_whatever_the_rates() -> None:
    ladder = Ladder(40_000)
    assert not ladder.is_full(outlook("p", 4_900, 0.1))
    assert ladder.is_full(outlook("p", 5_100, 0.1))
    assert ladder.is_full(outlook("p", 2_600, 0.1))
    assert not ladder.is_full(outlook("p", 2_400, 0.1))


def test_a_layer_has_to_fit_into_its_part_of_the_promise() -> None:
    asked = Plan(1, 2, True)
    late = [outlook("p", 0), outlook("q", 14_000)]  # 15 s of 30, of which a layer has a half
    assert granted(Ladder(1e9), outlook(), late, asked, promise_s=30).plan == Plan(1, 1)
    assert granted(Ladder(1e9), outlook(), late, asked, promise_s=50).plan == Plan(1, 2)


def test_a_board_is_not_full_one_moment_and_free_the_next() -> None:
    ladder = Ladder(1e9)
    turns = 0
    was = False
    chance = Random(4)
    for _ in range(500):  # around the threshold
        now = ladder.is_full(outlook("p", 2_000 + chance.uniform(-300, 300), FULL))
        turns += now != was
        was = now
    assert turns <= 1
    assert not ladder.is_full(outlook("p", 900, FULL))


def test_a_full_owner_goes_down_as_far_as_its_own_work_must() -> None:
    ladder, own = Ladder(1e9), outlook(wait_ms=9_000, rho=1.5)
    # Own work of M2: 1 + 2 + 2 s, of M1: 1 + 2 s, alone: 1 s; .2 is for its peers.
    assert granted(ladder, own, peers(3), prompts_per_s=0.14).plan == Plan(2, 3)
    assert granted(ladder, own, peers(3), prompts_per_s=0.24).plan == Plan(1, 3)
    grant = granted(ladder, own, peers(3), prompts_per_s=0.6)
    assert grant.plan == Plan(0, 0)
    assert "loaded" in grant.why


def test_a_full_or_slow_owner_leaves_proposing_to_its_peers_where_it_may() -> None:
    slow = outlook(alpha_ms=4_000)
    assert granted(Ladder(1e9), slow, peers(3), Plan(1, 2, False)).plan == Plan(1, 2, False)
    assert granted(Ladder(1e9), slow, peers(3), Plan(1, 2, True)).plan == Plan(1, 2, True)
    assert granted(Ladder(1e9), slow, peers(3), Plan(1, 1, False)).plan == Plan(1, 1, True)
    assert granted(Ladder(1e9), outlook(), peers(3), Plan(1, 2, False)).plan == Plan(1, 2, True)
    full = outlook(wait_ms=9_000, rho=1.5)
    assert granted(Ladder(1e9), full, peers(3), Plan(1, 2, False), prompts_per_s=0.35).plan == Plan(
        1, 2, False
    )


def test_what_would_be_too_late_is_not_granted() -> None:
    assert granted(Ladder(1e9), outlook(), peers(3, wait_ms=60_000), promise_s=1_000).plan == Plan(
        2, 3
    )
    grant = granted(Ladder(1e9), outlook(), peers(3, wait_ms=60_000), promise_s=190)
    assert grant.plan == Plan(1, 3)
    assert "promised" in grant.why
    assert granted(Ladder(1e9), outlook(), peers(3, wait_ms=60_000), promise_s=30).plan == Plan(
        0, 0
    )


def test_predictions_are_believed_as_far_as_they_come_true() -> None:
    ladder = Ladder(1e9)
    for _ in range(50):
        ladder.observe(1_000, 1_000)
    assert ladder.doubt == pytest.approx(1, abs=0.01)
    for i in range(100):
        ladder.observe(1_000, 2_000 + 500 * (-1) ** i)
    assert 2.5 < ladder.doubt < 4
    assert ladder.likely_ms(1_000) == pytest.approx(2_000, rel=0.1)


@given(
    st.integers(0, 4), st.integers(0, 6), st.booleans(),
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 5), st.floats(1, 1e5)), max_size=8),
    st.tuples(st.floats(0, 1e6), st.floats(0, 5), st.floats(1, 1e5)),
    st.floats(0, 10), st.floats(1, 1e4),
)  # fmt: skip
def test_whatever_the_load_there_is_a_plan_and_never_a_larger_one(  # noqa: PLR0917 - drawn
    layers: int, proposers: int, always: bool, others: list[tuple[float, float, float]],
    own: tuple[float, float, float], prompts_per_s: float, promise_s: float,
) -> None:  # fmt: skip
    asked = Plan(layers, proposers, always) if layers and proposers else Plan(0, 0)
    candidates = [outlook(f"p{i}", *figures) for i, figures in enumerate(others)]
    grant = granted(
        Ladder(1e9),
        outlook("me", *own),
        candidates,
        asked,
        prompts_per_s=prompts_per_s,
        promise_s=promise_s,
    )
    plan = grant.plan
    assert plan.layers <= asked.layers
    assert plan.proposers <= min(asked.proposers, len(candidates))
    assert bool(plan.layers) == bool(plan.proposers)
    assert bool(grant.why) == ((plan.layers, plan.proposers) != (asked.layers, asked.proposers))
    assert plan.own or plan.proposers > 1
    anyway = grant_anyway(asked, outlook("me", *own), candidates).plan
    assert stability.jobs_per_prompt(plan.layers, plan.proposers) <= stability.jobs_per_prompt(
        anyway.layers, anyway.proposers
    )


def test_headroom_is_the_per_device_condition_solved_for_the_rate() -> None:
    own, others = outlook(rho=0.4), [outlook("a", rho=0.5), outlook("b", rho=0.9)]
    alone = headroom(Plan(0, 0), own, others)
    assert alone.prompts_per_min == pytest.approx(0.6 * 60)
    one = headroom(Plan(1, 1), own, others)  # own: 3 s of .6; peers: .5 + .1 a second
    assert one.prompts_per_min == pytest.approx(0.2 * 60)
    assert one.limited_by == (ME,)
    both = headroom(Plan(1, 2), own, others)  # each prompt needs both of them
    assert both.prompts_per_min == pytest.approx(0.1 * 60)
    assert both.limited_by == ("b",)
    assert headroom(Plan(0, 0), outlook(rho=1.5), []).prompts_per_min < 0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(100, 1e4)), min_size=1, max_size=7), st.data())
def test_headroom_of_peers_is_what_some_choice_can_carry(
    figures: list[tuple[float, float]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(figures)))
    others = [outlook(f"p{i}", 0, rho, alpha) for i, (rho, alpha) in enumerate(figures)]
    rate = headroom(Plan(1, k), outlook(rho=0, alpha_ms=0.001), others).prompts_per_min / 60_000
    room = [max(1 - each.utilisation, 0) / each.proposal_ms for each in others]
    # Boards take what they can, each at most once a prompt: just enough at that rate, not above.
    assert sum(min(r, rate) for r in room) >= rate * k * (1 - 1e-9)
    more = rate * 1.01 + 1e-9
    assert sum(min(r, more) for r in room) < more * k or rate > 100
