"""Guesses: what they are, when they are worth their while, and that no answer shows them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from models.tiny import tiny

from edgemoa.core.events import Finish, TokenLogprob, Wishes, WorkDone
from edgemoa.core.messages import Sampling
from edgemoa.engine import ragged, slots
from edgemoa.engine.drafts import MOST, Drafts
from edgemoa.engine.frames import Done, Generate, Text
from edgemoa.engine.slots import SlotsBackend
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent

from .harness import conversation

CONTEXT = 128
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}'


def test_what_followed_the_same_tokens_is_guessed() -> None:
    drafts = Drafts([1, 2, 3, 4, 5, 6, 2, 9, 1, 2])
    assert drafts.guess(4, 0) == [3, 4, 5, 6]
    assert drafts.guess(2, 0) == [3, 4]
    assert drafts.guess(0, 0) == []
    drafts.push(3)
    assert drafts.guess(4, 0) == [4, 5, 6, 2]
    drafts.push(7)
    assert drafts.guess(MOST, 0) == []


def test_more_tokens_alike_go_before_later_ones() -> None:
    drafts = Drafts([1, 2, 3, 4, 0, 2, 3, 5, 0, 1, 2, 3])
    assert drafts.guess(1, 0) == [4]
    drafts = Drafts([9, 2, 3, 4, 0, 8, 2, 3, 5, 0, 1, 2, 3])
    assert drafts.guess(1, 0) == [5]


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 1, 2]])
def test_of_few_tokens_nothing_is_guessed(text: list[int]) -> None:
    assert Drafts(text).guess(MOST, 0) == []


def test_so_many_are_guessed_as_pay() -> None:
    """Also where none were made before: a text that comes to repeat itself is noticed."""
    verse = list(range(20))
    drafts = Drafts(verse)
    assert drafts.guess(MOST, 0.6) == []
    for token in (*verse, *verse):
        drafts.push(token)
    assert len(drafts.guess(MOST, 0.6)) == MOST
    assert drafts.guess(MOST, 1) == []
    for token in (0, 1, 30, 0, 1, 31, 0, 1, 32, 0, 1, 33, 0, 1, 34, 0, 1, 35, 0, 1):
        drafts.push(token)
    assert len(drafts.guess(MOST, 0.6)) == 0
    assert drafts.guess(MOST, 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts")
    file = tiny("gemma3", "Q8_0", context=CONTEXT).write(path / "tiny.gguf")
    return import_gguf(file, ModelLibrary(path / "models"), "tiny", silent)


@pytest.fixture(scope="module")
def backend(folder: Path) -> SlotsBackend:
    loaded = slots.load(folder, 1, 4)
    assert loaded.is_exact
    return loaded


Told = tuple[str, Finish, int, list[TokenLogprob]]


def told(backend: SlotsBackend, jobs: list[Generate]) -> tuple[dict[int, Told], int]:
    """What is said of jobs, of which as many run at a time as may; and the steps that it takes."""
    backend.forget()
    waiting, done, steps = jobs[::-1], dict[int, WorkDone](), 0
    logprobs: dict[int, list[TokenLogprob]] = {each.job_id: [] for each in jobs}
    while len(done) < len(jobs):
        while waiting and len(backend._jobs) < backend.slots and backend.admit(waiting[-1]):
            waiting.pop()
        steps += 1
        for event in backend.step():
            assert isinstance(event, Text | Done), event
            if isinstance(event, Text):
                logprobs[event.job_id] += event.logprobs
            else:
                done[event.job_id] = event.result
    found = {
        each: (result.text, result.finish, result.tokens, logprobs[each])
        for each, result in done.items()
    }
    return found, steps


def some_job(number: int, chance: random.Random) -> Generate:
    sampling = Sampling(
        max_tokens=chance.choice([1, 2, 7, 40, 1000, 1000]),  # often until the context is full
        temperature=chance.choice([0.0, 0.0, 0.05, 0.8]),
        top_p=chance.choice([1.0, 0.9]),
        top_k=chance.choice([0, 3]),
        min_p=chance.choice([0.0, 0.1]),
        repetition_penalty=chance.choice([1.0, 1.0, 1.1]),
        presence_penalty=chance.choice([0.0, 0.0, 0.2]),
        frequency_penalty=chance.choice([0.0, 0.0, 0.1]),
        seed=chance.randrange(100),
        stop=chance.choice([(), ("e", "th"), ("qq",)]),
    )
    wishes = Wishes(
        schema=chance.choice(["", "", "", SCHEMA]),
        logprobs=chance.choice([-1, 0, 2]),
        logit_bias=chance.choice([{}, {40: 2.0, 41: -3.0}]),
    )
    text = "".join(chance.choices(["ab", "abc ", "the "], k=chance.randrange(1, 20)))
    return Generate(number, conversation(text), sampling, stream=True, wishes=wishes)


def test_no_answer_shows_guesses_or_what_else_runs(backend: SlotsBackend) -> None:
    """Its text, how it ends, its tokens' probabilities: with all that an answer may be asked for,
    up to the last token of the context."""
    chance = random.Random(11)
    jobs = [some_job(number, chance) for number in range(80)]
    expected: dict[int, Told] = {}
    backend.guess_cost = 1.0
    for each in jobs:
        expected |= told(backend, [each])[0]
    assert {finish for _, finish, _, _ in expected.values()} == {"stop", "length", "loop"}
    lengths = [backend.count(each.messages) + expected[each.job_id][2] for each in jobs]
    assert lengths.count(CONTEXT) > 4
    steps = []
    for backend.guess_cost in (1.0, 0.1, 0.0):
        found, count = told(backend, jobs)
        steps.append(count)
        for each in jobs:
            assert found[each.job_id] == expected[each.job_id], each
    assert max(steps[1:]) < 0.8 * steps[0]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_vocabulary_that_leaves_no_room_for_guesses(
    folder: Path, backend: SlotsBackend, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(12)
    jobs = [some_job(number, chance) for number in range(8)]
    expected, _ = told(backend, jobs)
    monkeypatch.setattr(ragged, "LOGITS_BYTES", 1)
    narrow = slots.load(folder, 1, rows)
    assert narrow._graph.most_logits == max(rows, 2)
    narrow.guess_cost = 0.0
    assert told(narrow, jobs)[0] == expected
