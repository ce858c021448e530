"""The whole protocol under faults, on a virtual clock."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from edgemoa.core.messages import BoardId, Part
from edgemoa.core.node import Node
from edgemoa.sim.scenario import FREE, PAPER
from edgemoa.sim.world import InvariantError, Scenario, World

STORM = Scenario(
    boards=50,
    seconds=60,
    prompts_per_s=0.03,
    layers=2,
    proposers=3,
    loss=0.1,
    duplicates=0.1,
    false_alarms=0.02,
    crashes_per_s=0.005,
    stops_per_s=0.002,
    engine_crashes_per_s=0.01,
    failures=0.02,
    cancels=0.05,
    layer_deadline_s=20,
    deadline_s=60,
)


def test_fifty_boards_in_a_storm_bit_for_bit() -> None:
    first = World(STORM, seed=7).run()
    assert first.answered > 40
    assert first.refused == 0
    assert first.degraded > 0  # the faults were felt
    # Another process, other hash seeds: the same bits.
    again = subprocess.run(
        [sys.executable, "-c", _AGAIN],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
    ).stdout.strip()
    assert again == first.digest


_AGAIN = """
from tests.sim.test_world import STORM
from edgemoa.sim.scenario import FREE, PAPER
from edgemoa.sim.world import World
print(World(STORM, seed=7).run().digest)
"""


def test_another_seed_is_another_run() -> None:
    small = replace(STORM, boards=5, seconds=20)
    assert World(small, 1).run().digest != World(small, 2).run().digest


@pytest.mark.parametrize("seed", range(60))
def test_invariants_hold_whatever_the_faults(seed: int) -> None:
    chance = Random(seed)
    pick = chance.choice
    World(
        Scenario(
            boards=pick([1, 2, 3, 5, 10]),
            seconds=120,
            prompts_per_s=pick([0.02, 0.1, 0.5, 2]),
            layers=chance.randint(0, 3),
            proposers=chance.randint(0, 5),
            service_s=pick([(1.0,), (0.2, 5.0), (3.0,)]),
            loss=pick([0, 0.1, 0.4, 0.9]),
            duplicates=pick([0, 0.3]),
            false_alarms=pick([0, 0.1]),
            crashes_per_s=pick([0, 0.02, 0.1]),
            stops_per_s=pick([0, 0.02]),
            engine_crashes_per_s=pick([0, 0.05, 0.5]),
            failures=pick([0, 0.1, 0.9]),
            cancels=pick([0, 0.2]),
            layer_deadline_s=pick([3, 30]),
            deadline_s=pick([10, 90]),
            quorum=chance.randint(0, 3),
            own_requests=pick([1, 4, 16]),
            peer_jobs=pick([0, 1, 4, 32]),
            slots=pick([1, 2, 4]),
            node=pick(
                [
                    {},
                    {"aggregator": "auto"},
                    {"aggregator": "strongest", "own_proposal": "always"},
                    {"pick": "capacity", "promise_ms": 15_000},
                    {"discipline": "fcfs", "pick": "uniform"},
                ]
            ),
            streams=seed % 2 == 1,
        ),
        seed,
    ).run()


def test_answers_and_proposals_are_told_of_in_parts() -> None:
    """Nothing is mixed, whatever is lost or comes twice; and where nobody asks, nothing is told."""
    told = []

    def count(self: Node, sender: BoardId, part: Part, now_ms: int) -> None:
        told.append(part)
        really(self, sender, part, now_ms)

    really = Node._part_arrived
    node = {"aggregator": "strongest", "own_proposal": "always"}
    streaming = replace(
        STORM, boards=6, prompts_per_s=0.1, service_s=(0.2, 5.0), streams=True, node=node
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "_part_arrived", count)
        for seed in range(3):
            assert World(streaming, seed).run().answered > 10
        assert 3 in {part.layer for part in told}  # of two, and the answer
        told.clear()
        World(replace(streaming, node={}), 1).run()
        assert {part.layer for part in told} == {1, 2}
        told.clear()
        World(replace(streaming, streams=False), 1).run()
        assert not told


def test_what_is_called_off_stops_everywhere() -> None:
    """On a network that loses nothing, a proposer hears within moments that nobody waits."""
    calm = Scenario(boards=6, seconds=300, prompts_per_s=0.05, service_s=(8.0,), quorum=2,
                    cancels=0.5)  # fmt: skip
    for seed in range(5):
        outcome = World(calm, seed).run()
        assert outcome.cancelled > 5
        assert outcome.left_out > 5  # by the quorum


def test_theorem_1_below_the_boundary_queues_are_bounded_and_above_they_grow() -> None:
    """alpha ((k+1) M + 1) lambda < 1 (arXiv 2412.21200, Theorem 1); here alpha = 1 s."""
    layers, proposers = 1, 2
    boundary = 1 / ((proposers + 1) * layers + 1)
    calm = Scenario(boards=6, seconds=1_200, layers=layers, proposers=proposers,
                    own_requests=FREE, peer_jobs=FREE, layer_deadline_s=FREE,
                    deadline_s=FREE, node=PAPER)  # fmt: skip
    below = World(replace(calm, prompts_per_s=0.7 * boundary), 1).run()
    above = World(replace(calm, prompts_per_s=1.3 * boundary), 1).run()
    assert below.utilisation == pytest.approx(0.7, abs=0.05)
    assert below.mean_queue < 5
    assert above.mean_queue > 10 * below.mean_queue


def test_a_broken_invariant_is_noticed_and_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A node that takes one job more than its cap allows.
    monkeypatch.setattr("edgemoa.core.node.Node._peers_refusal", lambda *_: "")
    crowded = replace(STORM, boards=4, peer_jobs=1, prompts_per_s=0.5)
    with pytest.raises(InvariantError, match=r"seed 3, at \d+ ms"):
        World(crowded, 3).run()
