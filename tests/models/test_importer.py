"""The import: exact weights, right logits, one clear error for everything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgemoa.errors import DiskFullError, HashMismatchError, ModelInvalidError, UserError
from edgemoa.models.blocks import FITTED, FORMATS
from edgemoa.models.importer import convert, import_gguf
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.perplexity import Scorer
from edgemoa.models.progress import silent

from .tiny import PRESETS, VOCABULARY, Floats, Tiny, tiny

IDS = np.random.default_rng(1).integers(0, len(VOCABULARY), 50)


def imported(model: Tiny, folder: Path, **changes: Any) -> Path:
    path = model.write(folder / "tiny.gguf", **changes)
    return import_gguf(path, ModelLibrary(folder / "models"), "tiny", silent)


def logits(folder: Path, graph: str = "score.onnx", ids: np.ndarray = IDS) -> Floats:
    parts = list(Scorer(folder / graph, read_manifest(folder)).logits(ids))
    return np.concatenate([part for _, part in parts])


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
    found = [part for _, part in Scorer(tmp_path / "score.onnx", manifest).logits(ids)]
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
        manifest = convert(model.write(folder / "t.gguf"), folder, "t", silent, reference=True)
        scorer, text = Scorer(folder / "model.onnx", manifest), IDS[:16].tolist()
        for _ in range(8):
            *_, (_, last) = scorer.logits(np.array(text))
            text.append(int(last[-1].argmax()))
        assert text[16:] == model.continuation(IDS[:16], 8), preset


def test_the_generation_graph_gives_the_last_position(tmp_path: Path) -> None:
    folder = imported(Tiny("Q4_1"), tmp_path)
    last = logits(folder, "model.onnx")
    assert last.shape == (1, len(VOCABULARY))
    np.testing.assert_array_equal(last[0], logits(folder)[-1])


def test_sequences_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    import onnxruntime as ort

    folder = imported(Tiny("F32"), tmp_path)
    session = ort.InferenceSession(folder / "score.onnx", providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((2, 2, 0, 16), np.float32) for i in session.get_inputs()[2:]}
    ids = IDS[:24].reshape(2, 12)
    batch = session.run(
        ["logits"], {"input_ids": ids, "attention_mask": np.ones((2, 12), np.int64), **past}
    )[0]
    for row, sequence in zip(batch, ids, strict=True):
        np.testing.assert_allclose(row, logits(folder, ids=sequence), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, form in FORMATS.items() if form is not FITTED])
def test_weights_read_back_from_onnx_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    model = tiny("llama", kind)
    tensors = stored(imported(model, tmp_path))

    def weights(name: str) -> Floats:
        q, d = tensors[f"{name}.q"], tensors[f"{name}.d"].astype(np.float32)
        m = tensors[f"{name}.m"].astype(np.float32) if f"{name}.m" in tensors else 0 * d
        if kind in ("Q4_K", "Q5_K"):
            d = np.repeat(d, 8, -1) * tensors[f"{name}.ds"]
            m = -np.repeat(m, 8, -1) * tensors[f"{name}.ms"]
        zero = {"Q4_0": 8, "Q5_0": 128, "Q8_0": 128, "Q5_1": 112, "Q5_K": 112}.get(kind, 0)
        if kind.startswith("Q4"):
            q = np.stack([q & 15, q >> 4], -1).reshape(*q.shape[:2], 32)
        return (d[..., None] * (q.astype(np.float32) - zero) + m[..., None]).reshape(len(q), -1)

    def halves(rows: Floats) -> Floats:
        """The order of rows that rope by halves needs, head by head."""
        heads = [rows[i : i + model.head_size] for i in range(0, len(rows), model.head_size)]
        return np.concatenate([part for head in heads for part in (head[0::2], head[1::2])])

    v = model.values
    np.testing.assert_array_equal(weights("embedding"), v["token_embd.weight"])
    for n in range(model.layers):
        b, to = f"blk.{n}.", f"layer{n}."
        q, k = (halves(v[f"{b}attn_{part}.weight"]) for part in "qk")
        gate_up = [v[f"{b}ffn_gate.weight"], v[f"{b}ffn_up.weight"]]
        np.testing.assert_array_equal(
            weights(f"{to}qkv"), np.concatenate([q, k, v[f"{b}attn_v.weight"]])
        )
        np.testing.assert_array_equal(weights(f"{to}attention_out"), v[f"{b}attn_output.weight"])
        np.testing.assert_array_equal(weights(f"{to}gate_up"), np.concatenate(gate_up))
        np.testing.assert_array_equal(weights(f"{to}down"), v[f"{b}ffn_down.weight"])


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
