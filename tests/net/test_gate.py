"""The commands about the group, over a real socket, between a real network and a real client."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from netbed import Bed, Board, run, until

from edgemoa.api.server import Api
from edgemoa.cli import main
from edgemoa.client import Client
from edgemoa.errors import NetworkError, PairingError, UserError
from edgemoa.net.pairing import new_join_secret


async def served(bed: Bed, name: str, mode: int = 0o600) -> tuple[Board, Api, Client]:
    board = await bed.board(name, secret=None)
    path = Path(tempfile.mkdtemp(prefix="edgemoa-")) / "s"
    path.parent.chmod(0o755)
    nobody: Any = None  # the other routes are not asked
    api = Api(nobody, path, mode, gate=board.network)
    await api.start()
    return board, api, Client(path)


def test_from_code_to_revocation(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, api_a, at_a = await served(bed, "a")
        b, api_b, at_b = await served(bed, "b")
        opened = await asyncio.to_thread(at_a.post, "/v1/pairing", {})
        assert opened["expires_in_s"] == 180
        wrong = str((int(opened["code"].replace("-", "")) + 1) % 10**8).zfill(8)
        for body, error in (
            ({"code": wrong, "address": a.seed}, PairingError),
            ({"code": "12", "address": a.seed}, UserError),
            ({"code": "", "address": "nowhere"}, UserError),
            ({"code": 5}, UserError),
            ({}, UserError),
            ({"code": opened["code"], "more": 1}, UserError),
            ({"code": "1" * 5000}, UserError),
        ):
            with pytest.raises(error) as caught:
                await asyncio.to_thread(at_b.post, "/v1/pairing/join", body)
            assert wrong not in str(caught.value)
        asked = {"code": opened["code"], "address": a.seed}
        found = await asyncio.to_thread(at_b.post, "/v1/pairing/join", asked)
        assert (found["id"], found["state"]) == (a.id, "paired")
        await until(lambda: a.linked(b) and b.linked(a))
        window = await asyncio.to_thread(at_a.get, "/v1/pairing")
        assert (window["joined"], window["open"], window["failures"]) == (["b"], True, 1)
        assert opened["code"] not in str(window)
        closed = await asyncio.to_thread(at_a.delete, "/v1/pairing")
        assert closed["open"] is False
        named = {"id": b.id, "name": "attic"}
        assert await asyncio.to_thread(at_a.post, "/v1/devices/rename", named) == named
        await asyncio.to_thread(at_a.post, "/v1/devices/revoke", {"id": b.id})
        await until(lambda: not a.linked(b))
        assert [(d.name, d.state) for d in a.network.devices()] == [("b", "revoked")]
        with pytest.raises(UserError, match="identity"):
            await asyncio.to_thread(at_a.post, "/v1/devices/accept", {"id": b.id[:-1]})
        again = await asyncio.to_thread(at_a.post, "/v1/devices/accept", {"id": b.id})
        assert again["state"] == "paired"
        await until(lambda: a.linked(b))
        with pytest.raises(NetworkError):
            body = {"id": a.id[::-1], "address": a.seed}
            await asyncio.to_thread(at_a.post, "/v1/devices/accept", {**body, "id": _made_up()})
        await api_a.stop()
        await api_b.stop()

    run(tmp_path, test)


def _made_up() -> str:
    from edgemoa.core.envelope import board_id

    return board_id(b"m" * 32)


ASK = """
import http.client, os, socket, sys
os.setgid(65534); os.setuid(65534)
for method, path in (
    ("POST", "/v1/pairing"), ("GET", "/v1/pairing"), ("DELETE", "/v1/pairing"),
    ("POST", "/v1/pairing/join"), ("POST", "/v1/devices/accept"),
    ("POST", "/v1/devices/rename"), ("POST", "/v1/devices/revoke"),
):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(sys.argv[1])
    connection.request(method, path, b"{}")
    print(connection.getresponse().status)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
def test_others_who_may_use_the_socket_let_nobody_in(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, api, client = await served(bed, "a", 0o666)
        command = [sys.executable, "-c", ASK, str(client.path)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == ["403"] * 7, done.stderr
        assert a.network.window()["closed"] == "none was"
        await api.stop()

    run(tmp_path, test)


def test_secret_and_new_key_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "secret"
    text = new_join_secret()
    file.write_text(text + "\n")
    assert main(["join-secret", "show", "--set", f"net.join_secret_file={file}"]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert main(["join-secret", "show", "--set", "net.join_secret_file="]) == 2
    state = f"board.state_dir={tmp_path / 'state'}"
    for _ in range(2):
        assert main(["rotate-key", "--json", "--set", state]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["id"] == second["old"] != second["id"]
