"""The fast back end on CPU: onnxruntime alone, many jobs at a time, nothing read twice.

Each job has a slot, a row of the :class:`~edgemoa.engine.cache.Cache` that a run of the graph
reads as its past and writes as its present, in place. All jobs that write make their next token in
one run over neighbouring rows; a prompt is read in its own row, a chunk between two such runs. A
slot whose job has ended keeps what was read, for the next prompt that begins alike; and what a
prompt will surely begin with can be read ahead of it, in a slot that nobody needs.

**A job's text does not depend on what else runs.** Rows of a run are computed as each would be by
itself (:meth:`SlotsBackend.warm_up` looks whether that is so on this machine), and a prompt's keys
and values are the same however it is cut into chunks. What a job *wrote* is not kept: a single
token's attention is computed by another kernel than several tokens', with other last digits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgemoa.core.events import WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.core.rates import Meter
from edgemoa.engine.answer import (
    CHUNKS,
    SPIN_US,
    Answer,
    Reader,
    cause,
    chunk_of,
    find_chunk,
    load_reader,
)
from edgemoa.engine.cache import Cache
from edgemoa.engine.frames import Done, Event, Failed, Generate, Score, Scored
from edgemoa.engine.memory import available_bytes
from edgemoa.engine.sampling import Sampler
from edgemoa.engine.score import LOGITS_BYTES, Scoring, scoring
from edgemoa.errors import EngineError, ModelInvalidError
from edgemoa.text.files import IMPORT_AGAIN
from edgemoa.text.settings import CONFIG, Config, read_config

MOST_SLOTS: Final = 4  # unless the settings say otherwise
MEMORY_SHARE: Final = 0.5  # of what is available when the model is loaded, for keys and values
LEAST_SLOT_TOKENS: Final = 1024  # a slot more is not worth it where memory holds fewer for it

WORTH_REUSING: Final = 8  # tokens: a prefill step saved

_SCRATCH: Final = 0  # the row beside the first slot that holds nothing of anybody's
_FIRST: Final = 1
_WANTED: Final = "wanted_positions"
_SCORES: Final = "wanted_logits"
_PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class UnsuitedError(Exception):
    """This back end does not run such a model, and why; genai may. Never meets a person."""


class Graph:
    """A decoder as ``edgemoa.models.graph`` writes it, and its cache."""

    def __init__(self, session: Any, config: Config, rows: int) -> None:
        """Raises :class:`UnsuitedError` for a graph that takes or gives anything else."""
        decoder = config.model.decoder
        self._session = session
        inputs = {each.name: each for each in session.get_inputs()}
        outputs = {each.name: each for each in session.get_outputs()}
        self._past = [name for name in inputs if _PAST.fullmatch(name)]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        heads, size = decoder.num_key_value_heads, decoder.head_size
        self.vocabulary = config.model.vocab_size
        fits = (
            inputs.keys() == {"input_ids", "attention_mask", *self._past}
            and outputs.keys() - {"hidden", _SCORES} == {"logits", *self._present}
            and len(self._past) == 2 * decoder.num_hidden_layers
            and all(
                inputs[each].type == "tensor(int64)" for each in ("input_ids", "attention_mask")
            )
            and all(
                inputs[each].type == "tensor(float)" and inputs[each].shape[1::2] == [heads, size]
                for each in self._past
            )
            and outputs["logits"].type == "tensor(float)"
            and outputs["logits"].shape[1:] == [1, self.vocabulary]
        )
        if not fits:
            raise UnsuitedError("its graph has other inputs or outputs")
        self.cache = Cache(len(self._past), rows, heads, config.model.context_length, size)
        self._logits = np.empty((rows, 1, self.vocabulary), np.float32)
        self._bindings: dict[tuple[int, int], Any] = {}
        optional = {each.name for each in session.get_overridable_initializers()}
        self.scores = _WANTED in optional and _SCORES in outputs

    def run(
        self, first: int, tokens: npt.NDArray[np.int64], lengths: list[int]
    ) -> npt.NDArray[np.float32]:
        """Read ``tokens`` [rows, count] into the rows from ``first`` on, which have ``lengths``
        tokens after it. The logits [rows, vocabulary] of the last ones are good until the next run.

        Raises :class:`EngineError` where onnxruntime fails.
        """
        rows = len(tokens)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        binding = self._bindings.get((first, rows))
        if binding is None:
            binding = self._bindings[first, rows] = self._bind(first, rows)
        self._run(binding, input_ids=tokens, attention_mask=mask)
        return self._logits[:rows, 0]

    def read_all(
        self, row: int, tokens: npt.NDArray[np.int64], length: int
    ) -> npt.NDArray[np.float32]:
        """As :meth:`run` for one row, with the logits [count, vocabulary] of all its tokens, in an
        array of their own. Only where ``scores`` says that the graph can.
        """
        count = len(tokens)
        logits = np.empty((1, count, self.vocabulary), np.float32)
        binding = self._bind(row, 1)
        binding.bind_output(_SCORES, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        mask, wanted = np.ones((1, length), np.int64), np.arange(count)
        inputs = {"input_ids": tokens[None], "attention_mask": mask, _WANTED: wanted}
        self._run(binding, **inputs)
        return logits.reshape(count, -1)

    def _run(self, binding: Any, **inputs: npt.NDArray[np.int64]) -> None:
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own derive from nothing in particular
            raise EngineError(f"The model failed: {cause(error)}") from error

    def _bind(self, first: int, rows: int) -> Any:
        binding = self._session.io_binding()
        shape = (rows, *self.cache.shape)
        addresses = self.cache.addresses(first)
        for past, present, address in zip(self._past, self._present, addresses, strict=True):
            binding.bind_input(past, "cpu", 0, np.float32, shape, address)
            binding.bind_output(present, "cpu", 0, np.float32, shape, address)
        logits = self._logits[:rows]
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        return binding


@dataclass(slots=True, eq=False)
class _Slot:
    """A row's contents: the prompt's tokens, how many of them were read, how many tokens lie in
    the row with those that were written; and the job, if one is at work here.
    """

    prompt: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    read: int = 0
    length: int = 0
    answer: Answer | Scoring | None = None
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

    def shares(self, prompt: npt.NDArray[np.int64]) -> int:
        """How many tokens that ``prompt`` begins with are there already.

        The last two are read anew: the last for its logits, and never a token by itself (CHUNKS).
        """
        return _alike(self.prompt[: self.read], prompt[: max(len(prompt) - 2, 0)])

    def is_ahead_of(self, prompt: npt.NDArray[np.int64]) -> bool:
        """Whether ``prompt`` is what is read ahead of here, but for how that ends."""
        return bool(self.ahead) and _alike(self.prompt, prompt) > len(self.prompt) - WORTH_REUSING


class SlotsBackend:
    """A loaded model and the jobs that it works on."""

    name = "slots"
    reads_ahead = True

    def __init__(
        self, graph: Graph, reader: Reader, slots: int, budget_tokens: int, *, ends_loops: bool
    ) -> None:
        """:param budget_tokens: that may lie in all slots together."""
        self.context_tokens = reader.context_tokens
        self.slots = slots
        self.chunk_tokens = CHUNKS[-1]
        self.budget_tokens = budget_tokens
        self.pairs_up = False  # whether a lone row is computed along with a second one
        self._graph = graph
        self._cache = graph.cache
        self._reader = reader
        self._ends_loops = ends_loops
        self._slots = [_Slot() for _ in range(slots)]  # in the order of their rows
        self._jobs: list[_Slot] = []  # in the order in which they came
        self._given = 0  # prompts so far
        self._owed_s = 0.0  # that jobs which write have waited for what is read ahead
        self.meter = Meter()

    def count(self, messages: tuple[ChatMessage, ...]) -> int:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        return len(self._reader.read(messages))

    def admit(self, job: Generate | Score) -> bool:
        """Give ``job`` a slot; False where other jobs may come to need the memory for it.

        Raises :class:`PromptTooLongError`, :class:`InvalidPromptError`, or :class:`EngineError`
        where there is no memory for it.
        """
        prompt = self._reader.read(job.messages)
        if isinstance(job, Score):
            scores = self._scoring(job, prompt)
            limit = scores.longest
        else:
            limit = self._reader.limit(prompt, job.sampling)
        worst = len(prompt) + limit
        if worst > self.budget_tokens:
            raise EngineError(
                f"No room for {worst} tokens of context: this board's memory holds"
                f" {self.budget_tokens}."
            )
        if worst + sum(slot.worst for slot in self._jobs) > self.budget_tokens:
            return False
        if isinstance(job, Score):
            answer: Answer | Scoring = scores
        else:
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
        if not self._graph.scores:
            raise EngineError(
                "The model was imported by an earlier edgemoa, whose graphs do not score texts.",
                hint=IMPORT_AGAIN,
            )
        return scoring(job, self._reader.tokens, len(prompt), self.context_tokens)

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
        reading = next((slot for slot in self._jobs if slot.reading or slot.scoring), None)
        if reading is not None:
            events += self._guarded([reading], self._score if reading.scoring else self._read)
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
        computes at all, finds the prefill step that this board does in time, and whether a row by
        itself is computed as it is among others.

        Raises :class:`EngineError` for a model that computes nothing valid.
        """
        prompt = np.array(self._reader.read((ChatMessage("user", "Hello"),)), np.int64)
        most = self.context_tokens - 1

        def read(tokens: int) -> None:
            logits = self._graph.run(_FIRST, np.resize(prompt, (1, tokens)), [tokens])
            Sampler(Sampling()).pick(logits[0])

        self.chunk_tokens = find_chunk(read, most)
        length = min(CHUNKS[-1], most) + 1
        last = prompt[None, -1:]
        alone = self._graph.run(_FIRST, last, [length])[0].copy()
        paired = self._graph.run(_SCRATCH, np.repeat(last, 2, 0), [1, length])[1]
        self.pairs_up = not np.array_equal(alone, paired)
        self._cache.release(_SCRATCH, 0, 1)
        self._cache.release(_FIRST, 0, min(CHUNKS[0], most) + 1)

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
        assert slot.answer is not None  # noqa: S101 - else it does not read
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
        chunk = slot.prompt[None, start:end]
        (logits,) = self._graph.run(self._row(slot), chunk, [end])
        slot.read = slot.length = end
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
        """A token more for each of the slots, in one run."""
        started_s = time.perf_counter()
        self._gather(slots)
        slots = sorted(slots, key=self._row)
        first = self._row(slots[0])
        tokens = [slot.answer.last if slot.answer else 0 for slot in slots]
        lengths = [slot.length + 1 for slot in slots]
        if self.pairs_up and len(slots) == 1:
            self._move(slots[0], _FIRST)
            logits = self._graph.run(
                _SCRATCH, np.array([[tokens[0]], tokens], np.int64), [1, *lengths]
            )[1:]
        else:
            logits = self._graph.run(first, np.array(tokens, np.int64)[:, None], lengths)
        share_s = (time.perf_counter() - started_s) / len(slots)
        events: list[Event] = []
        for slot, row in zip(slots, logits, strict=True):
            slot.length += 1
            if slot.answer is not None:
                slot.answer.model_s += share_s
            events += self._pick(slot, row)
        seconds = time.perf_counter() - started_s
        self._owed_s -= seconds
        self.meter.observe_decode(len(slots), sum(lengths) / len(slots), 1000 * seconds)
        return events

    def _score(self, slots: list[_Slot]) -> list[Event]:
        """Read the next tokens of a slot's candidates, for what they say of those that follow."""
        started_s = time.perf_counter()
        (slot,) = slots
        assert isinstance(slot.answer, Scoring)  # noqa: S101 - else it does not score
        most = max(2, min(self.chunk_tokens, LOGITS_BYTES // (4 * self._graph.vocabulary)))
        stretch = slot.answer.next(most)
        if stretch.start == 0:  # in place of the candidate before
            self._keep(slot, slot.read)
        end = slot.read + stretch.end
        logits = self._graph.read_all(self._row(slot), stretch.tokens, end)
        slot.length = end
        events = slot.answer.take(stretch, logits)
        seconds = time.perf_counter() - started_s
        slot.answer.model_s += seconds
        if events:
            self._free(slot)
        return events

    def _pick(self, slot: _Slot, logits: npt.NDArray[np.float32]) -> list[Event]:
        assert slot.answer is not None  # noqa: S101 - else nothing is picked for it
        try:
            events = slot.answer.pick(logits)
        except EngineError as error:
            return self._fail(slot, error)
        if events and isinstance(events[-1], Done | Scored):
            self._free(slot)
        return events

    def _fail(self, slot: _Slot, error: Exception) -> list[Event]:
        if slot.answer is None:
            return []
        failed = Failed(slot.answer.job.job_id, WorkFailed(str(error) or "No room in memory."))
        self._free(slot)
        self._keep(slot, 0)  # whatever lies there is not to be trusted
        return [failed]

    # --- rows

    def _row(self, slot: _Slot) -> int:
        return _FIRST + self._slots.index(slot)

    def _gather(self, slots: list[_Slot]) -> None:
        """Make the slots neighbours."""
        rows = sorted(map(self._row, slots))
        wanted = range(rows[0], rows[0] + len(rows))
        outside = [row for row in rows if row not in wanted]
        for row in wanted:
            if row not in rows:
                self._move(self._slots[outside.pop() - _FIRST], row)

    def _move(self, slot: _Slot, row: int) -> None:
        """Exchange a slot's row with that of the slot that lies at ``row``."""
        here, other = self._row(slot), self._slots[row - _FIRST]
        if here == row:
            return
        self._cache.swap(here, slot.length, row, other.length)
        self._slots[row - _FIRST], self._slots[here - _FIRST] = slot, other

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
        self._cache.release(self._row(slot), tokens, slot.length)
        slot.read = slot.length = tokens
        slot.ahead = ""
        if tokens == 0:
            slot.ahead_tokens, slot.ahead_s = 0, 0.0

    def _free(self, slot: _Slot) -> None:
        self._jobs.remove(slot)
        slot.answer, slot.worst = None, 0
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
    session = _session(model_dir, config, threads)
    decoder = config.model.decoder
    token_bytes = 8 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_size
    budget = (memory_mb << 20 or int(available_bytes() * MEMORY_SHARE)) // token_bytes
    if slots == 0:
        slots = max(1, min(most_slots, budget // LEAST_SLOT_TOKENS))
    budget = min(budget, slots * config.model.context_length)
    try:
        graph = Graph(session, config, _FIRST + slots)
    except (EngineError, MemoryError) as error:
        raise UnsuitedError(cause(error).rstrip(".")) from error
    backend = SlotsBackend(graph, reader, slots, budget, ends_loops=ends_loops)
    backend.warm_up()
    return backend


def _session(model_dir: Path, config: Config, threads: int) -> Any:
    import onnxruntime  # noqa: PLC0415 - heavy, and for models that this back end runs alone

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    entries = {
        name: str(value)
        for name, value in config.model.decoder.session_options.items()
        if "." in name  # the others are not entries; what an entry may be, read_config has checked
    }
    for name, value in (entries | {"session.intra_op.spin_duration_us": str(SPIN_US)}).items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(
            str(model_dir / config.model.decoder.filename),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # onnxruntime's own derive from nothing in particular
        said = cause(error).replace(f"{model_dir}/", "").rstrip(".")
        raise UnsuitedError(f"onnxruntime cannot load it: {said}") from error
