"""``edgemoa bench``, and what a daemon makes of what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from models.tiny import tiny

from edgemoa import cli_bench
from edgemoa.cli import main
from edgemoa.client import Client
from edgemoa.engine import measure, tuning
from edgemoa.engine.tuning import Tuning
from edgemoa.errors import EdgemoaError
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.progress import silent
from edgemoa.sim import recording
from edgemoa.sim.recording import read_recording

NAME = "little"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    file = tiny("llama", "Q4_1", context=2048).write(folder / "little.gguf")
    import_gguf(file, ModelLibrary(folder / "models"), NAME, silent)
    return folder / "models"


@pytest.fixture
def settings(library: Path, tmp_path: Path) -> list[str]:
    told = {
        "board.models_dir": library, "board.state_dir": tmp_path / "state", "model.name": NAME,
        "api.socket": tmp_path / "socket", "net.mdns": "false",
    }  # fmt: skip
    return [word for key, value in told.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are believed, whatever else runs; and the tests run on at their own priority."""
    monkeypatch.setattr(tuning, "MOST_BUSY", 1.0)
    monkeypatch.setattr(measure, "MOST_BUSY", 1.0)
    monkeypatch.setattr(cli_bench, "_settle", lambda: None)


def bench(settings: list[str], *more: str) -> int:
    return main(["bench", *settings, *more])


def test_figures_and_what_is_kept(
    settings: list[str], quiet: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(settings, "--json") == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)
    assert figures["backend"] == "slots"
    assert figures["tuning"] is None
    assert figures["threads"] == tuning.cores()
    assert [read["tokens"] for read in figures["prefill"]] == [500]
    measured = {(wrote["context"], wrote["jobs"]) for wrote in figures["decode"]}
    assert measured >= {(64, 1), (1000, 1), (64, 2), (1000, 2)}
    for each in (*figures["prefill"], *figures["decode"]):
        assert each["tokens_per_s"] > 0
    assert 10 < figures["memory_mb"] <= figures["memory_peak_mb"]
    assert "loading" in told.err
    assert "daemon" not in told.err

    assert bench(settings, "--tune", "--json") == 0
    found = json.loads(capsys.readouterr().out)["tuning"]
    kept = json.loads((tmp_path / "state" / tuning.FILE).read_text())["kept"]
    assert [each["tuning"] for each in kept] == [found]

    assert bench(settings) == 0
    out = capsys.readouterr().out
    assert f"{found['threads']} threads, {found['slots']} jobs at a time, by measurement" in out
    named = ["--set", "model.threads=1", "--set", "model.slots=3"]
    assert bench(settings, "--tune", *named) == 0
    assert "best: 1 threads, 3 jobs" in capsys.readouterr().out
    # What a setting named is not taken for what is best without it.
    assert bench(settings) == 0
    out = capsys.readouterr().out
    assert f"{found['threads']} threads, {found['slots']} jobs at a time, by measurement" in out


def test_a_recording_of_a_board_drives_simulator_and_plan(
    settings: list[str], quiet: None, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cli_bench, "QUESTIONS", cli_bench.QUESTIONS[:2])
    file = tmp_path / "board.json"
    record = ("--record", str(file), "--set", "board.name=pi")
    monkeypatch.setattr(recording, "LEAST_MS", 1e6)
    assert bench(settings, *record) == 11
    assert "those of no board" in capsys.readouterr().err, "a toy is faster than any board"
    monkeypatch.setattr(recording, "LEAST_MS", 0.01)
    assert bench(settings, *record) == 0
    recorded = read_recording(file)
    assert (recorded.board, recorded.model) == ("pi", NAME)
    assert {sample.kind for sample in recorded.samples} >= {"proposal"}
    assert all(sample.prompt_tokens and sample.tokens for sample in recorded.samples)
    capsys.readouterr()
    group = ["--board", str(file), "--nodes", "3", "--seconds", "60", "--rate", "0.2", "--json"]
    assert main(["sim", *group]) == 0
    assert json.loads(capsys.readouterr().out)


def test_what_cannot_be_measured(
    settings: list[str],
    quiet: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert bench(settings, "--model", "none", "--json") == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "model_not_found"
    # Nothing is kept that was measured beside others.
    monkeypatch.setattr(tuning, "MOST_BUSY", -1.0)
    assert bench(settings, "--tune") == 69
    assert "too busy" in capsys.readouterr().err
    assert not (tmp_path / "state" / tuning.FILE).exists()


@contextmanager
def daemon(settings: list[str], tmp_path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Its status once it is ready; afterwards what it said."""
    said: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "edgemoa", "serve", *settings],
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        client, end = Client(tmp_path / "socket", timeout_s=5), time.monotonic() + 30
        while True:
            try:
                status = client.get("/v1/status")
                if status["ready"]:
                    break
            except EdgemoaError:
                assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield status, said
    finally:
        process.terminate()
        _, err = process.communicate(timeout=20)
        said += err.splitlines()


def test_a_daemon_tunes_once_and_does_as_was_found(
    settings: list[str], library: Path, quiet: None, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    state = tmp_path / "state"
    with daemon(settings, tmp_path) as (status, said):
        cores = status["threads"]
    assert 1 <= cores <= tuning.cores()
    busy = any("the board was busy" in line for line in said)
    assert busy != (state / tuning.FILE).exists()
    assert any("tuned" in line for line in said)

    board = tuning.this_board(read_manifest(library / NAME).model_id, "auto", "cpu")
    tuning.keep(state, board, Tuning(1, 3))
    with daemon(settings, tmp_path) as (status, said):
        assert (status["threads"], status["slots"]) == (1, 3)
        assert bench(settings, "--json") == 0
        told = capsys.readouterr()
        assert "daemon is running" in told.err
        assert json.loads(told.out)["threads"] == 1
    assert not any("tuned" in line for line in said)

    more = ["--set", "model.threads=2", "--set", "model.slots=5", "--set", "model.provider=cuda"]
    with daemon([*settings, *more], tmp_path) as (status, said):
        assert (status["threads"], status["slots"]) == (2, 5)
        assert "model.provider cuda cannot be used" in status["engine"]["note"]
    assert not any("tuned" in line for line in said)
