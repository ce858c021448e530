"""``edgemoa bench``: how fast this board runs a model, and which settings are best for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgemoa.errors import BoardError, EdgemoaError, EngineError

if TYPE_CHECKING:
    from edgemoa.config import Config
    from edgemoa.core.events import WorkDone
    from edgemoa.core.messages import ChatMessage, Sampling
    from edgemoa.engine.load import Wish
    from edgemoa.engine.tuning import Tuning
    from edgemoa.engine.worker import Backend
    from edgemoa.models.library import ModelLibrary
    from edgemoa.sim.recording import Sample

PROMPT_TOKENS = 500
CONTEXTS = (64, 1000)
TUNING_S = 40.0
ASKING_S = 2.0  # for a daemon to say that it runs
RECORDING_S = 240.0  # for usual jobs; the question that is on is finished
PROPOSALS = 3  # for each question
JOB = 2**31  # no other job that is measured has that number
QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a quick dinner with lentils.",
    "Explain to a child how a bicycle stays upright.",
    "Write a short note to my neighbours about noise on Saturday night.",
    "What should I look at when I buy a used car?",
    "How do I find out which process is using a port on Linux?",
)


class Prefill(msgspec.Struct, frozen=True):
    tokens: int
    tokens_per_s: float


class Decode(msgspec.Struct, frozen=True):
    """``tokens_per_s`` of all jobs together; None where they do not fit."""

    jobs: int
    context: int
    tokens_per_s: float | None


class Figures(msgspec.Struct, frozen=True):
    """What was measured. Memory is that of the whole process when all is done."""

    model: str
    backend: str
    note: str
    threads: int
    slots: int
    prefill_step: int
    budget_tokens: int
    load_s: float
    memory_mb: int
    memory_peak_mb: int
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench`` beside those of settings."""
    parser.add_argument(
        "--model", help="a model from `edgemoa model list` (default: as configured)"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find the best number of threads and of jobs at a time, and keep it for the daemon",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also write what `edgemoa sim --board` and `edgemoa plan --board` read: speeds, and"
        " what a few usual jobs take",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, config: Config, library: ModelLibrary) -> int:
    """Measure and print; returns the exit code.

    :raises EdgemoaError: as the model's process does.
    """
    from edgemoa.engine import tuning
    from edgemoa.engine.load import Wish
    from edgemoa.models.library import read_manifest

    folder = library.find(config.model.name)
    model = config.model
    board = tuning.this_board(
        read_manifest(folder).model_id,
        model.backend,
        model.provider,
        threads=model.threads,
        slots=model.slots,
        cache_mb=model.memory_mb,
    )
    state_dir = config.state_dir()
    kept = tuning.kept(state_dir, board)
    _warn_of_a_daemon(config)
    wish = Wish(
        folder,
        model.threads,
        model.backend,
        model.provider,
        model.slots,
        memory_mb=model.memory_mb,
        ends_loops=False,
    )
    _settle()
    if arguments.tune:
        found = _tune(wish, tuning.cores())
        tuning.keep(state_dir, board, found)
        told = {"model": model.name, "tuning": msgspec.to_builtins(found)}
        _print_tuning(told if arguments.json else None, found, state_dir / tuning.FILE)
        return 0
    threads = model.threads or (kept.threads if kept else tuning.cores())
    figures, backend = _measure(model.name, replace(wish, threads=threads))
    if arguments.record is not None:
        slots = model.slots or (kept.slots if kept else figures.slots)
        _record(arguments.record, config.board.name, model.name, slots, backend)
    if arguments.json:
        said = {**msgspec.to_builtins(figures), "tuning": msgspec.to_builtins(kept)}
        print(json.dumps(said))
        return 0
    _print_figures(figures)
    if kept:
        print(f"kept       {kept.threads} threads, {kept.slots} jobs at a time, by measurement")
    else:
        print("kept       nothing; `edgemoa bench --tune` finds and keeps what is best")
    return 0


def _settle() -> None:
    """Run as the model's process does."""
    from edgemoa.engine.worker import NICENESS

    os.nice(NICENESS)


def _warn_of_a_daemon(config: Config) -> None:
    """Say so where this board's daemon runs: both would take the processors from each other."""
    from edgemoa.client import Client

    try:
        Client(config.socket_path(), timeout_s=ASKING_S).get("/v1/status")
    except EdgemoaError:
        return
    _say("this board's daemon is running: figures are too low while it works; stop it to be sure")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tune(wish: Wish, cores: int) -> Tuning:
    from edgemoa.engine.measure import tune_wish

    def progress(what: str) -> None:
        _say(f"trying {what}")

    try:
        _, note, found = tune_wish(wish, cores, goal_s=TUNING_S, progress=progress)
    except ImportError as error:
        raise _cannot_import(error) from error
    if note:
        _say(note)
    if not found.is_trusted:
        raise BoardError(
            f"the board is too busy to be measured: others took {found.busy:.0%} of its processors",
            hint="try again when it has nothing else to do, and stop its daemon for the time",
        )
    return found


def _cannot_import(error: ImportError) -> EngineError:
    return EngineError(
        f"The model runtime cannot be imported: {error}.",
        hint="Install edgemoa again, with its dependencies.",
    )


def _measure(name: str, wish: Wish) -> tuple[Figures, Backend]:
    try:
        from edgemoa.engine.load import load
        from edgemoa.engine.measure import MOST_JOBS, Gauge
    except ImportError as error:
        raise _cannot_import(error) from error
    _say(f"loading {name}")
    started_s = time.perf_counter()
    backend, note = load(replace(wish, most_slots=MOST_JOBS))
    load_s = time.perf_counter() - started_s
    gauge = Gauge(backend)
    prefill, decode = [], []
    for tokens in sizes(backend):
        _say(f"reading {tokens} tokens")
        prefill.append(Prefill(tokens, round(gauge.prefill(tokens), 1)))
    for context in sizes(backend, CONTEXTS):
        jobs = 1
        while jobs <= backend.slots:
            _say(f"writing for {jobs} behind {context} tokens")
            rate = gauge.decode(jobs, context)
            decode.append(Decode(jobs, context, None if rate is None else round(rate, 1)))
            jobs *= 2
    memory_mb, peak_mb = _memory_mb()
    figures = Figures(
        model=name,
        backend=backend.name,
        note=note,
        threads=wish.threads,
        slots=backend.slots,
        prefill_step=backend.chunk_tokens,
        budget_tokens=backend.budget_tokens,
        load_s=round(load_s, 2),
        memory_mb=memory_mb,
        memory_peak_mb=peak_mb,
        prefill=tuple(prefill),
        decode=tuple(decode),
    )
    return figures, backend


def _record(file: Path, board: str, model: str, slots: int, backend: Backend) -> None:
    """Write what the simulator needs to know of this board."""
    import socket

    from edgemoa.sim.recording import VERSION, Recording, write_recording

    samples = _samples(backend)
    name = board or socket.gethostname()
    rates = backend.meter.rates()
    try:
        recording = Recording(VERSION, name[:64], model[:64], slots, rates, tuple(samples))
    except ValueError as error:
        raise EngineError(
            f"what was measured is no recording of a board: {error}",
            hint="is the model a toy, or was the board asleep meanwhile?",
        ) from error
    write_recording(file, recording)
    _say(f"recorded in {file}")


def _samples(backend: Backend) -> list[Sample]:
    """Usual jobs, one at a time: proposals for a few questions, and answers made of those."""
    from edgemoa.core.messages import BoardId, ChatMessage, Sampling
    from edgemoa.core.moa import Draft, Room, Synthesis, Write
    from edgemoa.core.node import PROPOSAL_TOP_P, NodeSettings
    from edgemoa.sim.recording import Sample

    settings = NodeSettings("", 0)
    most = settings.proposal_max_tokens
    deadline_s = time.perf_counter() + RECORDING_S
    samples: list[Sample] = []
    for number, question in enumerate(QUESTIONS):
        if samples and time.perf_counter() > deadline_s:
            break
        _say(f"answering usual question {number + 1} of {len(QUESTIONS)}")
        asked = (ChatMessage("user", question),)
        drafts = []
        for seed in range(PROPOSALS):
            how = Sampling(most, settings.proposal_temperature if seed else 0, PROPOSAL_TOP_P, seed)
            done = _job(backend, asked, how)
            samples.append(Sample("proposal", done.prompt_tokens, done.tokens, _least(done)))
            drafts.append(
                Draft.of(BoardId(str(seed)), done.text, done.tokens, done.finish, own=False)
            )
        room = Room(max(backend.context_tokens - 2 * most, 0))
        written = Synthesis().conclude(asked, [each for each in drafts if each.text], room)
        if isinstance(written, Write) and written.drafts:
            done = _job(backend, written.messages, Sampling(most))
            samples.append(Sample("aggregation", done.prompt_tokens, done.tokens, _least(done)))
    return samples


def _least(done: WorkDone) -> float:
    return max(float(done.model_ms), 1.0)


def _job(backend: Backend, messages: tuple[ChatMessage, ...], how: Sampling) -> WorkDone:
    """One job by itself, from its beginning to its end."""
    from edgemoa.engine.frames import Done, Failed, Generate

    backend.forget()  # as for a prompt that nobody has asked before
    if not backend.admit(Generate(JOB, messages, how, stream=False)):
        raise EngineError("The model's memory has no room for a usual job.")
    while True:
        for event in backend.step():
            if isinstance(event, Done):
                return event.result
            if isinstance(event, Failed):
                raise EngineError(f"The model fails: {event.failure.reason}")


def sizes(backend: Backend, wanted: tuple[int, ...] = (PROMPT_TOKENS,)) -> list[int]:
    """Those that the model's context can hold, or else half of it."""
    most = backend.context_tokens // 2
    return sorted({min(each, most) for each in wanted})


def _memory_mb() -> tuple[int, int]:
    """What this process has in memory, and the most that it had."""
    told = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    now, peak = (int(told[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _print_tuning(told: dict[str, Any] | None, found: Tuning, file: Path) -> None:
    if told is not None:
        print(json.dumps(told))
        return
    for threads in found.by_threads:
        print(
            f"{threads.threads:3} threads   {threads.prefill:8.1f} tokens/s read"
            f"   {threads.decode:8.1f} written"
        )
    for jobs in found.by_jobs:
        print(f"{jobs.jobs:3} jobs      {jobs.decode:8.1f} tokens/s written in all")
    print(f"best: {found.threads} threads, {found.slots} jobs at a time; kept in {file}")
    print("a daemon that runs takes it when it is started again")


def _print_figures(figures: Figures) -> None:
    print(f"model      {figures.model}, loaded in {figures.load_s:.2f} s")
    print(
        f"engine     {figures.backend}, {figures.threads} threads, up to {figures.slots} jobs at a"
        f" time, room for {figures.budget_tokens} tokens, read {figures.prefill_step} at a time"
    )
    if figures.note:
        print(f"           {figures.note}")
    print(f"memory     {figures.memory_mb} MB, {figures.memory_peak_mb} MB at most")
    for read in figures.prefill:
        print(f"reads      {read.tokens_per_s:8.1f} tokens/s of a prompt of {read.tokens}")
    for wrote in figures.decode:
        rate = "no room" if wrote.tokens_per_s is None else f"{wrote.tokens_per_s:8.1f} tokens/s"
        of = "one job" if wrote.jobs == 1 else f"{wrote.jobs} jobs, in all,"
        print(f"writes     {rate} for {of} behind {wrote.context} tokens")
