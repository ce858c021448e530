"""Quantizers of Q4_K, Q5_K and Q6_K, which the ``gguf`` package can only read.

Plain rounding to the nearest step, without llama.cpp's search for better ones: what matters here
is that the blocks are valid and that the package's own dequantizer says what they stand for.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPER: Final = 256  # weights in a block of any K type
KINDS: Final = ("Q4_K", "Q5_K", "Q6_K")


def quantize(values: Floats, kind: str) -> Bytes:
    """Rows [..., n] with n in steps of 256 as raw blocks, uint8 [..., bytes of a row]."""
    blocks = np.asarray(values, np.float32).reshape(-1, SUPER)
    raw = _q6_k(blocks) if kind == "Q6_K" else _q45_k(blocks, {"Q4_K": 4, "Q5_K": 5}[kind])
    return raw.reshape(*values.shape[:-1], -1)


def _q45_k(blocks: Floats, bits: int) -> Bytes:
    """w = d * scale * q - dmin * minimum, 8 groups of 32 weights, 6 bits a scale and minimum."""
    groups = blocks.reshape(-1, 8, 32)
    lowest = np.minimum(groups.min(-1), 0)
    step = (np.maximum(groups.max(-1), 0) - lowest) / (2**bits - 1)
    d, dmin = (_half(part.max(-1, keepdims=True) / 63) for part in (step, -lowest))
    scale, minimum = (
        np.clip(np.rint(_divide(part, unit)), 0, 63).astype(np.uint8)
        for part, unit in ((step, d), (-lowest, dmin))
    )
    shifted = groups + (dmin * minimum)[..., None]
    q = np.clip(np.rint(_divide(shifted, (d * scale)[..., None])), 0, 2**bits - 1)
    q = q.astype(np.uint8).reshape(-1, 4, 2, 32)  # a byte holds a weight of each of two groups
    low = ((q[:, :, 0] & 15) | (q[:, :, 1] & 15) << 4).astype(np.uint8)
    parts: list[Bytes] = [part.astype(np.float16).view(np.uint8) for part in (d, dmin)]
    parts.append(_pack_six_bits(scale, minimum))
    if bits == 5:
        fifth = (q >> 4).reshape(-1, 8, 32)
        parts.append(np.packbits(fifth, axis=1, bitorder="little").reshape(-1, 32))
    return np.concatenate([*parts, low.reshape(-1, 128)], -1)


def _pack_six_bits(scale: Bytes, minimum: Bytes) -> Bytes:
    """Twelve bytes: the first four groups whole, the upper bits of the others above them."""
    first = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scale, minimum)]
    return np.concatenate([*first, (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4], -1)


def _q6_k(blocks: Floats) -> Bytes:
    """w = d * scale * (q - 32), 16 groups of 16 weights; scales have signs."""
    groups = blocks.reshape(-1, 16, 16)
    # The weight farthest from zero becomes -32, the end of the range that has one step more.
    farthest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    step = (-farthest[..., 0] / 32).astype(np.float32)
    d = _half(np.abs(step).max(-1, keepdims=True) / 127)
    scale = np.clip(np.rint(_divide(step, d)), -128, 127).astype(np.int8)
    unit = (d * scale).astype(np.float32)[..., None]
    q = np.clip(np.rint(_divide(groups, unit)), -32, 31) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of 128 weights, in quarters
    low = np.concatenate([(q[:, :, n] & 15) | (q[:, :, n + 2] & 15) << 4 for n in (0, 1)], -1)
    high = np.bitwise_or.reduce(q >> 4 << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=2)
    return np.concatenate(
        [
            low.reshape(-1, 128),
            high.reshape(-1, 64),
            scale.view(np.uint8),
            d.astype(np.float16).view(np.uint8),
        ],
        -1,
    )


def _half(values: Floats) -> Floats:
    """As 16-bit floats round it."""
    return values.astype(np.float16).astype(np.float32)


def _divide(values: Floats, by: Floats) -> Floats:
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)
