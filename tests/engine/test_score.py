"""Scores of given texts, against the definition: log-softmax in float64 of the logits that the
scoring graph gives for prompt and candidate as one sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from models.tiny import tiny

from edgemoa.core.messages import Sampling
from edgemoa.engine import genai, ragged, slots
from edgemoa.engine.answer import load_reader
from edgemoa.engine.frames import Generate, Likelihood, Score, Scored
from edgemoa.engine.slots import SlotsBackend
from edgemoa.errors import (
    EngineError,
    InvalidPromptError,
    ModelInvalidError,
    PromptTooLongError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.perplexity import Scorer
from edgemoa.models.progress import silent
from edgemoa.text.files import RAGGED_GRAPH

from .harness import conversation

CONTEXT = 640
PROMPT = "abc " * 9
CANDIDATES = ("b", "ab", "a b c d " * 12, "d", "the same again, " * 9)
TOLERANCE = 1e-4


def imported(folder: Path, name: str, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.gguf"
    tiny(name, kind, context=CONTEXT).write(file)
    return import_gguf(file, ModelLibrary(folder / "models"), name, silent)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("score"), "llama", "Q4_1")


def defined(folder: Path, prompt: str, candidate: str) -> Likelihood:
    reader = load_reader(folder, CONTEXT)
    before = reader.read(conversation(prompt))
    after = reader.tokens.encode(candidate)
    scorer = Scorer(folder / RAGGED_GRAPH, read_manifest(folder))
    ids = np.array(before + after)
    logits = np.concatenate([each for _, each in scorer.logits(ids)]).astype(np.float64)
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    told = [shares[at - 1, ids[at]] for at in range(len(before), len(ids))]
    return Likelihood(float(np.mean(told)), len(after))


def scores(backend: SlotsBackend, score: Score, steps: list[int] | None = None) -> list[Likelihood]:
    """What a back end says of a job that it has admitted."""
    while True:
        for event in backend.step():
            if isinstance(event, Scored) and event.job_id == score.job_id:
                return list(event.scores)
        if steps is not None:
            steps.append(1)


def alike(ours: Likelihood, theirs: Likelihood) -> bool:
    near = abs(ours.log_probability - theirs.log_probability) < TOLERANCE
    return near and ours.tokens == theirs.tokens


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
def test_scores_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    folder = imported(tmp_path, name, "Q8_0")
    backend = slots.load(folder, 1, 2)
    score = Score(-1, conversation(PROMPT), CANDIDATES)
    for backend.chunk_tokens in (64, 8):
        assert backend.admit(score)
        ours = scores(backend, score)
        for text, told in zip(CANDIDATES, ours, strict=True):
            assert alike(told, defined(folder, PROMPT, text)), text
        # Texts differ in their scores by far more than the tolerance.
        assert (
            max(each.log_probability for each in ours) - min(each.log_probability for each in ours)
            > 100 * TOLERANCE
        )


def test_a_candidate_scores_the_same_alone_and_among_others(llama: Path) -> None:
    backend = slots.load(llama, 1, 2)
    together = Score(-1, conversation(PROMPT), CANDIDATES)
    assert backend.admit(together)
    told = scores(backend, together)
    for text, expected in zip(CANDIDATES, told, strict=True):
        alone = Score(-2, conversation(PROMPT), (text,))
        assert backend.admit(alone)
        assert scores(backend, alone) == [expected]


def test_scores_and_texts_are_the_same_beside_each_other(llama: Path) -> None:
    backend = slots.load(llama, 1, 3)
    backend.chunk_tokens = 8
    score = Score(-1, conversation(PROMPT), CANDIDATES)
    assert backend.admit(score)
    expected = scores(backend, score)
    write = Generate(1, conversation("abc " * 9 + "d"), Sampling(max_tokens=60), stream=True)
    assert backend.admit(write)
    alone = [event for _ in range(80) for event in backend.step()][-1]
    for first, second in ((write, score), (score, write)):
        events = []
        assert backend.admit(first)
        assert backend.admit(second)
        for _ in range(200):
            events += backend.step()
        done, scored = events[-1], next(each for each in events if isinstance(each, Scored))
        if isinstance(done, Scored):
            done = events[-2]
        assert done.result.text == alone.result.text  # type: ignore[union-attr]
        assert list(scored.scores) == expected


def test_a_token_for_each_chunk_while_others_write(llama: Path) -> None:
    """Jobs that write go on with each step, whatever is scored."""
    backend = slots.load(llama, 1, 2)
    backend.chunk_tokens, backend.guess_cost = 8, 1.0
    limit = 60
    assert backend.admit(Generate(1, conversation("a"), Sampling(max_tokens=limit), stream=True))
    backend.step()
    (slot,) = backend._jobs
    assert backend.admit(Score(-1, conversation(PROMPT), ("a b c d " * 20,)))
    for _ in range(20):
        before = slot.length
        assert not any(isinstance(event, Scored) for event in backend.step())
        assert slot.length == before + 1


def test_what_was_read_is_not_read_again(llama: Path) -> None:
    backend = slots.load(llama, 1, 2)
    backend.chunk_tokens = 8
    counts = []
    for _ in range(2):
        steps: list[int] = []
        score = Score(-1, conversation("abc " * 60), ("a",))
        assert backend.admit(score)
        scores(backend, score, steps)
        counts.append(len(steps))
    assert counts[0] > 5
    assert counts[1] == 0  # one step


def test_what_cannot_be_scored(llama: Path, smollm2: Path) -> None:
    backend = slots.load(llama, 1, 2)
    room = CONTEXT - backend.count(conversation(PROMPT))
    reader = load_reader(llama, CONTEXT)
    fitting = "a" * CONTEXT
    while len(reader.tokens.encode(fitting)) > room:
        fitting = fitting[:-1]
    assert backend.admit(Score(-1, conversation(PROMPT), (fitting,)))
    backend.drop(-1)
    with pytest.raises(PromptTooLongError):
        backend.admit(Score(-1, conversation(PROMPT), ("a", fitting + "aaaaaaaa")))
    with pytest.raises(InvalidPromptError):
        backend.admit(Score(-1, conversation(PROMPT), ("a", "")))
    backend.budget_tokens = 100
    with pytest.raises(EngineError, match="memory"):
        backend.admit(Score(-1, conversation(PROMPT), (fitting,)))
    assert not backend._jobs
    with pytest.raises(ModelInvalidError, match="does not score or embed"):
        genai.load(smollm2, 1).admit(Score(-1, conversation(PROMPT), ("a",)))


def test_logits_of_a_run_are_bounded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = slots.load(llama, 1, 2)
    graph = backend._graph
    graph.most_logits = 20
    read: list[int] = []
    really_run = graph.run

    def run(
        first: int, tokens: list[npt.NDArray[np.int64]], starts: list[int], *, every: bool = False
    ) -> npt.NDArray[np.float32]:
        read.extend(map(len, tokens) if every else [])
        return really_run(first, tokens, starts, every=every)

    monkeypatch.setattr(graph, "run", run)
    text = "a b c d " * 20
    score = Score(-1, conversation(PROMPT), (text,))
    assert backend.admit(score)
    (told,) = scores(backend, score)
    assert alike(told, defined(llama, PROMPT, text))
    assert len(read) > 3
    assert max(read) == 20
    assert sum(read) == told.tokens - 1


@pytest.mark.parametrize("tokens", range(19, 25))
def test_candidates_as_long_as_a_run_and_a_little_longer(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    vocabulary = read_manifest(llama).vocabulary
    monkeypatch.setattr(ragged, "LOGITS_BYTES", 20 * 4 * vocabulary)
    backend = slots.load(llama, 1, 2)
    assert backend._graph.most_logits == 20
    text = ("qzjxw" * 5)[:tokens]
    score = Score(-1, conversation(PROMPT), (text,))
    assert backend.admit(score)
    (told,) = scores(backend, score)
    assert told.tokens == tokens
    assert alike(told, defined(llama, PROMPT, text))


def test_what_the_head_is_given_can_be_had(llama: Path) -> None:
    """``hidden`` is what logits are a linear function of, at every position."""
    ids = np.random.default_rng(1).integers(3, 200, 400)
    manifest = read_manifest(llama)
    scorer = Scorer(llama / RAGGED_GRAPH, manifest)
    scorer._outputs[0] = "hidden"
    hidden = np.concatenate([each for _, each in scorer.logits(ids)])
    logits = np.concatenate(
        [each for _, each in Scorer(llama / RAGGED_GRAPH, manifest).logits(ids)]
    )
    assert hidden.shape == (400, 64)
    head, *_ = np.linalg.lstsq(hidden[:300], logits[:300], rcond=None)
    errors = hidden[300:] @ head - logits[300:]
    assert errors.std() < 0.05 * logits[300:].std()
