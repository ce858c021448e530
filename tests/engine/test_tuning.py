"""What is measured of a board, what is chosen by it, and where that is kept."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from models.tiny import tiny

from edgemoa.engine import genai, measure, slots, tuning
from edgemoa.engine.engine import Engine
from edgemoa.engine.load import Wish, load
from edgemoa.engine.measure import Gauge, candidates, choose_slots, choose_threads, tune
from edgemoa.engine.memory import available_bytes, total_bytes
from edgemoa.engine.tuning import Board, Jobs, Threads, Tuning
from edgemoa.engine.worker import Backend, _bounded
from edgemoa.errors import StateError
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent

from .harness import Recorder, running

BOARD = Board("0" * 64, "auto", "cpu", 4, 2048, "1 2")
FOUND = Tuning(3, 4, (Threads(4, 50.0, 9.0), Threads(3, 49.0, 9.1)), (Jobs(1, 9.0),))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    file = tiny("llama", "Q4_1", context=1024).write(folder / "llama.gguf")
    return import_gguf(file, ModelLibrary(folder / "models"), "llama", silent)


# --- what is chosen


def speed(threads: int, times_as_fast: float) -> Threads:
    return Threads(threads, 100 * times_as_fast, 20 * times_as_fast)


def test_a_thread_more_has_to_be_worth_it() -> None:
    assert choose_threads([speed(4, 1.0), speed(3, 0.97), speed(2, 0.9)]).threads == 3
    assert choose_threads([speed(4, 1.0), speed(3, 0.9), speed(2, 0.5)]).threads == 4
    assert choose_threads([speed(2, 1.0), speed(1, 1.2)]).threads == 1
    # Where nothing could be measured it is what it would be without.
    assert choose_threads([Threads(2, 0, 0), Threads(1, 0, 0)]).threads == 2


def test_twice_the_jobs_have_to_be_worth_it() -> None:
    def batches(*rates: float) -> list[Jobs]:
        return [Jobs(2**at, rate) for at, rate in enumerate(rates)]

    assert choose_slots(batches(100, 170, 250, 320)) == 8
    assert choose_slots(batches(100, 170, 250, 260)) == 4
    assert choose_slots(batches(100, 110, 250, 320)) == 1
    # In all it would be more, but each would crawl.
    assert choose_slots(batches(100, 120, 145, 180)) == 4


def test_which_numbers_of_threads_are_tried() -> None:
    assert candidates(1) == [1]
    assert candidates(4) == [4, 3, 2, 1]
    for cores in range(1, 257):
        tried = candidates(cores)
        assert tried[0] == cores
        assert tried == sorted(set(tried), reverse=True)
        assert tried[-1] >= 1
        assert len(tried) <= 8


# --- what is measured


def test_a_measurement_leaves_the_back_end_as_it_was(llama: Path) -> None:
    backend = slots.load(llama, 1, 4)
    gauge = Gauge(backend)
    assert gauge.prefill() > 0
    assert gauge.prefill(300) > 0
    for context in (32, 500):
        for jobs in (1, 2, 4):
            rate = gauge.decode(jobs, context)
            assert rate is not None
            assert rate > 0
    assert gauge.decode(5, 32) is None  # there are four slots
    assert not backend._jobs
    backend.budget_tokens = 400
    assert gauge.decode(4, 200) is None
    backend.forget()
    assert all(slot.length == 0 for slot in backend._slots)


def test_genai_is_measured_likewise(smollm2: Path) -> None:
    gauge = Gauge(genai.load(smollm2, 2))
    one = gauge.decode(1, 32)
    assert one is not None
    assert 1 < one < 100_000
    assert gauge.prefill() > 1
    assert gauge.decode(2, 32) is None


def test_a_model_without_a_word_to_say_is_no_endless_loop(llama: Path) -> None:
    backend = slots.load(llama, 1, 2)
    assert Gauge(backend).decode(2, 32) is not None
    backend._reader.tokens.end_of_turn = frozenset(range(10_000))
    assert Gauge(backend).decode(2, 32) is None
    assert not backend._jobs


def test_the_best_is_found_and_loaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_BUSY", 1.0)
    loaded: list[int] = []

    def load_with(threads: int) -> Backend:
        loaded.append(threads)
        return slots.load(llama, threads, most_slots=8)

    backend, found = tune(load_with, 2, goal_s=60)
    assert loaded[0] == 2
    assert loaded[-1] == found.threads
    assert [each.threads for each in found.by_threads] == [2, 1]
    assert backend.slots == found.slots
    assert [each.jobs for each in found.by_jobs][:2] == [1, 2]
    # Settings go before what is measured, and no time is lost on what they leave open.
    loaded.clear()
    backend, found = tune(load_with, 2, threads=1, slots=3, goal_s=60)
    assert loaded == [1]
    assert (found.threads, found.slots, backend.slots) == (1, 3, 3)
    # Without time for it, nothing is tried but what it would be without.
    loaded.clear()
    _, found = tune(load_with, 2, goal_s=0)
    assert loaded == [2]
    assert found.threads == 2


@contextmanager
def busy_processors() -> Iterator[None]:
    """As many processes at work as there are processors."""
    loop = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    processes = [
        subprocess.Popen(loop, stdout=subprocess.PIPE) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_busy_board_is_not_believed(llama: Path) -> None:
    with busy_processors():
        _, found = tune(lambda n: slots.load(llama, n, most_slots=8), 2, goal_s=60)
    assert not found.is_trusted
    assert (found.threads, found.slots) == (2, slots.MOST_SLOTS)


def test_the_model_process_tunes_once(llama: Path) -> None:
    async def start() -> None:
        async with running(llama, threads=2, tune_s=30) as (engine, events):
            found = engine.tuning
            assert found is not None
            info = events.ready[-1]
            assert (info.threads, info.slots) == (found.threads, found.slots)
            assert engine.pid is not None
            os.kill(engine.pid, 9)
            again = await events.loads(2)
            assert engine.tuning is None
            assert (again.threads, again.slots) == (found.threads, found.slots)

    asyncio.run(start())


def test_a_model_that_cannot_be_measured_is_served_all_the_same(smollm2: Path) -> None:
    async def start() -> None:
        events = Recorder()
        engine = Engine(smollm2, "model", 2, events, memory_mb=1, tune_s=30)
        await engine.start()
        try:
            await events.loads()
            assert not events.lost
            assert engine.tuning is None
            assert "Memory holds 22 tokens" in engine.note
        finally:
            await engine.stop()

    asyncio.run(start())


# --- where it is kept


def test_what_is_kept_is_found_for_the_same_board_and_model_only(tmp_path: Path) -> None:
    state = tmp_path / "state" / "edgemoa"
    assert tuning.kept(state, BOARD) is None
    tuning.keep(state, BOARD, FOUND)
    assert tuning.kept(state, BOARD) == FOUND
    others: tuple[dict[str, Any], ...] = (
        {"model_id": "1" * 64}, {"backend": "genai"}, {"provider": "cuda"}, {"cores": 3},
        {"memory_mb": 1024}, {"runtimes": "1 3"},
        {"threads": 2}, {"slots": 1}, {"cache_mb": 64},
    )  # fmt: skip
    for other in others:
        assert tuning.kept(state, msgspec.structs.replace(BOARD, **other)) is None
    assert oct(state.stat().st_mode)[-3:] == "700"
    better = Tuning(4, 8)
    tuning.keep(state, BOARD, better)
    assert tuning.kept(state, BOARD) == better
    for number in range(40):
        tuning.keep(state, msgspec.structs.replace(BOARD, cores=number), FOUND)
    assert len(json.loads((state / tuning.FILE).read_text())["kept"]) == tuning.MOST_KEPT
    assert [file.name for file in state.iterdir()] == [tuning.FILE]


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"format":2,"kept":[]}', b"x" * (tuning.MAX_FILE_BYTES + 1),
     b'{"format":1,"kept":[{"board":{},"tuning":{"threads":0,"slots":1}}]}'],
)  # fmt: skip
def test_a_file_that_is_none_counts_as_none(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / tuning.FILE).write_bytes(damage)
    assert tuning.kept(tmp_path, BOARD) is None
    tuning.keep(tmp_path, BOARD, FOUND)
    assert tuning.kept(tmp_path, BOARD) == FOUND


def test_a_state_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        tuning.keep(tmp_path / "file", BOARD, FOUND)


# --- memory


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


@pytest.fixture
def kernel(tmp_path: Path) -> tuple[Path, Path]:
    """A machine with 8,000 KiB of memory, of which 4,000 are available."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  4000 kB\n")
    (proc / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/system.slice/edgemoa.service\n")
    groups.mkdir()
    return proc, groups


def test_the_machines_memory_without_limits(kernel: tuple[Path, Path]) -> None:
    assert available_bytes(*kernel) == 4000 * 1024
    (kernel[0] / "self" / "cgroup").unlink()
    assert (available_bytes(*kernel), total_bytes(*kernel)) == (4000 * 1024, 8000 * 1024)


def test_the_tightest_of_the_groups_counts(kernel: tuple[Path, Path]) -> None:
    top = kernel[1]
    slice_, service = top / "system.slice", top / "system.slice" / "edgemoa.service"
    stat = "anon 7\ninactive_file 1000"
    group(service, memory_max="max", memory_high="max", memory_current=5, memory_stat=stat)
    assert available_bytes(*kernel) == 4000 * 1024
    group(service, memory_max=2_000_000, memory_high=1_500_000, memory_current=500_000)
    assert available_bytes(*kernel) == 1_500_000 - 500_000 + 1000
    assert total_bytes(*kernel) == 1_500_000
    group(slice_, memory_max=1_600_000, memory_current=1_500_000, memory_stat="anon 1")
    assert available_bytes(*kernel) == 100_000
    group(slice_, memory_current=1_700_000)
    assert available_bytes(*kernel) == 0


def test_groups_of_the_first_version(kernel: tuple[Path, Path]) -> None:
    proc, top = kernel
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/../../docker/abc\n0::/\n")
    names = {"memory_limit_in_bytes": 2**63 - 4096, "memory_usage_in_bytes": 10**9}
    group(top / "memory", **names, memory_stat="total_inactive_file 0")
    assert available_bytes(*kernel) == 4000 * 1024
    group(top / "memory", memory_limit_in_bytes=10**9 + 7)  # what a container sees as its top
    assert available_bytes(*kernel) == 7


def test_the_cache_keeps_to_the_memory_that_it_is_given(llama: Path) -> None:
    wish = Wish(llama, 1, memory_mb=1)
    backend, note = load(wish)
    token_bytes = 8 * 2 * 2 * 16  # floats of keys and values: layers, heads, head size
    assert (backend.budget_tokens, note) == ((1 << 20) // token_bytes, "")
    assert backend.slots == (1 << 20) // token_bytes // slots.LEAST_SLOT_TOKENS
    more, _ = load(replace(wish, memory_mb=100))
    assert more.budget_tokens == more.slots * 1024


def test_memory_that_holds_hardly_a_prompt_is_told_before_one_fails(llama: Path) -> None:
    assert load(Wish(llama, 1, memory_mb=100))[1] == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "available_bytes", lambda: 1 << 16)
        backend, note = load(Wish(llama, 1))
    assert backend.budget_tokens < backend.context_tokens
    assert f"Memory holds {backend.budget_tokens} tokens" in note
    assert "Raise model.memory_mb" in note


# --- execution providers


def test_a_provider_that_is_not_there(llama: Path, smollm2: Path) -> None:
    """The CPU stands in, and it is said why."""
    for provider in genai.PROVIDERS:
        backend, note = load(Wish(llama, 1, provider=provider))
        assert backend.name == "slots"
        assert f"model.provider {provider} cannot be used, the CPU is. It needs" in note
        # The next step is told also where the runtime says more than a note may hold.
        assert "a build of onnxruntime-genai for it" in _bounded(note)
    backend, note = load(Wish(smollm2, 1, backend="genai", provider="cuda"))
    assert backend.name == "genai"
    assert "cuda" in note
    backend, note = load(Wish(llama, 1, backend="slots", provider="cuda"))
    assert backend.name == "slots"
    assert "CPU" in note
    assert load(Wish(llama, 1))[1] == ""


def test_the_daemon_hears_of_it(llama: Path) -> None:
    async def start() -> Recorder:
        async with running(llama, provider="cuda") as (engine, events):
            assert "model.provider cuda cannot be used" in engine.note
            return events

    assert asyncio.run(start()).ready[0].backend == "slots"
