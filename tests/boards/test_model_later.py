"""A board whose model comes when its daemon has long been running."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemoa import Client
from edgemoa.errors import DaemonUnreachableError, EdgemoaError, EngineError

MODEL = "smollm2-135m-instruct"


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_board_without_a_model_is_there_and_takes_one_when_it_comes(
    tmp_path: Path, models_dir: Path
) -> None:
    here = tmp_path / "models"
    settings = {
        "board.state_dir": tmp_path / "state",
        "board.models_dir": here,
        "api.socket": tmp_path / "sock",
        "model.name": MODEL,
        "net.mdns": "false",
    }
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "edgemoa", "serve", "--wait-for-model", *flags],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
    )
    client = Client(tmp_path / "sock", timeout_s=60)

    def ready() -> bool:
        try:
            return bool(client.status()["ready"])
        except DaemonUnreachableError:
            return False

    def serves() -> bool:
        try:
            return not client.status()["ready"]
        except DaemonUnreachableError:
            return False

    try:
        until(serves)
        assert f"no model '{MODEL}'" in client.status()["engine"]["trouble"]
        assert client.devices()["devices"] == []
        with pytest.raises(EngineError, match="no model"):
            client.ask("Hello.")
        with pytest.raises(EdgemoaError):
            client.submit("Hello.")
        shutil.copytree(models_dir / MODEL, here / ".coming")
        (here / ".coming").rename(here / MODEL)
        until(ready)
        assert client.status()["engine"]["trouble"] == ""
        assert client.ask("Hello.", max_tokens=4).text
    finally:
        daemon.terminate()
        assert daemon.wait(20) == 0
