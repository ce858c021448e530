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

from bench_core_models import figures as model_figures
from bench_core_models import row  # beside this file

from edgemoa.demo import LocalBoard, group, wait_until_ready
from edgemoa.models.library import ModelLibrary, default_model_dir
from edgemoa.models.progress import silent
from edgemoa.models.pull import ensure
from edgemoa.show import follow

MODEL = "smollm2-135m-instruct"


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
    return row("edgemoa --help", ours, "s", 0.3, f"{ours / bare:.1f} x an empty interpreter")


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
        row("three boards from start to paired", statistics.median(ready_s), "s", 5,
               "models loaded; no process existed before"),
        row("daemon without its model process", statistics.median(daemon_mb), "MB", 70,
               "most of the resident set, after an answer"),
        row("event loop late while models write", statistics.median(lag_ms), "ms", 50,
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
    figures += model_figures(models_dir)
    if arguments.json:
        print(json.dumps({"figures": figures}))
    else:
        for told in figures:
            reach = f"reach {told['reach']:g}" if "reach" in told else ""
            mark = {True: "ok", False: "SHORT", None: ""}[told.get("ok")]
            shown = f"{told['name']:44} {told['value']:>9g} {told['unit']:12}"
            print(f"{shown} {reach:11} {mark:6} {told['note']}".rstrip())
    short = [told["name"] for told in figures if told.get("ok") is False]
    if arguments.check and short:
        print(f"short of their reach: {', '.join(short)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
