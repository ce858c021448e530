"""``edgemoa doctor`` on boards that are well, and on some that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_promises import running

from edgemoa.cli import main


def doctor(
    capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["doctor", "--json", *flags])
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == sum(each["level"] == "fail" for each in told["findings"])
    return code, {each["what"]: each for each in told["findings"]}


def test_a_board_that_is_well(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, models_dir) as board:
        place = board.socket.parent
        flags = [
            f"--set=board.state_dir={place / 'state'}",
            f"--config={place / 'edgemoa.toml'}",
            f"--socket={board.socket}",
        ]
        code, found = doctor(capsys, *flags)
        assert code == 0, found
        for what in ("edgemoa", "packages", "board", "settings", "state", "disk", "socket"):
            assert found[what]["level"] == "ok", found[what]
        assert found["model"]["told"].startswith("smollm2-135m-instruct")
        assert found["daemon"]["told"].endswith(f"process {board.process.pid}")
        assert found["engine"]["level"] == "ok"
        assert found["queue"]["told"].startswith("0 running, 0 waiting")
        assert (found["peers"]["level"], "edgemoa join" in found["peers"]["todo"]) == ("warn", True)

        (place / "state").chmod(0o755)
        assert main(["doctor", *flags]) == 1
        out = capsys.readouterr().out
        assert "fail  state" in out
        assert f"-> chmod 700 {place / 'state'}" in out
        assert "1 failed" in out.splitlines()[-1]


def test_without_a_daemon_or_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (f"board.state_dir={tmp_path}/state", f"board.models_dir={tmp_path}/models")
    flags = [word for each in settings for word in ("--set", each)]
    code, found = doctor(capsys, *flags, "--socket", str(tmp_path / "none.sock"))
    assert code == 1
    assert found["model"]["todo"].startswith("fetch it: edgemoa model pull ")
    assert "edgemoa serve" in found["daemon"]["todo"]
    assert found["state"]["level"] == "ok"
    assert "engine" not in found


def test_settings_that_are_wrong_do_not_keep_the_rest_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edgemoa.toml"
    file.write_text("[queue]\nown_request = 3\n")
    socket = str(tmp_path / "none.sock")
    code, found = doctor(capsys, "--config", str(file), "--socket", socket)
    assert code == 1
    assert found["settings"]["todo"] == "did you mean 'own_requests'?"
    assert found["daemon"]["level"] == "fail"
