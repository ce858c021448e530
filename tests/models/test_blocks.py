"""Blocks mean after the move what they meant before, to the bit where that is promised."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from edgemoa.errors import ModelInvalidError
from edgemoa.models.blocks import FITTED, FORMATS, dequantize, fit, pack, split, values

from . import k_quants

Type = gguf.GGMLQuantizationType
FITTED_KINDS = [kind for kind, form in FORMATS.items() if form is FITTED]
EXACT_KINDS = [kind for kind in FORMATS if kind not in FITTED_KINDS]


def weights() -> np.ndarray:
    """Rows of very different size, some with an offset, one of zeros."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((48, 512)) * 10.0 ** rng.uniform(-3, 2, (48, 1))
    rows[:8] += 3.0
    rows[8] = 0.0
    return rows.astype(np.float32)


def rows_of(kind: str) -> np.ndarray:
    """ggml's bytes [rows, row_bytes]."""
    make = k_quants.quantize if kind in k_quants.KINDS else gguf.quants.quantize
    raw = make(weights(), kind if kind in k_quants.KINDS else Type[kind])
    return np.ascontiguousarray(raw).view(np.uint8).reshape(48, -1)


def expected(kind: str, rows: np.ndarray) -> np.ndarray:
    own = rows.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    return np.asarray(gguf.quants.dequantize(own, Type[kind])).reshape(48, 512)


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_values_are_those_of_the_gguf_package(kind: str) -> None:
    rows = rows_of(kind)
    np.testing.assert_array_equal(dequantize(kind, rows), expected(kind, rows))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_any_bits_of_a_superblock_are_read_alike(kind: str) -> None:
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = np.random.default_rng(4).integers(0, 256, (64, 2, size), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):  # float16 that are numbers
        raw[..., at + 1] &= 0x3F
    rows = raw.reshape(64, -1)
    np.testing.assert_array_equal(dequantize(kind, rows), gguf.quants.dequantize(rows, Type[kind]))


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_blocks_stand_for_the_same_weights(kind: str) -> None:
    rows = rows_of(kind)
    np.testing.assert_array_equal(values(FORMATS[kind], split(kind, rows)), expected(kind, rows))


@pytest.mark.parametrize("kind", FITTED_KINDS)
def test_fitted_weights_are_within_half_a_step(kind: str) -> None:
    rows = rows_of(kind)
    blocks, exact = split(kind, rows), expected(kind, rows)
    step = np.repeat(np.abs(exact.reshape(48, -1, 32)).max(-1) / 127, 32, axis=-1)
    # Half a step, and what the scale's rounding to float16 adds to the largest weights.
    off = np.abs(values(FITTED, blocks) - exact)
    assert (off <= step * (0.5 + 127 * 2**-11) + 1e-6).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_weights_that_no_scale_fits_are_refused(bad: float) -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = bad
    with pytest.raises(ModelInvalidError, match="no numbers, or far too large"):
        fit(rows)


def test_codes_are_packed_lower_bits_first() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(1, 1, 32) % 16
    assert pack(codes, 4)[0, 0, :3].tolist() == [0x10, 0x32, 0x54]
    np.testing.assert_array_equal(pack(codes, 8), codes)


def test_a_type_without_blocks() -> None:
    with pytest.raises(ValueError, match="IQ4_NL is not a type"):
        split("IQ4_NL", np.zeros((1, 64), np.uint8))
