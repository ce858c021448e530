"""Carrying ggml's quantized blocks over to ONNX as they are, and their values for reference.

A ggml block is 32 weights ``w = d * u + m`` along the input dimension, with a scale ``d``, a
minimum ``m`` (or an implied one) and unsigned integers ``u``. ``MatMulNBits`` of onnxruntime
computes with ``w = d * (u - 2**(bits - 1))``. So:

========  ====  ============================  =======================================
type      bits  ggml's meaning                here
========  ====  ============================  =======================================
Q4_0      4     ``d * (u - 8)``               the same
Q8_0      8     ``d * q``, q signed           ``u = q + 128``
Q4_1      4     ``d * u + m``                 ``d * (u - 8) + c`` with ``c = m + 8 * d``
========  ====  ============================  =======================================

``c`` is constant in a block, so its part of a product ``x @ w.T`` is ``blocksum(x) @ c.T``: one
matrix product of 1/32 of the size, which costs next to nothing. ``u``, ``d`` and ``m`` are kept
bit for bit; the graph computes ``c`` from them when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class Format:
    """How one ggml type is stored: ``bits`` of each weight, or 0 for a plain float type."""

    bits: int
    minimum: bool = False


FORMATS: Final = {
    "F32": Format(0),
    "F16": Format(0),
    "BF16": Format(0),
    "Q4_0": Format(4),
    "Q4_1": Format(4, minimum=True),
    "Q8_0": Format(8),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some rows of a quantized tensor.

    ``packed`` is uint8 [rows, blocks, 32 * bits / 8], earlier weights in the lower bits;
    ``scale`` and ``minimum`` are float16 [rows, blocks].
    """

    packed: NDArray[np.uint8]
    scale: NDArray[np.float16]
    minimum: NDArray[np.float16] | None = None


def split(kind: str, rows: NDArray[np.uint8]) -> Blocks:
    """Take ggml rows, uint8 [rows, row_bytes] of type ``kind``, apart into :class:`Blocks`."""
    if kind == "Q8_0":
        blocks = rows.reshape(len(rows), -1, 34)
        # Two's complement to offset binary: adding 128 is flipping the highest bit.
        return Blocks(blocks[..., 2:] ^ np.uint8(0x80), _halves(blocks[..., :2]))
    if kind == "Q4_0":
        blocks = rows.reshape(len(rows), -1, 18)
        return Blocks(_interleave(blocks[..., 2:]), _halves(blocks[..., :2]))
    if kind == "Q4_1":
        blocks = rows.reshape(len(rows), -1, 20)
        return Blocks(
            _interleave(blocks[..., 4:]), _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
        )
    raise ValueError(f"{kind} has no blocks to carry over")


def dequantize(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The float32 weights [rows, columns] that ggml rows stand for: the reference to compare to."""
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = split(kind, rows)
    bits = FORMATS[kind].bits
    unsigned = blocks.packed
    if bits == 4:
        unsigned = np.stack([unsigned & 0xF, unsigned >> 4], axis=-1)
    unsigned = unsigned.reshape(*blocks.scale.shape, BLOCK)
    scale = blocks.scale.astype(np.float32)[..., None]
    if blocks.minimum is None:
        weights = scale * (unsigned.astype(np.float32) - np.float32(1 << (bits - 1)))
    else:
        weights = scale * unsigned + blocks.minimum.astype(np.float32)[..., None]
    return weights.reshape(len(rows), -1)


def _halves(pair: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(pair).view("<f2")[..., 0]


def _interleave(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """From ggml's order (byte i holds weights i and i + 16) to ONNX's (2 i and 2 i + 1)."""
    halves = np.concatenate([nibbles & 0xF, nibbles >> 4], axis=-1)
    packed: NDArray[np.uint8] = halves[..., 0::2] | (halves[..., 1::2] << 4)
    return packed
