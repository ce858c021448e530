"""Proves the package on booted boards: three small Debian systems, each with a systemd of its own,
on one bridge without any other network. Installs the .deb, pairs by a secret and by a code, asks
through the socket as an ordinary user with the real model, kills and freezes the daemon, reboots,
upgrades with a prompt accepted, revokes, and purges.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_deb import BuildError, Target, build, debian, output, run  # noqa: E402
from figures import say  # noqa: E402

from edgemoa.models.library import ModelLibrary, default_model_dir  # noqa: E402
from edgemoa.models.progress import silent  # noqa: E402
from edgemoa.models.pull import ensure  # noqa: E402

MODEL: Final = "smollm2-135m-instruct"
BRIDGE: Final = "edgemoa-test"
NEEDS: Final = ("systemd", "systemd-sysv", "dbus", "python3", "iproute2", "libstdc++6", "procps")
ASK: Final = 'edgemoa ask --max-tokens 12 --json "Why is the sky blue?"'
# What a purge leaves, by Debian's policy or because it is not the package's: logs, dpkg's and
# systemd's own books, and the system user.
LEFT: Final = tuple(
    f"/{each}"
    for each in (
        *("var/log/", "var/lib/dpkg/", "var/cache/", "var/lib/systemd/", "var/tmp/", "tmp/"),
        *("etc/passwd", "etc/group", "etc/shadow", "etc/gshadow", "etc/subuid", "etc/subgid"),
        *("etc/.pwd.lock", "run/", "home/", "root/"),
    )
)


class CaseError(Exception):
    """A case went otherwise than it should."""


@dataclass
class Board:
    """One booted system."""

    name: str
    root: Path
    number: int
    process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start it, and wait until its systemd is up."""
        self.process = subprocess.Popen(
            ["systemd-nspawn", "-q", "-D", self.root, f"--machine={self.name}", "-b",
             f"--network-bridge={BRIDGE}", "--register=no", "--keep-unit",
             "--console=read-only"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(f"{self.name} has booted", self.is_up, 60)

    def is_up(self) -> bool:
        state = self.do("systemctl is-system-running", check=False).strip()
        return state in ("running", "degraded")

    def do(self, command: str, user: str = "", *, check: bool = True, seconds: int = 120) -> str:
        """What a shell command there prints; as root, or as another user."""
        inside = ["su", user, "-c", command] if user else ["sh", "-c", command]
        enter = ["nsenter", "-t", self._leader(), "-a", "env", "-i", "HOME=/root",
                 "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]  # fmt: skip
        done = subprocess.run(
            [*enter, *inside], capture_output=True, text=True, timeout=seconds, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise CaseError(f"{self.name}: {command}\n{done.stdout[-800:]}{done.stderr[-800:]}")
        return done.stdout

    def _leader(self) -> str:
        if self.process is None:
            raise CaseError(f"{self.name} was not booted")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = children.read_text().split() if children.exists() else []
        return found[0] if found else "0"

    def json(self, command: str, **more: Any) -> Any:
        return json.loads(self.do(command, **more))

    def status(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = self.json("edgemoa status --json", check=False)
        except ValueError:
            return {"ready": False, "peers": []}
        return told

    def ready_with(self, peers: int) -> bool:
        status = self.status()
        return bool(status.get("ready")) and peers <= sum(
            peer["accepting"] for peer in status.get("peers", [])
        )

    def off(self) -> None:
        if self.process is not None:
            self.process.terminate()  # an orderly shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
            self.process.wait()


def until(what: str, true: Callable[[], bool], seconds: float) -> float:
    """Wait; returns for how long, in seconds.

    :raises CaseError: in vain.
    """
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        with contextlib.suppress(CaseError, subprocess.TimeoutExpired):
            if true():
                return time.monotonic() - began
        time.sleep(0.3)
    raise CaseError(f"not within {seconds:.0f} s: {what}")


def main() -> int:
    """Run every case; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/board-test", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=("bookworm", "trixie"), default="trixie")
    parser.add_argument("--deb", type=Path, help="the package (default: one that is built now)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    missing = [tool for tool in ("systemd-nspawn", "debootstrap") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        told_missing = "".join(f", {tool}" for tool in missing)
        print(f"board-test: needs root{told_missing}", file=sys.stderr)
        print("  next: sudo apt install systemd-container debootstrap", file=sys.stderr)
        return 2
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgemoa-boards-") as place:
        try:
            deb = arguments.deb or packaged(arguments.suite, Path(place))
            with boards(arguments.suite, Path(place), deb) as three:
                for case in CASES:
                    began = time.monotonic()
                    note = case(three)
                    about = (case.__doc__ or "").strip().removesuffix(".")
                    told.append({"case": about, "seconds": round(time.monotonic() - began, 1),
                                 "note": note})  # fmt: skip
                    if not arguments.json:
                        print(f"ok    {about}: {note}", flush=True)
        except (CaseError, BuildError) as error:
            failed = f"FAILED after {len(told)} of {len(CASES)} cases: {error}"
            print(json.dumps({"cases": told, "error": str(error)}) if arguments.json else failed)
            return 1
    if arguments.json:
        print(json.dumps({"cases": told}))
    return 0


def packaged(suite: str, place: Path) -> Path:
    arch = output("dpkg", "--print-architecture")
    return Path(build(Target(suite, arch), debian(suite, ""), place)["file"])


@contextlib.contextmanager
def boards(suite: str, place: Path, deb: Path) -> Iterator[list[Board]]:
    """Three systems on a bridge, the package and the model put down in each."""
    base = debian(suite, "", "board", NEEDS)
    library = ModelLibrary(default_model_dir())
    ensure(MODEL, library, silent)
    run("ip", "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
    run("ip", "link", "set", BRIDGE, "up")
    three = [Board(f"board{n}", place / f"board{n}", n) for n in (1, 2, 3)]
    try:
        for board in three:
            say(f"booting {board.name}")
            run("cp", "-a", "--reflink=auto", base, board.root)
            (board.root / "etc/hostname").write_text(f"{board.name}\n")
            (board.root / "etc/machine-id").write_text("")
            network = board.root / "etc/systemd/network/10-host0.network"
            network.parent.mkdir(parents=True, exist_ok=True)
            network.write_text(
                f"[Match]\nName=host0\n[Network]\nAddress=10.77.0.{board.number}/24\n"
            )
            enabled = board.root / "etc/systemd/system/multi-user.target.wants"
            enabled.mkdir(parents=True, exist_ok=True)
            (enabled / "systemd-networkd.service").symlink_to(
                "/usr/lib/systemd/system/systemd-networkd.service"
            )
            shutil.copy(deb, board.root / "root" / "edgemoa.deb")
            shutil.copytree(library.find(MODEL), board.root / "root" / MODEL)
            board.boot()
        yield three
    finally:
        for board in three:
            board.off()
        run("ip", "link", "delete", BRIDGE)


# --- the cases, in their order: each goes on where the one before ended


def installs(three: list[Board]) -> str:
    """The package installs without a network, and the daemon runs."""
    for board in three:
        board.do("find / -xdev > /root/before")
        board.do("dpkg -i /root/edgemoa.deb", seconds=300)
        board.do("systemctl stop edgemoa.service")
        board.do(
            "install -d -o edgemoa -g edgemoa /var/lib/edgemoa/models && "
            f"cp -r /root/{MODEL} /var/lib/edgemoa/models/ && "
            "chown -R edgemoa: /var/lib/edgemoa/models"
        )
        board.do("useradd -m -G edgemoa anna && useradd -m berta")
    began = time.monotonic()
    three[0].do("systemctl start edgemoa")
    active_s = time.monotonic() - began
    until("it answers", lambda: bool(three[0].json(ASK, user="anna")["answer"]), 30)
    answered_s = time.monotonic() - began
    for board in three[1:]:
        board.do("systemctl start edgemoa")
    return f"active after {active_s:.1f} s, first answer after {answered_s:.1f} s"


def is_hardened(three: list[Board]) -> str:
    """systemd finds it well shut in."""
    last = three[0].do("systemd-analyze security edgemoa.service --no-pager").splitlines()[-1]
    level = float(last.split(":")[1].split()[0])
    if level > 1.5:
        raise CaseError(f"the exposure level is {level}")
    return f"exposure level {level}"


def pairs_by_secret(three: list[Board]) -> str:
    """Boards that hold one secret pair by themselves."""
    secret = three[0].do("edgemoa join-secret new").strip()
    for board in three[:2]:
        path = "/etc/edgemoa/join-secret"
        board.do(f"umask 077; echo {secret} > {path}; chown edgemoa: {path}")
        board.do(f"sed -i '/^port/a join_secret_file = \"{path}\"' /etc/edgemoa/edgemoa.toml")
        board.do("systemctl restart edgemoa")
    took_s = until("board1 has its peer", lambda: three[0].ready_with(1), 60)
    return f"{took_s:.1f} s after the restart"


def pairs_by_code(three: list[Board]) -> str:
    """A third joins by a code, and is then known to both."""
    three[0].do("edgemoa pair --json > /run/pair.json 2>&1 &")
    until("a code is shown", lambda: bool(three[0].do("grep code /run/pair.json")), 10)
    code = json.loads(three[0].do("head -1 /run/pair.json"))["code"]
    three[2].do(f"edgemoa join {code}")
    took_s = until("all know all", lambda: all(board.ready_with(2) for board in three), 60)
    return f"all know all {took_s:.1f} s later"


def answers_together(three: list[Board]) -> str:
    """Three boards answer a prompt of an ordinary user, who has to be in the group."""
    told = three[1].json(ASK, user="anna")
    if told["granted"]["proposers"] != 2 or not told["answer"]:
        raise CaseError(f"not by three boards: {told}")
    if "answer" in three[1].do(ASK, user="berta", check=False):
        raise CaseError("somebody who is not in the group was answered")
    return f"{told['total_ms']} ms, {len(told['proposals'])} proposals"


def survives_kill(three: list[Board]) -> str:
    """Killed, the daemon is back."""
    pid = three[0].status()["pid"]
    three[0].do(f"kill -9 {pid}")
    # Where control groups tell nobody that they are empty, as in some containers, systemd waits for
    # TimeoutStopSec before it starts the daemon anew.
    took_s = until("it is back", lambda: three[0].ready_with(2), 90)
    return f"ready with its peers after {took_s:.1f} s"


def survives_freeze(three: list[Board]) -> str:
    """Frozen, it is ended by the watchdog and is back."""
    pid = three[0].status()["pid"]
    three[0].do(f"kill -STOP {pid}")
    took_s = until(
        "it is back", lambda: three[0].status().get("pid") not in (None, pid)
        and three[0].ready_with(2), 120,
    )  # fmt: skip
    return f"ready with its peers after {took_s:.1f} s"


def survives_reboot(three: list[Board]) -> str:
    """After a reboot it is there by itself."""
    board, before = three[1], three[1].status()["id"]
    board.off()
    board.boot()
    took_s = until("it is back", lambda: board.ready_with(2), 60)
    if board.status()["id"] != before:
        raise CaseError("it is another board now")
    return f"ready with its peers {took_s:.1f} s after the boot"


def keeps_over_upgrade(three: list[Board]) -> str:
    """An upgrade keeps identity, pairings, models, settings and accepted prompts."""
    board, before = three[0], three[0].status()["id"]
    client = "/opt/edgemoa/bin/python3 -c 'from edgemoa import Client; c = Client(); "
    left = [board.do(f"{client}print(c.submit(\"Count to {n}.\", max_tokens=40))'").strip()
            for n in range(20, 26)]  # fmt: skip
    board.do("dpkg -i /root/edgemoa.deb", seconds=300)
    until("it is back", lambda: board.ready_with(2), 60)
    if board.status()["id"] != before:
        raise CaseError("it is another board now")
    for request in left:
        if not board.do(f'{client}print(c.result("{request}", wait_s=60))\'').strip():
            raise CaseError("an accepted prompt was not answered")
    return f"{len(left)} accepted prompts answered"


def revokes(three: list[Board]) -> str:
    """A revoked board is out, everywhere."""
    known = three[0].json("edgemoa devices --json")["devices"]
    third = next(device["id"] for device in known if device["name"] == "board3")
    three[0].do(f"edgemoa devices revoke {third}")

    def is_out() -> bool:
        devices = three[1].json("edgemoa devices --json")["devices"]
        return any(d["id"] == third and d["state"] == "revoked" for d in devices)

    took_s = until("board2 knows", is_out, 30)
    return f"board2 knew after {took_s:.1f} s"


def purges(three: list[Board]) -> str:
    """Purged, nothing of it is left."""
    board = three[2]
    board.do("dpkg --purge edgemoa")
    now = set(board.do("find / -xdev").splitlines())
    more = sorted(now - set(board.do("cat /root/before").splitlines()))
    left = [path for path in more if not path.startswith(LEFT)]
    if left:
        raise CaseError(f"left: {', '.join(left[:8])}")
    return f"{len(more)} files more than before, all of them the system's own"


CASES: Final = (
    installs, is_hardened, pairs_by_secret, pairs_by_code, answers_together, survives_kill,
    survives_freeze, survives_reboot, keeps_over_upgrade, revokes, purges,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
