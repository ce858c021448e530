"""The graph of packed tokens: what a text gives depends on nothing else that runs beside it, nor
on the pieces that it is read in. The engine rests on that.

Bit for bit, and only if attention sees each row with two places at least: for a single one,
onnxruntime takes another kernel. So a single new token is given twice, and the second place is
written over by the token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.perplexity import Scorer
from edgemoa.models.progress import silent
from edgemoa.text.files import RAGGED_GRAPH

from .tiny import PRESETS, VOCABULARY, Floats, Ids, Tiny, tiny

TEXTS = [np.random.default_rng(n).integers(0, len(VOCABULARY), 30) for n in range(4)]


class Rows:
    """Rows of caches that the graph extends in place."""

    def __init__(self, folder: Path, rows: int, capacity: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self._session = ort.InferenceSession(
            folder / RAGGED_GRAPH, options, providers=["CPUExecutionProvider"]
        )
        m = read_manifest(folder)
        shape = (rows, m.kv_heads, capacity, m.head_size)
        rng = np.random.default_rng(0)  # what lies there before must not matter
        self.caches = {
            f"{number}.{side}": rng.standard_normal(shape).astype(np.float32)
            for number in range(m.layers)
            for side in ("key", "value")
        }
        self.lengths = np.zeros(rows, int)

    def run(
        self,
        new: Sequence[Ids],
        wanted: Ids | None = None,
        *,
        least: int = 2,
        more: int = 0,
    ) -> tuple[Floats, Floats]:
        """Append ``new`` tokens to each row, none for an idle one; logits [wanted, vocabulary] and
        what they are made of. ``least`` is the fewest places of a row that is not idle; ``more``
        are further ones that no row uses.
        """
        counts = np.array([len(tokens) for tokens in new])
        used = np.where(counts > 0, np.maximum(counts, least), 0)
        after = np.where(counts > 0, self.lengths + used, self.lengths)
        span = min(int(used.max()) + more, int(after.max()))
        place, first = np.arange(span), np.cumsum(counts) - counts
        last = np.maximum(counts - 1, 0)[:, None]
        tokens = np.minimum(first[:, None] + np.minimum(place, last), counts.sum() - 1)
        inputs = {
            "input_ids": np.concatenate(new).astype(np.int64),
            "row_tokens": np.stack([np.zeros_like(tokens), tokens], -1),
            "token_places": np.argwhere(place < counts[:, None])[None],
            "query_seqlens": used.astype(np.int32),
            "seqlens_k": np.maximum(after - 1, 0).astype(np.int32),
            "total_sequence_length": np.array(after.max(), np.int32),
            "wanted": np.arange(counts.sum()) if wanted is None else wanted,
        }
        bound = self._session.io_binding()
        for name, value in inputs.items():
            bound.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, cache in self.caches.items():
            where = ("cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            bound.bind_input(f"past_key_values.{name}", *where)
            bound.bind_output(f"present.{name}", *where)
        bound.bind_output("logits", "cpu")
        bound.bind_output("hidden", "cpu")
        self._session.run_with_iobinding(bound)
        self.lengths += counts
        logits, hidden = (value.numpy()[0] for value in bound.get_outputs()[-2:])
        return logits, hidden

    def row(self, number: int) -> Floats:
        """All that is kept of a row."""
        kept = [cache[number, :, : self.lengths[number]] for cache in self.caches.values()]
        return np.stack(kept)


def imported(model: Tiny, folder: Path) -> Path:
    path = model.write(folder / "tiny.gguf")
    return import_gguf(path, ModelLibrary(folder / "models"), "tiny", silent)


def read_alone(folder: Path, text: Ids, piece: int) -> tuple[Floats, Floats]:
    """A text's logits and caches, read in pieces with nothing beside it."""
    rows = Rows(folder, 1, len(text) + 1)
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    logits = np.concatenate([rows.run([part])[0] for part in pieces])
    return logits, rows.row(0)


def check_splits(folder: Path, texts: Sequence[Ids], seed: int, most: int) -> None:
    """Texts side by side, in pieces of any size up to ``most``, with pauses."""
    expected = [read_alone(folder, text, 16) for text in texts]
    rng = np.random.default_rng(seed)
    # One row is never used; and each must have room for as many places as the widest of a run.
    rows = Rows(folder, len(texts) + 1, max(map(len, texts)) + most + 2)
    found: list[list[Floats]] = [[] for _ in texts]
    while any(length < len(text) for length, text in zip(rows.lengths, texts, strict=False)):
        counts = rng.integers(0, most + 1, len(texts)) * rng.integers(0, 2, len(texts))
        if rng.integers(0, 3) == 0:
            counts = np.minimum(counts, 1)
        new = [
            text[length : length + count]
            for text, length, count in zip(texts, rows.lengths, counts, strict=False)
        ]
        total = sum(map(len, new))
        if not total:
            continue
        order = rng.permutation(total)
        logits, _ = rows.run([*new, texts[0][:0]], order, more=int(rng.integers(0, 3)))
        in_line = np.empty_like(logits)
        in_line[order] = logits
        for kept, part in zip(
            found, np.split(in_line, np.cumsum([len(part) for part in new])[:-1]), strict=True
        ):
            kept.append(part)
    for number, (logits, cache) in enumerate(expected):
        np.testing.assert_array_equal(np.concatenate(found[number]), logits)
        np.testing.assert_array_equal(rows.row(number), cache)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0", "Q5_1"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_text_is_the_same_bits_in_any_pieces_and_company(
    tmp_path: Path, preset: str, kind: str
) -> None:
    folder = imported(tiny(preset, kind), tmp_path)
    for seed in range(3):
        check_splits(folder, TEXTS, seed, most=9)


def test_the_default_model_too(smollm2: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 49000, count) for count in (150, 40, 290)]
    check_splits(smollm2, texts, 1, most=40)


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_with_gaps_compute_the_definition(tmp_path: Path, preset: str) -> None:
    """Whatever the bits are: the reference knows nothing of rows."""
    model = tiny(preset, "Q8_0")
    folder = imported(model, tmp_path)
    rows = Rows(folder, 3, 31)
    found = [rows.run([TEXTS[0][at : at + 1], TEXTS[1][:0], TEXTS[2][at : at + 1]])[0]
             for at in range(30)]  # fmt: skip
    for side, number in enumerate((0, 2)):
        expected = model.logits(TEXTS[number])
        off = np.stack([logits[side] for logits in found]) - expected
        assert np.sqrt(np.mean(off**2)) < 0.08 * expected.std()
    assert rows.lengths.tolist() == [30, 0, 30]


def test_a_context_can_be_filled_to_its_last_token(tmp_path: Path) -> None:
    folder = imported(tiny("qwen3", "Q4_0", context=64), tmp_path)
    text = np.random.default_rng(9).integers(0, len(VOCABULARY), 64)
    whole, cache = read_alone(folder, text, 64)
    rows = Rows(folder, 2, 64 + 30)
    for at in range(0, 60, 30):
        rows.run([text[at : at + 30], text[:0]])
    last = [rows.run([text[at : at + 1], text[:0]])[0] for at in range(60, 64)]
    np.testing.assert_array_equal(np.concatenate(last), whole[60:])
    rows.run([text[:0], text[:30]])  # a full row is idle beside one that reads
    np.testing.assert_array_equal(rows.row(0), cache)


def test_nothing_is_written_behind_the_places_in_use(tmp_path: Path) -> None:
    rows = Rows(imported(tiny("gemma3", "Q4_K"), tmp_path), 3, 40)
    rows.run([TEXTS[0][:10], TEXTS[1][:5], TEXTS[2][:0]])
    before = {name: cache.copy() for name, cache in rows.caches.items()}
    rows.run([TEXTS[0][10:13], TEXTS[1][5:12], TEXTS[2][:0]])
    for name, cache in rows.caches.items():
        changed = (cache != before[name]).any(axis=(1, 3))
        assert [np.flatnonzero(row).tolist() for row in changed] == [
            [10, 11, 12], [5, 6, 7, 8, 9, 10, 11], []
        ]  # fmt: skip


def test_hidden_is_what_the_head_makes_logits_of(tmp_path: Path) -> None:
    model = tiny("llama3", "F16")
    logits, hidden = Rows(imported(model, tmp_path), 1, 31).run([TEXTS[0]])
    expected = hidden @ model.values["output.weight"].T
    assert np.abs(logits - expected).max() < 0.05 * expected.std()


def test_the_scorer_gives_the_same(tmp_path: Path) -> None:
    folder = imported(tiny("gemma3", "Q4_K"), tmp_path)
    rows = Rows(folder, 1, 31)
    scorer = Scorer(folder / RAGGED_GRAPH, read_manifest(folder))
    (_, logits), = scorer.logits(TEXTS[0])  # fmt: skip
    np.testing.assert_array_equal(rows.run([TEXTS[0]])[0], logits)
