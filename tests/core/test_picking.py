"""Which peers are asked."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import get_args

import pytest

from edgemoa.core.load import PRIOR_SERVICE_MS
from edgemoa.core.messages import Alive, BoardId
from edgemoa.core.picking import Outlook, Pick, choose

BOARDS = [BoardId(f"b{i}") for i in range(6)]


def picks(pick: Pick, outlooks: dict[BoardId, Outlook], proposers: int = 2) -> Counter[BoardId]:
    chance, counted = Random(3), Counter[BoardId]()
    for _ in range(3_000):
        chosen = choose(pick, BOARDS, proposers, chance, outlooks.__getitem__)[:proposers]
        boards = [each.board for each in chosen]
        assert len(set(boards)) == proposers
        counted.update(boards)
    return counted


def outlooks(**changes: list[float]) -> dict[BoardId, Outlook]:
    return {
        board: Outlook(
            board,
            **{
                "wait_ms": 0.0,
                "proposal_ms": 1_000.0,
                "aggregation_ms": 2_000.0,
                "utilisation": 0.5,
                **{name: values[i] for name, values in changes.items()},
            },
        )
        for i, board in enumerate(BOARDS)
    }


@pytest.mark.parametrize("pick", get_args(Pick))
def test_boards_that_are_alike_are_picked_alike(pick: Pick) -> None:
    counted = picks(pick, outlooks())
    assert all(900 < n < 1_100 for n in counted.values())


def test_by_capacity_boards_are_picked_by_what_they_have_to_spare() -> None:
    counted = picks("capacity", outlooks(proposal_ms=[1e3, 1e3, 1e3, 2e3, 2e3, 4e3]), 1)
    assert counted[BOARDS[0]] / counted[BOARDS[3]] == pytest.approx(2, rel=0.2)
    assert counted[BOARDS[0]] / counted[BOARDS[5]] == pytest.approx(4, rel=0.2)
    busy = picks("capacity", outlooks(utilisation=[0.5, 0.5, 0.5, 0.9, 1.0, 3.0]), 1)
    assert busy[BOARDS[0]] / busy[BOARDS[3]] == pytest.approx(5, rel=0.3)
    assert 0 < busy[BOARDS[5]] < 150  # a report may be old


def test_the_shortest_is_who_would_be_done_first() -> None:
    counted = picks("shortest", outlooks(wait_ms=[0, 5e3, 5e3, 5e3, 5e3, 9e3]), 1)
    assert counted[BOARDS[0]] > 1_800  # wherever it was among those that were looked at
    assert counted[BOARDS[5]] == 0
    slow = picks("shortest", outlooks(proposal_ms=[1e3, 1e3, 1e3, 1e3, 1e3, 6e3]), 2)
    assert slow[BOARDS[5]] == 0


def test_a_report_is_read_with_what_was_given_since() -> None:
    alive = Alive(1, 7, "b", True, "m", 1, 1, 1_500, 1_000, 2_500, 800)
    outlook = Outlook.of(BOARDS[0], alive, 2)
    assert (outlook.wait_ms, outlook.done_ms(1), outlook.done_ms(2)) == (3_500, 4_500, 6_000)
    assert outlook.spare == pytest.approx(0.2 / 1_000)
    unknown = Outlook.of(BOARDS[0], Alive(1, 7, "b", True, "m", 1, 1, 1_500), 0)
    assert unknown.proposal_ms == unknown.aggregation_ms == PRIOR_SERVICE_MS
