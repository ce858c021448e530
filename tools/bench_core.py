"""Measures the figures of the main job, several times where they are noisy, and says the median.

Each figure has a reach; ``--check`` exits 1 if one falls short and names those on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_core_models

from edgemoa.demo import LocalBoard, group, wait_until_ready
from edgemoa.models.library import ModelLibrary, default_model_dir
from edgemoa.models.progress import silent
from edgemoa.models.pull import ensure
from edgemoa.show import follow

MODEL = "smollm2-135m-instruct"


def figure(name: str, value: float, unit: str, reach: float, note: str = "") -> dict[str, Any]:
    """A figure that is better the smaller it is."""
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "reach": reach,
        "ok": value <= reach,
        "note": note,
    }


def say(text: str) -> None:
    """Progress, for people."""
    print(f"· {text}", file=sys.stderr, flush=True)


def help_figure() -> dict[str, Any]:
    """Start of the command line, in seconds; the reference is an interpreter that does nothing."""

    def once(*argv: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *argv], check=True, capture_output=True)
        return time.perf_counter() - began

    pairs = [(once("-m", "edgemoa", "--help"), once("-c", "pass")) for _ in range(9)]
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    return figure("edgemoa --help", ours, "s", 0.3, f"{ours / bare:.1f} x an empty interpreter")


def memory_mb(pid: int, key: str) -> float:
    """``VmHWM`` (most ever) or ``VmRSS`` (now) of a process, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(key))
    return int(kilobytes) * 1024 / 1e6


def board_figures(models_dir: Path, rounds: int) -> list[dict[str, Any]]:
    """Three boards, started anew each round: time to paired, memory, responsiveness."""
    ready_s, daemon_mb, lag_ms = [], [], []
    for i in range(rounds):
        say(f"three boards, round {i + 1} of {rounds}")
        began = time.monotonic()
        with group(3, MODEL, models_dir) as boards:
            wait_until_ready(boards)
            ready_s.append(time.monotonic() - began)
            answer(boards[0])
            status = [board.client.get("/v1/status") for board in boards]
            daemon_mb.append(max(memory_mb(s["pid"], "VmHWM") for s in status))
            lag_ms.append(max(s["loop_lag_ms_max"] for s in status))
    return [
        figure("three boards from start to paired", statistics.median(ready_s), "s", 5,
               "models loaded; no process existed before"),
        figure("daemon without its model process", statistics.median(daemon_mb), "MB", 70,
               "most of the resident set, after an answer"),
        figure("event loop late while models write", statistics.median(lag_ms), "ms", 50,
               f"worst of all probes; worst round {max(lag_ms):.1f}"),
    ]  # fmt: skip


def answer(board: LocalBoard) -> None:
    """Have the group answer something of ordinary length."""
    body = {
        "messages": [{"role": "user", "content": "Explain how a lighthouse works, step by step."}],
        "max_tokens": 128,
        "edgemoa": {"events": True},
    }
    follow(board.client.chat(body), None)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument("--rounds", type=int, default=3, help="starts of the group (default: 3)")
    arguments = parser.parse_args()
    models_dir = default_model_dir()
    ensure(MODEL, ModelLibrary(models_dir), silent)
    figures = [help_figure(), *board_figures(models_dir, arguments.rounds)]
    say("import, perplexity, tokenisation, speed")
    figures += bench_core_models.figures(models_dir)
    if arguments.json:
        print(json.dumps({"figures": figures}))
    else:
        for row in figures:
            reach = "" if row.get("reach") is None else f"reach {row['reach']:g}"
            mark = {True: "ok", False: "SHORT", None: ""}[row.get("ok")]
            shown = f"{row['name']:42} {row['value']:>10g} {row['unit']:6} {reach:12} {mark:6}"
            print(f"{shown} {row.get('note', '')}".rstrip())
    short = [row["name"] for row in figures if row.get("ok") is False]
    if arguments.check and short:
        print(f"short of their reach: {', '.join(short)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
