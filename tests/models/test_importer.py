"""The import: weights as promised, right logits, one clear error for everything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgemoa.errors import DiskFullError, HashMismatchError, ModelInvalidError, UserError
from edgemoa.models.blocks import CLOSE_ENOUGH, FITTED, FORMATS
from edgemoa.models.gguf import GgufFile
from edgemoa.models.importer import SMALL_BYTES, convert, import_gguf, written_bytes
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.perplexity import Scorer
from edgemoa.models.progress import silent
from edgemoa.text.files import RAGGED_GRAPH

from .tiny import PRESETS, VOCABULARY, Floats, Tiny, tiny

IDS = np.random.default_rng(1).integers(0, len(VOCABULARY), 50)


def imported(model: Tiny, folder: Path, **changes: Any) -> Path:
    path = model.write(folder / "tiny.gguf", **changes)
    return import_gguf(path, ModelLibrary(folder / "models"), "tiny", silent)


def logits(folder: Path, ids: np.ndarray = IDS) -> Floats:
    """Of every position, float32 [tokens, vocabulary]."""
    return np.concatenate([part for _, part in scorer(folder).logits(ids)])


def scorer(folder: Path) -> Scorer:
    return Scorer(folder / RAGGED_GRAPH, read_manifest(folder))


def last_logits(folder: Path, ids: np.ndarray) -> Floats:
    """By the graph for onnxruntime-genai, [batch, vocabulary] of ids [batch, tokens]."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    inputs: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs()[2:]:
        shape = (len(ids), value.shape[1], 0, value.shape[3])
        inputs[value.name] = np.zeros(shape, np.float32)
    return np.asarray(session.run(["logits"], inputs)[0][:, 0])


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the graph by name, read by the onnx package."""
    model = onnx.load(folder / "model.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


# Short texts, so that phi3's two sets of rope factors are not mixed.
LENGTHS = {"phi3-long": 32, "phi4": 32}


def noise(found: Floats, expected: Floats) -> float:
    """Root mean square of the difference, in standard deviations of what was expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_the_graph_of_every_architecture_computes_the_definition(
    tmp_path: Path, preset: str, kind: str
) -> None:
    model = tiny(preset, kind)
    manifest = convert(model.write(tmp_path / "tiny.gguf"), tmp_path, "t", silent, reference=True)
    ids = IDS[: LENGTHS.get(preset)]
    found = [part for _, part in Scorer(tmp_path / RAGGED_GRAPH, manifest).logits(ids)]
    assert noise(np.concatenate(found), model.logits(ids)) < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_blocks_differ_by_the_rounding_of_activations_only(
    tmp_path: Path, preset: str, kind: str
) -> None:
    model = tiny(preset, kind)
    ids = IDS[: LENGTHS.get(preset)]
    found = logits(imported(model, tmp_path), ids=ids)
    # Seven random layers with normed heads carry a difference further than two.
    assert noise(found, model.logits(ids)) < (0.08 if preset.startswith("gemma3") else 0.05)


@pytest.mark.parametrize(
    "model",
    [
        *(Tiny(kind) for kind in FORMATS if not kind.endswith("K")),
        tiny("llama", "Q5_K"),
        Tiny("Q4_1", tied=False),
        Tiny("Q4_1", {"token_embd": "Q8_0"}),
        Tiny("Q4_1", {"attn_v": "Q8_0", "ffn_up": "F16", "token_embd": "F16"}),
        Tiny("Q8_0", heads=2, kv_heads=1, base=500000.0, epsilon=1e-6),
        # As llama.cpp mixes them in Q4_K_M: values and some others in a wider type.
        tiny("llama", "Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}),
        tiny("qwen2", "Q5_0", {"attn_q": "Q4_1"}),
        tiny("phi3", "Q5_1", {"ffn_down": "Q8_0"}),
    ],
    ids=lambda model: f"{model.architecture}-{model.kind}-{len(model.kinds)}",
)
def test_every_type_and_mixtures_of_them(tmp_path: Path, model: Tiny) -> None:
    assert noise(logits(imported(model, tmp_path)), model.logits(IDS)) < 0.04


def test_rows_that_do_not_divide_into_blocks_stay_floats(tmp_path: Path) -> None:
    model = Tiny("F16", feed_forward=72)
    folder = imported(model, tmp_path)
    assert {"layer0.down.w", "layer0.gate_up.q"} <= stored(folder).keys()
    assert noise(logits(folder), model.logits(IDS)) < 0.04


def test_greedy_continuations_are_those_of_the_definition(tmp_path: Path) -> None:
    for preset in PRESETS:
        model = tiny(preset)
        folder = tmp_path / preset
        folder.mkdir()
        convert(model.write(folder / "t.gguf"), folder, "t", silent, reference=True)
        text = IDS[:16].tolist()
        for _ in range(8):
            text.append(int(last_logits(folder, np.array([text]))[0].argmax()))
        assert text[16:] == model.continuation(IDS[:16], 8), preset


@pytest.mark.parametrize("model", [Tiny("Q4_1"), tiny("gemma3", "Q4_K")])
def test_both_graphs_compute_the_same(tmp_path: Path, model: Tiny) -> None:
    folder = imported(model, tmp_path)
    sequences = IDS[:48].reshape(2, 24)
    expected = [logits(folder, sequence)[-1] for sequence in sequences]
    np.testing.assert_array_equal(last_logits(folder, sequences), expected)


WITH_MINIMA = [kind for kind, form in FORMATS.items() if form.centre]


@pytest.mark.parametrize("kind", [kind for kind, form in FORMATS.items() if form is not FITTED])
def test_weights_read_back_from_onnx_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    """To the bit without minima, else within what is promised of the mean of a block."""
    model = tiny("llama", kind)
    tensors = stored(imported(model, tmp_path))
    wide = 4 if kind.startswith("Q4") else 8

    def nibbles(bytes_: np.ndarray) -> np.ndarray:
        return np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*bytes_.shape[:-1], -1)

    def weights(name: str, columns: int) -> tuple[Floats, Floats]:
        """Weights, [rows, columns], and the scales of their blocks."""
        q, d = tensors[f"{name}.q"], tensors[f"{name}.d"].astype(np.float32)
        z = tensors.get(f"{name}.z", np.empty(0, np.uint8))
        if wide == 4:
            q, z = nibbles(q), nibbles(z)
        zeros = z[:, : d.shape[1]] if z.size else np.full(d.shape, 1 << (wide - 1))
        parts = d[..., None] * (q.astype(np.float32) - zeros[..., None])
        own = columns // 32
        added = parts[:, own:].reshape(len(d), -1, -(-own // 32) * 32)  # by digits
        rest = added.sum(1)[:, :own] / 32
        return (parts[:, :own] + rest[..., None]).reshape(len(d), -1), d[:, :own]

    def check(name: str, *parts: Floats) -> None:
        expected = np.concatenate(parts)
        found, scale = weights(name, expected.shape[1])
        if kind not in WITH_MINIMA:
            np.testing.assert_array_equal(found, expected)
            return
        off = (found - expected).reshape(*scale.shape, 32)
        steps = np.sqrt(np.mean(np.square(scale)))
        assert np.sqrt(np.mean(off.mean(-1) ** 2)) < steps * CLOSE_ENOUGH
        # Within a block only the rounding of the scale shows, for K types.
        around = np.abs(off - off.mean(-1, keepdims=True)) / np.abs(scale).max()
        assert around.max() < (2**-6 if kind.endswith("K") else 1e-5)

    def halves(rows: Floats) -> Floats:
        """The order of rows that rope by halves needs, head by head."""
        heads = [rows[i : i + model.head_size] for i in range(0, len(rows), model.head_size)]
        return np.concatenate([part for head in heads for part in (head[0::2], head[1::2])])

    v = model.values
    check("embedding", v["token_embd.weight"])
    for n in range(model.layers):
        b, to = f"blk.{n}.", f"layer{n}."
        q, k = (halves(v[f"{b}attn_{part}.weight"]) for part in "qk")
        check(f"{to}qkv", q, k, v[f"{b}attn_v.weight"])
        check(f"{to}attention_out", v[f"{b}attn_output.weight"])
        check(f"{to}gate_up", v[f"{b}ffn_gate.weight"], v[f"{b}ffn_up.weight"])
        check(f"{to}down", v[f"{b}ffn_down.weight"])


@pytest.mark.parametrize("kind", WITH_MINIMA)
def test_rows_are_gathered_as_they_are_in_the_file(tmp_path: Path, kind: str) -> None:
    """An embedding with columns behind its own (tied), and one without."""
    for tied in (True, False):
        model = tiny("llama", kind, tied=tied)
        place = tmp_path / str(tied)
        place.mkdir()
        folder = imported(model, place)
        graph = onnx.load(folder / RAGGED_GRAPH)
        graph.graph.output.append(
            onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, None)
        )
        session = ort.InferenceSession(graph.SerializeToString())
        size = model.head_size
        places = np.stack([np.zeros(50, int), np.arange(50)], -1)[None]
        inputs = {
            value.name: np.zeros((1, model.kv_heads, 0, size), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past")
        } | {
            "input_ids": IDS, "row_tokens": places, "token_places": places,
            "query_seqlens": np.array([50], np.int32), "seqlens_k": np.array([49], np.int32),
            "total_sequence_length": np.array(50, np.int32), "wanted": np.array([0]),
        }  # fmt: skip
        (rows,) = session.run(["embedding"], inputs)
        expected = model.values["token_embd.weight"][IDS]
        # The scale and what is added are float16.
        np.testing.assert_allclose(rows[0], expected, atol=np.abs(expected).max() * 2**-10)
        assert ("embedding.z" in stored(folder)) == tied


@pytest.mark.parametrize(
    "model",
    [
        Tiny("Q4_1", far=0.5),
        Tiny("Q4_1", far=3.0),
        tiny("qwen2", "Q4_1", far=0.5),
        Tiny("Q4_1", hidden=1056, heads=33, kv_heads=3, layers=1, far=0.5),
    ],
    ids=["one", "far", "bias", "wide"],
)
def test_blocks_far_from_zero_have_more_columns(tmp_path: Path, model: Tiny) -> None:
    folder = imported(model, tmp_path)
    tensors = stored(folder)
    own = model.hidden // 32
    assert tensors["layer0.gate_up.q"].shape[1] > own + -(-own // 32)
    assert noise(logits(folder), model.logits(IDS)) < 0.06


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    folder = imported(Tiny("Q4_1", {"token_embd": "Q8_0"}), tmp_path)
    manifest = read_manifest(folder)
    assert manifest.architecture == "llama"
    assert manifest.quantization == "Q4_1"
    assert manifest.has_chat_template
    assert sum(manifest.weights.values()) == manifest.parameters
    assert manifest.weights.keys() == {"Q4_1", "Q8_0", "F32"}
    assert (manifest.layers, manifest.kv_heads, manifest.head_size) == (2, 2, 16)
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert manifest.eos_token_ids == (2, 0, 3)
    assert manifest.text_start_token_id == 0
    names = {path.name: path.stat().st_size for path in folder.iterdir()}
    del names["model.json"]
    assert {file.name: file.size_bytes for file in manifest.files} == names


def test_a_context_beyond_what_any_board_uses_is_cut(tmp_path: Path) -> None:
    manifest = read_manifest(imported(tiny("llama3", context=131072), tmp_path))
    assert manifest.context_length == 32768


def test_tokens_that_few_need_may_be_out_of_the_vocabulary(tmp_path: Path) -> None:
    changes = {f"tokenizer__ggml__{key}_token_id": 2**32 - 1 for key in ("padding", "fim_pad")}
    manifest = read_manifest(imported(Tiny(), tmp_path, **changes))
    assert manifest.eos_token_ids == (2, 0, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_was_foreseen(tmp_path: Path, kind: str) -> None:
    model = tiny("llama3", kind, hidden=1024, heads=32, feed_forward=1024, layers=1)
    with GgufFile(model.write(tmp_path / "tiny.gguf")) as gguf:
        most = written_bytes(gguf) - SMALL_BYTES
    folder = import_gguf(tmp_path / "tiny.gguf", ModelLibrary(tmp_path / "models"), "t", silent)
    weights = (folder / "weights.bin").stat().st_size
    # Alignment is in what is kept for small things. Four digits are seldom used.
    assert weights - 64 * len(stored(folder)) <= most <= weights * 1.25


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match="no regular file"):
        import_gguf(tmp_path / "tiny.gguf", ModelLibrary(tmp_path / "models"), "tiny", silent)


def test_the_same_file_gives_the_same_model(tmp_path: Path) -> None:
    source = Tiny("Q4_1").write(tmp_path / "tiny.gguf")
    ids = set()
    for name in ("one", "two"):
        folder = import_gguf(source, ModelLibrary(tmp_path / "models"), name, silent)
        ids.add(read_manifest(folder).model_id)
    assert len(ids) == 1


# --- what is refused


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (Tiny(architecture="rwkv"), {}, "'rwkv' is not supported; supported: llama, qwen2, qwen3"),
        (Tiny(kinds={"attn_norm": "Q8_0"}), {}, "of the type Q8_0, which is not supported"),
        (Tiny(), {"llama__rope__scaling__type": "yarn"}, "rope scaling"),
        (tiny("llama3"), {"tensors": {"rope_freqs.weight": (9,)}}, "rope_freqs.weight' is not"),
        (Tiny(), {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0},
         "rope.scaling.factor is out of range"),
        (tiny("gemma3"), {"gemma3__final_logit_softcapping": 30.0}, "capped logits"),
        (tiny("qwen3", key_length=36), {}, "heads of 36 dimensions"),
        (tiny("phi3"), {"phi3__rope__dimension_count": 17}, "17 rotary dimensions"),
        (tiny("qwen2"), {"tensors": {"blk.0.attn_k.bias": None}}, "'blk.0.attn_k.bias' is missing"),
        (Tiny(), {"llama__expert_count": 8}, "mixture of experts"),
        (Tiny(), {"tensors": {"blk.0.attn_q.bias": (64,)}}, r"not part.*'blk.0.attn_q.bias'"),
        (Tiny(), {"tensors": {"blk.1.ffn_up.weight": None}}, "'blk.1.ffn_up.weight' is missing"),
        (Tiny(), {"tensors": {"blk.0.ffn_up.weight": (64, 96)}}, r"\[64, 96\], not \[96, 64\]"),
        (Tiny(), {"tensors": {"token_embd.weight": None}}, "'token_embd.weight' is missing"),
        (Tiny(), {"llama__block_count": None}, "llama.block_count is not an integer"),
        (Tiny(), {"llama__block_count": 0}, "llama.block_count is 0"),
        (Tiny(), {"llama__block_count": 100000}, "llama.block_count is not an integer from"),
        (Tiny(), {"llama__attention__head_count_kv": 3}, "4 heads of 16 over 3"),
        (Tiny(), {"llama__attention__head_count": 100}, "llama.attention.key_length"),
        (Tiny(), {"llama__attention__layer_norm_rms_epsilon": float("nan")}, "out of range"),
        (Tiny(), {"llama__rope__freq_base": 0.0}, "out of range"),
        (Tiny(), {"llama__rope__dimension_count": 8}, "partly rotary"),
        (Tiny(), {"tokenizer__ggml__model": "wordpiece"}, "tokenizers of the kind 'wordpiece'"),
        (Tiny(), {"tokenizer__ggml__pre": "chameleon"}, "pre-tokenizer 'chameleon'.*smollm"),
        (Tiny(), {"tokenizer__ggml__tokens": ["a", "b"]}, "do not fit"),
        (Tiny(), {"tokenizer__ggml__merges": ["abc"]}, "not a pair"),
        (Tiny(), {"tokenizer__ggml__eos_token_id": 999999}, "eos_token_id is not an integer"),
        (
            Tiny(),
            {"tokenizer__ggml__tokens": ["a", "b", "ab", *(f"t{n}" for n in range(397))],
             "tokenizer__ggml__token_type": [1] * 400, "tokenizer__ggml__merges": ["a b"]},
            "more tokens than",
        ),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_and_leaves_nothing(
    tmp_path: Path, model: Tiny, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelInvalidError, match=message):
        imported(model, tmp_path, **changes)
    assert not ModelLibrary(tmp_path / "models").models()
    assert [p.name for p in (tmp_path / "models" / ".staging").iterdir()] == []


def test_a_truncated_file(tmp_path: Path) -> None:
    source = Tiny("Q4_1").write(tmp_path / "tiny.gguf")
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ModelInvalidError, match="truncated") as caught:
        import_gguf(source, ModelLibrary(tmp_path / "models"), "tiny", silent)
    assert caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.gguf cannot be read: No such file"):
        import_gguf(tmp_path / "nothing.gguf", ModelLibrary(tmp_path), "tiny", silent)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    imported(Tiny(), tmp_path)
    with pytest.raises(UserError, match="already") as caught:
        imported(Tiny(), tmp_path)
    assert "edgemoa model rm tiny" in caught.value.hint


def test_a_wrong_hash(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "tiny.gguf")
    with pytest.raises(HashMismatchError, match="has the SHA-256"):
        convert(source, tmp_path, "tiny", silent, sha256="0" * 64)


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from edgemoa.errors import EdgemoaError
from edgemoa.models.blocks import FITTED, FORMATS
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary
source, library, what = Path(sys.argv[1]), ModelLibrary(Path(sys.argv[2])), sys.argv[3]
def progress(stage, done, total):
    if what == "kill" and stage == "import" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
if what == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    import_gguf(source, library, "tiny", progress)
except EdgemoaError as error:
    print(type(error).__name__, error, error.hint)
"""


def child(tmp_path: Path, what: str) -> subprocess.CompletedProcess[str]:
    source = Tiny("Q4_1", layers=6).write(tmp_path / "tiny.gguf")
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path / "models"), what],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_kill_in_the_middle_leaves_no_model_and_the_next_try_starts_clean(
    tmp_path: Path,
) -> None:
    assert child(tmp_path, "kill").returncode == -signal.SIGKILL
    library = ModelLibrary(tmp_path / "models")
    assert not library.models()
    assert list((tmp_path / "models" / ".staging/tiny/model").iterdir())
    # Another model's import cleans up, too: nobody holds the lock of what is left.
    import_gguf(tmp_path / "tiny.gguf", library, "other", silent)
    assert not (tmp_path / "models" / ".staging/tiny").exists()
    import_gguf(tmp_path / "tiny.gguf", library, "tiny", silent)
    assert sorted(library.models()) == ["other", "tiny"]
    library.verify("tiny", silent)


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    result = child(tmp_path, "full")
    assert result.stdout.startswith("DiskFullError no space was left")
    assert "--models" in result.stdout
    assert [p.name for p in (tmp_path / "models" / ".staging").iterdir()] == []


def test_a_disk_without_room_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=20 << 20)
    monkeypatch.setattr("edgemoa.models.library.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="has 21 MB free; this needs"):
        imported(Tiny(), tmp_path)
