"""Tries whole boards on a network that fails, case by case.

Real daemons, each on a host of its own (``tests/lan/bed.py``), with a stand-in for the model; the
case ``model`` has the real one. Each case begins with a new network, and one line says what came of
it. Everything that is sent in a case is searched for its prompts. Exit code 1 where a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from figures import say  # noqa: E402
from lan.bed import PORT, Bed, Board, NoBedError, until  # noqa: E402

from edgemoa.errors import EdgemoaError  # noqa: E402
from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402

MODEL: Final = "smollm2-135m-instruct"
CANARY: Final = "xyzzy-canary-4711"
KNOWN_S: Final = 40.0
GONE_S: Final = 30.0
TOKEN_MS: Final = 10.0
LONG: Final = " ".join(f"{CANARY}-{i}" for i in range(200))  # two seconds of work


class CaseError(Exception):
    """A case did not end as it has to."""


@dataclass
class Case:
    """One network. ``minutes`` is how long the cases that can take long do."""

    bed: Bed
    minutes: float
    notes: list[str] = field(default_factory=list)

    def boards(self, number: int, *flags: str, **options: Any) -> list[Board]:
        """So many, that know each other."""
        made = self.bed.boards(number, "log.level=debug", *flags, **options)
        self.meet(made)
        return made

    def meet(self, boards: list[Board], what: str = "") -> None:
        """Wait until all of these know each other."""
        began = time.monotonic()
        wait(
            lambda: all(board.knows(*boards) for board in boards),
            KNOWN_S,
            lambda: f"{what or 'found'}: {views(boards)}",
        )
        if what:
            self.notes.append(f"{what} in {time.monotonic() - began:.1f} s")

    def gone(self, board: Board, for_whom: list[Board]) -> None:
        """Wait until they all know that it is gone."""
        began = time.monotonic()
        wait(
            lambda: all(each.sees().get(board.name) == "gone" for each in for_whom),
            GONE_S,
            lambda: f"{board.name} gone: {views(for_whom)}",
        )
        self.notes.append(f"known to be gone in {time.monotonic() - began:.1f} s")


def check(true: object, said: str) -> None:
    """Fail the case unless it is so."""
    if not true:
        raise CaseError(said)


def wait(true: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    """Fail the case unless it comes to be so in time."""
    try:
        until(true, seconds)
    except TimeoutError as error:
        raise CaseError(f"{error}: {said()}") from None


def views(boards: list[Board]) -> str:
    """What they believe of each other, for people."""
    return "; ".join(f"{board.name} sees {board.sees()}" for board in boards)


def by(answered: dict[str, Any]) -> set[str]:
    """Who proposed."""
    return {proposal["board"] for proposal in answered["proposals"]}


def say_it(board: Board, **options: Any) -> dict[str, Any]:
    """A short prompt, answered."""
    answered = board.ask(f"Say {CANARY}.", **options)
    check(CANARY.upper() in answered["text"], f"{board.name} answered something else")
    return answered


@contextlib.contextmanager
def asked(board: Board, prompt: str = LONG) -> Iterator[Callable[[], dict[str, Any]]]:
    """A long prompt on its way; gives what waits for its answer."""
    outcome: list[dict[str, Any] | EdgemoaError] = []

    def ask() -> None:
        try:
            outcome.append(board.ask(prompt, max_tokens=200))
        except EdgemoaError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def answer() -> dict[str, Any]:
        thread.join(180)
        check(outcome, "the prompt is still not answered")
        if isinstance(outcome[0], EdgemoaError):
            raise CaseError(f"the prompt failed: {outcome[0]}")
        return outcome[0]

    yield answer


def working(board: Board) -> bool:
    """Whether it works on anything."""
    status = board.status()
    return bool(status.get("running", 0) or status.get("waiting", 0))


# --- the cases


def found(case: Case) -> None:
    """Five boards with one secret find each other by mDNS and answer together."""
    began = time.monotonic()
    boards = case.boards(5)
    case.notes.append(f"known in {time.monotonic() - began:.1f} s")
    check(len(by(say_it(boards[0], plan="M2k4"))) >= 4, "not all took part")


def stranger(case: Case) -> None:
    """A board without the secret gets nothing, and is shown as pending."""
    boards = case.boards(2)
    other = case.bed.board("stranger", secret=False)

    def pending() -> bool:
        told = boards[0].client.devices()["devices"]
        return [d["state"] for d in told] == ["paired", "pending"]

    wait(pending, KNOWN_S, lambda: str(boards[0].client.devices()))
    say_it(boards[0])
    check("stranger" not in boards[0].sees(), "a stranger is taken for a board of the group")
    check(not other.sees(), "a stranger knows the group")
    check(other.status()["counters"]["proposals_served"] == 0, "a stranger was asked")


def revoked(case: Case) -> None:
    """A board that is revoked on one is out on all, at once."""
    *boards, out = case.boards(4)
    began = time.monotonic()
    boards[0].client.post("/v1/devices/revoke", {"id": out.status()["id"]})
    wait(lambda: all(out.name not in b.sees() for b in boards), 5, lambda: views(boards))
    case.notes.append(f"out for all in {time.monotonic() - began:.1f} s")
    before = out.status()["counters"]["proposals_served"]
    check(by(say_it(boards[1], plan="M1k3")) <= {b.name for b in boards}, "it was asked")
    check(out.status()["counters"]["proposals_served"] == before, "it was asked")
    time.sleep(3)
    check(all(out.name not in b.sees() for b in boards), f"it is back: {views(boards)}")


def cloned(case: Case) -> None:
    """A second board with the key of a first is noticed, and does not stay beside it."""
    boards = case.boards(3)
    twin = case.bed.board("twin", "log.level=debug", start=False)
    boards[2].stop()
    shutil.copytree(boards[2].state_dir, twin.state_dir)
    boards[2].start()
    case.meet(boards)
    twin.start()

    def noticed() -> bool:
        told = [d for b in boards[:2] for d in b.client.devices()["devices"]]
        logs = "".join(b.log.read_text() for b in case.bed.all)
        return any("copied" in d["detail"] for d in told) or "was its storage copied" in logs

    wait(noticed, KNOWN_S, lambda: str(boards[0].client.devices()))
    say_it(boards[0])


def loss(case: Case) -> None:
    """30 % of all packets lost, some doubled, all jumbled: prompts are answered, nobody is given
    up who is there."""
    boards = case.boards(5)
    case.bed.usual(loss=0.3, twice=0.1, delay_ms=2, jitter_ms=20)
    until_s = time.monotonic() + max(case.minutes * 60, 20)
    answered, proposals, given_up = 0, 0, 0
    while time.monotonic() < until_s:
        told = say_it(boards[answered % 5])
        answered += 1
        proposals += len(told["proposals"])
        given_up += sum(list(b.sees().values()).count("gone") for b in boards)
        time.sleep(0.2)
    case.notes.append(f"{answered} prompts, {proposals / answered:.2f} of 3 proposals each")
    check(given_up == 0, f"a board was given up that was there, {given_up} times seen")
    check(proposals / answered > 2.5, f"only {proposals / answered:.2f} of 3 proposals arrived")
    case.bed.usual()
    case.meet(boards, "all well")


def one_way(case: Case) -> None:
    """Nothing passes from one board to another, all passes back: both work on, with the third."""
    a, b, c = boards = case.boards(3)
    case.bed.rule([b], [a], loss=1)
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        for board in boards:
            say_it(board)
        check(set(c.sees().values()) == {"alive"}, f"one that all reach: {views(boards)}")
        check("alive" in a.sees().values(), f"they lost the third too: {views(boards)}")
        time.sleep(0.5)
    case.notes.append(views([a, b]))
    check(by(say_it(a)) >= {c.name}, "the third takes no part")
    case.bed.heal()
    case.meet(boards, "healed")


def partial(case: Case) -> None:
    """Two boards do not reach each other, and all reach the others: nobody is given up."""
    a, b, *others = boards = case.boards(4)
    case.bed.cut([a], [b])
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        check("gone" not in str(views(boards)), f"given up: {views(boards)}")
        told = say_it(a)
        check(by(told) & {other.name for other in others}, f"nobody else took part: {told}")
        time.sleep(0.5)
    check(all(b.name not in by(say_it(a)) for _ in range(3)), "a board that cannot be reached")
    case.bed.heal()
    case.meet(boards, "healed")


def partition(case: Case) -> None:
    """2|3: both sides answer by themselves; their views are one again soon after it is healed."""
    boards = case.boards(5)
    two, three = boards[:2], boards[2:]
    case.bed.cut(two, three)
    for side, others in ((two, three), (three, two)):
        for other in others:
            case.gone(other, side)
        check(by(say_it(side[0])) <= {b.name for b in side}, "a board of the other side")
    case.bed.heal()
    case.meet(boards, "healed")
    check(len(by(say_it(boards[0], plan="M1k4"))) >= 4, "not all take part again")


def proposer_killed(case: Case) -> None:
    """A proposer loses its power in the middle of a prompt: it is answered without it."""
    boards = case.boards(3)
    with asked(boards[0]) as answer:
        wait(lambda: working(boards[1]), 10, lambda: "it never began")
        boards[1].kill()
        told = answer()
    check(boards[2].name in by(told), "the other one's proposal is not there")
    check(boards[1].name not in by(told), "a proposal of a board that is off")
    case.notes.append(f"answered in {told['total_ms'] / 1000:.1f} s")
    case.gone(boards[1], [boards[0], boards[2]])
    boards[1].start()
    case.meet(boards, "back")


def frozen(case: Case) -> None:
    """A board is stopped for 20 s in the middle of a prompt, and goes on where it was."""
    boards = case.boards(3)
    with asked(boards[0]) as answer:
        wait(lambda: working(boards[1]), 10, lambda: "it never began")
        boards[1].signal(signal.SIGSTOP)
        stopped = time.monotonic()
        told = answer()
    case.notes.append(f"answered in {told['total_ms'] / 1000:.1f} s")
    case.gone(boards[1], [boards[0], boards[2]])
    say_it(boards[2])
    time.sleep(max(20 - (time.monotonic() - stopped), 0))
    boards[1].signal(signal.SIGCONT)
    case.meet(boards, "back")
    wait(lambda: not working(boards[1]), 10, lambda: "it works for nobody")
    check(boards[1].name in by(say_it(boards[0], plan="M1k2")), "it takes no part")


def owner_killed(case: Case) -> None:
    """The owner of a prompt loses its power: nobody works for it any more; back again, it answers,
    since it had promised to."""
    boards = case.boards(3)
    number = boards[0].client.submit(LONG, max_tokens=200)
    wait(lambda: all(working(b) for b in boards), 10, lambda: "they never began")
    boards[0].kill()
    began = time.monotonic()
    wait(lambda: not any(working(b) for b in boards[1:]), 30, lambda: "they work for nobody")
    case.notes.append(f"orphans stopped in {time.monotonic() - began:.1f} s")
    boards[0].start()
    case.meet(boards, "back")
    answer = boards[0].client.result(number, wait_s=60)
    check(answer is not None and CANARY.upper() in answer.text, "the promised answer is not there")


def power_cut(case: Case) -> None:
    """All lose their power at once, and come back at other addresses."""
    boards = case.boards(4)
    for board in boards:
        board.kill()
    for number, board in enumerate(boards):
        board.host.ip("addr flush dev eth0 scope global")
        board.host.ip(f"addr add 10.77.0.{101 + number}/24 dev eth0")
        board.host.ip("route add 224.0.0.0/4 dev eth0")
        board.start()
    case.meet(boards, "known again")
    say_it(boards[0])


def address_change(case: Case) -> None:
    """A running board gets another address: the others follow."""
    boards = case.boards(3)
    boards[0].host.ip("addr flush dev eth0 scope global")
    boards[0].host.ip("addr add 10.77.0.201/24 dev eth0")
    boards[0].host.ip("route add 224.0.0.0/4 dev eth0")
    say_it(boards[1])

    def there() -> bool:
        told = [d for b in boards[1:] for d in b.client.devices()["devices"]]
        at = [d["address"] for d in told if d["name"] == boards[0].name and d["linked"]]
        return at == [f"10.77.0.201:{PORT}"] * 2

    wait(there, KNOWN_S, lambda: str(boards[1].client.devices()))
    case.meet(boards, "known again")
    check(len(by(say_it(boards[0]))) >= 2, "it works alone")


def late_interface(case: Case) -> None:
    """A board whose network comes up long after it started is found."""
    boards = case.boards(2)
    late = case.bed.board("late", start=False)
    late.host.ip("link set eth0 down")
    late.host.ip("addr flush dev eth0")
    late.start()
    wait(lambda: bool(late.status()), KNOWN_S, lambda: "it does not start without a network")
    say_it(late)
    time.sleep(3)
    late.host.ip("link set eth0 up")
    late.host.ip("addr add 10.77.0.150/24 dev eth0")
    late.host.ip("route add 224.0.0.0/4 dev eth0")
    case.meet([*boards, late], "found")


def unplugged(case: Case) -> None:
    """A running board's cable is pulled, and put back after it was given up."""
    boards = case.boards(3)
    boards[2].host.ip("link set eth0 down")
    case.gone(boards[2], boards[:2])
    say_it(boards[2])
    boards[2].host.ip("link set eth0 up")
    boards[2].host.ip("route add 224.0.0.0/4 dev eth0")
    case.meet(boards, "known again")


def ipv6(case: Case) -> None:
    """Boards that have nothing but IPv6."""
    boards = case.bed.boards(3, start=False)
    for number, board in enumerate(boards, 1):
        board.host.ip("addr flush dev eth0 scope global")
        board.host.ip(f"addr add fd77::{number}/64 dev eth0 nodad")
        board.start()
    case.meet(boards, "known")
    say_it(boards[0])


def responder(case: Case) -> None:
    """Each host has an mDNS responder already, Avahi, which holds port 5353 and comes and goes."""
    boards = case.bed.boards(2, "log.level=debug", start=False)
    responders = [avahi(case.bed, board) for board in boards]
    for board in boards:
        board.start()
    case.meet(boards, "found beside Avahi")
    check(by(say_it(boards[0])) == {"board-1", "board-2"}, "not both proposed")
    check(all(each.poll() is None for each in responders), "Avahi ended")
    boards[1].stop()
    for each in responders:
        each.terminate()
        each.wait()
    again = avahi(case.bed, boards[0])  # it comes after the board
    boards[1].start()
    case.meet(boards, "again when it was restarted")
    check(again.poll() is None, "Avahi ended")


def avahi(bed: Bed, board: Board) -> subprocess.Popen[bytes]:
    """Start this system's responder on a board's host, and wait until it answers there. It ends
    with the namespaces of the bed.

    :raises NoBedError: it is not installed.
    """
    program = shutil.which("avahi-daemon", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise NoBedError("Avahi is not installed (Debian: apt install avahi-daemon)")
    place = bed.place / f"avahi-{board.name}"
    place.mkdir(exist_ok=True)
    (place / "conf").write_text(
        f"[server]\nhost-name={board.name}\nenable-dbus=no\n[rlimits]\n", encoding="utf-8"
    )
    # It has a folder below /run, where one of the machine's own may be, and wants it to belong to
    # its user and group, whom a bed without the rights of root does not know: there, they are root.
    for known in ("passwd", "group"):
        lines = Path("/etc", known).read_text("utf-8").splitlines()
        root = "avahi:x:0:0:::" if known == "passwd" else "avahi:x:0:"
        others = [line for line in lines if not line.startswith("avahi:")]
        (place / known).write_text("\n".join([*others, root, ""]), encoding="utf-8")
    start = (
        'for f in passwd group; do mount --bind "$1/$f" "/etc/$f" || exit; done; '
        'mount -t tmpfs none /run && exec "$0" --no-drop-root --no-chroot --no-rlimits -f "$1/conf"'
    )
    argv = ["unshare", "--mount", "sh", "-c", start, program, str(place)]
    log = place / "log"
    with log.open("wb") as told:
        process = board.host.popen(argv, stdin=subprocess.DEVNULL, stdout=told, stderr=told)
    wait(
        lambda: b"startup complete" in log.read_bytes(),
        KNOWN_S,
        lambda: f"Avahi says {log.read_text('utf-8', 'replace')[-300:]}",
    )
    return process


def clocks(case: Case) -> None:
    """Clocks in 1970 and 2040, and one that jumps by years during a prompt: time of day is nothing
    that anything depends on. Needs libfaketime."""
    library = fake_time()
    jump = case.bed.place / "time"
    jump.write_text("+0", encoding="ascii")
    preload = {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    made = [
        case.bed.board("old", environment={**preload, "FAKETIME": "@1970-01-02 00:00:00"}),
        case.bed.board("new", environment={**preload, "FAKETIME": "@2040-01-01 00:00:00"}),
        case.bed.board(
            "jumps",
            environment={
                **preload, "FAKETIME_TIMESTAMP_FILE": str(jump), "FAKETIME_NO_CACHE": "1",
            },
        ),
    ]  # fmt: skip
    case.meet(made, "known")
    years = [board.events()[0]["time"][:4] for board in made[:2]]
    check(years == ["1970", "2040"], f"the clocks are not as they were set: {years}")
    with asked(made[2]) as answer:
        wait(lambda: working(made[0]), 10, lambda: "they never began")
        jump.write_text("-20y", encoding="ascii")
        time.sleep(0.5)
        jump.write_text("+10y", encoding="ascii")
        told = answer()
    check(len(by(told)) >= 2, "one took part alone")
    check(all(board.knows(*made) for board in made), f"given up: {views(made)}")


def fake_time() -> Path:
    """libfaketime, which other systems keep elsewhere.

    :raises NoBedError: it is not installed.
    """
    for folder in (Path("/usr/lib"), Path("/usr/local/lib"), Path("/usr/lib64")):
        for place in (*folder.glob("*/faketime"), folder / "faketime"):
            if (found := place / "libfaketimeMT.so.1").is_file():
                return found
    raise NoBedError("libfaketime is not installed (Debian: apt install faketime)")


def model(case: Case) -> None:
    """Three boards with the real model; one is killed in the middle of a prompt."""
    models_dir = default_model_dir()
    ensure(MODEL, ModelLibrary(models_dir), silent)
    flags = (f"model.name={MODEL}", "model.threads=1", "model.memory_mb=128", "moa.promise_s=3600")
    boards = case.boards(3, *flags, models_dir=models_dir)
    wait(lambda: all(b.status().get("ready") for b in boards), 120, lambda: "not ready")
    first = boards[0].ask(f"What is {CANARY}?", max_tokens=16)
    check(first["text"] and len(by(first)) >= 2, f"they do not work together: {first}")
    with asked(boards[0], f"Tell a long story of {CANARY}.") as answer:
        wait(lambda: working(boards[1]), 30, lambda: "it never began")
        boards[1].kill()
        told = answer()
    check(told["text"], "there is no answer")
    check(boards[1].name not in by(told), "a proposal of a board that is off")
    case.notes.append(f"answered by {len(by(told))} in {told['total_ms'] / 1000:.1f} s")


CASES: Final[dict[str, Callable[[Case], None]]] = {
    "found": found, "stranger": stranger, "revoked": revoked, "cloned": cloned, "loss": loss,
    "one-way": one_way, "partial": partial, "partition": partition,
    "proposer-killed": proposer_killed, "frozen": frozen, "owner-killed": owner_killed,
    "power-cut": power_cut, "address-change": address_change, "late-interface": late_interface,
    "unplugged": unplugged, "ipv6": ipv6, "responder": responder, "clocks": clocks,
    "model": model,
}  # fmt: skip


def look_for_prompts(bed: Bed, capture: Path) -> None:
    """Fail the case if its prompts, or their answers, can be read anywhere but at their owner."""
    bed.end_capture()
    places = {"the wire": capture.read_bytes()}
    for board in bed.all:
        places[f"{board.name}'s log"] = board.log.read_bytes()
        if board.runs:
            with contextlib.suppress(EdgemoaError):  # it may be frozen, or in trouble
                places[f"{board.name}'s status"] = json.dumps(board.status()).encode()
    secret = (bed.place / "join-secret").read_bytes().strip()
    for place, data in places.items():
        check(CANARY.encode() not in data.lower(), f"a prompt can be read in {place}")
        check(secret not in data, f"the secret can be read in {place}")


def try_case(name: str, minutes: float) -> dict[str, Any]:
    """One case on a network of its own; what came of it.

    :raises NoBedError: networks cannot be made here.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        capture = Path(folder) / "all.pcap"
        with Bed(token_ms=TOKEN_MS, capture=capture) as bed:
            case = Case(bed, minutes)
            outcome, why = "ok", ""
            try:
                CASES[name](case)
                look_for_prompts(bed, capture)
            except NoBedError as error:
                outcome, why = "left out", str(error)
            except (CaseError, EdgemoaError, RuntimeError, TimeoutError, OSError) as error:
                outcome, why = "FAILED", f"{type(error).__name__}: {error}"
    note = "; ".join([*case.notes, *([why] if why else [])])
    took_s = round(time.monotonic() - began, 1)
    return {"case": name, "outcome": outcome, "took_s": took_s, "note": note}


def main() -> int:
    """Try them one after another; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="only this")
    parser.add_argument("--list", action="store_true", help="say what the cases are")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.3,
        help="for the case loss (default: 0.3; the design: 10)",
    )
    given = parser.parse_args()
    if given.list:
        for name, case in CASES.items():
            print(f"{name:16} {' '.join((case.__doc__ or '').split())}")
        return 0
    told = []
    for name in given.only or CASES:
        say(name)
        try:
            told.append(try_case(name, given.minutes))
        except NoBedError as error:
            print(f"cluster-test: {error}", file=sys.stderr)
            return 1
        if not given.json:
            line = told[-1]
            print(
                f"{name:16} {line['outcome']:9} {line['took_s']:6.1f} s  {line['note']}", flush=True
            )
    if given.json:
        print(json.dumps({"cases": told}))
    return 1 if any(line["outcome"] == "FAILED" for line in told) else 0


if __name__ == "__main__":
    sys.exit(main())
