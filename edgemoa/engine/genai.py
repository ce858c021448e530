"""The reference back end: onnxruntime-genai, one job at a time.

Imported by the model process alone: a model step holds the interpreter lock for its whole time,
so nothing else can live beside it. genai runs the model; tokens are picked and turned into text
here (see :mod:`edgemoa.engine.sampling` and :mod:`edgemoa.engine.text` for why).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import onnxruntime_genai as og

from edgemoa.core.events import Given, WorkFailed
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
from edgemoa.engine.frames import Done, Event, Failed, Generate, Work, failure
from edgemoa.engine.sampling import Sampler
from edgemoa.errors import EngineError, ModelInvalidError, SchemaError
from edgemoa.text.files import IMPORT_AGAIN
from edgemoa.text.settings import CONFIG, read_config


class GenaiBackend:
    """A loaded model and the job that it works on."""

    name = "genai"
    slots = 1
    reads_ahead = False  # a prompt begins with an empty memory
    embeds = False
    guess_cost = 1.0  # nothing is guessed
    has_to_read = False

    def __init__(self, model: Any, reader: Reader, *, ends_loops: bool) -> None:
        self.context_tokens = reader.context_tokens
        self.budget_tokens = reader.context_tokens
        self.chunk_tokens = CHUNKS[-1]
        self.meter = Meter()
        self._model = model
        self._reader = reader
        self._ends_loops = ends_loops
        self._answer: Answer | None = None
        self._generator: Any = None
        self._unfed: list[int] = []  # what the model has not seen yet
        self._fed = 0  # tokens that it has

    @property
    def calls_tools(self) -> bool:
        """See :class:`~edgemoa.engine.worker.Backend`."""
        return self._reader.call_form is not None

    def count(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        return len(self._reader.read(messages, given))

    def admit(self, job: Work) -> bool:
        """Make ``job`` the one that :meth:`step` works on.

        Raises :class:`PromptTooLongError`, :class:`InvalidPromptError`, :class:`SchemaError`,
        :class:`EngineError` where there is no memory for it, and :class:`ModelInvalidError` for
        texts to score or to embed.
        """
        if not isinstance(job, Generate):
            raise ModelInvalidError(
                "The genai back end, which runs this model, does not score or embed texts.",
                hint='Import the model with edgemoa, and set model.backend to "auto".',
            )
        prompt = self._reader.read(job.messages, job.wishes.given)
        limit = self._reader.limit(prompt, job.sampling)
        answer = Answer(job, self._reader, prompt, limit, ends_loops=self._ends_loops)
        self._generator = self._new_generator(len(prompt) + limit)
        self._answer, self._unfed, self._fed = answer, prompt, 0
        return True

    def forget(self) -> None:
        """Nothing: nothing is kept."""

    def drop(self, job_id: int) -> None:
        """Forget the job, if it is the one; its memory is free when this returns."""
        if self._answer is not None and self._answer.job.job_id == job_id:
            self._answer = self._generator = None

    def step(self) -> list[Event]:
        """Feed the next chunk of the prompt, or the last token, and pick a token at its end."""
        answer = self._answer
        if answer is None:
            return []
        started_s = time.perf_counter()
        try:
            taken = chunk_of(len(self._unfed), self.chunk_tokens)
            chunk, self._unfed = self._unfed[:taken], self._unfed[taken:]
            self._generator.append_tokens(chunk)
            self._account(answer, taken, time.perf_counter() - started_s)
            if self._unfed:
                return []
            events = answer.pick(self._generator.get_logits()[0, -1])
            self._unfed = [answer.last]
        except (EngineError, SchemaError) as error:
            events = [Failed(answer.job.job_id, failure(error))]
        except (RuntimeError, MemoryError) as error:
            reason = f"The model failed: {cause(error)}"
            events = [Failed(answer.job.job_id, WorkFailed(reason))]
        if any(isinstance(event, Done | Failed) for event in events):
            self.drop(answer.job.job_id)
        return events

    def read_ahead(self, key: str, messages: tuple[ChatMessage, ...]) -> None:
        """Nothing: see ``reads_ahead``."""

    def _account(self, answer: Answer, taken: int, seconds: float) -> None:
        answer.model_s += seconds
        if answer.last < 0:
            self.meter.observe_prefill(taken, self._fed, 1000 * seconds)
        else:
            self.meter.observe_decode(1, self._fed, 1000 * seconds)
        self._fed += taken

    def warm_up(self) -> None:
        """Run the model once on something harmless: brings its weights into memory, shows whether
        it computes at all, and finds the prefill step that this board does in time.

        Raises :class:`EngineError` for a model that computes nothing valid.
        """
        prompt = self._reader.read((ChatMessage("user", "Hello"),))

        def read(tokens: int) -> None:
            generator = self._new_generator(tokens + 1)
            generator.append_tokens((prompt * tokens)[:tokens])
            Sampler(Sampling()).pick(generator.get_logits()[0, -1])

        self.chunk_tokens = find_chunk(read, self.context_tokens - 1)

    def _new_generator(self, max_length: int) -> Any:
        """``max_length`` tokens of KV cache, allocated here and now."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, batch_size=1, num_beams=1)
        try:
            return og.Generator(self._model, params)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"No room for {max_length} tokens of context: {cause(error)}"
            ) from error


PROVIDERS: Final = {
    "cuda": "cuda",
    "migraphx": "MIGraphX",
    "nvtensorrtrtx": "NvTensorRtRtx",
    "openvino": "OpenVINO",
    "qnn": "QNN",
    "webgpu": "WebGPU",
}
"""Execution providers beside the CPU's, by their name in the settings: what genai calls them."""


class ProviderError(Exception):
    """An execution provider that does not run this model here, and why. Never meets a person."""


def load(
    model_dir: Path, threads: int, *, provider: str = "cpu", ends_loops: bool = True
) -> GenaiBackend:
    """Load a model folder, ready to work.

    :param provider: of :data:`PROVIDERS`. Raises :class:`ProviderError` for one that cannot be
        used.

    Raises :class:`ModelInvalidError` with what is wrong with the folder, :class:`EngineError` for
    a model that loads and does not compute.
    """
    if not model_dir.is_dir():
        raise ModelInvalidError(f"There is no model folder at {model_dir}.", hint=IMPORT_AGAIN)
    context = read_config(model_dir / CONFIG).model.context_length
    og.disable_telemetry_events()  # nothing leaves this board that its owner did not ask for
    session_options = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "session.intra_op.spin_duration_us": str(SPIN_US),
    }
    try:
        config = og.Config(str(model_dir))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        if provider != "cpu":
            config.clear_providers()
            config.append_provider(PROVIDERS[provider])
        model = og.Model(config)
        backend = GenaiBackend(model, load_reader(model_dir, context), ends_loops=ends_loops)
        backend.warm_up()
    except (RuntimeError, MemoryError, EngineError) as error:
        said = cause(error).replace(f"{model_dir}/", "")
        if provider != "cpu":
            raise ProviderError(said) from error
        if isinstance(error, EngineError):
            raise
        raise ModelInvalidError(f"The model cannot be loaded: {said}", hint=IMPORT_AGAIN) from error
    return backend
