"""The fast back end with the default model: whatever runs beside a job, and whatever was read
before, its text is that of the job alone, which is genai's."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from models.tiny import tiny

from edgemoa.core.events import WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine import frames, genai, slots
from edgemoa.engine.answer import CHUNKS, Answer
from edgemoa.engine.cache import Cache
from edgemoa.engine.frames import Done, Failed, Generate, Text
from edgemoa.engine.slots import SlotsBackend
from edgemoa.engine.worker import Backend, Pipe, Worker
from edgemoa.errors import EngineError
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent

from .harness import conversation, job, running

FOX = "The quick brown fox jumps over the lazy dog. "
PROMPTS = ("Why is the sky blue?", "1+1?", FOX * 12, "List the planets.", FOX * 12 + "Who?", "日本")


@dataclass
class Bench:
    """A back end and what came of its jobs."""

    backend: Backend
    texts: dict[int, str] = field(default_factory=dict)
    done: dict[int, WorkDone] = field(default_factory=dict)
    failed: dict[int, WorkFailed] = field(default_factory=dict)

    def admit(
        self, job_id: int, messages: tuple[ChatMessage, ...] | str, sampling: Sampling
    ) -> bool:
        if isinstance(messages, str):
            messages = conversation(messages)
        return self.backend.admit(Generate(job_id, messages, sampling, stream=True))

    def step(self) -> None:
        for event in self.backend.step():
            match event:
                case Text(job_id, text):
                    self.texts[job_id] = self.texts.get(job_id, "") + text
                case Done(job_id, result):
                    assert self.texts.pop(job_id, "") == result.text
                    self.done[job_id] = result
                case Failed(job_id, failure):
                    self.failed[job_id] = failure

    def end(self, job_id: int) -> WorkDone:
        while job_id not in self.done:
            assert job_id not in self.failed, self.failed[job_id]
            self.step()
        return self.done.pop(job_id)

    def alone(self, messages: tuple[ChatMessage, ...] | str, sampling: Sampling) -> WorkDone:
        assert self.admit(0, messages, sampling)
        return self.end(0)


def forget(backend: SlotsBackend) -> None:
    """Leave nothing in any slot."""
    for slot in [*backend._jobs]:
        assert slot.answer is not None
        backend.drop(slot.answer.job.job_id)
    for slot in backend._slots:
        backend._keep(slot, 0)


@pytest.fixture(scope="module")
def eight(smollm2: Path) -> SlotsBackend:
    return slots.load(smollm2, threads=2, slots=8)


@pytest.fixture
def bench(eight: SlotsBackend) -> Iterator[Bench]:
    """Eight slots with nothing in them; reads in steps of 64 tokens."""
    forget(eight)
    budget, cost, eight.chunk_tokens = eight.budget_tokens, eight.guess_cost, 64
    yield Bench(eight)
    eight.budget_tokens, eight.guess_cost, eight._graph.doubles = budget, cost, False


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """The tokens that are picked, each with how far it was ahead of the next one, in logits."""
    found: list[tuple[int, float]] = []
    really_pick = Answer.pick

    def pick(answer: Answer, logits: np.ndarray) -> list[frames.Event]:
        second, first = np.partition(logits, -2)[-2:]
        events = really_pick(answer, logits)
        found.append((answer.last, float(first - second)))
        return events

    monkeypatch.setattr(Answer, "pick", pick)
    return found


def check_that_they_agree(
    picked: list[tuple[int, float]], ours: Bench, theirs: Bench, prompt: str, noise: float
) -> bool:
    """Greedy texts are the same, up to a token that was as good as another: kernels differ in last
    digits, and activations are rounded. Returns whether they are the same to the end."""
    told = []
    for each in (ours, theirs):
        picked.clear()
        each.alone(prompt, Sampling(max_tokens=32))
        told.append(picked.copy())
    for (one, ahead), (other, _) in zip(*told, strict=False):
        if one != other:
            assert ahead < noise, prompt
            return False
    assert len(told[0]) == len(told[1])
    return True


def test_greedy_text_is_that_of_genai(
    bench: Bench, smollm2: Path, picked: list[tuple[int, float]]
) -> None:
    reference = Bench(genai.load(smollm2, threads=2))
    same = [check_that_they_agree(picked, bench, reference, each, 0.3) for each in PROMPTS]
    assert sum(same) >= len(same) // 2


def some_jobs(prompts: tuple[str, ...]) -> dict[int, tuple[str, Sampling]]:
    """Greedy ones and sampled ones, short and long."""
    chance = random.Random(5)
    return {
        each: (
            chance.choice(prompts),
            Sampling(max_tokens=chance.randrange(2, 40), temperature=0.8 * (each % 2), seed=each),
        )
        for each in range(1, 17)
    }


def check_that_nothing_shows(
    backend: SlotsBackend, bench: Bench, jobs: dict[int, tuple[str, Sampling]]
) -> dict[int, WorkDone]:
    """Jobs write the same alone as among others, which come and go, and are cancelled, by chance.

    Returns what they wrote.
    """
    expected = {}
    for each, asked in jobs.items():
        forget(backend)
        expected[each] = bench.alone(*asked)
        assert expected[each].cached_tokens == 0
    forget(backend)
    chance = random.Random(6)
    for most in {3, backend.slots}:
        waiting, at_work = [*jobs], set[int]()
        chance.shuffle(waiting)
        while waiting or at_work:
            while waiting and len(at_work) < chance.randint(1, most):
                each = waiting.pop()
                assert bench.admit(each, *jobs[each])
                at_work.add(each)
            bench.step()
            at_work -= bench.done.keys()
            if at_work and chance.random() < 0.05:
                each = at_work.pop()
                backend.drop(each)
                bench.texts.pop(each, None)
                waiting.insert(0, each)
        assert not bench.failed
        for each, result in bench.done.items():
            assert (result.text, result.finish) == (expected[each].text, expected[each].finish)
        assert bench.done.keys() == jobs.keys()
        bench.done.clear()
    return expected


@pytest.mark.parametrize(("doubles", "guess_cost"), [(False, 0.3), (True, 1.0), (False, 0.0)])
def test_a_text_is_that_of_the_job_alone_whatever_runs_beside_it(
    eight: SlotsBackend, bench: Bench, doubles: bool, guess_cost: float
) -> None:
    eight._graph.doubles, eight.guess_cost = doubles, guess_cost
    check_that_nothing_shows(eight, bench, some_jobs(PROMPTS))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guesses_show_in_no_text(eight: SlotsBackend, bench: Bench, temperature: float) -> None:
    assert eight.is_exact
    for prompt in PROMPTS:
        told = []
        for eight.guess_cost in (1.0, 0.0):
            forget(eight)
            sampling = Sampling(max_tokens=48, temperature=temperature, seed=3)
            told.append(bench.alone(prompt, sampling))
        assert told[0].text == told[1].text
        assert told[0].tokens == told[1].tokens


def test_what_is_guessed_right_saves_runs(eight: SlotsBackend, bench: Bench) -> None:
    asked = conversation(f"Repeat this text: {FOX * 4}"), Sampling(max_tokens=64)
    steps = []
    for eight.guess_cost in (1.0, 0.2):
        forget(eight)
        assert bench.admit(1, *asked)
        steps.append(0)
        while 1 not in bench.done:
            bench.step()
            steps[-1] += 1
        del bench.done[1]
    assert steps[1] < 0.6 * steps[0]


def test_a_board_that_computes_otherwise_guesses_nothing_and_keeps_prompts_alone(
    eight: SlotsBackend, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.alone(FOX * 12, Sampling(max_tokens=24))
    forget(eight)
    really_run = eight._graph.run

    def run(first: int, tokens: list[np.ndarray], starts: list[int], **how: bool) -> np.ndarray:
        logits = really_run(first, tokens, starts, **how)
        if sum(map(len, tokens)) == 1:  # another kernel, with other last digits
            logits *= np.float32(1 + 1e-6)
        return logits

    monkeypatch.setattr(eight._graph, "run", run)
    eight.warm_up()
    eight.chunk_tokens = 64
    try:
        assert eight._graph.doubles
        assert not eight.is_exact
        assert eight.guess_cost == 1
        result = bench.alone(FOX * 12, Sampling(max_tokens=24))
        assert result.text == expected.text
        assert {slot.length for slot in eight._slots} == {0, result.prompt_tokens}
    finally:
        monkeypatch.undo()
        eight.warm_up()


@pytest.mark.parametrize("preset", ["llama3", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_every_architecture_is_run_as_genai_runs_it(
    tmp_path: Path, preset: str, kind: str, picked: list[tuple[int, float]]
) -> None:
    file = tiny(preset, kind, context=512).write(tmp_path / "tiny.gguf")
    folder = import_gguf(file, ModelLibrary(tmp_path / "models"), "tiny", silent)
    jobs = some_jobs(tuple("a b c d " * times for times in (1, 3, 7, 8)))
    backend = slots.load(folder, 1, 4)
    assert backend.is_exact
    check_that_nothing_shows(backend, Bench(backend), jobs)
    reference = Bench(genai.load(folder, 1))
    noise = 1e-3 if kind == "F32" else 0.3
    for prompt in {prompt for prompt, _ in jobs.values()}:
        check_that_they_agree(picked, Bench(backend), reference, prompt, noise)


def test_others_write_on_while_a_long_prompt_is_read(bench: Bench) -> None:
    bench.admit(1, "Tell me a story.", Sampling(max_tokens=200))
    while 1 not in bench.texts:
        bench.step()
    bench.admit(2, FOX * 60, Sampling(max_tokens=2))
    steps = 0
    while 2 not in bench.texts and 2 not in bench.done:
        before = bench.texts[1]
        bench.step()
        bench.step()
        steps += 2
        assert bench.texts[1] != before
    assert steps >= 10  # chunks


def test_nothing_is_read_twice(eight: SlotsBackend, bench: Bench) -> None:
    greedy = Sampling(max_tokens=24)
    story = FOX * 12
    first = bench.alone(story, greedy)
    turns = conversation(story, first.text, "Who jumps?")
    count = eight.count(turns)
    follow_up = bench.alone(turns, greedy)
    assert first.cached_tokens == 0
    assert follow_up.cached_tokens >= first.prompt_tokens - 5  # where the answer's turn begins
    # Again: all but the two tokens that are always read.
    again = bench.alone(turns, greedy)
    assert again.cached_tokens == count - 2
    forget(eight)
    cold = bench.alone(turns, greedy)
    assert cold.cached_tokens == 0
    assert cold.text == follow_up.text == again.text


def test_what_another_job_reads_is_taken_over(eight: SlotsBackend, bench: Bench) -> None:
    expected = bench.alone(FOX * 20, Sampling(max_tokens=24)).text
    forget(eight)
    for each in (1, 2, 3):  # at once: nothing is read yet when they come
        bench.admit(each, FOX * 20, Sampling(max_tokens=24))
    results = [bench.end(each) for each in (1, 2, 3)]
    count = results[0].prompt_tokens
    assert [result.cached_tokens for result in results] == [0, count - 2, count - 2]
    assert {result.text for result in results} == {expected}


def test_another_conversation_does_not_push_one_out(eight: SlotsBackend, bench: Bench) -> None:
    greedy = Sampling(max_tokens=2)
    long = FOX * 20
    count = bench.alone(long, greedy).prompt_tokens
    for each in range(7):
        bench.alone(f"{each} is a number", greedy)
    assert bench.alone(long, greedy).cached_tokens == count - 2


def test_the_text_does_not_depend_on_the_prefill_step(eight: SlotsBackend, bench: Bench) -> None:
    for prompt in ("1+1?", FOX * 12):
        count = eight.count(conversation(prompt))
        texts = set()
        for eight.chunk_tokens in (*CHUNKS, count - 1, count, count + 1):
            forget(eight)
            texts.add(bench.alone(prompt, Sampling(max_tokens=24)).text)
        assert len(texts) == 1


def test_a_job_is_admitted_only_if_all_may_become_as_long_as_they_may(
    eight: SlotsBackend, bench: Bench
) -> None:
    count = eight.count(conversation(FOX * 20))
    eight.budget_tokens = count + 300
    bench.alone("1+1?", Sampling(max_tokens=4))
    assert bench.alone(FOX * 20, Sampling(max_tokens=4)).cached_tokens == 24 < count
    assert bench.admit(1, FOX * 20, Sampling(max_tokens=200))
    # That took the room of what was kept of the other.
    assert [slot.length for slot in eight._slots if slot.length] == [count - 2]
    assert not bench.admit(2, "1+1?", Sampling(max_tokens=200))
    assert bench.admit(3, "1+1?", Sampling(max_tokens=40))
    eight.drop(1)
    assert bench.admit(2, "1+1?", Sampling(max_tokens=200))
    with pytest.raises(EngineError, match=f"No room for {count + 301} tokens"):
        bench.admit(4, FOX * 20, Sampling(max_tokens=301))


def test_a_job_without_room_waits_for_another_to_end(eight: SlotsBackend, bench: Bench) -> None:
    """In the worker: in its turn, neither refused nor lost."""
    count = eight.count(conversation("1+1?"))
    eight.budget_tokens = count + 30
    ours, theirs = os.pipe(), os.pipe()
    done: list[int] = []

    def ask() -> None:
        for each in (1, 2, 3):
            asked = Generate(each, conversation("1+1?"), Sampling(max_tokens=20 + each), False)
            os.write(ours[1], frames.encode(asked))
        os.write(ours[1], frames.encode(frames.Cancel(2)))
        reader = frames.event_reader()
        while len(done) < 2:
            for event in reader.feed(os.read(theirs[0], 65536)):
                done.extend([event.job_id] if isinstance(event, Done) else [])
        os.close(ours[1])

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    with pytest.raises(EOFError):
        Worker(eight, Pipe(ours[0], theirs[1])).serve()
    asking.join()
    assert done == [1, 3]
    for each in (ours[0], *theirs):
        os.close(each)


def test_memory_that_is_short_for_one_job_ends_that_one_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others end with the same run."""
    really_pick = Answer.pick

    def pick(answer: Answer, logits: np.ndarray) -> list[frames.Event]:
        if answer.job.job_id == 2 and answer.left == 1:
            raise MemoryError
        return really_pick(answer, logits)

    monkeypatch.setattr(Answer, "pick", pick)
    bench.backend.guess_cost = 1.0
    for each in (1, 2, 3):
        bench.admit(each, "Why is the sky blue?", Sampling(max_tokens=14 - each))
    while len(bench.done) + len(bench.failed) < 3:
        bench.step()
    assert bench.done.keys() == {1, 3}
    assert bench.failed[2].reason == "No room in memory."


def test_numbers_that_are_none_end_one_job_alone(eight: SlotsBackend, bench: Bench) -> None:
    expected = bench.alone("Why is the sky blue?", Sampling(max_tokens=12)).text
    for each in (1, 2, 3):
        bench.admit(each, "Why is the sky blue?", Sampling(max_tokens=12))
    while 3 not in bench.texts:
        bench.step()
    (spoilt,) = (slot for slot in eight._jobs if slot.answer and slot.answer.job.job_id == 2)
    for buffer in eight._cache._buffers:
        buffer[eight._row(spoilt), :, : spoilt.length] = np.nan
    assert (bench.end(1).text, bench.end(3).text) == (expected, expected)
    assert bench.failed[2].reason == "The model computed no valid numbers."
    # Nobody reads on from there.
    assert {bench.alone("Why is the sky blue?", Sampling(max_tokens=12)).text} == {expected}


def test_a_freed_slot_gives_back_what_was_written(eight: SlotsBackend, bench: Bench) -> None:
    before = resident_bytes()
    bench.admit(1, FOX * 100, Sampling(max_tokens=4))
    bench.end(1)
    kept = resident_bytes()
    (slot,) = (slot for slot in eight._slots if slot.length)
    held = slot.length * eight._cache.token_bytes
    assert held > 40e6
    assert kept - before > 0.9 * held
    forget(eight)
    assert kept - resident_bytes() > 0.9 * held


def test_rows_are_copied_and_given_back_in_whole_pages() -> None:
    cache = Cache(2, 3, 2, 100, 64)
    assert cache.capacity == 112  # whole pages of each head
    assert cache.token_bytes == 2 * 2 * 64 * 4
    numbers = np.random.default_rng(1).standard_normal((2, 3, *cache.shape)).astype(np.float32)
    for buffer, values in zip(cache._buffers, numbers, strict=True):
        buffer[0, :, :90] = values[0, :, :90]
    cache.copy(0, 2, 70)
    cache.release(0, 17, 90)
    for buffer, values in zip(cache._buffers, numbers, strict=True):
        assert np.array_equal(buffer[0, :, :32], values[0, :, :32])
        assert not buffer[0, :, 32:].any()
        assert not buffer[1].any()
        assert np.array_equal(buffer[2, :, :70], values[0, :, :70])


def test_jobs_at_once_in_a_process_of_their_own(smollm2: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=3) as (engine, events):
            assert events.ready[0].slots == 3
            for each in range(1, 6):
                engine.work(job(each, PROMPTS[each % 2], max_tokens=24 + each))
            await events.writes(3)
            assert not events.done
            engine.cancel(2)
            texts = {each: (await events.ends(each)).text for each in (1, 3, 4, 5)}
            assert texts[5].startswith(texts[3])
            assert texts[3].startswith(texts[1])
            assert 2 not in events.done

    asyncio.run(scenario())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
