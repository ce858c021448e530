"""Carrying ggml's quantized blocks over to ONNX, and their values for reference.

A ggml block is 32 weights along the input dimension with one scale ``d`` and, in some types, a
minimum ``m``. ``MatMulNBits`` of onnxruntime computes with ``w = d * (u - 2**(bits - 1))``, where
``u`` has 4 or 8 bits; 5 bits become 8. So:

=====  ====  =====================  ==================================================
type   bits  ggml's meaning         here
=====  ====  =====================  ==================================================
Q4_0   4     ``d * (q - 8)``        ``u = q``
Q4_1   4     ``d * q + m``          ``u = q`` and ``c = m + 8 * d``
Q4_K   4     ``d * q + m``          the same
Q5_0   8     ``d * (q - 16)``       ``u = q + 112``
Q5_1   8     ``d * q + m``          ``u = q + 112`` and ``c = m + 16 * d``
Q5_K   8     ``d * q + m``          the same
Q8_0   8     ``d * q``, q signed    ``u = q + 128``
Q6_K   8     blocks of 16           fitted anew, see below
F16..  8     no blocks              fitted anew, see below
=====  ====  =====================  ==================================================

``c`` is constant in a block, so its part of a product ``x @ w.T`` is ``blocksum(x) @ c.T``. A float
matrix product for that would read a fifth as many bytes as the rest of the product does, in one
thread. Instead ``MatMulNBits`` is given an integral zero point for each block, the nearest to
``-m / d``, which costs nothing, and the rest ``r`` in columns of its own: the product is that of
``[x, blockmeans(x)]`` and ``[w, 32 * r]``, where ``r`` is quantized like weights (see
:func:`with_minima`). ``r`` is at most half a step of the weights where a block has both signs.
So codes are the file's to the bit, scales too (see below for the K types), and minima are close.
On the default model, whose minima are off by .001 steps, decoding takes a twentieth less time than
with float sums, and predictions are as near to those of the file's weights in float32. Rows of an
embedding are gathered, not multiplied: there ``c`` is added, as a float16; ``u`` is centred so that
it is small.

Q4_K and Q5_K have 8 blocks in a superblock of 256: ``d`` and ``m`` of a block are products of a
float16 of the superblock and 6 bits of the block. They are multiplied here; a float16 holds the
product within 1/2048.

Q6_K has a scale for each 16 weights. The kernel for blocks of 16 takes three times as long as that
for 32, so these weights are fitted into 8 bits with one scale in 32, a finer grid than Q6_K's own.
Weights that are stored as floats are fitted the same way: as float32, SmolLM2-135M takes 5 times
the memory and decodes a third as fast (47 against 130 tokens/s); perplexity is within 1 %.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgemoa.errors import ModelInvalidError

BLOCK: Final = 32
SUPERBLOCK: Final = 256


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is stored: ``bits`` of each weight, 0 for float32.

    ``centre`` is the ``q`` that lies in the middle, where blocks have a minimum; 0 without one.
    """

    bits: int
    centre: int = 0


FLOATS: Final = Format(0)
FITTED: Final = Format(8)

FORMATS: Final = {
    "F32": FITTED,
    "F16": FITTED,
    "BF16": FITTED,
    "Q4_0": Format(4),
    "Q4_1": Format(4, centre=8),
    "Q5_0": Format(8),
    "Q5_1": Format(8, centre=16),
    "Q8_0": Format(8),
    "Q4_K": Format(4, centre=8),
    "Q5_K": Format(8, centre=16),
    "Q6_K": FITTED,
}
"""Every tensor type that is supported, with the format that its matrices get."""

FLOAT_TYPES: Final = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some rows of a matrix: ``codes`` uint8 [rows, blocks, 32], the ``u`` of the table; ``scale``
    and ``minimum`` float32 [rows, blocks].
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    minimum: NDArray[np.float32] | None = None


LARGEST: Final = 2048.0
"""Of scales and minima; beyond are no model's. Up to it, all that is made of them fits float16."""


def split(kind: str, rows: NDArray[np.uint8]) -> Blocks:
    """Take ggml rows, uint8 [rows, row_bytes] of type ``kind``, apart into :class:`Blocks`.

    :raises ModelInvalidError: for weights that are no numbers, or too large for a model.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # it shows in what comes out
        blocks = _split(kind, rows)
    for factors in (blocks.scale, blocks.minimum):
        if factors is not None and not (np.abs(factors) <= LARGEST).all():
            raise ModelInvalidError(
                "the file has weights that are no numbers, or far too large for a model",
                hint="the file is damaged; fetch or copy it again",
            )
    return blocks


def _split(kind: str, rows: NDArray[np.uint8]) -> Blocks:
    if kind in FLOAT_TYPES or kind == "Q6_K":
        return _fit(dequantize(kind, rows))
    if kind == "Q8_0":
        blocks = rows.reshape(len(rows), -1, 34)
        # Two's complement to offset binary: adding 128 is flipping the highest bit.
        return Blocks(blocks[..., 2:] ^ np.uint8(0x80), _float16(blocks[..., :2]))
    if kind in ("Q4_0", "Q5_0"):
        five = kind == "Q5_0"
        blocks = rows.reshape(len(rows), -1, 22 if five else 18)
        scale = _float16(blocks[..., :2])
        if five:
            return Blocks(_fifth_bits(blocks[..., 2:6], blocks[..., 6:]), scale)
        return Blocks(_halves(blocks[..., 2:]), scale)
    if kind in ("Q4_1", "Q5_1"):
        five = kind == "Q5_1"
        blocks = rows.reshape(len(rows), -1, 24 if five else 20)
        codes = _fifth_bits(blocks[..., 4:8], blocks[..., 8:]) if five else _halves(blocks[..., 4:])
        return Blocks(codes, _float16(blocks[..., :2]), _float16(blocks[..., 2:4]))
    if kind in ("Q4_K", "Q5_K"):
        return _superblocks(rows.reshape(len(rows), -1, 176 if kind == "Q5_K" else 144))
    raise ValueError(f"{kind} is not a type that can be split")


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [rows, blocks, 32] in the bytes of ``MatMulNBits``: of two, the first is lower."""
    if bits == 8:
        return codes
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of a matrix as ``MatMulNBits`` takes them, with columns for minima behind their own.

    ``codes`` uint8 [rows, blocks, 32], ``scale`` float32 [rows, blocks], ``zeros`` uint8 [rows,
    blocks]; ``blocks`` counts the added ones, see :func:`added_blocks`.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zeros: NDArray[np.uint8]


MOST_DIGITS: Final = 4
CLOSE_ENOUGH: Final = 1 / 64
"""The error of minima, by its root mean square, in steps of the weights. It is the same for all of
a block. Weights are themselves off by .29 steps from what they were before quantization."""


def added_blocks(columns: int, digits: int) -> int:
    """How many blocks of columns the minima of a row take: one column for each block of its own,
    in blocks of their own for each digit.
    """
    return digits * -(-columns // BLOCK**2)


def digits_needed(form: Format, parts: Iterable[Blocks]) -> int:
    """How many digits bring the minima of a matrix, given in parts, close enough."""
    errors, steps = np.zeros(MOST_DIGITS), 0.0
    for blocks in parts:
        _, left = _zero_points(form, blocks)
        for number in range(MOST_DIGITS):
            _, _, left = _digit(form, left)
            errors[number] += np.square(left / BLOCK, dtype=np.float64).sum()
        steps += np.square(blocks.scale, dtype=np.float64).sum()
    enough = errors <= CLOSE_ENOUGH**2 * steps
    return int(enough.argmax()) + 1 if enough.any() else MOST_DIGITS


def with_minima(form: Format, blocks: Blocks, digits: int) -> Columns:
    """Blocks that have a minimum as columns without one.

    What zero points leave of it is quantized like weights: the first digit is the whole of it, each
    further one what the digits before left over.
    """
    zeros, left = _zero_points(form, blocks)
    codes, scales, all_zeros = [blocks.codes], [blocks.scale], [zeros]
    for _ in range(digits):
        code, scale, left = _digit(form, left)
        codes.append(code)
        scales.append(scale)
        all_zeros.append(np.full(scale.shape, 1 << (form.bits - 1), np.uint8))
    return Columns(
        np.concatenate(codes, 1), np.concatenate(scales, 1), np.concatenate(all_zeros, 1)
    )


def _zero_points(form: Format, blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The code of each block that is nearest to a weight of 0, [rows, blocks], and 32 times what is
    still to be added to its weights, as the weights of columns [rows, added blocks, 32].
    """
    assert blocks.minimum is not None  # noqa: S101 - by the format
    scale, minimum = blocks.scale, blocks.minimum
    first = np.float32((1 << (form.bits - 1)) - form.centre)  # the code of q = 0
    nearest = first + np.divide(-minimum, scale, out=np.zeros_like(scale), where=scale != 0)
    zeros = np.clip(np.rint(nearest), 0, 2**form.bits - 1)
    rest = (minimum + (zeros - first) * scale) * BLOCK
    rest = np.pad(rest, ((0, 0), (0, -rest.shape[1] % BLOCK)))
    return zeros.astype(np.uint8), rest.reshape(len(rest), -1, BLOCK)


def _digit(
    form: Format, weights: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Weights [rows, blocks, 32] in codes and scales [rows, blocks], and what these leave over."""
    half = 1 << (form.bits - 1)
    # The weight farthest from zero becomes -half, the end of the range with one step more.
    farthest = np.take_along_axis(weights, np.abs(weights).argmax(-1)[..., None], -1)
    scale = (farthest / -half).astype(np.float16).astype(np.float32)
    code = np.divide(weights, scale, out=np.zeros_like(weights), where=scale != 0)
    np.clip(np.rint(code, out=code), -half, half - 1, out=code)
    left = np.asarray(weights - code * scale, np.float32)
    return (code + half).astype(np.uint8), scale[..., 0], left


def pack_zeros(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Zero points [rows, blocks] in the bytes of ``MatMulNBits``."""
    if bits == 8:
        return zeros
    return pack(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))), 4)


def values(form: Format, blocks: Blocks) -> NDArray[np.float32]:
    """The float32 weights [rows, columns] that ``blocks`` of the format ``form`` stand for."""
    half = 1 << (form.bits - 1)
    # q - centre is u - half, so q is exact here and the weight is rounded as ggml rounds it.
    q = blocks.codes.astype(np.float32) - np.float32(half - form.centre)
    weights = blocks.scale[..., None] * q
    if blocks.minimum is not None:
        weights += blocks.minimum[..., None]
    return weights.reshape(len(weights), -1)


def dequantize(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The float32 weights [rows, columns] that ggml rows stand for: the reference to compare to."""
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "Q6_K":
        return _six_bits(rows.reshape(len(rows), -1, 210))
    return values(FORMATS[kind], split(kind, rows))


def _fit(weights: NDArray[np.float32]) -> Blocks:
    """Blocks of 8 bits for float32 weights [rows, columns], each scaled by its largest."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    scale = (np.abs(blocks).max(axis=-1) / 127).astype(np.float16).astype(np.float32)
    per_step = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = blocks * per_step[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, -127, 127, out=codes)  # the scale was rounded, perhaps down
    codes += 128
    return Blocks(codes.astype(np.uint8), scale)


def _float16(pair: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(pair).view("<f2")[..., 0].astype(np.float32)


def _spread(of_superblocks: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(of_superblocks, SUPERBLOCK // BLOCK, axis=-1)


def _halves(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit codes of a block, whose byte i holds the weights i and i + 16."""
    return np.concatenate([nibbles & 0xF, nibbles >> 4], axis=-1)


def _fifth_bits(high: NDArray[np.uint8], nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of a 5-bit block: bit i of ``high`` belongs to the weight i."""
    bits = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
    return np.asarray((_halves(nibbles) | (bits << 4)) + np.uint8(112), np.uint8)


def _superblocks(blocks: NDArray[np.uint8]) -> Blocks:
    """Q4_K and Q5_K: two float16, 12 bytes of scales and minima, [32 of high bits,] nibbles."""
    rows, count = blocks.shape[:2]
    packed = blocks[..., 4:16]
    # The first four blocks have their 6 bits in bytes 0 to 3 (scales) and 4 to 7 (minima); the last
    # four have 4 bits in bytes 8 to 11 and the upper two on top of the bytes of the first four.
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = [first & 63, (last & 15) | (first >> 6 << 4)]
    minima = [second & 63, (last >> 4) | (second >> 6 << 4)]
    nibbles = blocks[..., -128:].reshape(rows, count, 4, 1, 32)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=3)
    codes = codes.reshape(rows, count, 8, 32)
    if blocks.shape[2] == 176:
        high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        codes = ((codes | (high << 4)) + np.uint8(112)).astype(np.uint8)
    scale, minimum = (
        _spread(_float16(of_superblocks)) * np.concatenate(of_blocks, axis=-1).reshape(rows, -1)
        for of_superblocks, of_blocks in ((blocks[..., :2], scales), (blocks[..., 2:4], minima))
    )
    return Blocks(codes.reshape(rows, -1, BLOCK), scale, -minimum)


def _six_bits(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Q6_K: 128 bytes of low nibbles, 64 of high bits, 16 signed scales, one float16."""
    rows, count = blocks.shape[:2]
    low = blocks[..., :128].reshape(rows, count, 2, 64)
    high = blocks[..., 128:192].reshape(rows, count, 2, 32)
    codes = np.empty((rows, count, 2, 4, 32), np.uint8)
    codes[..., 0, :] = low[..., :32] & 15
    codes[..., 1, :] = low[..., 32:] & 15
    codes[..., 2, :] = low[..., :32] >> 4
    codes[..., 3, :] = low[..., 32:] >> 4
    for quarter in range(4):
        codes[..., quarter, :] |= (high >> (2 * quarter) & 3) << 4
    of_sixteen = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    scale = _float16(blocks[..., 208:])[..., None] * of_sixteen
    weights = codes.reshape(rows, -1).astype(np.float32)
    weights -= 32
    weights *= np.repeat(scale.reshape(rows, -1), 16, axis=-1)
    return weights
