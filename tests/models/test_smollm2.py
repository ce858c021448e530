"""The default model, as it was imported: what is promised is kept, and it says what it should."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgemoa.errors import ModelInvalidError, UserError
from edgemoa.models.perplexity import perplexity

# By the gguf package: SHA-256 over the bytes of every tensor of the GGUF in the order of names,
# where blocks have no minimum; and some minima of each tensor, [row, block, minimum].
RECORDED = json.loads(Path(__file__).with_name("smollm2_blocks.json").read_text("utf-8"))
GPL3 = Path("/usr/share/common-licenses/GPL-3")


class Stored:
    """The tensors in the weights file, as bytes."""

    def __init__(self, folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        self._where = {
            tensor.name: (tensor.dims, {entry.key: entry.value for entry in tensor.external_data})
            for tensor in model.graph.initializer
            if tensor.external_data
        }
        self._weights = np.memmap(folder / "weights.bin", np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        """uint8 [rows, all the bytes of a row]."""
        dims, entry = self._where[name]
        start, length = int(entry["offset"]), int(entry["length"])
        return self._weights[start : start + length].reshape(dims[0] if len(dims) > 1 else 1, -1)

    def q4_1(self, name: str, columns: int) -> np.ndarray:
        """ggml's rows, but for minima: per block d, and the weights i and i + 16 in byte i."""
        own = columns // 32
        q = self.read(f"{name}.q")
        q = q.reshape(len(q), -1, 16)[:, :own]
        u = np.stack([q & 15, q >> 4], -1).reshape(len(q), own, 32)
        nibbles = u[..., :16] | (u[..., 16:] << 4)
        d = self.read(f"{name}.d").reshape(len(q), -1, 2)[:, :own]
        return np.concatenate([d, nibbles], -1).reshape(len(q), -1)

    def minima(self, name: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Minima as zero points and columns have them, and scales, [rows, blocks]."""
        own = columns // 32
        d = self.read(f"{name}.d").view(np.float16).astype(np.float32)
        z, q = (self.read(f"{name}.{end}") for end in "zq")
        zeros, codes = (np.stack([part & 15, part >> 4], -1).reshape(len(d), -1) for part in (z, q))
        added = codes[:, columns:].reshape(len(d), -1, 32) - np.float32(8)
        rest = (added * d[:, own:, None]).reshape(len(d), -1, -(-own // 32) * 32).sum(1)
        return rest[:, :own] / 32 - d[:, :own] * zeros[:, :own], d[:, :own]


def pairs(rows: np.ndarray) -> np.ndarray:
    """Rope's halves of each head of 64 rows back to neighbours."""
    return rows.reshape(-1, 2, 32, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def by_tensor(number: int, rows: Callable[[str, int], np.ndarray]) -> dict[str, np.ndarray]:
    """What ``rows`` says of the matrices of a layer, by the names of the file."""
    b, layer = f"blk.{number}.", f"layer{number}."
    qkv, gate_up = rows(f"{layer}qkv", 576), rows(f"{layer}gate_up", 576)
    return {
        f"{b}attn_q": pairs(qkv[:576]),
        f"{b}attn_k": pairs(qkv[576:768]),
        f"{b}attn_v": qkv[768:],
        f"{b}attn_output": rows(f"{layer}attention_out", 576),
        f"{b}ffn_gate": gate_up[:1536],
        f"{b}ffn_up": gate_up[1536:],
        f"{b}ffn_down": rows(f"{layer}down", 1536),
    }


def test_codes_and_scales_are_those_of_the_gguf_bit_for_bit(smollm2: Path) -> None:
    stored = Stored(smollm2)
    d, q = (stored.read(f"embedding.{end}") for end in "dq")
    head = np.concatenate([d.reshape(-1, 18, 2), q.reshape(-1, 18, 32) ^ 128], -1)
    tensors = {"token_embd": head, "output_norm": stored.read("final_norm.gain")}
    for n in range(30):
        tensors |= by_tensor(n, stored.q4_1)
        tensors[f"blk.{n}.attn_norm"] = stored.read(f"layer{n}.attention_norm.gain")
        tensors[f"blk.{n}.ffn_norm"] = stored.read(f"layer{n}.feed_forward_norm.gain")
    digest = hashlib.sha256()
    for name in sorted(f"{name}.weight" for name in tensors):
        digest.update(tensors[name.removesuffix(".weight")].tobytes())
    assert digest.hexdigest() == RECORDED["sha256"]


def test_minima_are_those_of_the_gguf_within_a_thirtieth_of_a_step(smollm2: Path) -> None:
    """Root mean square; the largest of these is off by a tenth."""
    stored = Stored(smollm2)
    off = []
    for n in range(30):
        minima = by_tensor(n, lambda name, columns: stored.minima(name, columns)[0])
        scales = by_tensor(n, lambda name, columns: stored.minima(name, columns)[1])
        for name, found in minima.items():
            for row, block, expected in RECORDED["minima"][name]:
                off.append((found[row, block] - expected) / scales[name][row, block])
    assert len(off) == 210 * 6
    assert np.sqrt(np.mean(np.square(off))) < 1 / 30
    assert np.abs(off).max() < 0.1


def test_it_answers_as_before(smollm2: Path) -> None:
    """A golden completion, where no token was close to another (0.5 and more in logits)."""
    import onnxruntime_genai as og

    model = og.Model(str(smollm2))
    tokenizer = og.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": "How many days are in a week?"}])
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 40, do_sample=False)
    generator: Any = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0)[len(prompt) :]
    assert tokenizer.decode(answer) == "A week is approximately 7 days."
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


def test_a_folder_without_the_graph_of_packed_tokens(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes((smollm2 / "model.json").read_bytes())
    with pytest.raises(ModelInvalidError, match=r"no ragged\.onnx"):
        perplexity(tmp_path, "a text")
