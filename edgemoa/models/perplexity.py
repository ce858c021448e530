"""Perplexity of a model on a text: how well quantized weights and activations still predict.

The convention, so that figures can be compared: the text without white space at its ends is
tokenized as a whole and cut into windows that know nothing of each other; the first token of each
window is replaced by the one that precedes a document, as llama.cpp's perplexity tool does; every
following token of a window is predicted. Perplexity is exp of the mean of -ln p.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgemoa.errors import ModelInvalidError, UserError
from edgemoa.models.library import Manifest, read_manifest
from edgemoa.models.progress import Progress, silent
from edgemoa.text.files import RAGGED_GRAPH
from edgemoa.text.tokens import load_tokens

CHUNK_TOKENS: Final = 64  # logits of one chunk are 12 MB for a vocabulary of 49152


class Perplexity(msgspec.Struct, frozen=True):
    """``predictions`` is how many tokens were predicted, out of ``tokens`` in ``windows``."""

    perplexity: float
    tokens: int
    predictions: int
    windows: int
    window: int
    seconds: float


def perplexity(
    model_dir: Path,
    text: str,
    window: int = 512,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Raises :class:`UserError` for a text or a window without anything to predict, and
    :class:`ModelInvalidError` for a folder without our ragged graph.
    """
    manifest = read_manifest(model_dir)
    graph = model_dir / RAGGED_GRAPH
    start = manifest.text_start_token_id
    if start is None or not graph.is_file():
        raise ModelInvalidError(f"{model_dir} has no {RAGGED_GRAPH}: it was not imported by us")
    if not 2 <= window <= manifest.context_length:
        raise UserError(f"a window of {window} is not between 2 and {manifest.context_length}")
    started = time.monotonic()
    tokens = tokenize(model_dir, text.strip())[:max_tokens]
    if len(tokens) < 2:
        raise UserError("the text is too short to predict anything in it")
    scorer = Scorer(graph, manifest)
    total = 0.0
    predictions = windows = 0
    for first in range(0, len(tokens) - 1, window):
        ids = tokens[first : first + window].copy()
        ids[0] = start
        for position, logits in scorer.logits(ids[:-1]):
            targets = ids[position + 1 : position + 1 + len(logits)]
            total += float(negative_log_likelihood(logits, targets).sum())
            predictions += len(targets)
            progress("score tokens", predictions, len(tokens))
        windows += 1
    return Perplexity(
        perplexity=float(np.exp(total / predictions)),
        tokens=len(tokens),
        predictions=predictions,
        windows=windows,
        window=window,
        seconds=time.monotonic() - started,
    )


def tokenize(model_dir: Path, text: str) -> NDArray[np.int64]:
    """The text's tokens, int64 [tokens]."""
    return np.asarray(load_tokens(model_dir).encode(text), np.int64)


def negative_log_likelihood(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """-ln p of each target, [tokens], from logits [tokens, vocabulary]."""
    highest = logits.max(axis=-1, keepdims=True)
    partition = np.exp(logits - highest).sum(axis=-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, targets[:, None], axis=-1)
    return np.asarray(np.log(partition) + highest[:, 0] - chosen[:, 0], np.float64)


class Scorer:
    """Runs a graph of ours over one sequence at a time, in chunks, with onnxruntime alone."""

    def __init__(self, graph: Path, manifest: Manifest) -> None:
        self._session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self._manifest = manifest
        sides = [(n, side) for n in range(manifest.layers) for side in ("key", "value")]
        self._past = [f"past_key_values.{number}.{side}" for number, side in sides]
        self._outputs = ["logits", *(f"present.{number}.{side}" for number, side in sides)]

    def logits(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Logits [tokens, vocabulary] of each chunk of ``ids``, with its first position."""
        m = self._manifest
        empty = np.zeros((1, m.kv_heads, 0, m.head_size), np.float32)
        past = dict.fromkeys(self._past, empty)
        for first in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[first : first + CHUNK_TOKENS]
            places = np.arange(len(chunk))
            pairs = np.stack([np.zeros_like(places), places], -1)[None]
            inputs = {
                "input_ids": chunk,
                "row_tokens": pairs,
                "token_places": pairs,
                "query_seqlens": np.array([len(chunk)], np.int32),
                "seqlens_k": np.array([first + len(chunk) - 1], np.int32),
                "total_sequence_length": np.array(first + len(chunk), np.int32),
                "wanted": places,
            }
            logits, *present = self._session.run(self._outputs, inputs | past)
            past = dict(zip(self._past, present, strict=True))
            yield first, logits[0]
