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

from edgemoa.core.events import Finish, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine.frames import Done, Event, Failed, Generate, Text
from edgemoa.engine.sampling import Sampler
from edgemoa.engine.text import Detokenizer, StopText
from edgemoa.errors import EngineError, ModelInvalidError, PromptTooLongError
from edgemoa.text.settings import CONFIG, read_config
from edgemoa.text.template import ChatTemplate, load_template
from edgemoa.text.tokens import Tokens, load_tokens

STEP_GOAL_MS: Final = 100
"""How long a prefill step may take: cancelling and measuring wait for the step that runs."""

CHUNKS: Final = (128, 64, 32, 16, 8)
"""Tokens of a prefill step to choose from. On x86-64, logits are bit for bit the same with each, as
long as no step has a single token (onnxruntime computes one row by another kernel than several);
speed, against a prompt in one piece: 1.0, .97, .88, .72 for the first four."""

SPIN_US: Final = 20
"""How long onnxruntime's threads spin for work before they sleep. On two quiet cores as fast as
its default (181 against 180 tok/s; 126 without spinning); with another model process on the same
cores a quarter faster than the default."""

_MAX_CAUSE_CHARACTERS: Final = 160
_IMPORT_AGAIN: Final = "Import the model again."


class GenaiBackend:
    """A loaded model and the job that it works on."""

    slots = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Tokens,
        template: ChatTemplate,
        context: int,
    ) -> None:
        self.context_tokens = context
        self.chunk_tokens = CHUNKS[-1]
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._run: _Run | None = None

    def count(self, messages: tuple[ChatMessage, ...]) -> int:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        return len(self._encode(messages))

    def admit(self, job: Generate) -> None:
        """Make ``job`` the one that :meth:`step` works on.

        Raises :class:`PromptTooLongError`, :class:`InvalidPromptError`, or :class:`EngineError`
        where there is no memory for it.
        """
        started = time.perf_counter()
        prompt = self._encode(job.messages)
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"The prompt has {len(prompt)} tokens; the model's context holds"
                f" {self.context_tokens}, answer included."
            )
        limit = min(job.sampling.max_tokens, room)
        generator = self._generator(len(prompt) + limit)
        self._run = _Run(job, generator, self._tokenizer, prompt, limit)
        self._run.prefill_s = time.perf_counter() - started

    def drop(self, job_id: int) -> None:
        """Forget the job, if it is the one; its memory is free when this returns."""
        if self._run is not None and self._run.job.job_id == job_id:
            self._run = None

    def step(self) -> list[Event]:
        """One run of the model for the admitted job, and what there is to tell after it."""
        run = self._run
        if run is None:
            return []
        try:
            events = run.step(self.chunk_tokens)
        except EngineError as error:
            events = [Failed(run.job.job_id, WorkFailed(str(error)))]
        except (RuntimeError, MemoryError) as error:
            reason = f"The model failed: {_cause(error)}"
            events = [Failed(run.job.job_id, WorkFailed(reason))]
        if any(isinstance(event, Done | Failed) for event in events):
            self._run = None
        return events

    def warm_up(self) -> None:
        """Run the model once on something harmless: brings its weights into memory, shows whether
        it computes at all, and finds the prefill step that this board does in time.

        Raises :class:`EngineError` for a model that computes nothing valid.
        """
        prompt = self._encode((ChatMessage("user", "Hello"),))
        tokens = (prompt * CHUNKS[-2])[: CHUNKS[-2]]
        best_s = float("inf")
        for _ in range(4):  # the first pages the weights in; the best of all is without neighbours
            generator = self._generator(len(tokens) + 1)
            started = time.perf_counter()
            generator.append_tokens(tokens)
            best_s = min(best_s, time.perf_counter() - started)
            Sampler(Sampling()).pick(generator.get_logits()[0, -1])
        goal_tokens = len(tokens) * STEP_GOAL_MS / 1000 / best_s
        self.chunk_tokens = next((n for n in CHUNKS if n <= goal_tokens), CHUNKS[-1])

    def _encode(self, messages: tuple[ChatMessage, ...]) -> list[int]:
        prompt = self._template.render(self._tokenizer.guard(messages))
        return self._tokenizer.encode_prompt(prompt)

    def _generator(self, max_length: int) -> Any:
        """``max_length`` tokens of KV cache, allocated here and now."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, batch_size=1, num_beams=1)
        try:
            return og.Generator(self._model, params)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"No room for {max_length} tokens of context: {_cause(error)}"
            ) from error


class _Run:
    """One job's way through the model."""

    def __init__(
        self, job: Generate, generator: Any, tokenizer: Tokens, prompt: list[int], limit: int
    ) -> None:
        self.job = job
        self.prefill_s = 0.0
        self._decode_s = 0.0
        self._generator = generator
        self._end_tokens = tokenizer.end_of_turn
        self._prompt_tokens = len(prompt)
        self._unfed = prompt  # what the model has not seen yet
        self._limit = limit
        self._tokens = 0
        self._sampler = Sampler(job.sampling)
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopText(job.sampling.stop)
        self._text: list[str] = []

    def step(self, chunk_tokens: int) -> list[Event]:
        """Feed the next chunk of the prompt, or the last token, and pick a token at its end."""
        started = time.perf_counter()
        if len(self._unfed) == chunk_tokens + 1:
            chunk_tokens += 1  # see CHUNKS: a token by itself would be computed another way
        chunk, self._unfed = self._unfed[:chunk_tokens], self._unfed[chunk_tokens:]
        self._generator.append_tokens(chunk)
        token = None
        prefill = self._tokens == 0
        if not self._unfed:
            token = self._sampler.pick(self._generator.get_logits()[0, -1])
        taken_s = time.perf_counter() - started
        if prefill:
            self.prefill_s += taken_s
        else:
            self._decode_s += taken_s
        return [] if token is None else self._take(token)

    def _take(self, token: int) -> list[Event]:
        self._tokens += 1
        finish: Finish | None = None
        piece = ""
        if token in self._end_tokens:
            finish = "stop"
        else:
            self._unfed = [token]
            piece = self._stop.push(self._detokenizer.push(token))
            if self._tokens == self._limit:
                finish = "length"
        if finish is not None and not self._stop.stopped:
            piece += self._stop.finish()
        if self._stop.stopped:
            finish = "stop"
        events: list[Event] = []
        if piece:
            self._text.append(piece)
            if self.job.stream:
                events.append(Text(self.job.job_id, piece))
        if finish is not None:
            events.append(Done(self.job.job_id, self._result(finish)))
        return events

    def _result(self, finish: Finish) -> WorkDone:
        return WorkDone(
            text="".join(self._text),
            finish=finish,
            prompt_tokens=self._prompt_tokens,
            tokens=self._tokens,
            prefill_ms=round(self.prefill_s * 1000),
            decode_ms=round(self._decode_s * 1000),
        )


def load(model_dir: Path, threads: int) -> GenaiBackend:
    """Load a model folder, ready to work.

    Raises :class:`ModelInvalidError` with what is wrong with the folder, :class:`EngineError` for
    a model that loads and does not compute.
    """
    if not model_dir.is_dir():
        raise ModelInvalidError(f"There is no model folder at {model_dir}.", hint=_IMPORT_AGAIN)
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
        model = og.Model(config)
    except (RuntimeError, MemoryError) as error:
        cause = _cause(error).replace(f"{model_dir}/", "")
        raise ModelInvalidError(
            f"The model cannot be loaded: {cause}", hint=_IMPORT_AGAIN
        ) from error
    backend = GenaiBackend(model, load_tokens(model_dir), load_template(model_dir), context)
    backend.warm_up()
    return backend


def _cause(error: Exception) -> str:
    """The first line of what a library said, cut short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = lines[0][:_MAX_CAUSE_CHARACTERS]
    return cause if cause.endswith(".") else f"{cause}."
