"""Blocks mean after the move what they meant before, to the bit where that is promised."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from edgemoa.errors import ModelInvalidError
from edgemoa.models.blocks import (
    BLOCK,
    CLOSE_ENOUGH,
    FITTED,
    FORMATS,
    LARGEST,
    MOST_DIGITS,
    Blocks,
    Columns,
    Format,
    added_blocks,
    dequantize,
    digits_needed,
    pack,
    pack_zeros,
    split,
    values,
    with_minima,
)

from . import k_quants

Type = gguf.GGMLQuantizationType
FITTED_KINDS = [kind for kind, form in FORMATS.items() if form is FITTED]
EXACT_KINDS = [kind for kind in FORMATS if kind not in FITTED_KINDS]
WITH_MINIMA = [kind for kind, form in FORMATS.items() if form.centre]


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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_weights_that_no_scale_fits_are_refused(bad: float) -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = bad
    with pytest.raises(ModelInvalidError, match="no numbers, or far too large"):
        split("F32", rows.view(np.uint8))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST])
@pytest.mark.parametrize(
    ("kind", "at"),
    [
        *((kind, 0) for kind in EXACT_KINDS),
        *((kind, 2) for kind in WITH_MINIMA),
        ("Q6_K", 208),
    ],
)
def test_blocks_whose_scales_are_no_numbers_are_refused(kind: str, at: int, bad: float) -> None:
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    raw = np.random.default_rng(4).integers(1, 60, (3, 512 // block, size), dtype=np.uint8)
    assert split(kind, raw.reshape(3, -1)).codes.shape == (3, 16, 32)
    raw[1, -1, at : at + 2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
    with pytest.raises(ModelInvalidError, match="no numbers, or far too large"):
        split(kind, raw.reshape(3, -1))


# --- minima in columns


def product(form: Format, columns: Columns, own: int, x: np.ndarray, digits: int) -> np.ndarray:
    """What ``MatMulNBits`` computes of ``x`` and its blocks' means, in float64."""
    w = (columns.codes.astype(np.float64) - columns.zeros[..., None]) * columns.scale[..., None]
    means = x.reshape(len(x), own, BLOCK).mean(-1)
    room = np.zeros((len(x), added_blocks(own * BLOCK, 1) * BLOCK - own))
    given = np.concatenate([x, *[means, room] * digits], -1)
    return np.asarray(given @ w.reshape(len(w), -1).T)


def made(kind: str, width: int, rng: np.random.Generator) -> Blocks:
    """Blocks of ordinary weights, those of 24 rows."""
    rows = (rng.standard_normal((24, width)) * 0.1).astype(np.float32)
    quantize = k_quants.quantize if kind in k_quants.KINDS else gguf.quants.quantize
    raw = quantize(rows, kind if kind in k_quants.KINDS else Type[kind])
    return split(kind, np.ascontiguousarray(raw).view(np.uint8).reshape(24, -1))


@pytest.mark.parametrize("digits", range(1, MOST_DIGITS + 1))
@pytest.mark.parametrize("width", [256, 768, 1024, 1280])
@pytest.mark.parametrize("kind", WITH_MINIMA)
def test_columns_give_the_product_with_the_blocks(kind: str, width: int, digits: int) -> None:
    form, rng, own = FORMATS[kind], np.random.default_rng(5), width // BLOCK
    blocks = made(kind, width, rng)
    columns = with_minima(form, blocks, digits)
    blocks_there = own + added_blocks(width, digits)
    assert columns.codes.shape == (24, blocks_there, BLOCK)
    assert columns.scale.shape == columns.zeros.shape == (24, blocks_there)
    np.testing.assert_array_equal(columns.codes[:, :own], blocks.codes)
    np.testing.assert_array_equal(columns.scale[:, :own], blocks.scale)
    assert columns.codes.max() < 2**form.bits
    # A common shift of each block of x shows the minima alone: the error of each block in steps.
    x = np.repeat(np.eye(own), BLOCK, axis=-1)
    w = values(form, blocks).astype(np.float64)
    off = np.abs(product(form, columns, own, x, digits) - x @ w.T).T / BLOCK
    # A rest is up to half a step; a digit leaves up to a step of its own, at the short end.
    steps = np.abs(blocks.scale).max(-1, keepdims=True)
    most = steps * (0.5 / 2 ** ((form.bits - 1) * digits) + 1e-5)
    assert (off <= most).all()
    rms = np.sqrt(np.mean(off**2) / np.mean(np.square(blocks.scale, dtype=np.float64)))
    assert rms <= (CLOSE_ENOUGH if (form.bits - 1) * digits > 3 else 1 / 16)
    # And any x, not only such.
    x = rng.standard_normal((6, width))
    sums = np.abs(x.reshape(6, own, BLOCK).sum(-1)).sum(-1, keepdims=True)
    far = np.abs(product(form, columns, own, x, digits) - x @ w.T)
    assert (far <= sums * most.T + 1e-5 * np.abs(w).max()).all()


@pytest.mark.parametrize("kind", WITH_MINIMA)
def test_ordinary_blocks_take_six_bits_or_eight(kind: str) -> None:
    blocks, form = made(kind, 512, np.random.default_rng(6)), FORMATS[kind]
    assert digits_needed(form, [blocks, blocks]) == {4: 2, 8: 1}[form.bits]


@pytest.mark.parametrize(("away", "digits"), [(0.0, 2), (0.2, 2), (1.0, 3), (8.0, 4), (2e3, 4)])
def test_blocks_far_from_zero_take_more_digits(away: float, digits: int) -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 16, (20, 24, BLOCK), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, (20, 24)).astype(np.float32)
    minimum = (rng.uniform(-away, away, scale.shape) - 7.5 * scale).astype(np.float32)
    blocks = Blocks(codes, scale, minimum)
    form = FORMATS["Q4_1"]
    assert digits_needed(form, [blocks]) == digits
    columns = with_minima(form, blocks, digits)
    assert np.isfinite(columns.scale).all()
    x = np.repeat(np.eye(24), BLOCK, axis=-1)
    w = values(form, blocks).astype(np.float64)
    off = np.abs(product(form, columns, 24, x, digits) - x @ w.T) / BLOCK
    # Close in steps of the weights, or, where four digits cannot be that, to what is so far away.
    assert np.sqrt(np.mean(off**2)) <= max(0.02 * CLOSE_ENOUGH, away / 8**4)


@pytest.mark.filterwarnings("error")
def test_blocks_without_a_scale_or_with_the_least_one() -> None:
    """Constant blocks, empty ones, those of float16's last bits, and of what is largest."""
    form = FORMATS["Q4_1"]
    least, most = np.float32(2.0**-24), np.float32(LARGEST)
    scale = np.array([[0, 0, least, least, 0, most, most]], np.float32)
    minimum = np.array([[0, 0.25, 0, -7 * least, -1, -most, most]], np.float32)
    codes = np.full((1, 7, BLOCK), 5, np.uint8)
    for shown in ([0, 1, 2, 3, 4], [5, 6], [0], [2, 3]):
        blocks = Blocks(codes[:, shown], scale[:, shown], minimum[:, shown])
        digits = digits_needed(form, [blocks])
        columns = with_minima(form, blocks, digits)
        own = len(shown)
        x = np.repeat(np.eye(own), BLOCK, axis=-1)
        w = values(form, blocks).astype(np.float64)
        off = np.abs(product(form, columns, own, x, digits) - x @ w.T) / BLOCK
        assert (off <= np.abs(w).max() / 8**4 + np.abs(scale[:, shown]).max() / 16).all()
        assert np.isfinite(columns.scale.astype(np.float16)).all()


def test_zero_points_are_packed_by_rows() -> None:
    zeros = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert pack_zeros(zeros, 4).tolist() == [[0x21, 0x03], [0x54, 0x06]]
    assert pack_zeros(zeros, 8).tolist() == zeros.tolist()


def test_codes_are_packed_lower_bits_first() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(1, 1, 32) % 16
    assert pack(codes, 4)[0, 0, :3].tolist() == [0x10, 0x32, 0x54]
    np.testing.assert_array_equal(pack(codes, 8), codes)


def test_a_type_without_blocks() -> None:
    with pytest.raises(ValueError, match="IQ4_NL is not a type"):
        split("IQ4_NL", np.zeros((1, 64), np.uint8))
