"""The fast back end on CPU: onnxruntime alone, many jobs at a time, nothing read twice.

Each job has a slot, a row of the cache of a :class:`~edgemoa.engine.ragged.Graph`. All jobs that
write make their next tokens in one run; a prompt is read in its own row, a chunk between two such
runs. A job that writes has its next tokens guessed (:mod:`edgemoa.engine.drafts`): the model reads
the guesses with the last token, and as many as it would have written itself are written by that
run. A slot whose job has ended keeps what lies in its row, prompt and answer, for the next prompt
that begins alike; and what a prompt will surely begin with can be read ahead of it, in a slot that
nobody needs.

**A job's text does not depend on what else runs**, on what was read or guessed, on how a prompt is
cut into chunks: the graph computes the same for a token however it is brought in.
:meth:`SlotsBackend.warm_up` looks whether that is so on this machine; where it is not, nothing is
guessed, and of what a job wrote nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgemoa.core.events import Given
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.core.rates import Meter
from edgemoa.engine import drafts
from edgemoa.engine.answer import (
    CHUNKS,
    Answer,
    Reader,
    cause,
    chunk_of,
    find_chunk,
    load_reader,
)
from edgemoa.engine.drafts import Drafts
from edgemoa.engine.embed import Embedder, embedder
from edgemoa.engine.frames import (
    Done,
    Embed,
    Event,
    Failed,
    Generate,
    Score,
    Scored,
    Work,
    failure,
)
from edgemoa.engine.memory import available_bytes, mapped_files, release
from edgemoa.engine.ragged import Graph, UnsuitedError, load_session
from edgemoa.engine.sampling import Sampler
from edgemoa.engine.score import Scoring, scoring
from edgemoa.errors import EngineError, ModelInvalidError, SchemaError
from edgemoa.text.files import IMPORT_AGAIN
from edgemoa.text.settings import CONFIG, read_config

MOST_SLOTS: Final = 4  # unless the settings say otherwise
MEMORY_SHARE: Final = 0.5  # of what is available when the model is loaded, for keys and values
TABLE_BYTES: Final = 1 << 20  # at least, to be worth giving back now and then
LEAST_SLOT_TOKENS: Final = 1024  # a slot more is not worth it where memory holds fewer for it

WORTH_REUSING: Final = 8  # tokens: a prefill step saved

_SPARE: Final = drafts.MOST + 1  # places behind a row's tokens that wrong guesses are written to
_TRIES: Final = 6
_TRYING_S: Final = 0.5
_ROWS: Final = 2  # at least, to look whether they are computed alike


@dataclass(slots=True, eq=False)
class _Slot:
    """A row's contents: the prompt's tokens, how many of them were read, the tokens behind them
    that were written, how many lie in the row altogether; and the job, if one is at work here.
    """

    prompt: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    read: int = 0
    written: list[int] = field(default_factory=list)
    length: int = 0
    drafts: Drafts | None = None
    answer: Answer | Scoring | Embedder | None = None
    worst: int = 0  # tokens, at the end of the job
    used: int = 0  # when it was last given a job; of two, the later has more
    ahead: str = ""  # without a job: the prompt is read ahead of the one that goes by this key
    ahead_tokens: int = 0  # of what lies here, that were read so, for no job yet
    ahead_s: float = 0.0  # what that took

    @property
    def reading(self) -> bool:
        return self.answer is not None and self.read < len(self.prompt)

    @property
    def claims(self) -> int:
        """Tokens that lie here, or will, where there is no job."""
        return max(self.length, len(self.prompt)) if self.ahead else self.length

    @property
    def writing(self) -> bool:
        return isinstance(self.answer, Answer) and self.read == len(self.prompt)

    @property
    def scoring(self) -> bool:
        return isinstance(self.answer, Scoring) and self.read == len(self.prompt)

    @property
    def embedding(self) -> bool:
        return isinstance(self.answer, Embedder)

    def shares(self, prompt: npt.NDArray[np.int64]) -> int:
        """How many tokens that ``prompt`` begins with are there already.

        The last two are read anew: the last for its logits, and never a token by itself, for
        machines where that matters (``is_exact``).
        """
        return _alike(self.prompt[: self.read], prompt[: max(len(prompt) - 2, 0)])

    def is_ahead_of(self, prompt: npt.NDArray[np.int64]) -> bool:
        """Whether ``prompt`` is what is read ahead of here, but for how that ends."""
        return bool(self.ahead) and _alike(self.prompt, prompt) > len(self.prompt) - WORTH_REUSING


class SlotsBackend:
    """A loaded model and the jobs that it works on."""

    name = "slots"
    reads_ahead = True
    embeds = True

    def __init__(
        self, graph: Graph, reader: Reader, slots: int, budget_tokens: int, *, ends_loops: bool
    ) -> None:
        """:param budget_tokens: that may lie in all slots together."""
        self.context_tokens = reader.context_tokens
        self.slots = slots
        self.chunk_tokens = CHUNKS[-1]
        self.budget_tokens = budget_tokens
        self.is_exact = False  # whether a token is computed alike however it is brought in
        self.guess_cost = 1.0  # of a token more in a run, in runs of a single one
        self._graph = graph
        self._cache = graph.cache
        self._reader = reader
        self._ends_loops = ends_loops
        self._slots = [_Slot() for _ in range(slots)]  # in the order of their rows
        self._jobs: list[_Slot] = []  # in the order in which they came
        self._given = 0  # prompts so far
        self._owed_s = 0.0  # that jobs which write have waited for what is read ahead
        self.meter = Meter()

    @property
    def calls_tools(self) -> bool:
        """See :class:`~edgemoa.engine.worker.Backend`."""
        return self._reader.call_form is not None

    def count(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        return len(self._reader.read(messages, given))

    def admit(self, job: Work) -> bool:
        """Give ``job`` a slot; False where other jobs may come to need the memory for it.

        Raises :class:`PromptTooLongError`, :class:`InvalidPromptError`, :class:`SchemaError`, or
        :class:`EngineError` where there is no memory for it.
        """
        # Texts to embed have nothing in common that could be kept.
        given = job.wishes.given if isinstance(job, Generate) else "turns"
        prompt = [] if isinstance(job, Embed) else self._reader.read(job.messages, given)
        answer: Answer | Scoring | Embedder
        if isinstance(job, Embed):
            answer = self._embedder(job)
            limit = answer.longest
        elif isinstance(job, Score):
            answer = self._scoring(job, prompt)
            limit = answer.longest
        else:
            limit = self._reader.limit(prompt, job.sampling)
        worst = len(prompt) + limit
        if worst > self.budget_tokens:
            raise EngineError(
                f"No room for {worst} tokens of context: this board's memory holds"
                f" {self.budget_tokens}. Ask for a shorter answer, or raise model.memory_mb."
            )
        if worst + sum(slot.worst for slot in self._jobs) > self.budget_tokens:
            return False
        if isinstance(job, Generate):
            answer = Answer(job, self._reader, prompt, limit, ends_loops=self._ends_loops)
        tokens = np.array(prompt, np.int64)
        slot, source = self._choose(tokens)
        shared = source.shares(tokens)
        if isinstance(answer, Answer) and source.read - shared < WORTH_REUSING:
            answer.ahead_tokens, answer.model_s = min(source.ahead_tokens, shared), source.ahead_s
            source.ahead_tokens, source.ahead_s = 0, 0.0
        self._given += 1
        slot.used = self._given
        if source is slot:
            self._keep(slot, shared)
        else:
            self._keep(slot, 0)
        slot.prompt, slot.worst = tokens, worst
        slot.answer = answer
        slot.answer.cached_tokens = slot.read
        self._jobs.append(slot)
        self._make_room(source)
        if source is not slot:
            self._take_over(slot, source)
        return True

    def _scoring(self, job: Score, prompt: list[int]) -> Scoring:
        return scoring(job, self._reader.tokens, len(prompt), self.context_tokens)

    def _embedder(self, job: Embed) -> Embedder:
        return embedder(job, self._reader.tokens, self._graph.width, self.context_tokens)

    def drop(self, job_id: int) -> None:
        """Free the job's slot; what was read of its prompt stays there."""
        for slot in self._jobs:
            if slot.answer is not None and slot.answer.job.job_id == job_id:
                self._free(slot)
                return

    def forget(self) -> None:
        """Give back the memory of what is kept of prompts that no job works on."""
        for slot in self._slots:
            if slot.answer is None:
                self._keep(slot, 0)

    def step(self) -> list[Event]:
        """A chunk of the oldest prompt that is not read yet, and a token for every job whose is."""
        events: list[Event] = []
        reading = next(
            (slot for slot in self._jobs if slot.reading or slot.scoring or slot.embedding), None
        )
        if reading is not None:
            work = self._score if reading.scoring else self._read
            events += self._guarded([reading], self._embed if reading.embedding else work)
        elif self._owed_s <= 0 or not self._jobs:
            self._read_some_ahead()
        writing = [slot for slot in self._jobs if slot.writing]
        if writing:
            events += self._guarded(writing, self._write)
        return events

    @property
    def has_to_read(self) -> bool:
        """Whether something is to be read ahead."""
        return any(slot.ahead and slot.read < len(slot.prompt) for slot in self._slots)

    def read_ahead(self, key: str, messages: tuple[ChatMessage, ...]) -> None:
        """Have :meth:`step` read what a prompt will begin with, where no job needs the slot and
        the memory: a chunk where no job reads, for half of the time where jobs write.

        The job itself finds it by its tokens, however much was read. Replaces what was said under
        the same key; without messages, reads no further. Raises :class:`InvalidPromptError`.
        """
        for slot in self._slots:
            if slot.ahead == key:
                slot.ahead = ""
        if not messages:
            return
        tokens = np.array(self._reader.read_begun(messages), np.int64)
        source = max(self._slots, key=lambda slot: slot.shares(tokens))
        shared = source.shares(tokens)
        if len(tokens) < 2:  # never a token by itself (CHUNKS)
            return
        places = self._unneeded(source, shared)
        place = next((it for it in places if self._has_room(len(tokens), it, source)), None)
        if place is None:
            return
        self._given += 1
        place.used = self._given
        self._keep(place, shared if place is source else 0)
        place.prompt, place.ahead = tokens, key
        self._make_room(source)
        if place is not source:
            self._take_over(place, source)

    def warm_up(self) -> None:
        """Run the model on something harmless: brings its weights into memory, shows whether it
        computes at all, finds the prefill step that this board does in time, whether tokens are
        computed alike however they are brought in, and what guessing costs.

        Raises :class:`EngineError` for a model that computes nothing valid.
        """
        prompt = np.array(self._reader.read((ChatMessage("user", "Hello"),)), np.int64)
        most = self.context_tokens - 1

        def read(tokens: int) -> None:
            logits = self._graph.run(0, [np.resize(prompt, tokens)], [0])
            Sampler(Sampling()).pick(logits[0])

        self.chunk_tokens = find_chunk(read, most)
        if most > CHUNKS[-1] + _SPARE:
            self._look(np.resize(prompt, CHUNKS[-1] + _SPARE))
        for row in range(_ROWS):
            self._cache.release(row, 0, min(CHUNKS[0] + _SPARE, most))

    def _look(self, text: npt.NDArray[np.int64]) -> None:
        """Read a text in several ways."""
        run, start = self._graph.run, len(text) - 2
        whole = run(0, [text], [0])[0].copy()
        for self._graph.doubles in (False, True):
            found = []
            for rows in (1, 2):
                for row in range(rows):
                    run(row, [text[:start]], [0])
                run(0, [text[start:-1]] * rows, [start] * rows)
                found += list(run(0, [text[-1:]] * rows, [start + 1] * rows).copy())
            self.is_exact = all(np.array_equal(whole, each) for each in found)
            if self.is_exact or np.array_equal(found[0], found[1]):
                break
        self.guess_cost = self._cost_of_more(text) if self.is_exact else 1.0

    def _cost_of_more(self, text: npt.NDArray[np.int64]) -> float:
        """What a token more takes in a run, in runs of a single one; by the best of some runs."""
        most = min(drafts.MOST, self._graph.most_logits - 1)
        best = {1: float("inf"), 1 + most: float("inf")}
        started_s = before_s = time.perf_counter()
        for tokens in (*best,) * _TRIES:
            self._graph.run(0, [text[:tokens]], [0], every=True)
            now_s = time.perf_counter()
            best[tokens] = min(best[tokens], now_s - before_s)
            before_s = now_s
            if now_s - started_s > _TRYING_S and tokens > 1:
                break
        one, more = best.values()
        return min(max((more - one) / (most * one), 0.0), 1.0)

    # --- running

    def _guarded(
        self, slots: list[_Slot], work: Callable[[list[_Slot]], list[Event]]
    ) -> list[Event]:
        try:
            return work(slots)
        except (EngineError, MemoryError) as error:
            return [event for slot in slots for event in self._fail(slot, error)]

    def _read(self, slots: list[_Slot]) -> list[Event]:
        """Read the next chunk of a slot's prompt, and pick a token at its end."""
        started_s = time.perf_counter()
        (slot,) = slots
        assert isinstance(slot.answer, Answer | Scoring)  # noqa: S101 - else it does not read
        if slot.length == slot.answer.cached_tokens:  # its first chunk
            slot.answer.begin()
            source = max(self._slots, key=lambda each: each.shares(slot.prompt))
            self._take_over(slot, source)  # what another has read since this one came
        logits = self._read_chunk(slot)
        slot.answer.model_s += time.perf_counter() - started_s
        return [] if slot.reading else self._pick(slot, logits)

    def _read_chunk(self, slot: _Slot) -> npt.NDArray[np.float32]:
        """Read on in a slot's prompt; the logits of the last token that was read."""
        started_s = time.perf_counter()
        start, count = slot.read, chunk_of(len(slot.prompt) - slot.read, self.chunk_tokens)
        end = start + count
        slot.length = end  # also where the run fails, for what it may have written
        (logits,) = self._graph.run(self._row(slot), [slot.prompt[start:end]], [start])
        slot.read = end
        self.meter.observe_prefill(count, start, 1000 * (time.perf_counter() - started_s))
        return np.asarray(logits)

    def _read_some_ahead(self) -> None:
        """A chunk of the oldest of what is to be read ahead."""
        ahead = [slot for slot in self._slots if slot.ahead and slot.read < len(slot.prompt)]
        if not ahead:
            return
        started_s = time.perf_counter()
        slot = min(ahead, key=lambda slot: slot.used)
        before = slot.read
        try:
            self._read_chunk(slot)
        except (EngineError, MemoryError):
            self._keep(slot, 0)  # whoever asks for that prompt will hear of it
            return
        self._owed_s = time.perf_counter() - started_s
        slot.ahead_tokens += slot.read - before
        slot.ahead_s += self._owed_s

    def _write(self, slots: list[_Slot]) -> list[Event]:
        """A token more for each of the slots, and those that were guessed right, in one run."""
        started_s = time.perf_counter()
        contexts = sum(slot.length for slot in slots) / len(slots)
        rows = [self._row(slot) for slot in slots]
        first = min(rows)
        tokens: list[list[int]] = [[] for _ in range(first, max(rows) + 1)]
        for slot in slots:
            tokens[self._row(slot) - first] = self._next(slot, len(slots))
        starts = [slot.length for slot in self._slots[first : first + len(tokens)]]
        logits = self._graph.run(first, tokens, starts, every=True)
        share_s = (time.perf_counter() - started_s) / len(slots)
        events: list[Event] = []
        written = at = 0
        for slot, fed in zip(self._slots[first:], tokens, strict=False):
            if fed and slot.answer is not None:
                slot.answer.model_s += share_s
                before = slot.length
                events += self._take(slot, fed, logits[at : at + len(fed)])
                written += max(slot.length - before, 1)
                at += len(fed)
        ms = 1000 * (time.perf_counter() - started_s)
        self._owed_s -= ms / 1000
        self.meter.observe_decode(len(slots), contexts, ms * len(slots) / written)
        return events

    def _next(self, slot: _Slot, jobs: int) -> list[int]:
        """A slot's last token, and guesses of what follows, as far as they pay while so many jobs
        write: what a run costs beside its tokens is shared by all."""
        assert isinstance(slot.answer, Answer)  # noqa: S101 - else it does not write
        answer, alone = slot.answer, self.guess_cost
        if alone >= 1:
            return [answer.last]
        if slot.drafts is None:
            slot.drafts = Drafts([*slot.prompt.tolist(), answer.last])
        room = self._graph.most_logits // jobs - 1
        cost = alone / ((1 - alone) / jobs + alone)
        return [answer.last, *slot.drafts.guess(min(drafts.MOST, answer.left - 1, room), cost)]

    def _take(self, slot: _Slot, fed: list[int], logits: npt.NDArray[np.float32]) -> list[Event]:
        """Go on by the logits of a slot's last token, and by those of guesses as long as these are
        what is picked."""
        events: list[Event] = []
        for at, (token, row) in enumerate(zip(fed, logits, strict=True)):
            slot.written.append(token)
            slot.length += 1
            events += self._pick(slot, row)
            if not isinstance(slot.answer, Answer):
                break  # it has ended
            if slot.drafts is not None:
                slot.drafts.push(slot.answer.last)
            if fed[at + 1 : at + 2] != [slot.answer.last]:
                break
        return events

    def _score(self, slots: list[_Slot]) -> list[Event]:
        """Read the next tokens of a slot's candidates, for what they say of those that follow."""
        started_s = time.perf_counter()
        (slot,) = slots
        assert isinstance(slot.answer, Scoring)  # noqa: S101 - else it does not score
        most = min(self.chunk_tokens, self._graph.most_logits)
        stretch = slot.answer.next(most)
        if stretch.start == 0:  # in place of the candidate before
            self._keep(slot, slot.read)
        start = slot.read + stretch.start
        logits = self._graph.run(self._row(slot), [stretch.tokens], [start], every=True)
        slot.length = slot.read + stretch.end
        events = slot.answer.take(stretch, logits)
        seconds = time.perf_counter() - started_s
        slot.answer.model_s += seconds
        if events:
            self._free(slot)
        return events

    def _embed(self, slots: list[_Slot]) -> list[Event]:
        """Read the next chunk of a slot's texts, and let those that came meanwhile go first: there
        may be much to read, and who asks for it waits for the last of it anyway."""
        started_s = time.perf_counter()
        (slot,) = slots
        assert isinstance(slot.answer, Embedder)  # noqa: S101 - else it does not embed
        stretch = slot.answer.next(min(self.chunk_tokens + 1, self._graph.most_hidden))
        if stretch.start == 0:  # in place of the text before
            self._keep(slot, 0)
        slot.length = stretch.end  # also where the run fails, for what it may have written
        hidden = self._graph.hidden(self._row(slot), stretch.tokens, stretch.start)
        events = slot.answer.take(stretch, hidden)
        seconds = time.perf_counter() - started_s
        slot.answer.model_s += seconds
        self.meter.observe_prefill(len(stretch.tokens), stretch.start, 1000 * seconds)
        self._jobs.remove(slot)
        self._jobs.append(slot)
        if events:
            self._free(slot)
        return events

    def _pick(self, slot: _Slot, logits: npt.NDArray[np.float32]) -> list[Event]:
        assert isinstance(slot.answer, Answer | Scoring)  # noqa: S101 - else nothing is picked
        try:
            events = slot.answer.pick(logits)
        except (EngineError, SchemaError, MemoryError) as error:
            return self._fail(slot, error)
        if events and isinstance(events[-1], Done | Scored):
            self._free(slot)
        return events

    def _fail(self, slot: _Slot, error: Exception) -> list[Event]:
        if slot.answer is None:
            return []
        failed = Failed(slot.answer.job.job_id, failure(error))
        self._free(slot)
        self._keep(slot, 0)  # whatever lies there is not to be trusted
        return [failed]

    # --- rows

    def _row(self, slot: _Slot) -> int:
        return self._slots.index(slot)

    # --- what is kept

    def _choose(self, prompt: npt.NDArray[np.int64]) -> tuple[_Slot, _Slot]:
        """A free slot for a prompt, and the slot to take its beginning from, which may be it."""
        source = max(self._slots, key=lambda slot: slot.shares(prompt))
        free = [slot for slot in self._slots if slot.answer is None]
        # In its place, unless much else lies there that another prompt may begin with, or anything
        # that one surely will.
        little_else = 2 * source.shares(prompt) >= source.read and not source.ahead
        if source in free and (little_else or source.is_ahead_of(prompt)):
            return source, source
        slot = min(free, key=lambda slot: (bool(slot.ahead), slot.read > 0, slot.used))
        return slot, source

    def _unneeded(self, source: _Slot, shared: int) -> list[_Slot]:
        """Slots to read ahead in, the best first: the one that was not used for longest, or the
        source, where as good as nothing is lost with what lies there beyond ``shared`` tokens."""
        free = [slot for slot in self._slots if slot.answer is None and not slot.ahead]
        spoils = source.read - shared
        free.sort(
            key=lambda slot: (
                (slot is source) * (-1 if spoils < WORTH_REUSING else 1),
                slot.read > 0,
                slot.used,
            )
        )
        return free

    def _has_room(self, tokens: int, slot: _Slot, source: _Slot) -> bool:
        """Whether so many can be read ahead in ``slot`` without loss for any job, for what else is
        read ahead, or of the source."""
        held = sum(each.worst for each in self._jobs)
        held += sum(
            each.claims
            for each in self._slots
            if each.answer is None and each is not slot and (each.ahead or each is source)
        )
        return held + tokens <= self.budget_tokens and tokens < self.context_tokens

    def _take_over(self, slot: _Slot, source: _Slot) -> None:
        """Copy what ``source`` has of the slot's prompt, where that is worth it."""
        shared = source.shares(slot.prompt)
        if shared < slot.read + WORTH_REUSING:
            return
        self._cache.copy(self._row(source), self._row(slot), shared)
        slot.read = slot.length = shared
        if slot.answer is not None:
            slot.answer.cached_tokens = shared

    def _keep(self, slot: _Slot, tokens: int) -> None:
        """Forget what lies in a slot beyond so many of its prompt's tokens."""
        end = min(slot.length + _SPARE, self._cache.capacity) if slot.length else 0
        self._cache.release(self._row(slot), tokens, end)
        slot.read = slot.length = tokens
        slot.written, slot.drafts, slot.ahead = [], None, ""
        if tokens == 0:
            slot.ahead_tokens, slot.ahead_s = 0, 0.0

    def _free(self, slot: _Slot) -> None:
        self._jobs.remove(slot)
        slot.answer, slot.worst = None, 0
        if self.is_exact and slot.written:
            slot.prompt = np.concatenate([slot.prompt, slot.written])
            slot.read = len(slot.prompt)
        self._keep(slot, slot.read)

    def _make_room(self, spared: _Slot) -> None:
        """Forget the oldest prompts until every job may become as long as it may; what was read
        ahead is for a job to come, and stays for longer."""
        kept = [slot for slot in self._slots if slot.answer is None and slot.claims]
        kept.sort(key=lambda slot: (slot is spared, bool(slot.ahead), slot.used))
        room = self.budget_tokens - sum(slot.worst for slot in self._jobs)
        while sum(slot.claims for slot in kept) > room:
            self._keep(kept.pop(0), 0)


def _alike(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    """How many tokens two prompts begin with alike."""
    most = min(len(one), len(other))
    differs = one[:most] != other[:most]
    return int(differs.argmax()) if differs.any() else most


def load(
    model_dir: Path,
    threads: int,
    slots: int = 0,
    *,
    most_slots: int = MOST_SLOTS,
    memory_mb: int = 0,
    ends_loops: bool = True,
) -> SlotsBackend:
    """Load a model folder, ready to work on so many jobs at a time (0: as memory allows, up to
    ``most_slots``).

    :param memory_mb: for keys and values; 0: a share of what is available.

    Raises :class:`UnsuitedError` for a model that only genai can run, :class:`ModelInvalidError`
    with what is wrong with the folder, :class:`EngineError` for a model that loads and does not
    compute.
    """
    if not model_dir.is_dir():
        raise ModelInvalidError(f"There is no model folder at {model_dir}.", hint=IMPORT_AGAIN)
    config = read_config(model_dir / CONFIG)
    if config.search.get("past_present_share_buffer") is not True:
        raise UnsuitedError("its keys and values cannot stay in one place")
    reader = load_reader(model_dir, config.model.context_length)
    session = load_session(model_dir, threads)
    # onnxruntime has copied most weights into an order of its own, and keeps both. What it reads
    # of those that stay as they are is a row of a table for each token.
    release(mapped := mapped_files())
    folder = model_dir.resolve()
    tables = [part for part in mapped if part.file.parent == folder and part.size >= TABLE_BYTES]
    decoder = config.model.decoder
    token_bytes = 8 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_size
    budget = (memory_mb << 20 or int(available_bytes() * MEMORY_SHARE)) // token_bytes
    if slots == 0:
        slots = max(1, min(most_slots, budget // LEAST_SLOT_TOKENS))
    budget = min(budget, slots * config.model.context_length)
    try:
        graph = Graph(session, config, max(slots, _ROWS), tables)
    except (EngineError, MemoryError) as error:
        raise UnsuitedError(cause(error).rstrip(".")) from error
    backend = SlotsBackend(graph, reader, slots, budget, ends_loops=ends_loops)
    backend.warm_up()
    release(mapped_files())  # of libraries, two thirds were for the start alone
    return backend
