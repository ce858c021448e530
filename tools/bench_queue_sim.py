"""How fast the simulator is: events per second on one core, and a thousand boards for an hour."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from edgemoa.sim.scenario import Scenario
from edgemoa.sim.world import World

BUSY = Scenario(boards=20, seconds=3_000, prompts_per_s=0.1, service_s=(1.0, 1.0, 2.0),
                reports="table")  # fmt: skip
# A thousand users who ask every five minutes; a job takes five seconds of a model.
CROWD = Scenario(boards=1_000, seconds=3_600, prompts_per_s=1 / 300, service_s=(5.0,),
                 reports="table")  # fmt: skip


def measure(*, crowd: bool = True, node: dict[str, Any] | None = None) -> dict[str, float]:
    """Events per second with the daemon's own settings, or with other settings of the ``node``;
    and the seconds that a thousand boards take for an hour."""
    told: dict[str, float] = {}
    for name, scenario in (("events", BUSY), ("crowd", CROWD)):
        if name == "crowd" and not crowd:
            continue
        world = World(replace(scenario, node=node or {}), seed=1, checks=False)
        started_s = time.perf_counter()
        outcome = world.run()
        took_s = time.perf_counter() - started_s
        if name == "events":
            told["events_per_s"] = outcome.events / took_s
        else:
            told["crowd_s"], told["crowd_asked"] = took_s, outcome.asked
            told["crowd_events"] = outcome.events
    return told


if __name__ == "__main__":
    for key, value in measure().items():
        print(f"{key:20} {value:12.1f}")
