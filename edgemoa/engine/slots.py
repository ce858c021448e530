"""The fast back end on CPU: onnxruntime alone, many jobs at a time, nothing read twice.

Each job has a slot, a row of the :class:`~edgemoa.engine.cache.Cache` that a run of the graph
reads as its past and writes as its present, in place. All jobs that write make their next token in
one run over neighbouring rows; a prompt is read in its own row, a chunk between two such runs. A
slot whose job has ended keeps what was read, for the next prompt that begins alike.

**A job's text does not depend on what else runs.** Rows of a run are computed as each would be by
itself (:meth:`SlotsBackend.warm_up` looks whether that is so on this machine), and a prompt's keys
and values are the same however it is cut into chunks. What a job *wrote* is not kept: a single
token's attention is computed by another kernel than several tokens', with other last digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgemoa.core.events import WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
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
from edgemoa.engine.frames import Done, Event, Failed, Generate
from edgemoa.engine.sampling import Sampler
from edgemoa.errors import EngineError, ModelInvalidError
from edgemoa.text.files import IMPORT_AGAIN
from edgemoa.text.settings import CONFIG, Config, read_config

MOST_SLOTS: Final = 4  # unless the settings say otherwise
MEMORY_SHARE: Final = 0.5  # of what is available when the model is loaded, for keys and values
LEAST_SLOT_TOKENS: Final = 1024  # a slot more is not worth it where memory holds fewer for it

WORTH_REUSING: Final = 8  # tokens: a prefill step saved

_SCRATCH: Final = 0  # the row beside the first slot that holds nothing of anybody's
_FIRST: Final = 1
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
            and outputs.keys() == {"logits", *self._present}
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
        for name, array in (("input_ids", tokens), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own derive from nothing in particular
            raise EngineError(f"The model failed: {cause(error)}") from error
        return self._logits[:rows, 0]

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
    answer: Answer | None = None
    worst: int = 0  # tokens, at the end of the job
    used: int = 0  # when it was last given a job; of two, the later has more

    @property
    def reading(self) -> bool:
        return self.answer is not None and self.read < len(self.prompt)

    @property
    def writing(self) -> bool:
        return self.answer is not None and self.read == len(self.prompt)

    def shares(self, prompt: npt.NDArray[np.int64]) -> int:
        """How many tokens that ``prompt`` begins with are there already.

        The last two are read anew: the last for its logits, and never a token by itself (CHUNKS).
        """
        most = min(self.read, len(prompt) - 2)
        if most <= 0:
            return 0
        differs = self.prompt[:most] != prompt[:most]
        return int(differs.argmax()) if differs.any() else most


class SlotsBackend:
    """A loaded model and the jobs that it works on."""

    name = "slots"

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
        self._given = 0  # jobs so far

    def count(self, messages: tuple[ChatMessage, ...]) -> int:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        return len(self._reader.read(messages))

    def admit(self, job: Generate) -> bool:
        """Give ``job`` a slot; False where other jobs may come to need the memory for it.

        Raises :class:`PromptTooLongError`, :class:`InvalidPromptError`, or :class:`EngineError`
        where there is no memory for it.
        """
        prompt = self._reader.read(job.messages)
        limit = self._reader.limit(prompt, job.sampling)
        worst = len(prompt) + limit
        if worst > self.budget_tokens:
            raise EngineError(
                f"No room for {worst} tokens of context: this board's memory holds"
                f" {self.budget_tokens}."
            )
        if worst + sum(slot.worst for slot in self._jobs) > self.budget_tokens:
            return False
        tokens = np.array(prompt, np.int64)
        slot, source = self._choose(tokens)
        shared = source.shares(tokens)
        self._given += 1
        slot.used = self._given
        if source is slot:
            self._keep(slot, shared)
        else:
            self._keep(slot, 0)
        slot.prompt, slot.worst = tokens, worst
        slot.answer = Answer(
            job, self._reader.tokens, len(prompt), limit, ends_loops=self._ends_loops
        )
        slot.answer.cached_tokens = slot.read
        self._jobs.append(slot)
        self._make_room(source)
        if source is not slot:
            self._take_over(slot, source)
        return True

    def drop(self, job_id: int) -> None:
        """Free the job's slot; what was read of its prompt stays there."""
        for slot in self._jobs:
            if slot.answer is not None and slot.answer.job.job_id == job_id:
                self._free(slot)
                return

    def step(self) -> list[Event]:
        """A chunk of the oldest prompt that is not read yet, and a token for every job whose is."""
        events: list[Event] = []
        reading = next((slot for slot in self._jobs if slot.reading), None)
        if reading is not None:
            events += self._guarded([reading], self._read)
        writing = [slot for slot in self._jobs if slot.writing]
        if writing:
            events += self._guarded(writing, self._write)
        return events

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
        (slot,) = slots
        assert slot.answer is not None  # noqa: S101 - else it does not read
        if slot.length == slot.answer.cached_tokens:  # its first chunk
            slot.answer.begin()
            source = max(self._slots, key=lambda each: each.shares(slot.prompt))
            self._take_over(slot, source)  # what another has read since this one came
        count = chunk_of(len(slot.prompt) - slot.read, self.chunk_tokens)
        end = slot.read + count
        chunk = slot.prompt[None, slot.read : end]
        logits = self._graph.run(self._row(slot), chunk, [end])
        slot.read = slot.length = end
        return [] if slot.reading else self._pick(slot, logits[0])

    def _write(self, slots: list[_Slot]) -> list[Event]:
        """A token more for each of the slots, in one run."""
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
        events: list[Event] = []
        for slot, row in zip(slots, logits, strict=True):
            slot.length += 1
            events += self._pick(slot, row)
        return events

    def _pick(self, slot: _Slot, logits: npt.NDArray[np.float32]) -> list[Event]:
        assert slot.answer is not None  # noqa: S101 - else nothing is picked for it
        try:
            events = slot.answer.pick(logits)
        except EngineError as error:
            return self._fail(slot, error)
        if events and isinstance(events[-1], Done):
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
        # In its place, unless much else lies there that another prompt may begin with.
        if source in free and 2 * source.shares(prompt) >= source.read:
            return source, source
        slot = min(free, key=lambda slot: (slot.read > 0, slot.used))
        return slot, source

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

    def _free(self, slot: _Slot) -> None:
        self._jobs.remove(slot)
        slot.answer, slot.worst = None, 0
        self._keep(slot, slot.read)

    def _make_room(self, spared: _Slot) -> None:
        """Forget the oldest prompts until every job may become as long as it may."""
        kept = [slot for slot in self._slots if slot.answer is None and slot.length]
        kept.sort(key=lambda slot: (slot is spared, slot.used))
        room = self.budget_tokens - sum(slot.worst for slot in self._jobs)
        while sum(slot.length for slot in kept) > room:
            self._keep(kept.pop(0), 0)


def load(model_dir: Path, threads: int, slots: int = 0, *, ends_loops: bool = True) -> SlotsBackend:
    """Load a model folder, ready to work on so many jobs at a time (0: as memory allows).

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
    budget = int(_available_bytes() * MEMORY_SHARE) // token_bytes
    if slots == 0:
        slots = max(1, min(MOST_SLOTS, budget // LEAST_SLOT_TOKENS))
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


def _available_bytes() -> int:
    """Memory that this board could give to processes now."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    raise EngineError("The kernel does not say how much memory is available.")
