"""A board whose storage is read-only or full: real file systems, in a namespace of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lan.bed import HERE, MODEL, until, write_no_model

from edgemoa.client import Client
from edgemoa.errors import DiskFullError, EdgemoaError

ALONE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'


@contextmanager
def daemon(place: Path, options: str) -> Iterator[subprocess.Popen[str]]:
    """One whose state is on a file system that is mounted so, for it alone."""
    state, models = place / "state", place / "models"
    state.mkdir()
    write_no_model(models / MODEL)
    if subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make namespaces here")
    argv = [*ALONE, "sh", "-c", MOUNT, "sh", options, str(state)]
    argv += [sys.executable, str(HERE / "board.py"), "1", "serve"]
    for setting in (
        f"board.state_dir={state}", f"board.models_dir={models}", f"model.name={MODEL}",
        f"api.socket={place}/api.sock", "net.mdns=false",
    ):  # fmt: skip
        argv += ["--set", setting]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_read_only_storage_is_named_at_the_start(tmp_path: Path) -> None:
    with daemon(tmp_path, "ro") as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 15
    assert "Read-only file system" in said
    assert "Traceback" not in said


def test_full_storage_takes_no_prompt_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with daemon(tmp_path, "size=8m") as process:
        client = Client(tmp_path / "api.sock")

        def ready() -> bool:
            try:
                return bool(client.get("/v1/status")["ready"])
            except EdgemoaError:
                return False

        until(ready)
        enter = ["nsenter", "--target", str(process.pid), "--user", "--mount",
                 "--preserve-credentials", "sh", "-c"]  # fmt: skip
        filler = tmp_path / "state" / "filler"
        subprocess.run([*enter, f"cat /dev/zero > {filler}"], check=False, capture_output=True)
        with pytest.raises(DiskFullError):
            client.ask("Is there room?")
        assert client.get("/v1/status")["name"]
        subprocess.run([*enter, f"rm {filler}"], check=True)
        assert client.ask("And now?")
        assert process.poll() is None
