"""Three real daemons on three hosts, and a network between them that fails.

The same at length, and with more cases: ``tools/cluster-test``.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .bed import PORT, Bed, Board, NoBedError, until

CANARY = "xyzzy-canary-4711"
CONTROL = "a-canary-in-the-open"
SAY = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(sys.argv[1].encode(), "


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that was sent, from the first frame on."""
    return tmp_path_factory.mktemp("lan") / "all.pcap"


@pytest.fixture(scope="module")
def bed(capture: Path) -> Iterator[Bed]:
    """A network with three boards that know each other."""
    try:
        made = Bed(capture=capture)
    except NoBedError as error:
        pytest.skip(str(error))
    with made:
        boards = made.boards(3, "log.level=debug", "queue.own_proposal=always")
        until(lambda: all_know(boards), 30)
        yield made


@pytest.fixture
def boards(bed: Bed) -> list[Board]:
    """They, on a network that works."""
    bed.heal()
    bed.usual()
    until(lambda: all_know(bed.all), 30)
    return bed.all


def all_know(boards: list[Board]) -> bool:
    return all(board.knows(*boards) for board in boards)


def all_see(boards: list[Board], other: Board, what: str) -> Callable[[], bool]:
    return lambda: all(board.sees()[other.name] == what for board in boards)


def test_boards_with_one_secret_find_each_other_and_work_together(boards: list[Board]) -> None:
    answered = boards[0].ask("Why is the sky blue?")
    assert {p["board"] for p in answered["proposals"]} == {board.name for board in boards}
    assert "SKY" in answered["text"]
    devices = boards[0].client.devices()["devices"]
    addresses = {f"{board.host.address}:{PORT}" for board in boards[1:]}
    assert {(d["state"], d["address"]) for d in devices} == {("paired", a) for a in addresses}


def test_prompts_are_answered_by_all_while_packets_are_lost(bed: Bed, boards: list[Board]) -> None:
    bed.usual(loss=0.1, twice=0.1, jitter_ms=10)
    for number in range(6):
        answered = boards[number % 3].ask(f"Say {number}.")
        assert len(answered["proposals"]) == 3, answered["left_out"]
    assert all_know(boards)


def test_both_sides_of_a_partition_work_on_and_meet_again(bed: Bed, boards: list[Board]) -> None:
    one, *others = boards
    bed.cut([one], others)
    until(all_see(others, one, "gone"))
    # Nobody confirms what it finds, so that it believes it later; but it doubts.
    until(lambda: "alive" not in one.sees().values())
    assert "ALONE" in one.ask("Alone?")["text"]
    for board in others:
        answered = board.ask("Together?")
        assert {p["board"] for p in answered["proposals"]} == {b.name for b in others}
    bed.heal()
    until(lambda: all_know(boards))
    assert len(one.ask("Together again?")["proposals"]) == 3


def test_a_board_without_power_is_gone_for_all_and_comes_back(boards: list[Board]) -> None:
    *others, lost = boards
    lost.kill()
    until(all_see(others, lost, "gone"))
    assert len(others[0].ask("Without it?")["proposals"]) == 2
    lost.start()
    until(lambda: all_know(boards))
    assert len(lost.ask("With it?")["proposals"]) == 3


def test_nobody_can_read_a_prompt_or_its_answer(
    bed: Bed, boards: list[Board], capture: Path
) -> None:
    for board in boards:
        answered = board.ask(f"Repeat this: {f' {CANARY}' * 20}")
        assert CANARY.upper() in answered["text"]
        assert len(answered["proposals"]) == 3, (board.name, answered["left_out"])
    # That it would be seen: the same network with the same capture, in the open.
    where = (boards[1].host.address, 9)
    told = [sys.executable, "-c", f"{SAY}{where})", CONTROL]
    assert boards[0].host.popen(told, stderr=subprocess.DEVNULL).wait(20) == 0

    def seen(word: str) -> bool:
        return word.lower().encode() in capture.read_bytes().lower()

    bed.end_capture()
    assert seen(CONTROL)
    assert seen("_edgemoa")  # mDNS is in it as well
    assert not seen(CANARY)
    secret = (bed.place / "join-secret").read_text().strip()
    assert not seen(secret)
    for board in boards:
        shown = board.log.read_text() + json.dumps([board.status(), board.client.devices()])
        assert CANARY not in shown.lower()
        assert secret not in shown


def test_nothing_is_left_of_a_bed_whose_maker_is_killed() -> None:
    program = (
        "import sys, time; from lan.bed import Bed; bed = Bed(); board = bed.board('a');"
        " print(bed._switch.pid, board.process.pid, bed.place, flush=True); time.sleep(60)"
    )
    folders = [str(Path(__file__).parents[at]) for at in (1, 2)]
    argv = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {program}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        told = maker.stdout.readline().split()
        if not told:
            pytest.skip("no namespaces, as the other tests say")
        maker.send_signal(signal.SIGKILL)
    *pids, place = told
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    shutil.rmtree(place)
