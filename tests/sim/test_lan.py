"""Groups that watch themselves while the network, or their boards, fail."""

from __future__ import annotations

from random import Random

import pytest

from edgemoa.core.membership import Presence
from edgemoa.core.messages import Alive
from edgemoa.sim.lan import Lan

A, B, C, D, E = range(5)


def settled(boards: int, seed: int = 1, loss: float = 0.0) -> Lan:
    lan = Lan(boards, Random(seed), loss=loss)
    lan.run(20_000)
    assert lan.agrees()
    return lan


def test_the_same_seed_is_the_same_group() -> None:
    one, other = (settled(5, seed=3, loss=0.1) for _ in range(2))
    assert (one.sent, one.sent_bytes) == (other.sent, other.sent_bytes)


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("boards", [2, 5, 20])
def test_whoever_loses_its_power_is_gone_for_all_and_nobody_else_is(
    boards: int, loss: float
) -> None:
    lan = settled(boards, loss=loss)
    lan.cut_power(A)
    assert lan.run(15_000, lambda: lan.all_believe(A, Presence.GONE)) <= 10_000
    lan.run(30_000)
    assert lan.agrees()
    assert lan.false_deaths == 0
    lan.start(A)
    assert lan.run(15_000, lan.agrees) <= 10_000


def test_whose_process_dies_is_known_sooner_and_whose_stops_at_once() -> None:
    lan = settled(20)
    lan.kill(A)
    assert lan.run(15_000, lambda: lan.all_believe(A, Presence.GONE)) <= 4_000
    lan.leave(B)
    assert lan.run(15_000, lambda: lan.all_believe(B, Presence.GONE)) <= 50


@pytest.mark.parametrize("cut_ms", [3_000, 8_000, 60_000])
def test_a_partition_heals(cut_ms: int) -> None:
    lan = settled(5)
    lan.part((A, B), (C, D, E))
    lan.run(cut_ms)
    if cut_ms > 10_000:
        assert all(lan.presence(of, by) is Presence.GONE for of in (A, B) for by in (C, D, E))
        assert all(lan.presence(of, by) is Presence.GONE for of in (C, D, E) for by in (A, B))
        assert lan.presence(A, B) is lan.presence(C, E) is Presence.ALIVE
    lan.heal()
    assert lan.run(30_000, lan.agrees) <= 12_000
    lan.run(30_000)
    assert lan.agrees()


@pytest.mark.parametrize("ways", [((A, B), (B, A)), ((A, B),)], ids=["cut", "one way"])
def test_two_that_do_not_reach_each_other_but_others_are_there_for_each_other(
    ways: tuple[tuple[int, int], ...],
) -> None:
    lan = settled(5)
    lan.blocked.update(ways)
    lan.run(9_000)  # the link still stands
    lan.run(60_000)
    assert lan.agrees()
    assert lan.false_deaths == 0
    for one, other in ((A, B), (B, A)):
        node, board = lan.machines[one].node, lan.machines[other].board
        assert node is not None
        assert board not in node.members.usable()  # no answer would come, either way
    lan.heal()
    lan.run(20_000)
    assert all(len(m.node.members.usable()) == 4 for m in lan.machines if m.node)


def test_thirty_percent_of_loss_and_starved_boards_bury_nobody() -> None:
    def naps(rng: Random) -> tuple[int, int]:
        return round(rng.expovariate(1 / 4_400)), rng.randint(200, 2_000)

    lan = Lan(10, Random(7), loss=0.3, naps=naps)
    lan.run(300_000)
    assert lan.false_deaths == 0
    assert lan.sent > 10 * 300


def test_a_board_that_comes_and_goes_leaves_no_trouble() -> None:
    lan = settled(5, loss=0.05)
    rng = Random(3)
    for _ in range(20):
        rng.choice([lan.kill, lan.cut_power, lan.leave])(A)
        lan.run(rng.randint(100, 9_000))
        lan.start(A)
        lan.run(rng.randint(100, 9_000))
    lan.run(30_000)
    assert lan.agrees()
    assert lan.false_deaths == 0
    boots = {m.node.members.peers[lan.machines[A].board].boot for m in lan.machines[1:] if m.node}
    assert boots == {21}


def test_an_idle_group_says_little() -> None:
    lan = settled(20)
    lan.run(60_000)
    before = lan.sent_bytes
    lan.run(60_000)
    assert (lan.sent_bytes - before) / 60 / 20 < 300


def test_reports_reach_everybody_however_much_is_lost() -> None:
    lan = settled(8, loss=0.3)
    node = lan.machines[A].node
    assert node is not None
    lan.lose_engine(A)
    lan.run(5_000)
    seen = [m.node.members.peers[node.board_id].report for m in lan.machines[1:] if m.node]
    assert all(isinstance(report, Alive) and not report.accepting for report in seen)
    assert len(seen) == 7
