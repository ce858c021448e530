"""Which of two links stays, decided alike at both ends."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from netbed import Recorder, paired

from edgemoa.core.messages import BoardId
from edgemoa.net import wire
from edgemoa.net.identity import Identity, load_identity
from edgemoa.net.peer import Budget, Peer


@dataclass
class FakeLink:
    """One end of a link, as far as the choice looks at it."""

    dialler: BoardId
    hello: wire.Hello
    silent_s: float = 0.0
    closed: bool = False

    def idle(self) -> float:
        return self.silent_s

    def close(self, reason: str) -> None:
        assert reason
        self.closed = True


def hello(boot: int = 7) -> wire.Hello:
    return wire.Hello((1, 1), boot, b"s" * 32, b"k" * 8, 9, "name")


def peer(own: Identity, other: Identity) -> Peer:
    return Peer(
        paired(other),
        identity=own,
        boot=1,
        events=Recorder(),
        budget=Budget(),
        timings=wire.Timings(),
    )


@pytest.fixture
def two(tmp_path: Path) -> list[Identity]:
    boards = [load_identity(tmp_path / name) for name in ("a", "b")]
    return sorted(boards, key=lambda b: b.board_id)


def attach(at: Peer, link: FakeLink) -> bool:
    return at.attach(link)  # type: ignore[arg-type]


@pytest.mark.parametrize("orders", list(itertools.product([(0, 1), (1, 0)], repeat=2)))
def test_both_dialled_at_once(
    two: list[Identity], orders: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """In whatever order the two links come up at either end, the smaller identity's stays."""
    for own, other, order in zip(two, reversed(two), orders, strict=True):
        at = peer(own, other)
        links = [FakeLink(board.board_id, hello()) for board in two]
        assert [attach(at, links[n]) for n in order] == [True, order == (1, 0)]
        assert id(at.link) == id(links[0])
        assert links[1].closed == (order == (1, 0))


def test_what_replaces_a_link(two: list[Identity]) -> None:
    small, big = (b.board_id for b in two)
    for old, new, replaces in (
        (FakeLink(small, hello()), FakeLink(small, hello()), True),  # it lost the old one
        (FakeLink(big, hello()), FakeLink(big, hello()), True),
        (FakeLink(small, hello()), FakeLink(big, hello(8)), True),  # it was restarted
        (FakeLink(small, hello()), FakeLink(big, hello(6)), True),  # from an older image
        (FakeLink(small, hello(), silent_s=3.5), FakeLink(big, hello()), True),
        (FakeLink(small, hello(), silent_s=2.5), FakeLink(big, hello()), False),
        (FakeLink(small, hello(), closed=True), FakeLink(big, hello()), True),
    ):
        at = peer(two[0], two[1])
        assert attach(at, old)
        old_closed = old.closed
        assert attach(at, new) == replaces
        assert old.closed == (replaces or old_closed)
        assert id(at.link) == id(new if replaces else old)
