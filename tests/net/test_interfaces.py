"""Interfaces that come, change and go, in a network namespace of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import asyncio, os, subprocess, sys
from edgemoa.core import envelope
from edgemoa.core.messages import BoardId
from edgemoa.net import interfaces
from edgemoa.net.discovery import Discovery

def ip(*words):
    subprocess.run(["ip", *words], check=True)

def interface(name):
    ip("link", "add", name, "type", "veth", "peer", "name", f"veth{name}")
    for end in (name, f"veth{name}"):
        ip("link", "set", end, "addrgenmode", "none", "up")

async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.05)

async def main():
    ip("link", "set", "lo", "up")
    assert interfaces.usual() == ("127.0.0.1",)
    moves = []
    own = BoardId(envelope.board_id(os.urandom(32)))
    found = Discovery(own, 7000, (), lambda *_: None, lambda _: None, moved=lambda: moves.append(1))
    found.start()

    def speaks(*addresses):
        zeroconf = found._zeroconf
        info = zeroconf and zeroconf.zeroconf.registry.async_get_infos_server(f"{own}.local.")
        return bool(info) and tuple(info[0].parsed_addresses()) == addresses

    await until(lambda: speaks("127.0.0.1"))
    # A network that comes late.
    interface("eth0")
    ip("addr", "add", "10.1.2.3/24", "dev", "eth0")
    await until(lambda: speaks("10.1.2.3"))
    assert moves
    # Another address; then a second interface.
    ip("addr", "add", "10.9.9.9/24", "dev", "eth0")
    ip("addr", "del", "10.1.2.3/24", "dev", "eth0")
    await until(lambda: speaks("10.9.9.9"))
    interface("wlan0")
    ip("addr", "add", "10.5.5.5/24", "dev", "wlan0")
    await until(lambda: speaks("10.9.9.9", "10.5.5.5"))
    # Those of containers are nobody's business.
    ip("link", "add", "docker0", "type", "bridge")
    ip("addr", "add", "172.17.0.1/16", "dev", "docker0")
    ip("link", "set", "docker0", "up")
    ip("addr", "add", "172.18.0.1/16", "dev", "vetheth0")
    assert interfaces.usual() == ("10.9.9.9", "10.5.5.5")
    # Only IPv6, and that only on the link.
    ip("link", "del", "wlan0")
    ip("addr", "flush", "dev", "eth0")
    ip("addr", "add", "fe80::77/64", "dev", "eth0", "nodad")
    await until(lambda: speaks("fe80::77"))
    # All gone, and the board lives on.
    ip("link", "del", "eth0")
    await until(lambda: speaks("127.0.0.1"))
    await found.stop()
    print("well")

asyncio.run(main())
"""


def test_interfaces_are_followed() -> None:
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("this needs ip (iproute2) and unshare (util-linux)")
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-Urn"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no network namespaces may be made here")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "well", done.stderr
