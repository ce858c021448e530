"""Measures what an import costs and what it keeps, for every type of tensor.

The default model's weights are written anew in each type; the yardstick of each file is its own
dequantized weights in float32. K types come in blocks of 256, which most rows of the default model
(576 wide) do not divide into: there llama.cpp takes a neighbouring type, and so does this; Gemma 3
270M in Q4_K_M is measured beside it. With --with-builder, the same weights also go through the
model builder of onnxruntime-genai, which needs torch: over 1 GB the first time, and some minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import Row, arguments, row, say, tell  # noqa: E402 - beside this file

KINDS: Final = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
FALLBACK: Final = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # llama.cpp's, for other rows
BUILDS: Final = {
    "builder int4 default": ["int4"],
    "builder int4 k_quant": ["int4", "algo_config=k_quant"],
    "builder int4 k_quant_mixed": ["int4", "algo_config=k_quant_mixed"],
    "builder int8": ["int8"],
}
OURS: Final = "the GGUF's own blocks"
FLOATS: Final = "float32 of the GGUF's weights"
YARDSTICK: Final = "builder int4 default"

WINDOW_TOKENS: Final = 512
TEXT_TOKENS: Final = 2048
PROMPT_TOKENS: Final = 32
DECODE_TOKENS: Final = 100
ROUNDS: Final = 7

REACH_PERPLEXITY: Final = 0.01  # off the weights' own, to either side
REACH_IMPORT_S: Final = 15
REACH_MEMORY_MB: Final = 300  # beside the file
REACH_SIZE: Final = 1.1
REACH_LOAD_S: Final = 1


def main() -> int:
    """Measure, print, judge."""
    assert __doc__  # noqa: S101
    parser = arguments(__doc__)
    parser.add_argument(
        "--kinds", nargs="*", metavar="TYPE", choices=KINDS, default=list(KINDS),
        help="types of tensors (default: all)",
    )  # fmt: skip
    parser.add_argument("--without-gemma3", action="store_true", help="the default model only")
    parser.add_argument(
        "--with-builder", action="store_true",
        help="measure the builder of onnxruntime-genai, too, and our decode speed against its",
    )  # fmt: skip
    parser.add_argument(
        "--environment", type=Path, metavar="DIR",
        help="an environment that has the builder, instead of one in the cache",
    )  # fmt: skip
    given = parser.parse_args()
    from fetched import default_gguf, gemma3_gguf, text  # noqa: PLC0415 - not for the children

    left_out = ["--without-gemma3"] if given.without_gemma3 else []
    if set(given.kinds) != set(KINDS):
        left_out.append(f"--kinds {' '.join(given.kinds)}".rstrip())
    text(given.text)  # before the long work
    with tempfile.TemporaryDirectory(prefix="edgemoa-bench-") as folder:
        work = Path(folder)
        default = default_gguf(work)
        rows = costs("default model", default, work, REACH_IMPORT_S)
        if not given.without_gemma3:
            rows += costs("Gemma 3 270M", gemma3_gguf(), work)
        for kind in given.kinds:
            rows += of_type(kind, default, work)
        rows += recipes(default, work, given.environment, with_builder=given.with_builder)
    return tell(rows, given, left_out)


# --- figures


def costs(name: str, gguf: Path, work: Path, most_s: float | None = None) -> list[Row]:
    """Time, memory and size of importing a real file, and what its import predicts."""
    say(f"{name}: import, three times")
    size_mb = gguf.stat().st_size / 1e6
    runs = [child("import", gguf, fresh(work / "costs")) for _ in range(3)]
    folder = work / "costs" / "bench"
    seconds, peak_mb = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
    load_s = statistics.median(child("load", folder)["seconds"] for _ in range(3))
    say(f"{name}: perplexity")
    quantized, floats = perplexities(gguf, folder, work)
    return [
        row(f"{name}: import", seconds, "s", most_s),
        row(
            f"{name}: import, most memory beside the file", peak_mb - size_mb, "MB",
            REACH_MEMORY_MB, f"{peak_mb:.0f} MB with the file's {size_mb:.0f}",
        ),
        row(f"{name}: size over the GGUF's", runs[0]["bytes"] / size_mb / 1e6, "", REACH_SIZE),
        row(f"{name}: model load", load_s, "s", REACH_LOAD_S),
        perplexity_row(name, quantized, floats),
    ]  # fmt: skip


def of_type(kind: str, default: Path, work: Path) -> list[Row]:
    """The default model with all of its matrices in one type."""
    say(f"{kind}: writing, import, perplexity")
    source = work / f"{kind}.gguf"
    used = child("requantize", default, kind, source)["types"]
    imported = child("import", source, fresh(work / "types"))
    folder = work / "types" / "bench"
    quantized, floats = perplexities(source, folder, work)
    note = ", ".join(f"{count} {name}" for name, count in used.items())
    size = imported["bytes"] / source.stat().st_size
    source.unlink()
    return [
        perplexity_row(kind, quantized, floats, f"{note}; "),
        row(f"{kind}: size over the GGUF's", size, "", REACH_SIZE),
    ]


def perplexities(gguf: Path, folder: Path, work: Path) -> tuple[float, float]:
    """Of an imported folder, and of the same file's dequantized weights."""
    quantized = child("perplexity", folder)["perplexity"]
    reference = fresh(work / "reference")
    floats = child("reference", gguf, reference)["perplexity"]
    shutil.rmtree(reference)
    return quantized, floats


def perplexity_row(name: str, quantized: float, floats: float, note: str = "") -> Row:
    """The ratio that the import is judged by."""
    detail = f"{note}{quantized:.3f} over {floats:.3f}"
    title = f"{name}: perplexity over its weights' in float32"
    return row(title, quantized / floats, "", REACH_PERPLEXITY, detail, around=1)


def recipes(default: Path, work: Path, given: Path | None, *, with_builder: bool) -> list[Row]:
    """The default model by several recipes: perplexity, decode speed in turns, size."""
    ours = fresh(work / "recipes") / "bench"
    child("import", default, ours.parent)
    floats = fresh(work / "floats")
    perplexity = {
        FLOATS: child("reference", default, floats)["perplexity"],
        OURS: child("perplexity", ours)["perplexity"],
    }
    folders = {FLOATS: floats / "reference", OURS: ours}
    if with_builder:
        for name, folder in builds(default, ours, work, given).items():
            say(f"{name}: perplexity")
            perplexity[name] = child("score", folder / "model.onnx", ours)["perplexity"]
            folders[name] = folder
    say("decode speed, in turns")
    speed = child("speeds", *folders.values())["tokens_per_s"]
    rows: list[Row] = []
    for (name, folder), tokens_per_s in zip(folders.items(), speed, strict=True):
        model = {p for pattern in ("*.onnx*", "*.bin") for p in folder.glob(pattern)}
        size = sum(path.stat().st_size for path in model) / 1e6
        rows += [
            row(f"{name}: perplexity", perplexity[name]),
            row(f"{name}: decode", tokens_per_s, "tokens/s"),
            row(f"{name}: size", size, "MB"),
        ]
    title = "decode over the builder's int4"
    if not with_builder:
        return [*rows, row(title, None, "", 1, "not measured: --with-builder", least=True)]
    by_name = dict(zip(folders, speed, strict=True))
    note = f"perplexity {perplexity[OURS]:.2f} against {perplexity[YARDSTICK]:.2f}"
    return [*rows, row(title, by_name[OURS] / by_name[YARDSTICK], "", 1, note, least=True)]


def builds(gguf: Path, ours: Path, work: Path, given: Path | None) -> dict[str, Path]:
    """The builder's models of the file's dequantized weights.

    It reads GGUF files of float types only, and gets a folder of the hub's kind instead, whose
    tokenizer is the one that we made.
    """
    from fetched import ENGINES, environment  # noqa: PLC0415

    python = environment("engines", ENGINES, given)
    say("writing the weights for the builder")
    hub = work / "hub"
    jobs = work / "jobs.json"
    job = {"file": str(gguf), "out": str(work / "nothing.npz"), "save": str(hub)}
    jobs.write_text(json.dumps([job]), "utf-8")
    engines = Path(__file__).with_name("prove_models_engines.py")
    _run([python, engines, "transformers", jobs])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ours / name, hub)
    folders = {}
    for name, (precision, *options) in BUILDS.items():
        say(name)
        folders[name] = work / name.replace(" ", "-")
        command: list[str | Path] = [
            python, "-m", "onnxruntime_genai.models.builder", "-i", hub, "-o", folders[name],
            "-p", precision, "-e", "cpu", "-c", work / "builder-cache",
        ]  # fmt: skip
        _run([*command, *(["--extra_options", *options] if options else [])])
    shutil.rmtree(hub)
    return folders


def _run(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{command[1:4]} failed:\n{result.stderr[-3000:]}")


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# --- measurements, each in a child process of its own, so that memory and caches do not add up


def child(measure: str, *words: str | Path) -> dict[str, Any]:
    """Run a measurement; its findings."""
    result = subprocess.run(
        [sys.executable, Path(__file__).resolve(), "--measure", measure, *words],
        stdout=subprocess.PIPE,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"the measurement {measure} of {words} failed")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _import(gguf: str, models: str) -> dict[str, Any]:
    started = time.perf_counter()
    from edgemoa.models.importer import import_gguf  # noqa: PLC0415 - its import counts
    from edgemoa.models.library import ModelLibrary  # noqa: PLC0415
    from edgemoa.models.progress import silent  # noqa: PLC0415

    folder = import_gguf(Path(gguf), ModelLibrary(Path(models)), "bench", silent)
    seconds = time.perf_counter() - started
    # Not getrusage: its maximum survives exec, and so would be the parent's.
    status = Path("/proc/self/status").read_text("utf-8")
    return {
        "seconds": seconds,
        "peak": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _load(folder: str) -> dict[str, Any]:
    """As a board does, until it could answer; without what Python takes for its modules."""
    from edgemoa.engine import genai  # noqa: PLC0415

    started = time.perf_counter()
    genai.load(Path(folder), len(os.sched_getaffinity(0)))
    return {"seconds": time.perf_counter() - started}


def _perplexity(folder: str) -> dict[str, Any]:
    from fetched import text  # noqa: PLC0415

    from edgemoa.models.perplexity import perplexity  # noqa: PLC0415

    return {"perplexity": perplexity(Path(folder), text(), WINDOW_TOKENS, TEXT_TOKENS).perplexity}


def _reference(gguf: str, work: str) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415

    from edgemoa.models.importer import convert  # noqa: PLC0415
    from edgemoa.models.library import MANIFEST  # noqa: PLC0415
    from edgemoa.models.progress import silent  # noqa: PLC0415

    folder = Path(work) / "reference"
    folder.mkdir()
    manifest = convert(Path(gguf), folder, "reference", silent, reference=True)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return _perplexity(str(folder))


def _score(graph: str, ours: str) -> dict[str, Any]:
    """Perplexity of the builder's graph, by our tokens and convention."""
    import numpy as np  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415
    from fetched import text  # noqa: PLC0415

    from edgemoa.models.library import read_manifest  # noqa: PLC0415
    from edgemoa.models.perplexity import negative_log_likelihood, tokenize  # noqa: PLC0415

    m = read_manifest(Path(ours))
    tokens = tokenize(Path(ours), text().strip())[:TEXT_TOKENS]
    assert m.text_start_token_id is not None  # noqa: S101 - of what we import it is known
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    nothing = np.zeros((1, m.kv_heads, 0, m.head_size), np.float32)
    past = {n.name: nothing for n in session.get_inputs() if n.name.startswith("past")}
    losses = []
    for start in range(0, len(tokens) - 1, WINDOW_TOKENS):
        ids = tokens[start : start + WINDOW_TOKENS].copy()
        ids[0] = m.text_start_token_id
        inputs = {"input_ids": ids[None, :-1], "attention_mask": np.ones((1, len(ids) - 1), int)}
        (logits,) = session.run(["logits"], inputs | past)
        losses.append(negative_log_likelihood(logits[0], ids[1:]))
    return {"perplexity": float(np.exp(np.concatenate(losses).mean()))}


def _speeds(*folders: str) -> dict[str, Any]:
    """Decode speed at a short context, one round of each after the other, medians."""
    import onnxruntime_genai as og  # noqa: PLC0415
    from fetched import text  # noqa: PLC0415

    from edgemoa.text.tokens import load_tokens  # noqa: PLC0415

    models = [og.Model(folder) for folder in folders]
    prompt = load_tokens(Path(folders[0])).encode(text())[:PROMPT_TOKENS]

    def once(model: Any) -> float:
        length = PROMPT_TOKENS + DECODE_TOKENS + 1
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            generator.generate_next_token()
        return DECODE_TOKENS / (time.perf_counter() - started)

    for model in models:
        once(model)
    rounds = [[once(model) for model in models] for _ in range(ROUNDS)]
    return {"tokens_per_s": [statistics.median(speeds) for speeds in zip(*rounds, strict=True)]}


def _requantize(source: str, kind: str, target: str) -> dict[str, Any]:
    """Write a GGUF anew with every matrix in another type; vectors stay what they are."""
    import gguf  # noqa: PLC0415

    from tests.models import k_quants  # noqa: PLC0415

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = entry.types[1] if len(entry.types) > 1 else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        shape = tensor.shape[::-1].tolist()
        chosen = gguf.GGMLQuantizationType[kind]
        if len(shape) < 2:
            chosen = tensor.tensor_type
        elif shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
            chosen = gguf.GGMLQuantizationType[FALLBACK[kind]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        raw = (
            k_quants.quantize(values, chosen.name)
            if chosen.name in k_quants.KINDS
            else gguf.quants.quantize(values, chosen)
        )
        writer.add_tensor(tensor.name, raw, raw_dtype=chosen)
        if len(shape) > 1:
            types[chosen.name] = types.get(chosen.name, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"types": types}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "import": _import,
    "load": _load,
    "perplexity": _perplexity,
    "reference": _reference,
    "score": _score,
    "speeds": _speeds,
    "requantize": _requantize,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]](*sys.argv[3:])))
    else:
        sys.exit(main())
