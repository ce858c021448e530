"""Every parser that strangers reach, against its corpus and a few hundred changed inputs; and the
fuzzer itself, against parsers that are wrong. ``tools/fuzz`` does the same with millions."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutated
from targets import HERE, SLACK_BYTES, Target, TooLargeError, size_bytes, targets

ROOT = HERE.parents[1]
TARGETS = targets()

pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")  # a stranger's, and odd


def tried(target: Target, seed: int, count: int) -> None:
    """Judge inputs that are made of the corpus; the same ones for the same seed."""
    rng = Random(seed)
    for _ in range(count):
        data, other = rng.choice(target.corpus), rng.choice(target.corpus)
        data = mutated(data, other, target.form, target.head, rng)
        try:
            target.judge(data)
        except Exception as error:
            error.add_note(f"{target.name} was given {len(data)} bytes: {data[:2000].hex()}")
            raise


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_the_corpus(target: Target) -> None:
    accepted = 0
    for data in target.corpus:
        target.judge(data)
        try:
            target.parse(data)
        except target.errors:
            continue
        accepted += 1
    assert accepted, "nothing to go on from"


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_changed_inputs(target: Target) -> None:
    @settings(
        max_examples=20, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def some(seed: int) -> None:
        tried(target, seed, 50)

    some()


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_every_beginning_of_a_good_input(target: Target) -> None:
    """Whatever is cut off, at each offset of the shorter seeds."""
    for data in sorted(target.corpus, key=len)[:3]:
        for end in range(min(len(data), 600)):
            target.judge(data[:end])


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_nothing_is_kept(target: Target) -> None:
    """Neither what was taken nor what was refused, nor where: an error that is made once and raised
    often would hold on to every place that it came by."""
    before = 0
    for _ in range(3):  # tables of what was seen fill the first time
        tried(target, 1, 300)
        gc.collect()
        before, grown = len(gc.get_objects()), len(gc.get_objects()) - before
    assert grown < 30


def test_wrong_parsers_are_found_out() -> None:
    """One that trips over a value inside a valid message, and one that makes much of little."""
    hop = TARGETS["hop"]

    def trips(data: bytes) -> object:
        message = hop.parse(data)
        return 1 / (getattr(message, "number", 1) - 2**32)

    def swells(data: bytes) -> object:
        hop.parse(data)
        return [bytes(n) for n in range(200)]

    for parse, error in ((trips, ZeroDivisionError), (swells, TooLargeError)):
        wrong = Target("wrong", parse, hop.errors, hop.seeds)
        with pytest.raises(error) as caught:
            tried(wrong, 7, 20_000)
        assert "was given" in caught.value.__notes__[0]


def test_sizes_are_of_all_that_is_inside() -> None:
    inner = b"x" * 1000
    assert size_bytes({"a": [inner, (inner, "é")]}) > 1000
    assert size_bytes([inner, inner]) < 1300, "what is there twice is counted once"
    assert size_bytes([bytes([n]) * 1000 for n in range(20)]) > 20_000
    assert size_bytes(None) == 0
    assert SLACK_BYTES < 10_000


WRONG = """
import os, signal, sys, time
sys.path[:0] = [{tools!r}, {fuzz!r}, {vectors!r}]
import fuzz_worker, targets
from pathlib import Path

kept, count = [], 0

class Wrong(targets.Target):
    folder = Path({folder!r})

def parse(data):
    global count
    count += 1
    match {how!r}:
        case "raises" if count > 3000:
            raise KeyError("x")
        case "dies" if count > 3000:
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs" if count > 3000:
            time.sleep(60)
        case "grows":
            kept.append(bytes(2000))
        case "asks":
            bytearray(1 << 34)
    raise ValueError

wrong = Wrong("hop", parse, (ValueError,), lambda: [b"a", b"b"], "bytes")
fuzz_worker.TARGETS["hop"] = wrong
if sys.argv[1:2] and sys.argv[1][0] == "{{":
    fuzz_worker.main()
import fuzz
fuzz.TARGETS["hop"] = wrong
fuzz.HANG_S = 3.0
fuzz.WORKER = Path(__file__)
sys.exit(fuzz.main())
"""


@pytest.mark.parametrize(
    ("how", "short", "told"),
    [
        ("nothing", set[str](), ""),
        ("raises", {"findings"}, "KeyError at "),
        ("dies", {"inputs", "findings"}, "SIGSEGV"),
        ("hangs", {"inputs", "findings"}, "more than 3 s"),
        ("grows", {"growth"}, ""),
        ("asks", {"findings"}, "MemoryError at "),
    ],
)
def test_the_tool_tells_what_happens(how: str, short: set[str], told: str, tmp_path: Path) -> None:
    folder, script = tmp_path / "corpus", tmp_path / "wrong.py"
    places = {"tools": str(ROOT / "tools"), "fuzz": str(HERE), "vectors": str(HERE / "../vectors")}
    script.write_text(WRONG.format(how=how, folder=str(folder), **places))
    options = ["--engine", "own", "--target", "hop", "--inputs", "20000", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *options, "--seed", "3", "--json", "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)["figures"]}
    fell_short = {name for name, row in rows.items() if not row["ok"]}
    # Twenty thousand are not ten million, whatever happens.
    assert fell_short == {f"hop: {each}" for each in {"inputs", *short}}, done.stderr
    assert told in rows["hop: findings"]["note"]
    assert (rows["hop: inputs"]["value"] == 20_000) == ("inputs" not in short)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert all(name in last for name in fell_short)
    assert bool(list(folder.glob("*"))) == ("findings" in short)
