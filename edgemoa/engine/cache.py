"""The memory of a model's attention: keys and values of every token read, a row per sequence."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from edgemoa.errors import EngineError

_MAP_NORESERVE: Final = 0x4000  # Linux; the module mmap has it from Python 3.13 on


class Cache:
    """``buffers`` arrays float32 [rows, heads, capacity, head_size]: keys or values of one layer.

    They are address space until something is written, so a row costs what its tokens need
    (``token_bytes`` each) and not what it could hold. Positions that are written in order from 0
    and given back by :meth:`release` are all the memory that there is.
    """

    def __init__(self, buffers: int, rows: int, heads: int, tokens: int, head_size: int) -> None:
        """:param tokens: that a row holds at least; rows of each head are whole pages.

        Raises :class:`EngineError` where there is not even the address space.
        """
        self._position_bytes = 4 * head_size
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._position_bytes)
        self.capacity = -(-tokens // step) * step
        self.shape = (heads, self.capacity, head_size)
        self.token_bytes = buffers * heads * self._position_bytes
        self._head_bytes = self.capacity * self._position_bytes
        size = rows * heads * self._head_bytes
        try:
            self._maps = [
                mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
                for _ in range(buffers)
            ]
        except (OSError, OverflowError) as error:
            raise EngineError(
                f"No room for {rows} contexts of {tokens} tokens: {error}."
            ) from error
        for each in self._maps:
            with suppress(OSError):  # a kernel without huge pages
                each.madvise(mmap.MADV_NOHUGEPAGE)  # one would hold a token and 2 MB of nothing
        self._buffers: list[npt.NDArray[np.float32]] = [
            np.frombuffer(each, np.float32).reshape(rows, *self.shape) for each in self._maps
        ]

    def addresses(self, row: int) -> list[int]:
        """Where ``row`` begins, of each buffer; the next row lies behind it."""
        return [buffer[row].ctypes.data for buffer in self._buffers]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give ``target`` the first tokens of ``source``."""
        for buffer in self._buffers:
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def release(self, row: int, start: int, end: int) -> None:
        """Give back the memory of positions ``start`` to ``end``, beyond which nothing is
        written; nothing where ``end`` is not after ``start``."""
        first, last = (
            -(-at * self._position_bytes // mmap.PAGESIZE) * mmap.PAGESIZE for at in (start, end)
        )
        if last <= first:
            return
        heads = self.shape[0]
        for each in self._maps:
            for head in range(row * heads, (row + 1) * heads):
                each.madvise(mmap.MADV_DONTNEED, head * self._head_bytes + first, last - first)
