"""Proposals become prompts and answers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.events import Granted, Request
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.moa import (
    FRAME_TOKENS,
    TRANSITIONS,
    Draft,
    Give,
    IllegalTransitionError,
    Room,
    Run,
    State,
    Synthesis,
    Write,
    fit,
    without_reasoning,
)

A, B, C = BoardId("a"), BoardId("b"), BoardId("c")
ASK = (ChatMessage("system", "Be brief."), ChatMessage("user", "Why is the sky blue?"))
PLENTY = Room(10_000)


def draft(board: BoardId, text: str, tokens: int = 10) -> Draft:
    return Draft(board, text, tokens, own=board == A)


def run() -> Run:
    request = Request("request-1", ASK, 20, 2, 2, Sampling(), 60_000)
    return Run(request, Granted(2, 2), accepted_ms=0, deadline_ms=90_000, promised_ms=60_000)


def test_the_first_layer_gets_the_conversation_as_it_is() -> None:
    assert Synthesis().propose(ASK, [], PLENTY) == ASK


def test_the_conversation_comes_first_then_the_proposals_in_order() -> None:
    drafts = [draft(B, "scattering"), draft(A, "Rayleigh")]
    step = Synthesis().conclude(ASK, drafts, PLENTY)
    assert isinstance(step, Write)
    assert step.drafts == 2
    *before, proposals, last = step.messages
    assert tuple(before) == ASK  # what the model has read already
    assert proposals == ChatMessage("assistant", "scattering\n\n---\n\nRayleigh")
    assert last.role == "user"
    assert last.content.endswith(ASK[1].content)


def test_what_comes_next_begins_with_the_proposals_so_far() -> None:
    drafts = [draft(B, "scattering"), draft(A, "Rayleigh"), draft(C, "no idea")]
    for next_messages in (
        Synthesis().conclude(ASK, drafts, PLENTY).messages,  # type: ignore[union-attr]
        Synthesis().propose(ASK, drafts, PLENTY),
    ):
        for arrived in (1, 2):
            *before, last = Synthesis().begin(ASK, drafts[:arrived], PLENTY)
            assert tuple(before) == ASK
            assert last.role == next_messages[len(ASK)].role
            assert next_messages[len(ASK)].content.startswith(last.content)
    assert Synthesis().begin(ASK, drafts, Room(0)) == ()


def test_a_long_request_is_not_repeated() -> None:
    long = (ChatMessage("user", "x" * 2_000),)
    step = Synthesis().conclude(long, [draft(B, "y"), draft(C, "z")], PLENTY)
    assert isinstance(step, Write)
    assert sum(m.content.count("x" * 2_000) for m in step.messages) == 1


def test_the_instruction_can_be_replaced_and_proposals_cannot_fill_it() -> None:
    step = Synthesis("Pick: {request}").conclude(ASK, [draft(B, "{request}")], PLENTY)
    assert isinstance(step, Write)
    assert step.messages[-2].content == "{request}"
    assert step.messages[-1].content == f"Pick: {ASK[1].content}"


def test_the_owners_proposal_alone_is_the_answer_and_a_peers_alone_is_not() -> None:
    assert isinstance(Synthesis().conclude(ASK, [draft(A, "mine")], PLENTY), Give)
    assert isinstance(Synthesis().conclude(ASK, [draft(B, "theirs")], PLENTY), Write)
    assert Synthesis().conclude(ASK, [], PLENTY) == Write(ASK, 0)


def test_falling_back_prefers_the_owners_greedy_proposal() -> None:
    mine, theirs = draft(A, "mine"), draft(B, "theirs")
    assert Synthesis().fall_back([theirs, mine]) is mine
    assert Synthesis().fall_back([theirs]) is theirs
    assert Synthesis().fall_back([]) is None


@given(
    tokens=st.lists(st.integers(1, 400), max_size=8),
    room=st.integers(0, 2_000),
    room_bytes=st.integers(0, 4_000),
)
def test_what_is_fitted_fits(tokens: list[int], room: int, room_bytes: int) -> None:
    drafts = [Draft(BoardId(str(i)), "word " * n, n, own=False) for i, n in enumerate(tokens)]
    kept = fit(drafts, Room(room, room_bytes))
    assert sum(d.tokens for d in kept) + FRAME_TOKENS * len(kept) <= room or not kept
    assert sum(len(d.text.encode()) for d in kept) <= room_bytes + len(kept) * len(" […]".encode())
    assert [d.board for d in kept] == [d.board for d in drafts[: len(kept)]]


def test_only_the_longest_are_shortened() -> None:
    kept = fit(
        [draft(A, "short", 5), draft(B, "word " * 400, 400)], Room(5 + 100 + 3 * FRAME_TOKENS)
    )
    assert kept[0].text == "short"
    assert kept[1].tokens == 100
    assert kept[1].text.endswith(" […]")
    assert len(kept[1].text.split()) == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain", "plain"),
        ("<think>hm\nhm</think>\n\nYes.", "Yes."),
        ("a<reasoning>b</reasoning>c", "ac"),
        ("<think>never closed", ""),
        ("1 < 2 and <b>3</b>", "1 < 2 and <b>3</b>"),
    ],
)
def test_reasoning_is_not_passed_on(text: str, left: str) -> None:
    assert without_reasoning(text) == left


@pytest.mark.parametrize(("start", "end"), list(itertools.product(State, State)))
def test_a_prompt_moves_only_as_the_table_says(start: State, end: State) -> None:
    prompt = run()
    prompt.state = start
    if end in TRANSITIONS[start]:
        prompt.move(end)
        assert prompt.state is end
    else:
        with pytest.raises(IllegalTransitionError):
            prompt.move(end)
        assert prompt.state is start


def test_a_layer_leaves_time_for_what_follows_it() -> None:
    prompt = run()
    prompt.begin_layer([A, B], 0, layer_deadline_ms=120_000)
    assert prompt.layer_deadline_ms == 20_000  # a third: two layers and the aggregation
    prompt.begin_layer([A, B], 30_000, layer_deadline_ms=120_000)
    assert prompt.layer_deadline_ms == 45_000  # half of what is left
    prompt = run()
    prompt.begin_layer([A, B], 0, layer_deadline_ms=5_000)
    assert prompt.layer_deadline_ms == 5_000


def test_a_layer_is_settled_by_all_or_by_the_quorum() -> None:
    prompt = run()
    prompt.begin_layer([A, B, C], 0, 1_000)
    assert not prompt.settled(quorum=2)
    prompt.leave_out(C, "c", "gone")
    prompt.drafts.append(draft(A, "x"))
    prompt.pending.discard(A)
    assert not prompt.settled(quorum=0)
    assert not prompt.settled(quorum=2)
    assert prompt.settled(quorum=1)
    prompt.pending.discard(B)
    assert prompt.settled(quorum=0)
