"""What systemd and the daemon say to each other, with this test in systemd's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoa import systemd
from edgemoa.client import Client
from edgemoa.errors import StateError

# What systemd does: sockets from descriptor 3 on, and whom they are for.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "WATCHDOG_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "edgemoa", *sys.argv[2:]])
"""


def launched(fd: int, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(fd), *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environ,
        pass_fds=(fd,), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_daemon_takes_the_socket_that_it_is_given_and_shows_that_it_lives(
    tmp_path: Path, models_dir: Path
) -> None:
    path, address = tmp_path / "given.sock", str(tmp_path / "notify")
    with (
        socket.socket(socket.AF_UNIX) as given,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told,
    ):
        given.bind(str(path))
        given.listen(8)
        told.bind(address)
        told.settimeout(20)
        daemon = launched(
            given.fileno(), "serve", "--set", f"board.state_dir={tmp_path}/state",
            "--set", f"board.models_dir={models_dir}", "--set", "net.mdns=false",
            "--set", "model.threads=1",
            NOTIFY_SOCKET=address, WATCHDOG_USEC="400000",
        )  # fmt: skip
        try:
            assert told.recv(4096).startswith(b"READY=1")
            assert [told.recv(4096) for _ in range(4)] == [b"WATCHDOG=1"] * 4
            assert Client(path).get("/v1/status")["name"]
            daemon.terminate()
            while told.recv(4096) == b"WATCHDOG=1":
                pass
            assert daemon.wait(20) == 0, daemon.stderr and daemon.stderr.read()
        finally:
            daemon.kill()
            daemon.communicate()
    assert path.exists(), "it is systemd's"


def test_what_is_no_listening_socket_is_refused(tmp_path: Path, models_dir: Path) -> None:
    settings = (f"board.state_dir={tmp_path}/state", f"board.models_dir={models_dir}")
    flags = [word for each in settings for word in ("--set", each)]
    with (tmp_path / "file").open("w") as file:
        daemon = launched(file.fileno(), "serve", *flags)
        _, err = daemon.communicate(timeout=20)
    assert "systemd handed over something else" in err
    assert daemon.returncode == StateError.exit_code


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert systemd.watchdog_s(environ) == seconds


def test_sockets_are_for_whom_they_are_for() -> None:
    assert systemd.listening_socket({}) is None
    assert systemd.listening_socket({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) is None
    with pytest.raises(StateError, match="something else"):
        systemd.listening_socket({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"})
