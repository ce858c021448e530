"""Proves that models run as they were meant to, against other engines on the same weights.

For each architecture a small random model is written and run by llama.cpp, by transformers, by the
definition in numpy (tests/models/tiny.py, the tests' yardstick) and by edgemoa's import of it; for
two real files, llama (the default model) and gemma3, also text: tokens, perplexity, continuations.
transformers and llama.cpp are put into an environment in the cache, over 1 GB, the first time.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fetched import ENGINES, default_gguf, environment, gemma3_gguf, has, pip, text  # noqa: E402
from figures import Row, arguments, row, say, tell  # noqa: E402

from edgemoa.errors import ModelInvalidError  # noqa: E402
from edgemoa.models.importer import convert  # noqa: E402
from edgemoa.models.library import MANIFEST, Manifest  # noqa: E402
from edgemoa.models.perplexity import Scorer, negative_log_likelihood  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.text.files import RAGGED_GRAPH  # noqa: E402
from tests.models.tiny import PRESETS, Tiny, tiny  # noqa: E402

LLAMA_CPP: Final = "llama-cpp-python==0.3.36"
PORTABLE: Final = "-DGGML_NATIVE=OFF"  # a build for this very machine may crash on it
VECTORS: Final = ROOT / "tests" / "models" / "tokenizer_vectors.json"

# llama.cpp rounds its context up to 256 and picks phi3's rope factors by that, so the original
# context has to be as long for the short factors to be seen.
LONG: Final[dict[str, Any]] = {"original_context": 256, "context": 1024}
CHANGES: Final[dict[str, dict[str, Any]]] = {"phi3-long": LONG, "phi4": LONG}
LLAMA3_ROPE: Final = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOW_IGNORED: Final = "phi3"  # by llama.cpp, which says so when it loads one
KINDS: Final = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

SHORT_TOKENS: Final = 50
LONG_TOKENS: Final = 300
PROMPT_TOKENS: Final = 20
GREEDY_TOKENS: Final = 24
WINDOW: Final = 512
TEXT_TOKENS: Final = 2048
REAL_TOKENS: Final = 700  # longer than the sliding window of Gemma 3 270M
REAL_KEPT: Final = 64
CLEAR: Final = 0.5  # a margin of the best logit over the next, in standard deviations

# The definition is float64, the engines float32; llama.cpp takes GELU from a table of 16-bit
# floats; blocks meet activations of 8 bits.
REACH_FLOAT: Final = 1e-4
REACH_GELU_TABLE: Final = 1e-2
REACH_BLOCKS: Final = 0.01
REACH_REAL: Final = 1e-2


@dataclass
class Found:
    """What an engine gave for a job; see ``prove_models_engines``."""

    logits: np.ndarray
    greedy: list[int]
    nll: float
    tokens: list[list[int]]


@dataclass
class Engines:
    """The other engines, each in a process of its own for many jobs."""

    python: Path
    folder: Path
    without: list[str] = field(default_factory=list)  # what the arguments leave out

    @cached_property
    def llama_cpp(self) -> bool:
        """Whether llama.cpp is there; built if it can be, which takes minutes."""
        if not has(self.python, "llama_cpp"):
            say(f"building {LLAMA_CPP}, some minutes")
            try:
                pip(self.python, LLAMA_CPP, CMAKE_ARGS=PORTABLE)
            except subprocess.CalledProcessError:
                say("llama.cpp could not be built here (is there a compiler?)")
                return False
        return True

    def missing(self) -> list[Row]:
        """What has to be there, and is not: nothing that it would have shown is shown."""
        if "llama.cpp" in self.without or self.llama_cpp:
            return []
        return [row("llama.cpp", None, "", 0, "it could not be built here; see --without")]

    def run(self, engine: str, jobs: dict[str, dict[str, Any]]) -> dict[str, Found]:
        """Do jobs; without the engine there is nothing."""
        if not jobs or engine in self.without or (engine == "llama.cpp" and not self.llama_cpp):
            return {}
        say(f"{engine}: {', '.join(jobs)}")
        files = {name: self.folder / f"{engine}-{name}.npz" for name in jobs}
        listed = self.folder / f"{engine}.json"
        listed.write_text(
            json.dumps([job | {"out": str(files[name])} for name, job in jobs.items()]), "utf-8"
        )
        script = Path(__file__).with_name("prove_models_engines.py")
        result = subprocess.run(
            [self.python, script, engine, listed], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise SystemExit(f"{engine} failed:\n{result.stderr[-3000:]}")
        return {name: _read(path) for name, path in files.items()}


def _read(path: Path) -> Found:
    with np.load(path) as file:
        ends = np.cumsum(file["counts"] if "counts" in file else np.empty(0, int))
        flat = file["tokens"] if "counts" in file else np.empty(0)
        return Found(
            logits=file["logits"] if "logits" in file else np.empty(0),
            greedy=file["greedy"].tolist() if "greedy" in file else [],
            nll=float(file["nll"]) if "nll" in file else float("nan"),
            tokens=[part.tolist() for part in np.split(flat.astype(int), ends)][:-1],
        )


class Ours:
    """A file imported by edgemoa; float32 weights instead of blocks on demand."""

    def __init__(self, source: Path, folder: Path, *, reference: bool = False) -> None:
        folder.mkdir()
        self.manifest: Manifest = convert(source, folder, "proof", silent, reference=reference)
        (folder / MANIFEST).write_bytes(msgspec.json.encode(self.manifest))
        self._folder = folder
        self._scorer = Scorer(folder / RAGGED_GRAPH, self.manifest)

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [tokens, vocabulary], by the graph of packed tokens."""
        return np.concatenate([part for _, part in self._scorer.logits(np.array(ids))])

    def nll(self, windows: list[list[int]]) -> float:
        """Sum of -ln p over the windows, all tokens but the first of each."""
        total = 0.0
        for ids in windows:
            for first, logits in self._scorer.logits(np.array(ids[:-1])):
                targets = np.array(ids[first + 1 : first + 1 + len(logits)])
                total += float(negative_log_likelihood(logits, targets).sum())
        return total

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """By onnxruntime-genai with the generation graph, its cache kept; ends do not end it."""
        import onnxruntime_genai as og  # noqa: PLC0415

        model = og.Model(str(self._folder))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + count + 1)
        generator = og.Generator(model, params)
        found: list[int] = []
        for _ in range(count):
            generator.append_tokens(found[-1:] or prompt)
            found.append(int(generator.get_logits()[0, -1].argmax()))
        return found

    def tokens(self, texts: Iterable[str]) -> list[list[int]]:
        """As the engine does."""
        from edgemoa.text.tokens import load_tokens  # noqa: PLC0415

        tokens = load_tokens(self._folder)
        start = len(tokens.encode_prompt(""))  # what every prompt begins with
        return [tokens.encode_prompt(text)[start:] for text in texts]


# --- small models of every architecture


def texts_of(model: Tiny) -> tuple[list[int], list[int]]:
    """A text and a prompt, without special tokens; long enough for the long rope factors."""
    count = LONG_TOKENS if model.original_context else SHORT_TOKENS
    ids = np.random.default_rng(1).integers(6, 280, LONG_TOKENS).tolist()[:count]
    return ids, ids[:PROMPT_TOKENS]


def unlike(one: list[int], other: list[int]) -> int:
    """How many tokens of two continuations differ."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def expected_ratio(found: np.ndarray, expected: np.ndarray) -> float:
    """Perplexity over the reference's, on what the reference itself would write after each token.

    The mean over all possible next tokens, by their probability: a text of random tokens, or a
    short one, would drown the difference in chance.
    """
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float(np.exp((np.exp(p) * (p - q)).sum(-1).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def architectures(names: list[str], kinds: list[str], engines: Engines, work: Path) -> list[Row]:
    """The reference against the other engines, then the import against the reference."""
    models: dict[str, Tiny] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for name in names:
        model = tiny(name, **CHANGES.get(name, {}))
        ids, prompt = texts_of(model)
        models[name] = model
        jobs[name] = {
            "file": str(model.write(work / f"{name}.gguf")),
            "ids": ids, "keep": len(ids), "prompt": prompt, "count": GREEDY_TOKENS,
            "context": 512 if model.original_context else 256,
            "rope": LLAMA3_ROPE if name == "llama3" else None,
        }  # fmt: skip
    found = {engine: engines.run(engine, jobs) for engine in ("transformers", "llama.cpp")}
    rows: list[Row] = []
    for name, model in models.items():
        for engine, results in found.items():
            if name in results:
                rows += _defined(name, model, engine, results[name])
        rows += _imported(name, model, work)
        for kind in kinds:
            rows.append(_imported_blocks(name, kind, work))
    return rows


def _defined(name: str, model: Tiny, engine: str, found: Found) -> list[Row]:
    """The definition against an engine."""
    ids, prompt = texts_of(model)
    title, long, reach = f"{name}: definition, {engine}", None, REACH_FLOAT
    if engine == "llama.cpp":
        # It keeps to the rope factors of its whole context, however short a text.
        long = bool(model.original_context) or None
        if name == WINDOW_IGNORED:
            title, model = f"{title} without the window", copy.copy(model)
            model.window = 0
        if model.architecture == "gemma3":
            reach = REACH_GELU_TABLE
    greedy = model.continuation(np.array(prompt), GREEDY_TOKENS, long=long)
    return _compare(title, found, model.logits(np.array(ids)), greedy, reach)


def _compare(
    title: str, found: Found, logits: np.ndarray, greedy: list[int], reach: float
) -> list[Row]:
    far = float(np.abs(found.logits - logits).max())
    spread = f"of logits with a standard deviation of {logits.std():.2f}"
    wrong = unlike(found.greedy, greedy)
    return [
        row(f"{title}: logits", far, "", reach, spread),
        row(f"{title}: continuation", wrong, f"of {GREEDY_TOKENS}", 0),
    ]


def _imported(name: str, model: Tiny, work: Path) -> list[Row]:
    """The import with float32 weights, which has nothing to lose."""
    title = f"{name}: import in float32, definition"
    ids, prompt = texts_of(model)
    source = work / f"{name}.gguf"
    say(f"import: {name}")
    try:
        ours = Ours(source, work / f"{name}-imported", reference=True)
    except ModelInvalidError as error:
        return [row(f"{title}: logits", None, "", REACH_FLOAT, f"not supported yet: {error}")]
    ids = ids[: ours.manifest.context_length]  # phi3's original context, if there are two
    expected, found = model.logits(np.array(ids)), ours.logits(ids)
    greedy = model.continuation(np.array(prompt), GREEDY_TOKENS)
    ratio = expected_ratio(found, expected)
    return [
        *_compare(
            title, Found(found, ours.greedy(prompt, GREEDY_TOKENS), 0, []), expected, greedy,
            REACH_FLOAT,
        ),
        row(f"{title}: perplexity", ratio, "ratio", 1e-4, around=1),
    ]  # fmt: skip


def _imported_blocks(name: str, kind: str, work: Path) -> Row:
    """The import of a file in one type against what its weights stand for."""
    title = f"{name} {kind}: import, definition: perplexity"
    model = tiny(name, kind, **CHANGES.get(name, {}))
    source, folder = work / "blocks.gguf", work / f"{name}-{kind}"
    model.write(source)
    ids, _ = texts_of(model)
    try:
        ours = Ours(source, folder)
        ids = ids[: ours.manifest.context_length]
        found = ours.logits(ids)
    except ModelInvalidError as error:
        return row(title, None, "ratio", REACH_BLOCKS, f"not supported yet: {error}", around=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    expected = model.logits(np.array(ids))
    spread = expected.std()
    noise = np.sqrt(np.mean((found - expected) ** 2)) / spread
    best = np.sort(expected, -1)
    clear = best[:, -1] - best[:, -2] > CLEAR * spread
    wrong = int((found.argmax(-1) != expected.argmax(-1))[clear].sum())
    note = f"logits off by {noise:.2%} (rms), other best token in {wrong} of {clear.sum()} clear"
    ratio = expected_ratio(found, expected)
    told = row(title, ratio, "ratio", REACH_BLOCKS, note, around=1)
    # Where nothing is clear, that none is wrong shows nothing.
    return told | {"ok": told["ok"] and wrong == 0 and bool(clear.any())}


# --- real files


def real(name: str, source: Path, engines: Engines, work: Path) -> list[Row]:
    """A real file: tokens, perplexity, logits and a continuation, by everyone."""
    whole = text().strip()
    vectors = [vector["text"] for vector in json.loads(VECTORS.read_text("utf-8"))["vectors"]]
    texts = [whole, *whole.split("\n\n"), *vectors]
    rows: list[Row] = []
    job: dict[str, Any] = {"file": str(source), "context": 1024}
    theirs = engines.run("llama.cpp", {f"{name} tokens": job | {"texts": texts}})
    ours = None
    try:
        say(f"import: {name}")
        ours = Ours(source, work / f"{name}-imported")
    except ModelInvalidError as error:
        note = f"not supported yet: {error}"
        rows.append(row(f"{name}: import", None, "", REACH_REAL, note))
    if theirs:
        spoken = theirs[f"{name} tokens"].tokens
        if ours is not None:
            pairs = zip(texts, ours.tokens(texts), spoken, strict=True)
            wrong = [told for told, a, b in pairs if a != b]
            title = f"{name}: import, llama.cpp: texts with other tokens"
            note = f"such as {wrong[0][:40]!r}" if wrong else ""
            rows.append(row(title, len(wrong), f"of {len(texts)}", 0, note))
        tokens = spoken[0]
    elif ours is not None:
        tokens = ours.tokens([whole])[0]
    else:
        return rows

    start = _text_start(source)
    tokens = tokens[:TEXT_TOKENS]
    windows = [[start, *tokens[n + 1 : n + WINDOW]] for n in range(0, len(tokens), WINDOW)]
    ids = [start, *tokens[1:REAL_TOKENS]]
    job |= {
        "ids": ids, "keep": REAL_KEPT, "windows": windows,
        "prompt": ids[:PROMPT_TOKENS], "count": GREEDY_TOKENS,
    }  # fmt: skip
    if "transformers" in engines.without:  # the yardstick
        return rows
    exact = engines.run("transformers", {name: job})[name]
    other = engines.run("llama.cpp", {name: job})
    predictions = sum(len(window) - 1 for window in windows)
    yardstick = float(np.exp(exact.nll / predictions))
    rows.append(row(f"{name}: transformers, float32: perplexity", yardstick))
    if other:
        rows += _real_rows(f"{name}: llama.cpp", other[name], exact, predictions, bound=False)
    if ours is None:
        return rows
    say(f"import: {name}, scoring")
    for title, model in (
        (f"{name}: import", ours),
        (f"{name}: import, float32", Ours(source, work / f"{name}-float32", reference=True)),
    ):
        found = Found(
            model.logits(ids)[-REAL_KEPT:],
            model.greedy(ids[:PROMPT_TOKENS], GREEDY_TOKENS),
            model.nll(windows),
            [],
        )
        rows += _real_rows(title, found, exact, predictions, bound=True)
    return rows


def _real_rows(
    title: str, found: Found, exact: Found, predictions: int, *, bound: bool
) -> list[Row]:
    """Float32 weights have to agree in everything, blocks in perplexity."""
    whole = "float32" in title
    spread = exact.logits.std()
    noise = float(np.sqrt(np.mean((found.logits - exact.logits) ** 2)) / spread)
    ratio = float(np.exp((found.nll - exact.nll) / predictions))
    wrong = unlike(found.greedy, exact.greedy)
    than = "over transformers"
    reach = (5e-4 if whole else REACH_BLOCKS) if bound else None
    return [
        row(f"{title}: perplexity {than}", ratio, "ratio", reach, around=1),
        row(
            f"{title}: logits {than}, rms", noise, "of std", REACH_REAL if whole else None,
            f"the last {REAL_KEPT} of {REAL_TOKENS} tokens",
        ),
        row(
            f"{title}: continuation unlike {than}", wrong, f"of {GREEDY_TOKENS}",
            0 if whole else None,
        ),
    ]  # fmt: skip


def _text_start(source: Path) -> int:
    """The token that precedes a document: the file's own, or the end of the one before."""
    from gguf import GGUFReader  # noqa: PLC0415

    fields = GGUFReader(source).fields
    if fields["tokenizer.ggml.model"].contents() == "llama":
        return int(fields["tokenizer.ggml.bos_token_id"].contents())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    return int(tokens.index("<|endoftext|>"))


# --- recorded logits for the tests


def record(path: Path, engines: Engines, work: Path) -> None:
    """Write what the engines say about the small models, some logits of each, for test_tiny.py."""
    jobs: dict[str, dict[str, Any]] = {}
    for name in PRESETS:
        model = tiny(name, **CHANGES.get(name, {}))
        ids, _ = texts_of(model)
        jobs[name] = {
            "file": str(model.write(work / f"{name}.gguf")), "ids": ids, "keep": len(ids),
            "context": 512 if model.original_context else 256,
            "rope": LLAMA3_ROPE if name == "llama3" else None,
        }  # fmt: skip
    told: dict[str, Any] = {
        "made_with": f"{', '.join(ENGINES)}; {LLAMA_CPP}",
        "changes": CHANGES,
        "ids": jobs["phi3-long"]["ids"],
        "counts": {name: len(job["ids"]) for name, job in jobs.items()},
        "positions": [0, 17, -1],
        "tokens": [0, 95, 190, 287],
    }
    for engine in ("transformers", "llama.cpp"):
        told[engine] = {}
        for name, found in engines.run(engine, jobs).items():
            picked = found.logits[np.ix_(told["positions"], told["tokens"])]
            told[engine][name] = [[round(float(v), 6) for v in line] for line in picked]
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in told.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main() -> int:
    """Prove, print, judge."""
    assert __doc__  # noqa: S101
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[*PRESETS, "smollm2", "gemma3-270m"],
        help="these only: %(choices)s",
    )  # fmt: skip
    parser.add_argument(
        "--kinds", nargs="*", metavar="TYPE", choices=KINDS, default=list(KINDS),
        help="tensor types of the small models (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--environment", type=Path, metavar="DIR",
        help="an environment that has the other engines, instead of one in the cache",
    )  # fmt: skip
    parser.add_argument(
        "--record", type=Path, metavar="FILE",
        help="write the logits that tests/models/test_tiny.py compares with, and nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="+", metavar="ENGINE", choices=["llama.cpp", "transformers"], default=[],
        help="leave these out: %(choices)s",
    )  # fmt: skip
    given: argparse.Namespace = parser.parse_args()
    left_out = [f"--without {engine}" for engine in given.without]
    left_out += [f"--only {' '.join(given.only)}"] if given.only else []
    if set(given.kinds) != set(KINDS):
        left_out.append(f"--kinds {' '.join(given.kinds)}".rstrip())
    text(given.text)  # before the long work
    names = given.only or [*PRESETS, "smollm2", "gemma3-270m"]
    with tempfile.TemporaryDirectory(prefix="edgemoa-proof-") as folder:
        work = Path(folder)
        python = environment("engines", ENGINES, given.environment)
        engines = Engines(python, work, given.without)
        if given.record:
            record(given.record, engines, work)
            return 0
        rows = architectures([n for n in names if n in PRESETS], given.kinds, engines, work)
        if "smollm2" in names:
            rows += real("smollm2", default_gguf(work), engines, work)
        if "gemma3-270m" in names:
            rows += real("gemma3-270m", gemma3_gguf(), engines, work)
        rows += engines.missing()
    return tell(rows, given, left_out)


if __name__ == "__main__":
    sys.exit(main())
