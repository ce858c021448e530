"""``edgemoa status``: how a board is doing, once or again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgemoa import show
from edgemoa.errors import DaemonUnreachableError

if TYPE_CHECKING:
    from edgemoa.client import Client

_HOME_AND_CLEAR = "\x1b[H\x1b[2J"


def run(
    client: Client,
    every_s: int | None,
    *,
    as_json: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print it; with ``every_s`` until somebody interrupts, a JSON object a line for scripts.

    :raises DaemonUnreachableError: there is none; a daemon that goes while it is watched is told
        of, and awaited.
    """
    status = client.get("/v1/status")
    _print(status, as_json=as_json, clear=every_s is not None)
    try:
        while every_s is not None:
            sleep(every_s)
            try:
                status = client.get("/v1/status")
            except DaemonUnreachableError as error:
                _print({"error": str(error)}, as_json=as_json, clear=True)
            else:
                _print(status, as_json=as_json, clear=True)
    except KeyboardInterrupt:
        return 0
    return 0


def _print(status: dict[str, Any], *, as_json: bool, clear: bool) -> None:
    if as_json:
        print(json.dumps(status), flush=True)
        return
    if "error" in status:
        text = f"{status['error']}; waiting for it to come back"
    else:
        text = "\n".join(lines(status))
    if clear and sys.stdout.isatty():
        text = _HOME_AND_CLEAR + text
    elif clear:
        text += "\n"
    print(text, flush=True)


def lines(status: dict[str, Any]) -> list[str]:
    """What a person wants to know of a board's status."""
    engine, peers = status["engine"], status["peers"]
    ready = "ready" if status["ready"] else "not ready"
    told = [
        f"{status['name']}  {status['id']}",
        f"model    {status['model'] or 'no model'}, {ready}, {engine['restarts']} restarts",
    ]
    told += [f"         {engine[what]}" for what in ("trouble", "note") if engine[what]]
    if status["backend"]:
        told.append(
            f"engine   {status['backend']}, {status['slots']} jobs at a time, "
            f"{status['threads']} threads, room for {status['budget_tokens']} tokens"
        )
    told += [
        f"queue    {status['running']} running, {status['waiting']} waiting, "
        f"{show.seconds(status['expected_wait_ms'])} expected wait",
        f"load     {status['utilisation']:.0%} of what this board can do, "
        f"{status['peers_utilisation']:.0%} for peers; "
        f"{status['prompts_per_min']:.1f} prompts a minute of its own",
        f"bounds   {status['prompts']} of {status['own_requests_cap']} own prompts, "
        f"{status['peer_jobs']} of {status['peer_jobs_cap']} peers' jobs",
    ]
    told += [f"         {whose}: {show.cap(cap)}" for whose, cap in status["caps"].items()]
    told += _hardware(status["hardware"])
    told += [
        f"average  {show.seconds(milliseconds)} of the model's time for a {kind}"
        for kind, milliseconds in status["service_ms"].items()
    ]
    if speed := show.speed(status["rates"]):
        told.append("speed    tokens a second, by context and jobs at a time")
        told += [f"         {line}" for line in speed.splitlines()]
    names = {peer["id"]: peer["name"] for peer in peers} | {status["id"]: "this board"}
    told.append("room     for more prompts a minute, by plan, and who limits it")
    told += [f"         {show.headroom(each, names)}" for each in status["headroom"]]
    told.append(f"peers    {sum(p['accepting'] for p in peers)} of {len(peers)} at hand")
    told += [
        f"         {peer['name']}: {peer['presence']}, {peer['waiting']} waiting, "
        f"{peer['utilisation']:.0%} loaded, {show.seconds(peer['proposal_ms'])} a proposal"
        for peer in peers
    ]
    return told


def _hardware(sensors: dict[str, Any]) -> list[str]:
    words = []
    if sensors["temperature_c"] is not None:
        words.append(f"{sensors['temperature_c']:.0f} °C")
    if sensors["throttled"]:
        words.append("slowed down by the system")
    if sensors["under_voltage"]:
        words.append("the supply is too weak")
    return [f"board    {', '.join(words)}"] if words else []
