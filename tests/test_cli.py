"""The command line where it needs no daemon."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from edgemoa import __version__, log, show
from edgemoa.cli import main
from edgemoa.config import Config
from edgemoa.errors import ConfigError, EdgemoaError
from edgemoa.net.pairing import parse_join_secret


def codes(kind: type[EdgemoaError]) -> list[type[EdgemoaError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in codes(child))]


def test_each_error_has_a_code_of_its_own_and_the_readme_lists_them() -> None:
    kinds = codes(EdgemoaError)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    listed = {
        (int(cells[1]), cells[3].strip(" `"))
        for line in readme.splitlines()
        if (cells := line.split("|")) and len(cells) > 4 and cells[1].strip().isdigit()
    }
    told = {(kind.exit_code, kind.code) for kind in kinds}
    # Peers' errors share their exit code: for the person at the keyboard they are one thing.
    assert {pair for pair in told if pair[0] != 16} == {p for p in listed if p[0] != 16}
    own = [kind.exit_code for kind in kinds if kind.exit_code != 16]
    assert len(set(own)) == len(own)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--version"], ["--help"], ["demo", "--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
    out = capsys.readouterr().out
    assert __version__ in out
    for command in ("demo", "serve", "ask", "status", "devices", "model", "bench", "sim", "config"):
        assert command in out


def test_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config"]) == 0
    reference = capsys.readouterr().out
    assert "net" in tomllib.loads(reference)
    file = tmp_path / "edgemoa.toml"
    file.write_text(reference)
    assert main(["config", "--check", str(file)]) == 0
    file.write_text("[net]\nprot = 1\n")
    assert main(["config", "--check", str(file)]) == 3
    assert "next: did you mean 'port'?" in capsys.readouterr().err


def test_join_secrets_differ_and_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join-secret", "new"]) == main(["join-secret", "new"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first != second
    parse_join_secret(first)


def test_sim_says_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sim", "--seconds", "60", "--loss", "0.1", "--crashes", "10", "--json", "--seed", "3"]
    assert main(argv) == main(argv) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert first["answered"] > 0
    assert first["latency_ms_mean"] > 0
    assert main(["sim", "--loss", "1.5", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid_request"
    assert main(["sim", "--rate", "0", "--seconds", "5"]) == 0


@pytest.mark.parametrize("prompt", ["", " \n", "\udcff"])
def test_prompts_that_are_none(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ask", "demo"):
        assert main([command, prompt, "--json"]) == 13
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid_prompt"


def test_a_reader_that_has_enough_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "edgemoa", "config"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_standard_input_that_is_no_text(tmp_path: Path) -> None:
    for given, code in ((b"\xff\xfe", 13), (b"", 13), ("blå".encode(), 10)):
        ended = subprocess.run(
            [sys.executable, "-m", "edgemoa", "ask", "--socket", str(tmp_path / "none")],
            input=given, capture_output=True, check=False,
        )  # fmt: skip
        assert ended.returncode == code, ended.stderr
        assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_that_are_none(value: str) -> None:
    assert main(["sim", f"--rate={value}"]) == 2
    assert main(["sim", f"--seconds={value}"]) == 2


def test_without_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError) as caught:
        Config().state_dir()
    assert "HOME" in caught.value.hint


def test_what_other_boards_say_cannot_act_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "\x1b]52;c;eA==\x07\x1b[2J\u202e"
    chunks: list[dict[str, Any]] = [
        {"edgemoa": {"type": "left_out", "left_out": {"layer": 1, "board": evil, "reason": evil}}},
        {"choices": [{"delta": {"content": f"Hi{evil}\n\tthere"}}]},
    ]
    show.follow(chunks, show.Terminal())
    told = capsys.readouterr()
    assert told.out == "Hi]52;c;eA==[2J\n\tthere\n"
    assert "\x1b" not in told.err
    assert "\x1b" not in show.table([("A",), (evil,)])


def test_what_each_job_waited_read_and_wrote_is_shown() -> None:
    record = {
        "board": "bee", "layer": 1, "model": "tiny", "own": True, "prompt_tokens": 50,
        "cached_tokens": 20, "tokens": 7, "queue_ms": 10, "prefill_ms": 100, "work_ms": 350,
        "asked_at_ms": 5, "network_ms": 20, "sent_bytes": 90, "received_bytes": 30,
    }  # fmt: skip
    answered = record | {
        "prompt_tokens": 50, "job_tokens": 300, "cached_tokens": 260, "work_ms": 1_100,
        "proposals": [record], "left_out": [], "note": "", "total_ms": 1_500,
        "granted": {"layers": 1, "proposers": 1, "why": ""},
    }  # fmt: skip
    head, own, answer, _ = show.summary(answered).splitlines()
    assert "cached" in head
    assert " ".join(own.split()[2:]) == "1 0.01 s 0.10 s 0.25 s 20 30 7 0.02 s 90/30 tiny"
    assert " ".join(answer.split()[1:]) == "0.01 s 0.10 s 1.00 s 260 40 7"


def test_when_who_did_what_is_drawn() -> None:
    record = {
        "board": "bee", "layer": 1, "own": False, "asked_at_ms": 100, "network_ms": 100,
        "queue_ms": 100, "prefill_ms": 200, "work_ms": 400,
    }  # fmt: skip
    answered = {
        "proposals": [record], "total_ms": 1_000, "queue_ms": 0, "prefill_ms": 0, "work_ms": 300,
    }  # fmt: skip
    lines = show.timeline(answered, 29).splitlines()
    assert lines[0] == "bee 1      ··░░▒▒▒▒████"
    assert lines[1] == "answer                 ██████"
    assert lines[2] == "         0             1.00 s"
    # Clocks that do not agree draw no more than there is.
    wild = answered | {"proposals": [record | {"asked_at_ms": -5, "work_ms": 9_000}]}
    assert max(map(len, show.timeline(wild, 29).splitlines()[:2])) <= 29


def test_speed_is_tokens_a_second_in_all() -> None:
    prefill = [{"context": 32, "ms_per_token": 2.0}, {"context": 200, "ms_per_token": 4.0}]
    decode = [{"rows": rows, "context": 100, "step_ms": 5.0 + 5 * rows} for rows in (1, 4)]
    lines = show.speed({"prefill": prefill, "decode": decode}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["<", "128", "500", "100", "160"],
        ["<", "256", "250", "-", "-"],
    ]
    assert show.speed({"prefill": [], "decode": []}) == ""


def test_logs_are_lines_with_fields(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log.set_up("info", "json")
        logging.getLogger("edgemoa.x").info("it is %s", "so", extra={"port": 7})
        logging.getLogger("edgemoa.x").debug("not this")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("odd", stacklevel=1)
        log.set_up("warning", "text")
        logging.getLogger("edgemoa.x").warning("beware", extra={"port": 7})
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = before
    first, warned, second = capsys.readouterr().err.splitlines()
    told = json.loads(first)
    assert (told["event"], told["port"], told["level"]) == ("it is so", 7, "info")
    assert json.loads(warned)["logger"] == "py.warnings"
    assert "odd" in json.loads(warned)["event"]
    assert second.endswith("warning beware port=7")
