"""Who is there, by what is heard."""

from __future__ import annotations

from edgemoa.core.membership import (
    GONE_AFTER_MS,
    SUSPECT_AFTER_MS,
    TRANSITIONS,
    Membership,
    Presence,
)
from edgemoa.core.messages import Alive, BoardId

B = BoardId("b")


def test_a_name_cannot_act_on_a_terminal() -> None:
    members = known()
    members.report(B, Alive(1, 1, "b\x1b[31m\ne", True, "m", 0, 0, 0))
    assert members.name(B) == "b[31me"


def alive(sequence: int = 1, boot: int = 1, *, accepting: bool = True) -> Alive:
    return Alive(boot, sequence, "bee", accepting, "m", 0, 0, 0)


def known() -> Membership:
    members = Membership()
    members.pair(B, "")
    return members


def test_a_board_is_picked_only_while_it_is_heard() -> None:
    members = known()
    assert members.usable() == []
    members.heard(B, 0)
    assert members.usable() == []  # present, but has not said that it takes work
    members.report(B, alive())
    assert members.usable() == [B]
    assert members.sweep(SUSPECT_AFTER_MS) == []
    assert members.peers[B].presence is Presence.SUSPECT
    assert members.usable() == []
    members.heard(B, SUSPECT_AFTER_MS + 1)
    assert members.usable() == [B]
    assert members.sweep(SUSPECT_AFTER_MS + 1 + GONE_AFTER_MS) == [B]
    assert members.sweep(SUSPECT_AFTER_MS + 2 + GONE_AFTER_MS) == []  # news only once
    assert members.peers[B].presence is Presence.GONE


def test_a_board_whose_model_is_away_is_not_picked() -> None:
    members = known()
    members.heard(B, 0)
    members.report(B, alive(accepting=False))
    assert members.usable() == []


def test_an_older_report_changes_nothing_and_a_restart_is_noticed() -> None:
    members = known()
    assert not members.report(B, alive(5))
    assert not members.report(B, alive(4, accepting=False))
    assert members.peers[B].report == alive(5)
    assert members.report(B, alive(1, boot=2))
    # A storage image that was rolled back: the boot count went back, and the board is believed.
    assert members.report(B, alive(1, boot=1, accepting=False))
    assert members.peers[B].report == alive(1, boot=1, accepting=False)


def test_good_bye_is_believed_at_once_but_not_one_of_an_earlier_boot() -> None:
    members = known()
    members.heard(B, 0)
    members.report(B, alive(boot=7))
    assert not members.left(B, 6)
    assert members.usable() == [B]
    assert members.left(B, 7)
    assert members.usable() == []
    members.heard(B, 1)  # something that it had said before arrives late
    assert members.usable() == []


def test_names_are_for_people() -> None:
    members = known()
    assert members.name(B) == "b"
    members.report(B, alive())
    assert members.name(B) == "bee"
    assert members.name(BoardId("stranger-than-fiction")) == "strange"


def test_every_event_is_answered_from_every_state_that_it_can_meet() -> None:
    for state in Presence:
        assert (state, "heard") in TRANSITIONS
        assert (state, "left") in TRANSITIONS
