"""The yardstick itself: what other engines once computed for the same files, and that it is sharp.

``tools/prove-models --record tests/models/tiny_vectors.json`` asks those engines anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from . import k_quants
from .tiny import PRESETS, Tiny, tiny

VECTORS = json.loads(Path(__file__).with_name("tiny_vectors.json").read_text("utf-8"))
# llama.cpp takes gemma3's GELU from a table of 16-bit floats; all else is float32.
TABLE = {("llama.cpp", "gemma3"): 5e-3, ("llama.cpp", "gemma3-linear"): 5e-3}
IDS = np.array(VECTORS["ids"][:50])


def written(tmp_path: Path, name: str, *args: Any, **changes: Any) -> Tiny:
    model = tiny(name, *args, **changes)
    model.write(tmp_path / "tiny.gguf")
    return model


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_definition_gives_what_other_engines_gave(
    tmp_path: Path, name: str, engine: str
) -> None:
    model = written(tmp_path, name, **VECTORS["changes"].get(name, {}))
    if (engine, name) == ("llama.cpp", "phi3"):
        model.window = 0  # llama.cpp does not apply it
    ids = np.array(VECTORS["ids"][: VECTORS["counts"][name]])
    found = model.logits(ids)[np.ix_(VECTORS["positions"], VECTORS["tokens"])]
    tolerance = TABLE.get((engine, name), 2e-5)
    np.testing.assert_allclose(found, VECTORS[engine][name], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("llama", {"base": 1e6}),
        ("llama", {"epsilon": 0.1}),
        ("llama3", {"llama3_factor": 0.0}),
        ("llama-linear", {"linear": 1.0}),
        ("gemma3", {"window": 0}),
        ("gemma3", {"window": 13}),
        ("gemma3", {"window_base": 1e6}),
        ("gemma3", {"base": 1e4}),
        ("gemma3-linear", {"linear": 1.0}),
        ("phi3", {"window": 0}),
        ("phi3", {"window": 21}),
        ("phi3-long", {"original_context": 0}),
        ("phi3-long", {"original_context": 64}),
        ("phi4", {"rotary": 16, "original_context": 0}),
    ],
)
def test_every_feature_shows_in_the_logits(
    tmp_path: Path, name: str, without: dict[str, Any]
) -> None:
    model = written(tmp_path, name)
    expected = model.logits(IDS)
    for key, value in without.items():
        setattr(model, key, value)
    assert np.abs(model.logits(IDS) - expected).max() > 0.02


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "phi3-long"])
def test_every_tensor_shows_in_the_logits(tmp_path: Path, name: str) -> None:
    model = written(tmp_path, name)
    ids = VECTORS["ids"]
    both = [np.array(ids[:30]), np.array(ids[:50])]  # with short rope factors and with long ones
    expected = [model.logits(text) for text in both]
    for tensor, values in model.values.items():
        model.values[tensor] = values * np.linspace(1, 1.5, values.shape[0]).reshape(
            -1, *[1] * (values.ndim - 1)
        ).astype(np.float32)
        far = max(
            np.abs(model.logits(text) - was).max() for text, was in zip(both, expected, strict=True)
        )
        # A bias that all keys of a head share shifts all scores alike, but for its rotation.
        assert far > 0.01, tensor
        model.values[tensor] = values


def test_a_continuation_is_the_best_token_again_and_again(tmp_path: Path) -> None:
    model = written(tmp_path, "qwen3")
    prompt = IDS[:10]
    found = model.continuation(prompt, 6)
    best = model.logits(np.array([*prompt, *found]))[9:-1].argmax(-1)
    assert best.tolist() == found


@pytest.mark.parametrize("kind", k_quants.KINDS)
def test_k_blocks_stand_for_what_they_were_made_from(kind: str) -> None:
    values = np.random.default_rng(3).standard_normal((8, 512)).astype(np.float32)
    values[3] = 0
    values[4, :256] = 3
    values[5] = np.abs(values[5])
    raw = k_quants.quantize(values, kind)
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    # Half a step of each block's range, and what rounding the scales adds.
    steps = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[kind]
    spread = 2 * np.abs(values).max(-1, keepdims=True)
    assert (np.abs(found - values) <= 0.75 * spread / steps).all()
    assert not found[3].any()
    assert np.abs(found - values).max() > 0


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", *k_quants.KINDS])
@pytest.mark.parametrize("name", PRESETS)
def test_a_file_of_any_type_is_read_back_by_the_gguf_package(
    tmp_path: Path, name: str, kind: str
) -> None:
    model = written(tmp_path, name, kind)
    read = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert {t.tensor_type.name for t in read.tensors} == {"F32", kind}
    for tensor in read.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values.reshape(-1), model.values[tensor.name].reshape(-1))
