"""A decoder's ragged graph and its cache: new tokens, any number for each of several rows, a run.

The graph is ``ragged.onnx`` of a folder that edgemoa imported; see :mod:`edgemoa.models.graph` for
its inputs and outputs.

**What is computed for a token does not depend on how it is brought in**: with others before it, by
itself, as a guess among guesses, beside other rows. onnxruntime computes the attention of a single
place by another kernel than that of several, with other last digits, which rounding of activations
makes larger, layer by layer. So a row never has a single place: a lone token stands at two, and
what is written at the second is overwritten by the next token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from edgemoa.engine.answer import CHUNKS, SPIN_US, cause
from edgemoa.engine.cache import Cache
from edgemoa.engine.drafts import MOST
from edgemoa.engine.memory import Mapped, release
from edgemoa.errors import EngineError
from edgemoa.text.files import RAGGED_GRAPH
from edgemoa.text.settings import Config

LOGITS_BYTES: Final = 16 << 20  # of one run, or one token of each row; a token has 192 KB or more

MOST_EACH: Final = 1 + MOST
"""Tokens that a row may have in a run with other rows; with more, a run is for one row."""

RELEASE_TOKENS: Final = 128
"""Tokens after which tables of weights are given back: for the row of each, the kernel maps 64 KB
and more around it. Of SmolLM2's 28 MB, 23 were in memory after 1,900 tokens; to map them again
takes less than .2 % of the time."""

_LEAST_PLACES: Final = 2
_MOST_PLANS: Final = 64
_PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_LONG: Final = ("input_ids", "row_tokens", "token_places", "wanted")
_SHORT: Final = ("query_seqlens", "seqlens_k", "total_sequence_length")
_LOGITS_WANTED: Final = "logits_wanted"

_Asked = Literal["last", "every", "hidden"]
Numbers = npt.NDArray[np.int64]


class UnsuitedError(Exception):
    """This back end does not run such a model, and why; genai may. Never meets a person."""


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """A run's shape: ``places`` of each row; inputs, in arrays that stay where they are; and where
    outputs are written, of which the first was asked for."""

    places: list[int]
    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, npt.NDArray[np.float32]]


class Graph:
    """A loaded graph. ``doubles`` says whether a run of a single token reads it twice: kernels
    differ for one and for several on some machines."""

    def __init__(
        self, session: Any, config: Config, rows: int, tables: Sequence[Mapped] = ()
    ) -> None:
        """:param tables: weights that are read a row for each token, as long as the session lives.

        Raises :class:`UnsuitedError` for a graph that takes or gives anything else, and
        :class:`EngineError` where there is not even the address space for the cache."""
        decoder = config.model.decoder
        self._session = session
        self._tables = tables
        self._looked_up = 0  # tokens, since the tables were given back
        inputs = {each.name: each for each in session.get_inputs()}
        outputs = {each.name: each for each in session.get_outputs()}
        self._past = [name for name in inputs if _PAST.fullmatch(name)]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        heads, size = decoder.num_key_value_heads, decoder.head_size
        self.vocabulary = config.model.vocab_size
        fits = (
            inputs.keys() == {*_LONG, *_SHORT, *self._past}
            and outputs.keys() == {"logits", "hidden", *self._present}
            and len(self._past) == 2 * decoder.num_hidden_layers
            and all(inputs[each].type == "tensor(int64)" for each in _LONG)
            and all(inputs[each].type == "tensor(int32)" for each in _SHORT)
            and all(
                inputs[each].type == "tensor(float)" and inputs[each].shape[1::2] == [heads, size]
                for each in self._past
            )
            and outputs["logits"].type == "tensor(float)"
            and outputs["logits"].shape[::2] == [1, self.vocabulary]
            and outputs["hidden"].type == "tensor(float)"
            and isinstance(outputs["hidden"].shape[2], int)
        )
        if not fits:
            raise UnsuitedError("its graph has other inputs or outputs")
        # Also an idle row's places must have room for what another row's tokens take.
        places = config.model.context_length + MOST_EACH
        self.cache = Cache(len(self._past), rows, heads, places, size)
        self.most_logits = max(LOGITS_BYTES // (4 * self.vocabulary), rows)
        self.doubles = False
        self._logits = np.empty((self.most_logits, self.vocabulary), np.float32)
        # Graphs of an earlier version compute the logits of all whose hidden states they give.
        optional = {each.name for each in session.get_overridable_initializers()}
        self._can_spare_logits = _LOGITS_WANTED in optional
        self.most_hidden = CHUNKS[0] + 1 if self._can_spare_logits else self.most_logits
        self.width: int = outputs["hidden"].shape[2]
        self._hidden = np.empty((self.most_hidden, self.width), np.float32)
        self._plans: dict[tuple[tuple[int, ...], _Asked, bool], _Plan] = {}
        self._bindings: dict[tuple[int, int, bool], tuple[Any, _Plan]] = {}

    def run(
        self,
        first: int,
        tokens: Sequence[Sequence[int] | Numbers],
        starts: Sequence[int],
        *,
        every: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Read tokens into the rows from ``first`` on: of each row its next ones, which may be
        none, behind the ``starts`` that it has.

        The logits [n, vocabulary], of the last token of each row that has any or of ``every`` token
        (``most_logits`` at most), are good until the next run. Raises :class:`EngineError` where
        onnxruntime fails.
        """
        return self._run(first, tokens, starts, "every" if every else "last")

    def hidden(self, row: int, tokens: Numbers, start: int) -> npt.NDArray[np.float32]:
        """Read tokens into a row, ``most_hidden`` at most, behind the ``start`` that it has.

        What the head is given for each of them [n, width], final norm included, is good until the
        next run. Raises :class:`EngineError` where onnxruntime fails.
        """
        return self._run(row, [tokens], [start], "hidden")

    def _run(
        self,
        first: int,
        tokens: Sequence[Sequence[int] | Numbers],
        starts: Sequence[int],
        asked: _Asked,
    ) -> npt.NDArray[np.float32]:
        plan = self._plan(tuple(map(len, tokens)), asked)
        ids = [token for each in tokens for token in each]
        plan.inputs["input_ids"][:] = ids  # one of them fills both places of a pair
        lengths = [start + count for start, count in zip(starts, plan.places, strict=True)]
        plan.inputs["seqlens_k"][:] = [max(length, 1) - 1 for length in lengths]
        plan.inputs["total_sequence_length"][...] = max(lengths)
        binding = self._binding(first, len(tokens), plan)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own derive from nothing in particular
            raise EngineError(f"The model failed: {cause(error)}") from error
        self._looked_up += len(ids)
        if self._looked_up >= RELEASE_TOKENS:
            self._looked_up = 0
            release(self._tables)
        return next(iter(plan.outputs.values()))

    def _plan(self, counts: tuple[int, ...], asked: _Asked) -> _Plan:
        """What is the same for all runs of so many tokens in each row."""
        key = counts, asked, self.doubles
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        total = sum(counts)
        last = np.cumsum([n for n in counts if n]) - 1
        wanted = last if asked == "last" else np.arange(total)
        if total == 1 and self.doubles:
            counts, total = tuple(2 * count for count in counts), 2
        places = [max(count, _LEAST_PLACES) if count else 0 for count in counts]
        row_tokens = np.zeros((len(counts), max(places), 2), np.int64)
        token_places = np.empty((1, total, 2), np.int64)
        at = 0
        for row, count in enumerate(counts):
            if count:
                row_tokens[row, :, 1] = at + np.minimum(np.arange(max(places)), count - 1)
                token_places[0, at : at + count] = [(row, place) for place in range(count)]
                at += count
        inputs = {
            "input_ids": np.empty(total, np.int64),
            "row_tokens": row_tokens,
            "token_places": token_places,
            "wanted": wanted,
            "query_seqlens": np.array(places, np.int32),
            "seqlens_k": np.empty(len(counts), np.int32),
            "total_sequence_length": np.empty((), np.int32),
        }
        outputs = {"logits": self._logits[: len(wanted)]}
        if asked == "hidden":
            if self._can_spare_logits:  # but for one: not every head can be given nothing
                inputs[_LOGITS_WANTED] = np.ones(1, np.int64)
                outputs["logits"] = self._logits[:1]
            # Both: onnxruntime would take memory of its own for logits that have no place.
            outputs = {"hidden": self._hidden[: len(wanted)], **outputs}
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[key] = _Plan(places, inputs, outputs)
        return plan

    def _binding(self, first: int, rows: int, plan: _Plan) -> Any:
        """Rows of the cache as past and present of a run, and the rest by a plan."""
        key = first, rows, "hidden" in plan.outputs
        binding, bound = self._bindings.get(key, (None, None))
        if binding is None:
            binding = self._session.io_binding()
            shape = (rows, *self.cache.shape)
            addresses = self.cache.addresses(first)
            for past, present, address in zip(self._past, self._present, addresses, strict=True):
                binding.bind_input(past, "cpu", 0, np.float32, shape, address)
                binding.bind_output(present, "cpu", 0, np.float32, shape, address)
        if bound is not plan:
            for name, array in plan.inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, array in plan.outputs.items():
                shape = (1, *array.shape)
                binding.bind_output(name, "cpu", 0, np.float32, shape, array.ctypes.data)
            self._bindings[key] = binding, plan
        return binding


def load_session(model_dir: Path, threads: int) -> Any:
    """The folder's graph in onnxruntime. Raises :class:`UnsuitedError`."""
    import onnxruntime  # noqa: PLC0415 - heavy, and for models that this back end runs alone

    file = model_dir / RAGGED_GRAPH
    if not file.is_file():
        raise UnsuitedError(f"it has no {RAGGED_GRAPH}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.enable_mem_pattern = False  # a plan of a run's memory: 5 MB more, and no faster
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own derive from nothing in particular
        said = cause(error).replace(f"{model_dir}/", "").rstrip(".")
        raise UnsuitedError(f"onnxruntime cannot load it: {said}") from error
