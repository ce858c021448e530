"""The table of boards: what is heard and said of them, and who can be picked."""

from __future__ import annotations

import pytest

from edgemoa.core.membership import HEARD, LOST, SILENT, TRANSITIONS, Membership, Presence
from edgemoa.core.messages import Alive, BoardId

B = BoardId("b")


def alive(sequence: int = 1, boot: int = 1, *, accepting: bool = True) -> Alive:
    return Alive(boot, sequence, "bee", accepting, "m", 0, 0, 0)


def known() -> Membership:
    members = Membership()
    members.pair(B, "")
    return members


def usable() -> Membership:
    members = known()
    members.linked(B, 1)
    members.heard(B, 0)
    members.report(B, alive(), 0)
    assert members.usable() == [B]
    return members


def test_a_board_is_picked_once_it_was_heard_and_has_said_that_it_takes_work() -> None:
    members = known()
    assert members.usable() == []
    members.heard(B, 0)
    assert members.usable() == []
    members.report(B, alive(), 0)
    assert members.usable() == [B]
    members.report(B, alive(2, accepting=False), 0)
    assert members.usable() == []


def test_a_board_that_is_not_within_reach_or_not_sure_to_be_is_not_picked() -> None:
    members = usable()
    members.unlinked(B)
    assert members.usable() == []
    members.vouched(B)
    assert members.peers[B].there
    assert members.usable() == []
    members = usable()
    members.peers[B].mute = True
    assert members.usable() == []
    members.linked(B, 1)
    assert members.usable() == [B]
    for event, presence in ((SILENT, Presence.SUSPECT), (LOST, Presence.GONE)):
        members.move(B, event)
        assert members.peers[B].presence is presence
        assert members.usable() == []
        members.heard(B, 1)
        assert members.usable() == [B]


def test_an_older_report_changes_nothing_and_a_restart_is_noticed() -> None:
    members = known()
    assert not members.report(B, alive(5), 10)
    assert not members.report(B, alive(4, accepting=False), 20)
    assert (members.peers[B].report, members.peers[B].report_ms) == (alive(5), 10)
    members.peers[B].incarnation = 3
    assert members.report(B, alive(1, boot=2), 30)
    assert members.peers[B].incarnation == 0
    # A storage image that was rolled back: the boot count went back, and the board is believed.
    assert members.report(B, alive(1, boot=1, accepting=False), 40)
    assert members.peers[B].report == alive(1, boot=1, accepting=False)


def test_a_link_says_which_boot_is_there() -> None:
    members = usable()
    assert not members.linked(B, 1)
    assert members.usable() == [B]
    assert members.linked(B, 2)
    assert members.peers[B].report is None  # it was of the boot before


def test_good_bye_is_believed_at_once_but_not_one_of_an_earlier_boot() -> None:
    members = known()
    members.report(B, alive(boot=7), 0)
    members.heard(B, 0)
    assert not members.left(B, 6)
    assert members.usable() == [B]
    assert members.left(B, 7)
    assert not members.left(B, 7)
    assert members.usable() == []
    assert not members.heard(B, 1)  # something that it had said before arrives late
    members.report(B, alive(9, boot=7), 1)
    assert members.peers[B].presence is Presence.GONE
    assert members.usable() == []
    members.linked(B, 8)
    assert members.heard(B, 2)
    members.report(B, alive(boot=8), 2)
    assert members.usable() == [B]


def test_names_are_for_people() -> None:
    members = known()
    assert members.name(B) == "b"
    members.report(B, alive(), 0)
    assert members.name(B) == "bee"
    assert members.name(BoardId("stranger-than-fiction")) == "strange"


def test_a_name_cannot_act_on_a_terminal() -> None:
    members = known()
    members.report(B, Alive(1, 1, "b\x1b[31m\ne", True, "m", 0, 0, 0), 0)
    assert members.name(B) == "b[31me"


@pytest.mark.parametrize("state", Presence)
def test_a_board_can_be_heard_or_lost_at_any_time_and_suspected_only_while_it_is_there(
    state: Presence,
) -> None:
    assert TRANSITIONS[state, HEARD] is Presence.ALIVE
    assert TRANSITIONS[state, LOST] is Presence.GONE
    assert ((state, SILENT) in TRANSITIONS) == (state in (Presence.ALIVE, Presence.SUSPECT))
