"""Answers held to JSON, told with their probabilities; with the default model."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest

from edgemoa.core.events import Job, Wishes, WorkFailed
from edgemoa.core.messages import Sampling
from edgemoa.engine import engine as engine_module
from edgemoa.engine import genai, guidance, slots
from edgemoa.engine.answer import Answer, Reader, load_reader
from edgemoa.engine.engine import Engine
from edgemoa.engine.frames import Done, Event, Failed, Generate, Text
from edgemoa.engine.guidance import check_schema
from edgemoa.errors import EngineError, SchemaError, UserError

from .harness import Recorder, conversation, pid_of, process_file, running


class City(msgspec.Struct, forbid_unknown_fields=True):
    """What :data:`SCHEMA` describes, read by another library."""

    name: Annotated[str, msgspec.Meta(max_length=40)]
    people: Annotated[int, msgspec.Meta(ge=0, le=99_999_999)]
    coastal: bool
    tags: Annotated[list[Literal["old", "big"]], msgspec.Meta(max_length=3)]


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "people": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
            "coastal": {"type": "boolean"},
            "tags": {"type": "array", "items": {"enum": ["old", "big"]}, "maxItems": 3},
        },
        "required": ["name", "people", "coastal", "tags"],
        "additionalProperties": False,
    }
)
QUESTION = conversation("Describe the city of Kyōto (京都) as JSON.")


@pytest.fixture(scope="module")
def reader(smollm2: Path) -> Reader:
    return load_reader(smollm2, 8192)


def answer(
    reader: Reader,
    *,
    prompt: tuple[int, ...] = (5, 6),
    wishes: Wishes | None = None,
    limit: int = 99,
    **sampling: Any,
) -> Answer:
    options = Sampling(**sampling)
    job = Generate(1, QUESTION, options, True, wishes or Wishes())
    return Answer(job, reader, list(prompt), limit, ends_loops=True)


def row(
    reader: Reader, *likely: int, width: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    logits = np.zeros(width or reader.tokens.size, np.float32)
    for rank, token in enumerate(likely):
        logits[token] = 20 - rank
    return logits


def write(told: Answer, reader: Reader, text: str, *then: int) -> list[Event]:
    events: list[Event] = []
    for token in [*reader.tokens.encode(text), *then]:
        events += told.pick(row(reader, token))
        if events and isinstance(events[-1], Done):
            break
    return events


# --- which tokens


def test_only_what_the_schema_allows_is_picked_and_never_a_control_token(reader: Reader) -> None:
    guide = reader.guide(SCHEMA)
    assert guide is not None
    tokens = reader.tokens
    hidden = {number for number in range(tokens.size) if not tokens.piece(number)}
    assert tokens.end_of_turn <= hidden
    text = '{"name": "Kyōto 京都 \\"🗼\\"", "people": 1, "coastal": false, "tags": ["old"]}'
    ended = False
    for number in tokens.encode(text):
        assert not ended
        allowed = set(np.flatnonzero(guide.allowed()).tolist())
        assert number in allowed
        assert not allowed & hidden  # nothing is complete yet, so it may not end either
        ended = guide.push(number)
    assert ended


def test_an_answer_may_end_where_it_is_complete(reader: Reader) -> None:
    guide = reader.guide('{"type": "integer"}')
    assert guide is not None
    (seven,) = reader.tokens.encode("7")
    assert not set(np.flatnonzero(guide.allowed())) & reader.tokens.end_of_turn
    assert not guide.push(seven)  # another digit may follow
    ends = set(np.flatnonzero(guide.allowed())) - set(map(int, reader.tokens.encode("0123456789")))
    assert {int(n) for n in ends if not reader.tokens.piece(int(n))} == reader.tokens.end_of_turn


def test_a_text_within_bounds_may_be_long(reader: Reader) -> None:
    guide = reader.guide('{"type": "string", "maxLength": 9999}')
    assert guide is not None
    text = " ".join(f"{n} of the {n * n} towns" for n in range(300))
    tokens = reader.tokens.encode(f'"{text}"')
    assert len(tokens) > 2000
    for number in tokens[:-1]:
        assert guide.allowed()[number]
        assert not guide.push(number)
    assert guide.push(tokens[-1])


def test_a_model_without_an_end_writes_what_the_schema_says(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = load_reader(smollm2, 8192)
    monkeypatch.setattr(endless.tokens, "end_of_turn", frozenset())
    guide = endless.guide('{"const": 7}')
    assert guide is not None
    (seven,) = endless.tokens.encode("7")
    assert np.flatnonzero(guide.allowed()).tolist() == [seven]
    assert guide.push(seven)


def test_a_token_that_the_tokenizer_does_not_have_is_never_picked(reader: Reader) -> None:
    size = reader.tokens.size
    assert reader.tokens.knows(size - 1)
    assert not reader.tokens.knows(size)
    (yes,) = reader.tokens.encode("Yes")
    each: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}]
    for options in each:
        told = answer(reader, **options)
        told.pick(row(reader, size + 3, size, yes, width=size + 64))
        assert told.last == yes


def test_a_number_that_was_left_out_is_a_clear_failure(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(reader.tokens), "knows", lambda self, number: number != 1000)
    with pytest.raises(EngineError, match="a token that its tokenizer does not know"):
        answer(reader).pick(row(reader, 1000))


# --- how answers end


def test_the_last_bracket_ends_the_answer(reader: Reader) -> None:
    told = answer(reader, wishes=Wishes(schema='{"type": "object"}'))
    *_, done = write(told, reader, '{"a": 1} and more')
    assert isinstance(done, Done)
    assert (done.result.text, done.result.finish) == ('{"a": 1}', "stop")


def test_limits_loops_and_stop_strings_end_guided_answers_too(reader: Reader) -> None:
    wishes = Wishes(schema='{"type": "array"}')
    cases = [
        (answer(reader, wishes=wishes, limit=3), "[1, 2, 3, 4, 5]", "length"),
        (answer(reader, wishes=wishes, limit=999), "[" + "1, " * 99, "loop"),
        (answer(reader, wishes=wishes, stop=("3,",)), "[1, 2, 3, 4]", "stop"),
    ]
    for told, text, finish in cases:
        *_, done = write(told, reader, text)
        assert isinstance(done, Done)
        assert done.result.finish == finish
        assert text.startswith(done.result.text)
        assert len(done.result.text) < len(text)


# --- schemas


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("nonsense", "no JSON object"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"not": {}}', "Unimplemented keys"),
        ('{"type": "string", "format": "phone"}', "Unknown format"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"$ref": "#"}', "too complex"),
        (json.dumps({"properties": {f"k{n}": {} for n in range(2000)}}), "too complex"),
        ('{"$ref": "file:///etc/hostname"}', "not present"),
        ('{"items":' * 300 + "{}" + "}" * 300, "recursion limit"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(schema: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_schema(schema)


def test_a_clients_settings_for_the_library_are_not_taken(reader: Reader) -> None:
    guide = reader.guide('{"type": "object", "x-guidance": {"whitespace_pattern": "no*"}}')
    assert guide is not None
    guide.push(*reader.tokens.encode("{"))
    assert not guide.allowed()[reader.tokens.encode("n")[0]]


def test_without_the_library_the_answer_is_refused(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match="llguidance is not installed"):
        answer(reader, wishes=Wishes(schema='{"type": "object"}'))
    assert answer(reader) is not None


def test_in_the_models_process_no_error_quotes_the_schema(reader: Reader) -> None:
    with pytest.raises(SchemaError) as raised:
        reader.guide('{"type": "string", "format": "canary"}')
    assert "canary" not in str(raised.value)


ENDLESS = [
    {"type": "integer", "multipleOf": 99_999_989},
    {"allOf": [{"type": "string", "pattern": f".*{chr(97 + n) * 2}.*"} for n in range(22)]},
]


def test_schemas_are_checked_where_they_can_do_no_harm(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = Engine(tmp_path, "model", 1, Recorder())
        await engine.check_schema(SCHEMA)
        await engine.check_schema(SCHEMA)
        with pytest.raises(UserError, match="Unknown format: x"):
            await engine.check_schema('{"type": "string", "format": "x"}')
        for schema in ENDLESS:
            with pytest.raises(UserError, match="too much time or memory"):
                await engine.check_schema(json.dumps(schema))

    asyncio.run(scenario())


def test_what_was_found_of_a_schema_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks again, many at a time or not, costs no further child."""
    checked: list[bytes] = []
    really = engine_module._run_check

    async def run_check(schema: bytes) -> tuple[int, str]:
        checked.append(schema)
        return await really(schema)

    async def scenario() -> None:
        engine = Engine(tmp_path, "model", 1, Recorder())
        endless, bad = json.dumps(ENDLESS[0]), '{"type": "string", "format": "x"}'
        asked = (engine.check_schema(each) for each in (endless, bad, SCHEMA) * 3)
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(each) for each in told[:3]] == [str(each) for each in told[3:6]]
        assert [type(each) for each in told[:3]] == [UserError, UserError, type(None)]
        assert "too much time" in str(told[0])
        assert "Unknown format: x" in str(told[1])
        assert len(checked) == 3
        monkeypatch.setattr(engine_module, "_KEPT_CHECKS", 2)
        for number in range(3):
            with pytest.raises(UserError):
                await engine.check_schema(f'{{"not": {number}}}')
        assert (len(engine._refused), len(engine._checked)) == (2, 1)  # neither for the other
        await engine.check_schema(SCHEMA)
        assert len(checked) == 6

    monkeypatch.setattr(engine_module, "_run_check", run_check)
    asyncio.run(scenario())


def test_a_check_that_others_ended_says_nothing_of_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, the kernel kills whom it will."""
    really = asyncio.create_subprocess_exec

    async def killed(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
        process = await really(*arguments, **options)
        process.kill()
        return process

    async def scenario() -> None:
        engine = Engine(tmp_path, "model", 1, Recorder())
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "create_subprocess_exec", killed)
            with pytest.raises(EngineError, match="killed"):
                await engine.check_schema(SCHEMA)
        await engine.check_schema(SCHEMA)

    asyncio.run(scenario())


def test_a_schema_that_takes_too_much_in_the_middle_ends_its_answer_alone(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "_MAX_STATES", 320)
    wishes = Wishes(schema='{"type": "string", "minLength": 200, "maxLength": 999}')
    for backend in (slots.load(smollm2, 2, 2), genai.load(smollm2, 2)):
        events: list[Event] = []
        free = Generate(2, QUESTION, Sampling(max_tokens=90), stream=True)
        held = Generate(1, QUESTION, Sampling(max_tokens=90), True, wishes)
        for job in (held, free)[: backend.slots]:
            assert backend.admit(job)
        for _ in range(120):
            events += backend.step()
        (failed,) = (event for event in events if isinstance(event, Failed))
        assert failed == Failed(1, WorkFailed(guidance._TOO_COMPLEX, "schema"))
        assert any(isinstance(event, Text) and event.job_id == 1 for event in events)
        done = [event.job_id for event in events if isinstance(event, Done)]
        assert done == [2][: backend.slots - 1]
        assert backend.admit(Generate(3, QUESTION, Sampling(max_tokens=2), stream=True))


# --- probabilities


def test_logprobs_make_up_the_text_whatever_is_held_back(reader: Reader) -> None:
    text = "A 🗼 in 京都, and STOP"
    told = answer(reader, wishes=Wishes(logprobs=2), stop=("STOP",))
    events = write(told, reader, text + " here")
    texts = [event for event in events if isinstance(event, Text)]
    heard = ""
    tokens = b""
    for event in texts:
        heard += event.text
        tokens += b"".join(each.token for each in event.logprobs)
        assert tokens.decode(errors="ignore").startswith(heard)
    assert heard == "A 🗼 in 京都, and "
    assert tokens.decode() == "A 🗼 in 京都, and ST"  # the last token begins before the cut
    assert all(len(each.top) == 2 for event in texts for each in event.logprobs)


def test_a_character_that_is_cut_off_is_in_the_logprobs(reader: Reader) -> None:
    numbers = reader.tokens.encode("🗼")
    assert len(numbers) > 1
    told = answer(reader, wishes=Wishes(logprobs=0), limit=1)
    text, done = told.pick(row(reader, numbers[0]))
    assert isinstance(text, Text)
    assert isinstance(done, Done)
    assert (text.text, done.result.text, done.result.finish) == ("", "", "length")
    assert text.logprobs[0].token == reader.tokens.piece(numbers[0])


def test_logprobs_are_the_models_own(reader: Reader) -> None:
    (yes,), (no,) = reader.tokens.encode("Yes"), reader.tokens.encode("No")
    logits = np.full(reader.tokens.size, -np.inf, np.float32)
    logits[yes], logits[no] = np.log(0.75), np.log(0.25)
    wishes = Wishes(logprobs=20, logit_bias={yes: -100.0})
    told = answer(reader, wishes=wishes, temperature=0.5, prompt=(no,), repetition_penalty=2)
    (event,) = told.pick(logits)
    assert isinstance(event, Text)
    (only,) = event.logprobs
    assert only.token == b"No"
    assert only.logprob == pytest.approx(np.log(0.25))
    assert [token for token, _ in only.top[:2]] == [b"Yes", b"No"]
    assert [each for _, each in only.top[:2]] == pytest.approx([np.log(0.75), np.log(0.25)])


# --- the whole way


def test_both_back_ends_write_the_same(smollm2: Path) -> None:
    wishes = Wishes(schema=SCHEMA, logprobs=3, logit_bias={17: 1.5})
    sampling = Sampling(max_tokens=60, repetition_penalty=1.1, frequency_penalty=0.2)
    texts: list[str] = []
    tokens: list[list[bytes]] = []
    for backend in (genai.load(smollm2, 2), slots.load(smollm2, 2, 2)):
        assert backend.admit(Generate(1, QUESTION, sampling, True, wishes))
        events: list[Event] = []
        while not events or not isinstance(events[-1], Done):
            events += backend.step()
        told = [event for event in events if isinstance(event, Text)]
        tokens.append([each.token for event in told for each in event.logprobs])
        texts.append("".join(event.text for event in told))
    # Up to a token that is as good as another: kernels differ in last digits, and activations are
    # rounded.
    alike = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*tokens, strict=False)))
    assert len(alike) >= 8
    assert all(text.startswith("{") for text in texts)


def test_the_model_writes_what_the_schema_says(smollm2: Path) -> None:
    def mapped(engine: Engine) -> bool:
        return "llguidance" in process_file(pid_of(engine), "maps")

    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=4) as (engine, events):
            engine.work(Job(0, "proposal", QUESTION, Sampling(max_tokens=4), stream=True))
            await events.ends(0)
            assert not mapped(engine)
            wishes = Wishes(schema=SCHEMA, logprobs=1)
            for seed in range(1, 5):
                sampling = Sampling(max_tokens=160, temperature=float(seed > 1), seed=seed)
                engine.work(Job(seed, "aggregation", QUESTION, sampling, True, wishes))
            engine.work(Job(9, "aggregation", QUESTION, Sampling(max_tokens=9), True, wishes))
            for seed in range(1, 5):
                result = await events.ends(seed)
                assert result.finish == "stop"
                msgspec.json.decode(result.text, type=City)
                told = events.logprobs[seed]
                assert b"".join(each.token for each in told) == result.text.encode()
                assert all(each.logprob <= 0 and len(each.top) == 1 for each in told)
                assert len(told) <= result.tokens
            assert mapped(engine)
            cut = await events.ends(9)
            assert cut.finish == "length"
            assert re.match(r"\s*\{", cut.text)
            bad = Wishes(schema='{"not": {}}')
            engine.work(Job(10, "aggregation", QUESTION, Sampling(), True, bad))
            while 10 not in events.failed:
                await events._change()
            assert events.failed[10] == WorkFailed(
                "The answer's JSON schema cannot be obeyed.", code="schema"
            )
            engine.work(Job(11, "proposal", QUESTION, Sampling(max_tokens=4), stream=True))
            await events.ends(11)

    asyncio.run(scenario())
