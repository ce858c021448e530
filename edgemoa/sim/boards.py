"""What boards are thought to do that nobody has measured yet: estimates, every one of them.

Writing a token reads the whole model, so that memory bandwidth bounds it; of that, about half is
had in practice. Reading a prompt, and each further job of a batch, is arithmetic: two operations
for each parameter and token. Bandwidths are the makers' or commonly measured figures, arithmetic is
what 4-bit kernels are thought to reach on all cores of the processor; no GPU is used. A recording
of the board itself (``edgemoa bench --record``) is always better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgemoa.core.rates import DecodeRate, PrefillRate, Rates
from edgemoa.sim.recording import VERSION, Recording

HAD: Final = 0.5  # of the bandwidth, while tokens are written
GIGA: Final = 1e9
_ROWS: Final = 4  # of the second point that says how a step grows with its jobs
_CONTEXT: Final = 64


@dataclass(frozen=True, slots=True)
class BoardKind:
    """An estimate: memory bandwidth, arithmetic of the processor with 4-bit weights, and memory of
    the smallest one that is usual."""

    name: str
    title: str
    bandwidth_gb_s: float
    arithmetic_gop_s: float
    memory_mb: int
    reason: str


KINDS: Final = (
    BoardKind("zero2w", "Raspberry Pi Zero 2 W", 2.0, 3.5, 512,
              "LPDDR2, about 2 GB/s; 4 Cortex-A53 at 1.0 GHz, without dot products"),
    BoardKind("pi3", "Raspberry Pi 3B+", 2.5, 5.0, 1024,
              "LPDDR2, 2 to 3 GB/s; 4 Cortex-A53 at 1.4 GHz, without dot products"),
    BoardKind("pi4", "Raspberry Pi 4", 5.0, 15.0, 2048,
              "LPDDR4, 4 to 6 GB/s as measured; 4 Cortex-A72 at 1.5 GHz, without dot products"),
    BoardKind("pi5", "Raspberry Pi 5", 12.0, 60.0, 4096,
              "LPDDR4X, 17 GB/s, 9 to 13 as measured; 4 Cortex-A76 at 2.4 GHz"),
    BoardKind("jetson-nano", "Jetson Nano", 25.6, 12.0, 4096,
              "LPDDR4, 25.6 GB/s; 4 Cortex-A57 at 1.4 GHz, without dot products"),
    BoardKind("orin-nano", "Jetson Orin Nano", 68.0, 70.0, 8192,
              "LPDDR5, 68 GB/s; 6 Cortex-A78AE at 1.5 GHz"),
    BoardKind("orin-nano-super", "Jetson Orin Nano Super", 102.0, 80.0, 8192,
              "LPDDR5, 102 GB/s; 6 Cortex-A78AE at 1.7 GHz"),
    BoardKind("agx-orin", "Jetson AGX Orin", 204.8, 200.0, 32_768,
              "LPDDR5, 204.8 GB/s; 12 Cortex-A78AE at 2.2 GHz"),
)  # fmt: skip
ALIASES: Final = {"orin": "orin-nano", "nano": "jetson-nano", "pi3b+": "pi3", "agx": "agx-orin"}


def find_kind(name: str) -> BoardKind | None:
    """A kind by its name or a short one."""
    wanted = ALIASES.get(name.lower(), name.lower())
    return next((kind for kind in KINDS if kind.name == wanted), None)


def estimate(
    kind: BoardKind, model: str, size_bytes: int, parameters: int, slots: int
) -> Recording:
    """What a kind of board would do with a model of that size; no more than an estimate."""
    shared_ms = 1000 * size_bytes / (HAD * kind.bandwidth_gb_s * GIGA)
    token_ms = 1000 * 2 * parameters / (kind.arithmetic_gop_s * GIGA)
    return Recording(
        version=VERSION,
        board=kind.name,
        model=model,
        slots=slots,
        rates=Rates(
            prefill=(PrefillRate(_CONTEXT, token_ms),),
            decode=(
                DecodeRate(1, _CONTEXT, shared_ms + token_ms),
                DecodeRate(_ROWS, _CONTEXT, shared_ms + _ROWS * token_ms),
            ),
        ),
        note=f"estimate: {kind.reason}",
    )
