"""What is read ahead of a prompt: proposals as they arrive, at nobody's cost, and with no trace in
any text."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models.tiny import tiny as tiny_gguf

from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.moa import Draft, Room, Synthesis, Write
from edgemoa.engine import slots
from edgemoa.engine.slots import SlotsBackend
from edgemoa.errors import InvalidPromptError
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent

from .harness import conversation, cpu_s, job, pid_of, running
from .test_slots import FOX, Bench, forget

ASKED = conversation("Why is the sky blue? Explain it to a child.")
ROOM = Room(4_000)
DRAFTS = [
    Draft.of(BoardId(f"board-{n}"), f"The answer of board {n}: {FOX * 12}", 130, "stop", own=not n)
    for n in range(4)
]


@pytest.fixture(scope="module")
def four(smollm2: Path) -> SlotsBackend:
    return slots.load(smollm2, threads=2, slots=4)


@pytest.fixture
def bench(four: SlotsBackend) -> Iterator[Bench]:
    """Four slots with nothing in them; reads in steps of 64 tokens."""
    forget(four)
    budget, four.chunk_tokens, four._owed_s = four.budget_tokens, 64, 0.0
    yield Bench(four)
    four.budget_tokens = budget


def begun(drafts: int) -> tuple[ChatMessage, ...]:
    return Synthesis().begin(ASKED, DRAFTS[:drafts], ROOM)


def concluded() -> tuple[ChatMessage, ...]:
    conclusion = Synthesis().conclude(ASKED, DRAFTS, ROOM)
    assert isinstance(conclusion, Write)
    return conclusion.messages


def read(backend: SlotsBackend) -> None:
    while backend.has_to_read:
        assert not backend.step()


def ahead_of(backend: SlotsBackend, key: str) -> slots._Slot:
    (slot,) = (slot for slot in backend._slots if slot.ahead == key)
    return slot


def test_after_the_last_proposal_only_that_one_is_left_to_read(
    four: SlotsBackend, bench: Bench
) -> None:
    greedy = Sampling(max_tokens=16)
    whole = four.count(concluded())
    cold = bench.alone(concluded(), greedy)
    assert cold.cached_tokens == 0
    forget(four)
    bench.alone(ASKED, greedy)  # the board's own proposal
    rows, computed = [], []
    really_run = four._graph.run

    def run(first: int, tokens: list[np.ndarray], starts: list[int]) -> np.ndarray:
        computed.append(sum(map(len, tokens)))
        return really_run(first, tokens, starts)

    four._graph.run = run  # type: ignore[assignment,method-assign]
    try:
        for drafts in (1, 2, 3):
            four.read_ahead("request", begun(drafts))
            read(four)
            rows.append(four._row(ahead_of(four, "request")))
    finally:
        four._graph.run = really_run  # type: ignore[method-assign]
    # In one place, nothing twice: not the conversation either.
    assert len(set(rows)) == 1
    assert sum(computed) <= four.count(begun(3)) - four.count(ASKED) + 20
    warm = bench.alone(concluded(), greedy)
    one = len(four._reader.tokens.encode(DRAFTS[3].text))
    instruction = four.count((*concluded(),)) - four.count(concluded()[:-1])
    assert warm.cached_tokens >= whole - one - instruction - 12
    assert warm.text == cold.text
    assert warm.prompt_tokens == cold.prompt_tokens == whole
    # What it took is this job's, though it was done before.
    assert warm.ahead_tokens == sum(computed)
    assert warm.model_ms > warm.work_ms + 0.2 * cold.prefill_ms
    assert bench.alone(concluded(), greedy).ahead_tokens == 0


def test_a_prompt_takes_over_what_is_half_read(four: SlotsBackend, bench: Bench) -> None:
    expected = bench.alone(concluded(), Sampling(max_tokens=16)).text
    forget(four)
    four.read_ahead("request", begun(3))
    four.step()
    four.step()
    half = ahead_of(four, "request")
    assert half.read == 128 < len(half.prompt)
    result = bench.alone(concluded(), Sampling(max_tokens=16))
    assert (result.text, result.cached_tokens) == (expected, 128)
    assert not four.has_to_read
    assert not any(slot.ahead for slot in four._slots)
    # It was the job's from then on: what comes too late is of no harm.
    four.read_ahead("request", ())


def test_proposals_that_come_to_be_shortened_are_read_again(
    four: SlotsBackend, bench: Bench
) -> None:
    forget(four)
    short = Synthesis().conclude(ASKED, DRAFTS, Room(300))
    assert isinstance(short, Write)
    expected = bench.alone(short.messages, Sampling(max_tokens=16)).text
    forget(four)
    four.read_ahead("request", begun(3))
    read(four)
    result = bench.alone(short.messages, Sampling(max_tokens=16))
    assert result.text == expected
    assert 20 < result.cached_tokens < 150


def test_a_prompt_never_waits_for_it(four: SlotsBackend, bench: Bench) -> None:
    four.read_ahead("request", begun(3))
    four.step()
    ahead = ahead_of(four, "request")
    assert bench.admit(1, FOX * 30, Sampling(max_tokens=4))
    (slot,) = four._jobs
    while slot.reading:
        before = slot.read, ahead.read
        bench.step()
        assert slot.read > before[0]
        assert ahead.read == before[1] == 64
    bench.end(1)
    read(four)
    assert ahead.read == len(ahead.prompt)


def test_who_writes_gives_it_half_of_the_time_at_most(four: SlotsBackend, bench: Bench) -> None:
    bench.admit(1, "Tell me a story.", Sampling(max_tokens=300))
    while 1 not in bench.texts:
        bench.step()
    (slot,) = four._jobs
    four.read_ahead("request", begun(3))
    ahead = ahead_of(four, "request")
    reading = writing = 0.0
    four.meter = type(four.meter)()
    while ahead.read < len(ahead.prompt):
        before = slot.length, ahead.read, four._owed_s
        bench.step()
        assert slot.length > before[0]  # with every step
        if ahead.read > before[1]:
            assert before[2] <= 0
            reading += 1
        else:
            writing += 1
    assert reading >= 5
    assert writing > 2 * (reading - 1)  # a chunk takes as long as several tokens
    four.drop(1)


def test_several_prompts_have_one_each_and_a_job_takes_any_slot_it_needs(
    four: SlotsBackend, bench: Bench
) -> None:
    four.read_ahead("one", begun(2))
    four.read_ahead("two", conversation("Name a colour.", FOX * 5))
    read(four)
    one, two = ahead_of(four, "one"), ahead_of(four, "two")
    assert one.read == len(one.prompt)
    assert two.read == len(two.prompt)
    four.read_ahead("one", ())  # read no further; it stays there as long as nobody needs it
    assert not one.ahead
    assert one.read == len(one.prompt)
    four.read_ahead("one", begun(3))
    assert one is ahead_of(four, "one")
    read(four)
    # Jobs come first, in other slots while there are some, then in any.
    for each in range(1, 4):
        assert bench.admit(each, f"{each} is a number", Sampling(max_tokens=60))
    assert len([slot for slot in four._slots if slot.ahead]) == 1
    assert ahead_of(four, "one")  # the later one
    four.read_ahead("three", conversation("Name a number.", FOX))  # no place
    assert not four.has_to_read
    assert bench.admit(4, "4 is a number", Sampling(max_tokens=60))
    assert not any(slot.ahead for slot in four._slots)
    for each in range(1, 5):
        four.drop(each)


def test_other_prompts_that_begin_alike_do_not_spoil_it(four: SlotsBackend, bench: Bench) -> None:
    four.read_ahead("request", begun(1))
    read(four)
    ahead = ahead_of(four, "request")
    kept = ahead.read
    result = bench.alone(ASKED, Sampling(max_tokens=4))
    assert result.cached_tokens == result.prompt_tokens - 2  # it begins with that
    assert ahead_of(four, "request") is ahead
    assert ahead.read == kept
    # Neither what was not read yet.
    forget(four)
    long = conversation(FOX * 20)
    four.read_ahead("request", (*long, ChatMessage("assistant", FOX * 2)))
    assert bench.alone(long, Sampling(max_tokens=4)).cached_tokens == 0
    four.step()
    assert bench.alone(long, Sampling(max_tokens=4)).text
    read(four)
    ahead = ahead_of(four, "request")
    assert ahead.read == len(ahead.prompt)
    assert bench.alone(long, Sampling(max_tokens=4)).text
    assert ahead_of(four, "request") is ahead
    assert ahead.read == len(ahead.prompt)


def test_what_is_merely_kept_goes_before_what_is_read_ahead(
    four: SlotsBackend, bench: Bench
) -> None:
    for each in range(3):
        bench.alone(f"{each}{FOX * 3}", Sampling(max_tokens=2))
    four.read_ahead("request", begun(3))  # nothing of it is read yet
    bench.alone(f"3{FOX * 3}", Sampling(max_tokens=2))
    assert ahead_of(four, "request").claims > 100
    assert sum(slot.read > 40 for slot in four._slots) == 3


def test_memory_is_the_jobs_first(four: SlotsBackend, bench: Bench) -> None:
    count = len(four._reader.read_begun(begun(3)))
    four.budget_tokens = count + 100
    bench.alone(FOX * 8, Sampling(max_tokens=4))
    four.read_ahead("request", begun(3))  # takes the room of what is merely kept
    read(four)
    assert ahead_of(four, "request").read == count
    assert sum(slot.length for slot in four._slots) == count
    # What nobody read yet counts, too.
    forget(four)
    four.read_ahead("request", begun(3))
    four.read_ahead("other", conversation("?", FOX * 20))
    assert {slot.ahead for slot in four._slots} == {"request", ""}
    assert bench.admit(1, "1+1?", Sampling(max_tokens=200))
    assert not any(slot.ahead for slot in four._slots)
    four.read_ahead("request", begun(3))
    assert not four.has_to_read
    four.drop(1)


def test_what_cannot_be_read_is_nobodys_loss(four: SlotsBackend, bench: Bench) -> None:
    four.read_ahead("request", (ChatMessage("user", ""),))
    read(four)
    four.read_ahead("request", conversation(FOX * 4_000))  # more than the context
    assert not four.has_to_read
    four.read_ahead("request", begun(1))
    four.step()
    really_run = four._graph.run

    def fail(*_: object) -> None:
        raise MemoryError

    four._graph.run = fail  # type: ignore[assignment,method-assign]
    try:
        assert four.step() == []
    finally:
        four._graph.run = really_run  # type: ignore[method-assign]
    assert not four.has_to_read
    assert not any(slot.length for slot in four._slots)
    assert bench.alone("1+1?", Sampling(max_tokens=4)).text


def test_whatever_is_read_ahead_shows_in_no_text_and_keeps_to_the_budget(tmp_path: Path) -> None:
    """Jobs, cancellations and readings by chance, in less memory than all of them want."""
    file = tiny_gguf("llama3", "Q4_K", context=512).write(tmp_path / "tiny.gguf")
    folder = import_gguf(file, ModelLibrary(tmp_path / "models"), "tiny", silent)
    backend = slots.load(folder, 1, 4)
    bench, chance = Bench(backend), random.Random(3)
    words = [" ".join(chance.choices("abcd", k=20)) for _ in range(6)]
    asked = [
        conversation(*(chance.choice(words[:3]) for _ in range(turns)))
        for turns in (1, 1, 3, 3, 5, 5, 3, 1)
    ]
    jobs = [
        (messages, Sampling(max_tokens=chance.randrange(2, 30), temperature=n % 2, seed=n))
        for n, messages in enumerate(asked)
    ]
    expected = []
    for each in jobs:
        forget(backend)
        expected.append(bench.alone(*each).text)
    backend.chunk_tokens, backend.budget_tokens = 16, 420
    at_work: dict[int, int] = {}
    cached = finished = 0
    for number in range(1, 6_000):
        match chance.randrange(8):
            case 0 | 1 if len(at_work) < 4:
                which = chance.randrange(len(jobs))
                if bench.admit(number, *jobs[which]):
                    at_work[number] = which
            case 2 if at_work and chance.random() < 0.3:
                dropped = chance.choice([*at_work])
                del at_work[dropped]
                backend.drop(dropped)
                bench.texts.pop(dropped, None)
            case 3:
                messages = chance.choice(asked)
                backend.read_ahead(
                    chance.choice("xyz"), messages[: chance.randint(0, len(messages))]
                )
            case _:
                bench.step()
        for done in [*bench.done]:
            result, which = bench.done.pop(done), at_work.pop(done)
            assert result.text == expected[which]
            cached, finished = cached + result.cached_tokens, finished + 1
        assert not bench.failed
        claimed = sum(slot.claims for slot in backend._slots if slot.answer is None)
        assert claimed + sum(slot.worst for slot in backend._jobs) <= 420
        keys = [slot.ahead for slot in backend._slots if slot.ahead]
        assert len(keys) == len(set(keys))
        assert all(slot.answer is None for slot in backend._slots if slot.ahead)
        assert {slot.answer.job.job_id for slot in backend._jobs if slot.answer} == at_work.keys()
    assert finished > 200
    assert cached > 20 * finished


def test_a_template_that_refuses_is_not_asked_twice(four: SlotsBackend, bench: Bench) -> None:
    four.read_ahead("request", begun(1))
    with pytest.raises(InvalidPromptError):
        four.read_ahead("request", (ChatMessage("user", "x" * 1_100_000),))
    assert not any(slot.ahead for slot in four._slots)


def test_a_process_that_hangs_over_what_it_reads_ahead_is_replaced(smollm2: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=2, hang_s=0.8) as (
            engine,
            events,
        ):
            engine.read_ahead("request", begun(1))
            await asyncio.sleep(1.7)  # done with it, but for saying so when it is asked
            assert not events.lost
            used_s = cpu_s(pid_of(engine))
            await asyncio.sleep(1)
            assert cpu_s(pid_of(engine)) - used_s <= 0.02
            os.kill(pid_of(engine), signal.SIGSTOP)
            assert "said nothing" in await events.loses()
            await events.loads(2)
            assert engine._ahead == set()

    asyncio.run(scenario())


def test_a_process_reads_ahead_and_then_rests(smollm2: Path, tiny: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=2) as (engine, events):
            engine.read_ahead("request", begun(2))
            engine.read_ahead("request", begun(3))
            await engine.measure(ASKED)  # it was heard
            begun_s = used_s = cpu_s(pid_of(engine))
            async with asyncio.timeout(20):  # until it used next to nothing for a second
                while True:
                    await asyncio.sleep(1)
                    before_s, used_s = used_s, cpu_s(pid_of(engine))
                    if used_s - before_s <= 0.02:
                        break
            assert used_s > begun_s
            engine.work(job(1, messages=concluded()))
            engine.read_ahead("request", ())
            engine.read_ahead("another", ())
            result = await events.ends(1)
            assert result.cached_tokens > 0.6 * result.prompt_tokens
            assert not events.lost
            assert engine._ahead == set()
        async with running(tiny) as (engine, events):  # by genai: nothing to be had
            engine.read_ahead("request", begun(2))
            assert engine._ahead == set()
            engine.work(job(1, "go>"))
            assert (await events.ends(1)).cached_tokens == 0

    asyncio.run(scenario())
