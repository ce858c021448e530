"""What bounds the engine's decoding: memory bandwidth, and where the rest of a step's time goes.

Run as ``python bench_engine_limits.py FOLDER THREADS`` it profiles: scenarios as JSON on standard
input, operators' times on standard output.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgemoa.core.messages import ChatMessage, Sampling  # noqa: E402
from edgemoa.engine.frames import Generate  # noqa: E402

READ_BYTES: Final = 256 << 20  # far more than caches hold
READS: Final = 5
STEPS: Final = 40
SLOTS: Final = 8


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory at best: the largest of an array."""
    array = np.ones(READ_BYTES // 4, np.float32)
    best_s = float("inf")
    for _ in range(READS):
        readers = [
            threading.Thread(target=np.max, args=(p,)) for p in np.array_split(array, threads)
        ]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best_s = min(best_s, time.perf_counter() - began)
    return array.nbytes / best_s


def weight_bytes(graph: Path) -> int:
    """What a step reads of the weights: all, but for tables of which it only takes rows."""
    import onnx  # noqa: PLC0415 - heavy

    model = onnx.load(graph, load_external_data=False).graph
    users: dict[str, set[str]] = defaultdict(set)
    for node in model.node:
        for name in node.input:
            users[name].add(node.op_type)
    total = 0
    for tensor in model.initializer:
        if not all(user.startswith("Gather") for user in users[tensor.name]):
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            total += size * int(np.prod(tensor.dims))
    return total


# --- the profile


class Scenario(msgspec.Struct):
    """Prompts that are worked on together: being read, or written after."""

    name: str
    prompts: list[tuple[ChatMessage, ...]]
    reading: bool = False


class Operator(msgspec.Struct):
    """An operator's part in all layers: milliseconds in a step (or, of a prompt, in all of it)."""

    name: str
    ms: float
    calls: float


class Profile(msgspec.Struct):
    """``step_ms`` was measured without the profiler, ``profiled_ms`` with it."""

    name: str
    step_ms: float
    profiled_ms: float
    operators: list[Operator]


def profile(folder: Path, threads: int, scenario: Scenario) -> Profile:
    """Run a scenario through the back end as it is, without and with onnxruntime's profiler."""
    import onnxruntime  # noqa: PLC0415

    step_ms, _, _ = _run(folder, threads, scenario)
    plain = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory(prefix="edgemoa-profile-") as work:

        class Profiled(plain):  # type: ignore[misc, valid-type]
            """The options of every session that is made from here on."""

            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = f"{work}/profile"

        onnxruntime.SessionOptions = Profiled
        try:
            profiled_ms, steps, elapsed_s = _run(folder, threads, scenario)
        finally:
            onnxruntime.SessionOptions = plain
        gc.collect()  # the session writes its profile when it goes
        events = [e for file in Path(work).iterdir() for e in json.loads(file.read_bytes())]
    return Profile(scenario.name, step_ms, profiled_ms, _operators(events, steps, elapsed_s))


def _run(folder: Path, threads: int, scenario: Scenario) -> tuple[float, int, float]:
    """Milliseconds of a step; how many steps there were; and seconds of all of them, up to the
    last run of the model."""
    from edgemoa.engine import slots  # noqa: PLC0415

    backend = slots.load(folder, threads, SLOTS, ends_loops=False)
    for number, messages in enumerate(scenario.prompts):
        backend.admit(Generate(number, messages, Sampling(max_tokens=STEPS * 3), stream=True))
    begun: set[int] = set()

    def step() -> None:
        begun.update(getattr(event, "job_id", -1) for event in backend.step())

    started = time.perf_counter()
    while len(begun) < len(scenario.prompts):
        step()
    steps = 1
    if not scenario.reading:
        steps = STEPS
        step()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
    elapsed_s = time.perf_counter() - started
    return 1000 * elapsed_s / steps, steps, elapsed_s


def _operators(events: list[dict[str, Any]], steps: int, elapsed_s: float) -> list[Operator]:
    """Of the last seconds of a profile, whose clock is its own; those of all layers together."""
    last = max(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        is_kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["ts"] >= last - 1e6 * elapsed_s:
            name = re.sub(r"\d+", "*", event["name"].removesuffix("_kernel_time"))
            times[f"{name} ({event['args']['op_name']})"].append(event["dur"] / 1000)
    found = [Operator(name, sum(ms) / steps, len(ms) / steps) for name, ms in times.items()]
    return sorted(found, key=lambda operator: -operator.ms)


def main() -> None:
    """Profile what stands on standard input."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    scenarios = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Scenario])
    sys.stdout.buffer.write(
        msgspec.json.encode([profile(folder, threads, scenario) for scenario in scenarios])
    )


if __name__ == "__main__":
    main()
