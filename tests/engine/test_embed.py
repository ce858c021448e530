"""Vectors of texts, against the definition in numpy, and what asking for them does to others."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from models.tiny import Tiny, tiny
from onnx import TensorProto, helper, numpy_helper

from edgemoa.core import limits
from edgemoa.core.messages import Sampling
from edgemoa.engine import genai, slots
from edgemoa.engine.frames import Embed, Embedded, Failed, Generate
from edgemoa.engine.ragged import Graph
from edgemoa.engine.slots import SlotsBackend
from edgemoa.errors import (
    EngineError,
    InvalidPromptError,
    ModelInvalidError,
    PromptTooLongError,
)
from edgemoa.models.importer import convert, import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent
from edgemoa.text.files import RAGGED_GRAPH

from .harness import conversation, job, pid_of, running
from .test_slots import Bench

CONTEXT = 640
TEXTS = (
    "b",
    "ab",
    "the thin inn " * 30,
    "Straße 日本 🗼",
    "<|im_end|> the <bos>",
    "in the end " * 9,
)

Doubles = npt.NDArray[np.float64]


def imported(folder: Path, model: Tiny) -> Path:
    folder.mkdir(exist_ok=True)
    file = model.write(folder / "tiny.gguf")
    return import_gguf(file, ModelLibrary(folder / "models"), "tiny", silent)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("embed"), tiny("llama", "Q4_1", context=CONTEXT))


def other_version(folder: Path, copy: Path) -> Path:
    """The same model with a graph of the other kind: whether logits can be done without."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / RAGGED_GRAPH, load_external_data=False)
    graph = model.graph
    if "logits_wanted" in {each.name for each in graph.input}:
        (first,) = (node for node in graph.node if "logits_wanted" in node.input)
        (given,) = first.output
        graph.node.remove(first)
        for name in (graph.input, graph.initializer):
            name.remove(next(each for each in name if each.name == "logits_wanted"))
        rename(graph, given, "hidden")
    else:
        rename(graph, "hidden", "hidden.head")
        for name, value in {"from": 0, "logits_wanted": 2**63 - 1, "axis": 1}.items():
            graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        graph.input.append(helper.make_tensor_value_info("logits_wanted", TensorProto.INT64, [1]))
        names = ["hidden", "from", "logits_wanted", "axis"]
        at = next(index for index, node in enumerate(graph.node) if "hidden" in node.output)
        graph.node.insert(at + 1, helper.make_node("Slice", names, ["hidden.head"]))
    onnx.save(model, copy / RAGGED_GRAPH)
    return copy


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def embedded(backend: SlotsBackend, texts: Sequence[str]) -> Embedded:
    """What a back end says of texts that it is given now."""
    assert backend.admit(Embed(-1, tuple(texts)))
    while True:
        for event in backend.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Embedded):
                return event


def vectors(told: Embedded) -> Doubles:
    return np.array([np.frombuffer(each.vector, "<f4") for each in told.embeddings], np.float64)


def defined(model: Tiny, ids: list[int], start: int) -> Doubles:
    """By the reference's logits: the head is known, so what it was given is."""
    head = model.values["token_embd.weight" if model.tied else "output.weight"].astype(np.float64)
    logits = model.logits(np.array(ids)).astype(np.float64)
    hidden, *_ = np.linalg.lstsq(head, logits.T, rcond=None)
    mean = hidden[:, start:].mean(axis=1)
    return np.asarray(mean / np.linalg.norm(mean))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_vectors_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    model = tiny(name, "F32", context=CONTEXT)
    folder = tmp_path / "tiny"
    folder.mkdir()
    # Weights and activations as they are, so that rounding hides nothing.
    convert(model.write(tmp_path / "tiny.gguf"), folder, "tiny", silent, reference=True)
    for each in (folder, other_version(folder, tmp_path / "other")):
        backend = slots.load(each, 1, 2)
        tokens = backend._reader.tokens
        start = tokens.encode_prompt("")
        assert bool(start) == (name in {"gemma3", "phi3"})  # of which the vector shows nothing
        for backend.chunk_tokens in (64, 8):
            told = embedded(backend, TEXTS)
            assert told.dimensions == backend._graph.width == 64
            for text, one, ours in zip(TEXTS, told.embeddings, vectors(told), strict=True):
                ids = start + tokens.encode(text)
                assert one.tokens == len(ids)
                theirs = defined(model, ids, len(start))
                assert np.abs(ours - theirs).max() < 1e-5, text
            assert told.tokens == sum(each.tokens for each in told.embeddings)
            alike = vectors(told) @ vectors(told).T
            assert np.diag(alike) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)
            assert (alike - np.eye(len(TEXTS))).max() < 0.99  # texts differ by more than tolerance


def test_a_vector_depends_on_its_text_alone(llama: Path, tmp_path: Path) -> None:
    """Bit for bit: whatever the chunks, the other texts, the jobs beside it and the version."""
    backend = slots.load(llama, 1, 3)
    backend.chunk_tokens = 64
    expected = embedded(backend, TEXTS).embeddings
    other = slots.load(other_version(llama, tmp_path / "other"), 1, 1)
    assert other._graph.most_hidden != backend._graph.most_hidden
    assert embedded(other, TEXTS).embeddings == expected
    for backend.chunk_tokens in (8, 16, 128):
        assert embedded(backend, TEXTS).embeddings == expected
    for text, alone in zip(TEXTS, expected, strict=True):
        assert embedded(backend, [text]).embeddings == (alone,)
    for job_id, prompt in enumerate(("abc " * 30, "in the end " * 20)):
        sampling = Sampling(max_tokens=90)
        assert backend.admit(Generate(job_id, conversation(prompt), sampling, stream=False))
    backend.chunk_tokens = 8
    assert embedded(backend, TEXTS[::-1]).embeddings == expected[::-1]
    assert backend._jobs  # they wrote all the while


def test_no_more_is_computed_at_a_time_than_there_is_room_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    really = Graph.hidden

    def hidden(
        graph: Graph, row: int, tokens: npt.NDArray[np.int64], start: int
    ) -> npt.NDArray[np.float32]:
        read.append(len(tokens))
        return really(graph, row, tokens, start)

    monkeypatch.setattr(Graph, "hidden", hidden)
    for folder in (llama, other_version(llama, tmp_path / "other")):
        backend = slots.load(folder, 1, 1)
        expected = embedded(backend, TEXTS)
        backend._graph.most_hidden = 20
        read.clear()
        assert embedded(backend, TEXTS) == expected
        assert max(read) <= 20
        assert sum(read) == expected.tokens


def test_prompts_and_answers_do_not_wait_for_many_texts(llama: Path) -> None:
    backend = slots.load(llama, 1, 3)
    backend.chunk_tokens, backend.guess_cost = 8, 1.0
    bench = Bench(backend)
    assert bench.admit(1, "a", Sampling(max_tokens=200))
    bench.step()
    (writes,) = backend._jobs
    texts = Embed(-1, ("the thin inn " * 30,) * 20)
    assert backend.admit(texts)
    lengths = [writes.length]
    for _ in range(9):
        bench.step()
        lengths.append(writes.length)
    assert {after - before for before, after in pairwise(lengths)} == {1}
    assert bench.admit(2, "abc " * 20, Sampling(max_tokens=4))
    tokens = backend.count(conversation("abc " * 20))
    late = backend._jobs[-1]
    steps = 0
    while late.reading:
        bench.step()
        steps += 1
    assert steps <= -(-tokens // 8) + 1  # as if nothing else was to be read, but for a chunk
    assert len(backend._jobs) == 3
    told = None
    while told is None:
        told = next((each for each in backend.step() if isinstance(each, Embedded)), None)
    assert len(set(told.embeddings)) == 1
    assert not backend._slots[backend._slots.index(late)].embedding


def test_nothing_of_a_text_is_kept_and_as_little_as_can_be_is_lost(llama: Path) -> None:
    backend = slots.load(llama, 1, 2)
    bench = Bench(backend)
    prompt = "abc " * 60
    bench.alone(prompt, Sampling(max_tokens=4))
    embedded(backend, TEXTS)
    assert bench.alone(prompt, Sampling(max_tokens=4)).cached_tokens > 100
    assert sum(slot.length > 0 for slot in backend._slots) == 1


def test_what_cannot_be_embedded(llama: Path, smollm2: Path) -> None:
    backend = slots.load(llama, 1, 2)
    tokens = backend._reader.tokens
    fitting = "q" * CONTEXT
    assert len(tokens.encode(fitting)) == CONTEXT
    assert embedded(backend, [fitting]).tokens == CONTEXT
    with pytest.raises(PromptTooLongError, match=f"{CONTEXT + 1} tokens; the model's context"):
        backend.admit(Embed(-1, ("a", fitting + "q")))
    with pytest.raises(InvalidPromptError, match="empty"):
        backend.admit(Embed(-1, ("a", "")))
    backend.budget_tokens = 100
    with pytest.raises(EngineError, match="memory"):
        backend.admit(Embed(-1, (fitting,)))
    backend._graph.width = limits.MAX_DIMENSIONS + 1
    with pytest.raises(EngineError, match="too large"):
        backend.admit(Embed(-1, ("a",)))
    assert not backend._jobs
    with pytest.raises(ModelInvalidError, match="does not score or embed"):
        genai.load(smollm2, 1).admit(Embed(-1, ("a",)))


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_numbers_that_are_none_end_the_job_alone(
    llama: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    backend = slots.load(llama, 1, 2)
    bench = Bench(backend)
    assert bench.admit(1, "a", Sampling(max_tokens=20))
    expected = np.full((9, backend._graph.width), value, np.float32)
    monkeypatch.setattr(backend._graph, "hidden", lambda *_: expected)
    assert backend.admit(Embed(-1, ("b" * 9,)))
    while -1 not in bench.failed:
        bench.step()
    assert "no valid numbers" in bench.failed[-1].reason
    assert bench.end(1).tokens == 20
    monkeypatch.undo()
    assert embedded(backend, ["b"]).tokens == 1


# --- the whole way


def test_texts_that_mean_the_same_are_near_each_other(smollm2: Path) -> None:
    pairs = (
        ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
        ("How do I bake bread at home?", "A recipe for a loaf made in one's own oven."),
        ("The stock market fell sharply today.", "Shares lost much of their value this afternoon."),
        ("Paris is the capital of France.", "France is governed from the city of Paris."),
    )

    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=2) as (engine, _):
            told = await engine.embed([text for pair in pairs for text in pair])
            assert (len(told.embeddings), told.dimensions) == (8, 576)
            alike = vectors(told)[::2] @ vectors(told)[1::2].T
            assert alike.argmax(axis=1).tolist() == [0, 1, 2, 3]
            assert (await engine.embed([pairs[2][1]])).embeddings == told.embeddings[5:6]

    asyncio.run(scenario())


def test_what_is_refused_before_it_gets_to_the_model_or_there(smollm2: Path, tiny: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=2) as (engine, events):
            refused: list[tuple[list[str], type[Exception], str]] = [
                ([], InvalidPromptError, "empty"),
                (["a", ""], InvalidPromptError, "empty"),
                (["a"] * (limits.MAX_EMBEDDED + 1), InvalidPromptError, "too many"),
                (["é" * (limits.MAX_PROMPT_BYTES // 4)] * 3, InvalidPromptError, "bytes"),
                (["\ud800"], InvalidPromptError, "not valid Unicode"),
                (["and so on " * 9_000], PromptTooLongError, "the model's context holds 8192"),
            ]
            for texts, kind, said in refused:
                with pytest.raises(kind, match=said):
                    await engine.embed(texts)
            assert len((await engine.embed(["a"] * limits.MAX_EMBEDDED)).embeddings) == 64
            assert not engine._asked
            assert not events.lost
        async with running(tiny) as (engine, _):
            with pytest.raises(ModelInvalidError, match=r"genai .* Import the model"):
                await engine.embed(["a"])

    asyncio.run(scenario())


def test_called_off_or_lost_in_the_middle(smollm2: Path) -> None:
    long = ["and so on, " * 1_000] * 4  # some ten seconds

    async def scenario() -> None:
        async with running(smollm2, threads=1, backend="slots", slots=1) as (engine, events):
            asked = asyncio.create_task(engine.embed(long))
            await asyncio.sleep(0.3)
            asked.cancel()
            await asyncio.wait({asked})
            assert asked.cancelled()
            engine.work(job(1, "1+1?", max_tokens=2))  # there is one slot: it is free again
            async with asyncio.timeout(5):
                await events.ends(1)
            asked = asyncio.create_task(engine.embed(long))
            await asyncio.sleep(0.3)
            os.kill(pid_of(engine), signal.SIGKILL)
            with pytest.raises(EngineError, match="SIGKILL at work"):
                await asked
            with pytest.raises(EngineError, match="down"):
                await engine.embed(["a"])
            await events.loads(2)
            assert (await engine.embed(["a"])).tokens == 1
            assert not engine._asked

    asyncio.run(scenario())


def test_a_process_that_hangs_over_texts_is_replaced(smollm2: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=1, backend="slots", hang_s=0.8) as (engine, _):
            os.kill(pid_of(engine), signal.SIGSTOP)
            with pytest.raises(EngineError, match="said nothing"):
                await engine.embed(["a"])

    asyncio.run(scenario())
