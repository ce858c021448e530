"""The default model, as it was imported: nothing lost, and it says what it should."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgemoa.errors import ModelInvalidError, UserError
from edgemoa.models.perplexity import perplexity

# SHA-256 over the bytes of every tensor of the GGUF in the order of names, by the gguf package.
TENSORS_SHA256 = "8c036d21926f21e5a20b94c4a6b6b8d5649c272d2503759414e02f0d0a2aaa69"
GPL3 = Path("/usr/share/common-licenses/GPL-3")


def test_the_gguf_can_be_made_again_from_the_import_bit_for_bit(smollm2: Path) -> None:
    model = onnx.load(smollm2 / "model.onnx", load_external_data=False)
    where = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    weights = np.memmap(smollm2 / "weights.bin", np.uint8, "r")

    def read(name: str, width: int) -> np.ndarray:
        start, length = int(where[name]["offset"]), int(where[name]["length"])
        return weights[start : start + length].reshape(-1, width)

    def q4_1(name: str, columns: int) -> np.ndarray:
        """ggml's rows: per block d, m, and the weights i and i + 16 in byte i."""
        q = read(f"{name}.q", 16)
        u = np.stack([q & 15, q >> 4], -1).reshape(-1, 32)
        nibbles = u[:, :16] | (u[:, 16:] << 4)
        d, m = read(f"{name}.d", 2), read(f"{name}.m", 2)
        return np.concatenate([d, m, nibbles], -1).reshape(-1, columns // 32 * 20)

    def pairs(rows: np.ndarray) -> np.ndarray:
        """Rope's halves of each head of 64 rows back to neighbours."""
        return rows.reshape(-1, 2, 32, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

    head = np.concatenate([read("embedding.d", 2), read("embedding.q", 32) ^ 128], -1)
    tensors = {"token_embd": head, "output_norm": read("final_norm.gain", 4)}
    for n in range(30):
        qkv = q4_1(f"layer{n}.qkv", 576)
        gate_up = q4_1(f"layer{n}.gate_up", 576)
        tensors |= {
            f"blk.{n}.attn_q": pairs(qkv[:576]),
            f"blk.{n}.attn_k": pairs(qkv[576:768]),
            f"blk.{n}.attn_v": qkv[768:],
            f"blk.{n}.attn_output": q4_1(f"layer{n}.attention_out", 576),
            f"blk.{n}.ffn_gate": gate_up[:1536],
            f"blk.{n}.ffn_up": gate_up[1536:],
            f"blk.{n}.ffn_down": q4_1(f"layer{n}.down", 1536),
            f"blk.{n}.attn_norm": read(f"layer{n}.attention_norm.gain", 4),
            f"blk.{n}.ffn_norm": read(f"layer{n}.feed_forward_norm.gain", 4),
        }
    digest = hashlib.sha256()
    for name in sorted(f"{name}.weight" for name in tensors):
        digest.update(tensors[name.removesuffix(".weight")].tobytes())
    assert digest.hexdigest() == TENSORS_SHA256


def test_it_answers_as_before(smollm2: Path) -> None:
    """A golden completion, where no token was close to another (0.5 and more in logits)."""
    import onnxruntime_genai as og

    model = og.Model(str(smollm2))
    tokenizer = og.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": "What is 2+2?"}])
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 40, do_sample=False)
    generator: Any = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0)[len(prompt) :]
    assert tokenizer.decode(answer) == "The answer to this classic math problem is 4."
    assert len(answer) < 39  # it ended its turn by itself


@pytest.mark.skipif(not GPL3.is_file(), reason="the text is a part of Debian")
def test_perplexity_is_that_of_the_gguf_within_a_hundredth(smollm2: Path) -> None:
    # The file's own weights in float32 give 24.18 here (tools/bench-core measures both).
    result = perplexity(smollm2, GPL3.read_text("utf-8"), window=512, max_tokens=2048)
    assert (result.tokens, result.windows, result.predictions) == (2048, 4, 2044)
    assert result.perplexity < 24.18 * 1.01


def test_windows_know_nothing_of_each_other(smollm2: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    one = perplexity(smollm2, text, window=64, max_tokens=64)
    two = perplexity(smollm2, text, window=64, max_tokens=66)
    assert two.windows == 2
    assert two.predictions == one.predictions + 1


@pytest.mark.parametrize(("text", "window"), [("", 512), ("a", 512), ("a b c", 1), ("a b", 9999)])
def test_nothing_to_predict(smollm2: Path, text: str, window: int) -> None:
    with pytest.raises(UserError):
        perplexity(smollm2, text, window=window)


def test_a_folder_without_a_scoring_graph(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes((smollm2 / "model.json").read_bytes())
    with pytest.raises(ModelInvalidError, match=r"no score\.onnx"):
        perplexity(tmp_path, "a text")
