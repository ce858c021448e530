"""Blocks mean after the move what they meant before, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from edgemoa.models.blocks import FORMATS, dequantize, split

Type = gguf.GGMLQuantizationType


def rows_of(kind: str) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal((48, 128)).astype(np.float32)
    raw = gguf.quants.quantize(values, Type[kind])
    rows: np.ndarray = raw.view(np.uint8).reshape(48, -1)
    return rows


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_values_are_those_of_the_gguf_package(kind: str) -> None:
    rows = rows_of(kind)
    own = rows.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    np.testing.assert_array_equal(dequantize(kind, rows), gguf.quants.dequantize(own, Type[kind]))


@pytest.mark.parametrize("kind", [kind for kind, form in FORMATS.items() if form.bits])
def test_blocks_in_the_order_of_onnx_stand_for_the_same_weights(kind: str) -> None:
    rows = rows_of(kind)
    blocks = split(kind, rows)
    bits = FORMATS[kind].bits
    # MatMulNBits: lower bits first, w = scale * (u - 2**(bits - 1)).
    unpacked = np.unpackbits(blocks.packed, axis=-1, bitorder="little")
    unsigned = unpacked.reshape(*blocks.scale.shape, 32, bits) @ (1 << np.arange(bits))
    scale = blocks.scale.astype(np.float64)[..., None]
    weights = scale * (unsigned - (1 << (bits - 1)))
    if blocks.minimum is not None:
        weights += blocks.minimum.astype(np.float64)[..., None] + scale * (1 << (bits - 1))
    expected = gguf.quants.dequantize(rows, Type[kind])
    np.testing.assert_array_equal(weights.reshape(48, 128).astype(np.float32), expected)


def test_a_plain_type_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="F16 has no blocks"):
        split("F16", np.zeros((1, 64), np.uint8))
