"""Which back end runs a model folder, on which execution provider, and that one loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoa.errors import EngineError

if TYPE_CHECKING:
    from edgemoa.engine.worker import Backend


@dataclass(frozen=True, slots=True)
class Wish:
    """How a model is to be run; see :class:`edgemoa.config.Model` for the settings."""

    model_dir: Path
    threads: int
    backend: str = "auto"
    provider: str = "cpu"
    slots: int = 0
    most_slots: int = 0  # where ``slots`` is 0; 0: the back end's own bound
    memory_mb: int = 0
    ends_loops: bool = True


def load(wish: Wish) -> tuple[Backend, str]:
    """The back end, ready to work, and why it is not what was wished for, where it is not.

    Raises :class:`EdgemoaError` with what is wrong with the model or this installation.
    """
    notes: list[str] = []
    # Each back end is heavy, its failure is to be reported, and one of them is enough.
    try:
        if wish.provider != "cpu" and (backend := _accelerated(wish, notes)) is not None:
            return backend, ""
        if wish.backend != "genai" and (backend := _fast(wish, notes)) is not None:
            return backend, " ".join(notes)
        from edgemoa.engine import genai  # noqa: PLC0415

        reference = genai.load(wish.model_dir, wish.threads, ends_loops=wish.ends_loops)
        return reference, " ".join(notes)
    except ImportError as error:
        raise EngineError(
            f"The model runtime cannot be imported: {error}.",
            hint="Install edgemoa again, with its dependencies.",
        ) from error


def _accelerated(wish: Wish, notes: list[str]) -> Backend | None:
    """genai on another provider than the CPU; None, and a note, where that cannot be."""
    if wish.backend == "slots":
        notes.append(
            f"model.provider {wish.provider} is not used: model.backend slots is for the CPU alone."
        )
        return None
    from edgemoa.engine import genai  # noqa: PLC0415

    try:
        return genai.load(
            wish.model_dir, wish.threads, provider=wish.provider, ends_loops=wish.ends_loops
        )
    except genai.ProviderError as error:
        notes.append(  # the runtime's own words last: they may be many, and a note is cut
            f"model.provider {wish.provider} cannot be used, the CPU is. It needs a device of that"
            f" kind and a build of onnxruntime-genai for it: {error}"
        )
        return None


def _fast(wish: Wish, notes: list[str]) -> Backend | None:
    """The slots back end; None, and a note, for a model that it does not run."""
    from edgemoa.engine import ragged, slots  # noqa: PLC0415

    try:
        backend = slots.load(
            wish.model_dir,
            wish.threads,
            wish.slots,
            most_slots=wish.most_slots or slots.MOST_SLOTS,
            memory_mb=wish.memory_mb,
            ends_loops=wish.ends_loops,
        )
    except ragged.UnsuitedError as error:
        notes.append(f"The slots back end does not run this model: {error}.")
        if wish.backend == "slots":
            hint = 'Import the model with edgemoa, or set model.backend to "auto".'
            raise EngineError(notes[-1], hint=hint) from error
        return None
    if backend.budget_tokens < min(slots.LEAST_SLOT_TOKENS, backend.context_tokens):
        notes.append(
            f"Memory holds {backend.budget_tokens} tokens; a prompt that needs more with its answer"
            " fails. Raise model.memory_mb, or use a smaller model."
        )
    return backend
