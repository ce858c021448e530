"""The ragged graph: whatever a run brings in, every token is computed as in one piece, and nothing
is written but at its place and, for a lone token, the one behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models.tiny import tiny

from edgemoa.engine import ragged
from edgemoa.engine.ragged import MOST_EACH, Graph, load_session
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
from edgemoa.models.progress import silent
from edgemoa.text.settings import CONFIG, read_config

CONTEXT = 96
ROWS = 4
UNTOUCHED = np.float32(-12345)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ragged")
    file = tiny(request.param, "Q8_0", context=CONTEXT).write(path / "tiny.gguf")
    return import_gguf(file, ModelLibrary(path / "models"), "tiny", silent)


def graph_of(folder: Path, rows: int) -> Graph:
    return Graph(load_session(folder, 1), read_config(folder / CONFIG), rows)


def test_runs_write_and_compute_what_they_are_asked_to_and_nothing_else(folder: Path) -> None:
    """Up to the last place of the context, by chance."""
    chance = np.random.default_rng(3)
    graph, whole = graph_of(folder, ROWS), graph_of(folder, 1)
    texts = chance.integers(3, 200, (ROWS, CONTEXT - 1))
    expected = [whole.run(0, [text], [0], every=True).copy() for text in texts]
    for buffer in graph.cache._buffers:
        buffer[:] = UNTOUCHED
    starts = [0] * ROWS
    while min(starts) < CONTEXT - 1:
        first = int(chance.integers(ROWS))
        rows = range(first, int(chance.integers(first, ROWS)) + 1)
        counts = [
            min(int(chance.choice([0, 1, 1, 2, 5, MOST_EACH])), CONTEXT - 1 - starts[row])
            for row in rows
        ]
        if not sum(counts):
            continue
        before = [buffer.copy() for buffer in graph.cache._buffers]
        asked = [
            texts[row, starts[row] : starts[row] + n] for row, n in zip(rows, counts, strict=True)
        ]
        logits = graph.run(first, asked, [starts[row] for row in rows], every=True)
        at = 0
        written = np.zeros((ROWS, graph.cache.capacity), bool)
        for row, count in zip(rows, counts, strict=True):
            start = starts[row]
            ours = expected[row][start : start + count]
            assert np.array_equal(logits[at : at + count], ours)
            written[row, start : start + (max(count, 2) if count else 0)] = True
            starts[row], at = start + count, at + count
        assert not written[:, CONTEXT:].any()  # where no position is known
        for old, new in zip(before, graph.cache._buffers, strict=True):
            changed = (old != new).any(axis=(1, 3))
            assert not (changed & ~written).any()


def test_logits_of_every_row_fit_into_a_run_whatever_the_vocabulary(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, "LOGITS_BYTES", 1)
    graph = graph_of(folder, ROWS)
    assert graph.run(0, [[5]] * ROWS, [0] * ROWS, every=True).shape[0] == ROWS
