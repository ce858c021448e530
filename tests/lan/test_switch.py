"""The switch does to frames what it is told: otherwise no test on it means anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .bed import Bed, Host, NoBedError

NUMBER = 200
HEAR = """
import json, socket
own = socket.socket(type=socket.SOCK_DGRAM)
own.bind(("", 9000))
own.settimeout(1.5)
print("ready", flush=True)
heard = []
try:
    while True:
        heard.append(int(own.recv(16)))
        own.settimeout(0.3)
except TimeoutError:
    print(json.dumps(heard))
"""
SAY = """
import socket, sys, time
own = socket.socket(type=socket.SOCK_DGRAM)
for number in range(int(sys.argv[2])):
    own.sendto(b"%d" % number, (sys.argv[1], 9000))
    time.sleep(0.0005)
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    try:
        made = Bed()
    except NoBedError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="module")
def hosts(bed: Bed) -> tuple[Host, Host]:
    return bed.host("a"), bed.host("b")


def heard(sender: Host, by: Host) -> list[int]:
    """The numbers that arrive, of those up to ``NUMBER`` that are sent in order."""
    there = by.popen([sys.executable, "-c", HEAR], stdout=subprocess.PIPE)
    assert there.stdout is not None
    assert there.stdout.readline() == b"ready\n"
    argv = [sys.executable, "-c", SAY, by.address, str(NUMBER)]
    assert sender.popen(argv).wait(20) == 0
    out, _ = there.communicate(timeout=20)
    told: list[int] = json.loads(out)
    return told


def test_all_arrives_in_order_and_is_counted(bed: Bed, hosts: tuple[Host, Host]) -> None:
    before = bed.sent()["a"]
    assert heard(*hosts) == list(range(NUMBER))
    now = bed.sent()["a"]
    digits = sum(len(str(number)) for number in range(NUMBER))
    assert now["udp"] - before.get("udp", 0) == NUMBER * 28 + digits  # IP and UDP: 20 and 8 bytes
    assert bed.sent()["b"].get("udp", 0) == 0


def test_some_is_lost_doubled_or_late(bed: Bed, hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    heard(b, a)  # both know where the other is
    bed.usual(loss=0.5)
    assert NUMBER * 0.3 < len(heard(a, b)) < NUMBER * 0.7
    bed.usual(twice=1.0)
    assert sorted(heard(a, b)) == sorted([*range(NUMBER)] * 2)
    bed.usual(delay_ms=20, jitter_ms=50)
    jumbled = heard(a, b)
    assert jumbled != sorted(jumbled)
    assert sorted(jumbled) == [*range(NUMBER)]
    bed.usual()


def test_a_cut_is_one_way_until_it_is_healed(bed: Bed, hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    bed.rule([a], [b], loss=1)
    assert heard(a, b) == []
    assert heard(b, a) == [*range(NUMBER)]
    bed.heal()
    assert heard(a, b) == [*range(NUMBER)]
