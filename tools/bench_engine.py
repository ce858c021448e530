"""Measures the engine against llama.cpp: the same GGUF file, tokens and threads, in turns.

Each round starts every engine anew and asks each for the same, one right after the other; a ratio
is the median of the rounds' ratios. Ours is measured as the daemon sees it, with the pipe to its
model process; llama.cpp as a library, with its own defaults, and as a server with 8 slots. Texts
are greedy and of equal length. The first time, llama.cpp and its server are built, which takes a
compiler and some ten minutes. Measure on a machine that does nothing else: the last figure says
whether it did.

With --profile, only where a step's time goes is told, by operator of onnxruntime.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
from bench_engine_limits import Profile, Scenario, weight_bytes  # noqa: E402 - beside this file
from bench_engine_prompts import Loads  # noqa: E402
from bench_engine_rounds import IDLE_S, WRITTEN_TOKENS, Bench, Rivals  # noqa: E402
from bench_engine_sides import endless  # noqa: E402
from figures import Row, arguments, row, say, tell  # noqa: E402

from edgemoa.models.importer import import_gguf  # noqa: E402
from edgemoa.models.library import ModelLibrary, read_manifest  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402

ROUNDS: Final = 5

REACH_PREFILL: Final = 2.5
REACH_DECODE: Final = 1.5
REACH_DECODE_LONG: Final = 1.25
REACH_TOTAL: Final = 4.5
REACH_SERVER: Final = 1.2
REACH_ARRIVAL: Final = 2.5
REACH_AGGREGATION: Final = 0.3
REACH_FOLLOW_UP: Final = 0.1
REACH_MEMORY_MB: Final = 150  # beside the file and the keys and values
REACH_IDLE: Final = 1  # percent of a core
REACH_OTHERS: Final = 5  # percent of all cores

GENAI: Final = "genai"
SERVER: Final = "llama-server"


def main() -> int:
    """Measure, print, judge."""
    assert __doc__  # noqa: S101
    given = _arguments(__doc__).parse_args()
    from fetched import default_gguf, text  # noqa: PLC0415 - after --help

    passages = text(given.text)
    if given.quick:
        given.rounds = 1
    left_out = [f"--without {name}" for name in given.without]
    with tempfile.TemporaryDirectory(prefix="edgemoa-bench-") as name:
        work = Path(name)
        gguf = given.gguf or default_gguf(work)
        folder = import_gguf(gguf, ModelLibrary(work / "models"), "bench", silent)
        endless(folder)
        loads = Loads.of(folder, passages)
        if given.profile:
            return tell(_profile_rows(folder, given.threads, loads), given, left_out)
        rivals = _rivals(given)
        bench = Bench(folder, read_manifest(folder), gguf, given.threads, loads, rivals, work)
        asyncio.run(bench.run(given.rounds))
        return tell(Figures(bench).rows(), given, left_out)


def _arguments(description: str) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument(
        "--threads", type=int, metavar="N", default=len(os.sched_getaffinity(0)),
        help="of each engine (default: one for each core)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=ROUNDS, help=f"default: {ROUNDS}"
    )
    parser.add_argument("--quick", action="store_true", help="a single round: a first impression")
    parser.add_argument(
        "--profile", action="store_true", help="tell where a step's time goes, and nothing else"
    )
    parser.add_argument(
        "--without", nargs="+", metavar="NAME", choices=[SERVER, GENAI], default=[],
        help=f"leave out {SERVER}, or {GENAI}: our own reference",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="another model than the default one"
    )
    parser.add_argument(
        "--environment", type=Path, metavar="DIR",
        help="an environment that has llama-cpp-python, instead of one in the cache",
    )  # fmt: skip
    parser.add_argument(
        "--server", type=Path, metavar="FILE", help="a llama-server, instead of one in the cache"
    )
    return parser


def _rivals(given: argparse.Namespace) -> Rivals:
    from fetched import llama_cpp as library  # noqa: PLC0415
    from fetched import llama_server as server  # noqa: PLC0415

    wanted = SERVER not in given.without
    return Rivals(
        python=library(given.environment),
        server=(given.server or server()) if wanted else None,
        genai=GENAI not in given.without,
    )


# --- figures


class Figures:
    """What the measurements say."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._samples = bench.samples

    def rows(self) -> list[Row]:
        """All of it."""
        over, value, notes = self._over, self._value, self._bench.notes
        single = "their short"
        rows = [
            over("prefill of 1,000 tokens", "our long prefill", "their long prefill",
                 REACH_PREFILL, aim=3.5),
            over("decode, short context", "our short", single, REACH_DECODE, aim=2),
            over("decode at 1,000 tokens", "our long", "their long", REACH_DECODE_LONG, aim=1.6),
            over("decode of an aggregation", "our aggregation", "their aggregation"),
            over("8 at once, over its single stream", "our eight", single, REACH_TOTAL, aim=6),
            over("8 at once, over its server with 8 slots", "our eight", "server eight",
                 REACH_SERVER, aim=1.5),
            over("8 at once, over its library with 8 sequences", "our eight", "their eight"),
            over("a late arrival's first token beside 7, over alone", "late", "alone",
                 REACH_ARRIVAL, unit="ms", aim=1.5, note=notes["late"]),
            over("aggregation: prefill after the last proposal, over all",
                 "our aggregation streamed", "our aggregation whole", REACH_AGGREGATION, unit="ms",
                 aim=0.25, note=notes["aggregation streamed"]),
            over("aggregation: the same where it came all at once", "our aggregation last",
                 "our aggregation whole", unit="ms", note=notes["aggregation last"]),
            over("aggregation: the same over llama.cpp's of all", "our aggregation last",
                 "their aggregation whole", unit="ms"),
            over("a follow-up's first token, over cold", "follow-up", "cold", REACH_FOLLOW_UP,
                 unit="ms", aim=0.03, note=notes["follow-up"]),
            *self._memory_rows(),
            row("idle: CPU of the model process", value("idle"), "%", REACH_IDLE,
                f"of a core, over {IDLE_S:g} s"),
            *self._bandwidth_rows(),
        ]  # fmt: skip
        if self._bench.rivals.genai:
            rows += [
                over("genai: prefill of 1,000 tokens", "genai long prefill", "their long prefill"),
                over("genai: decode, short context", "genai short", single),
                over("genai: decode at 1,000 tokens", "genai long", "their long"),
            ]
        note = "of this machine's time: if more, figures mean little, and llama.cpp's least"
        others = row("what others computed meanwhile", value("others"), "%", REACH_OTHERS, note)
        return [*rows, others]

    def _value(self, name: str) -> float | None:
        return statistics.median(self._samples[name]) if self._samples[name] else None

    def _over(
        self, title: str, one: str, other: str, reach: float | None = None, *,
        unit: str = "tokens/s", aim: float | None = None, note: str = "",
    ) -> Row:  # fmt: skip
        """A ratio; speeds ought to be high, times low."""
        if not self._samples[other]:
            return row(title, None, "", reach, "not measured", least=unit == "tokens/s")
        pairs = list(zip(self._samples[one], self._samples[other], strict=True))
        ratio = statistics.median(ours / others for ours, others in pairs)
        told = [f"{self._value(one):.4g} over {self._value(other):.4g} {unit}", note]
        told.append(f"aim {aim:g}" if aim is not None else "")
        detail = ", ".join(filter(None, told))
        return row(title, ratio, "", reach, detail, least=unit == "tokens/s")

    def _memory_rows(self) -> list[Row]:
        files = {file.name: file.size_bytes for file in self._bench.manifest.files}
        file_mb = (files["model.onnx"] + files["weights.bin"]) / 1e6
        peak, held = self._samples["peak"][0], self._samples["held"][0]
        note = f"{peak:.0f} MB with the file's {file_mb:.0f} and {held:.0f} of keys and values"
        theirs = "file and all; a context of 2,048 tokens in half precision"
        return [
            row("memory: most beside file, keys and values", peak - file_mb - held, "MB",
                REACH_MEMORY_MB, note),
            row("memory: proportional", self._value("Pss"), "MB", note="PSS, at the end"),
            row("memory: anonymous", self._value("Anonymous"), "MB", note="at the end"),
            row("memory: llama.cpp's library, most", self._value("their peak"), "MB", note=theirs),
        ]  # fmt: skip

    def _bandwidth_rows(self) -> list[Row]:
        """How near decoding comes to what memory allows."""
        read = max(self._samples["bandwidth"])
        weights = weight_bytes(self._bench.folder / "model.onnx")
        rows = [row("memory bandwidth", read / 1e9, "GB/s", note=f"{self._bench.threads} threads")]
        for title, name, prompts in (
            ("decode, short context", "our short", self._bench.loads.short),
            ("decode at 1,000 tokens", "our long", self._bench.loads.long),
        ):
            read_tokens = statistics.mean(len(self._bench.loads.tokens(each)) for each in prompts)
            length = read_tokens + WRITTEN_TOKENS / 2
            size = weights + length * self._bench.manifest.kv_bytes_per_token
            speed = self._value(name)
            assert speed is not None  # noqa: S101 - ours is always measured
            note = f"{size / 1e6:.0f} MB a token: at most {read / size:.0f} tokens/s"
            rows.append(
                row(f"{title}: share of the bandwidth", 100 * speed * size / read, "%", note=note)
            )
        return rows


# --- the profile


def _profile_rows(folder: Path, threads: int, loads: Loads) -> list[Row]:
    scenarios = [
        Scenario("decode, short context", loads.short[:1]),
        Scenario("decode at 1,000 tokens", loads.long[:1]),
        Scenario("decode, 8 at once", loads.eight),
        Scenario("prefill of 1,000 tokens", loads.long[:1], reading=True),
    ]
    say(f"profiling: {', '.join(scenario.name for scenario in scenarios)}")
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("bench_engine_limits.py"), folder, str(threads)],
        input=msgspec.json.encode(scenarios),
        stdout=subprocess.PIPE,
        check=False,
    )
    if result.returncode:
        raise SystemExit("the profile failed")
    rows = []
    for found in msgspec.json.decode(result.stdout, type=list[Profile]):
        note = f"{found.profiled_ms:.3g} ms with the profiler"
        rows.append(row(found.name, found.step_ms, "ms", note=note))
        within = sum(operator.ms for operator in found.operators)
        for operator in found.operators:
            share = f"{100 * operator.ms / found.profiled_ms:.1f} %, {operator.calls:g} calls"
            rows.append(row(f"  {operator.name}", operator.ms, "ms", note=share))
        rest = found.profiled_ms - within
        share = f"{100 * rest / found.profiled_ms:.1f} %"
        rows.append(row("  outside of operators", rest, "ms", note=share))
    return rows


if __name__ == "__main__":
    sys.exit(main())
