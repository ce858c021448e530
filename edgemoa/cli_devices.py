"""The commands about who belongs to the group: ``pair``, ``join``, ``devices``, ``join-secret`` and
``rotate-key``."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa import show
from edgemoa.errors import PairingError, StateError, UserError

if TYPE_CHECKING:
    from edgemoa.client import Client
    from edgemoa.config import Config

LOOK_EVERY_S: Final = 0.5
SHORTEST_PREFIX: Final = 4
_LAST_ADVICE: Final = (
    "if it held the join secret: give the others a new one (`edgemoa join-secret new`), or whoever "
    "has that board now can come back under a new identity"
)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgemoa devices``."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action")
    accept = actions.add_parser(
        "accept", help="trust the board of this identity; it has to accept this one, too"
    )
    accept.add_argument("id", metavar="ID", help="all 56 characters, as compared with that board's")
    accept.add_argument("--address", default="", metavar="HOST:PORT", help="where it is")
    rename = actions.add_parser("rename", help="call a board by another name, in the whole group")
    rename.add_argument("id", metavar="BOARD", help="its name, or how its identity begins")
    rename.add_argument("name", metavar="NAME", help='"" gives it its own back')
    revoke = actions.add_parser("revoke", help="put a board out, in the whole group and at once")
    revoke.add_argument("id", metavar="BOARD", help="its name, or how its identity begins")
    for action in (accept, rename, revoke):
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
        )
        action.add_argument("--socket", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_join(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgemoa join``."""
    parser.add_argument(
        "code", nargs="?", help="the code; asked for if left out, so that no process list shows it"
    )
    parser.add_argument(
        "--address", default="", metavar="HOST:PORT", help="of the board that shows the code"
    )


def add_secret(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgemoa join-secret``."""
    parser.add_argument(
        "action",
        choices=("new", "show"),
        help="new: print a fresh one; show: print the one that this board is set to use",
    )


def pair(client: Client, *, as_json: bool) -> int:
    """Show a code, and who comes in by it, until its time is over or somebody interrupts."""
    opened = client.post("/v1/pairing", {})
    code, seconds = opened["code"], opened["expires_in_s"]
    if as_json:
        print(json.dumps(opened), flush=True)
    else:
        print(f"code {code}")
        print(f"for {seconds} s; on the other board: edgemoa join {code}", flush=True)
    told: list[str] = []
    try:
        while True:
            window = client.get("/v1/pairing")
            for name in window["joined"][len(told) :]:
                told.append(name)
                if not as_json:
                    print(f"paired with {name}", flush=True)
            if not window["open"]:
                break
            time.sleep(LOOK_EVERY_S)
    except BaseException:
        client.delete("/v1/pairing")
        raise
    if as_json:
        print(json.dumps(window))
    if not told:
        raise PairingError(
            f"no board came in: {window['closed']}", hint="`edgemoa pair` shows a new code"
        )
    return 0


def join(client: Client, code: str | None, address: str, *, as_json: bool) -> int:
    """Pair with the board that shows the code."""
    if code is None:
        code = getpass.getpass("code: ") if sys.stdin.isatty() else sys.stdin.readline()
    found = client.post("/v1/pairing/join", {"code": code.strip(), "address": address})
    if as_json:
        print(json.dumps(found))
    else:
        print(f"paired with {found['name'] or found['id']}")
    return 0


def devices(client: Client, arguments: argparse.Namespace) -> int:
    """List boards, or change something about one."""
    action = arguments.action
    if action is None:
        return _list(client, as_json=arguments.json)
    if action == "accept":
        body = {"id": arguments.id.strip(), "address": arguments.address}
        text = "accepted"
    else:
        body = {"id": _find(client, arguments.id)}
        text = "renamed" if action == "rename" else "revoked"
        if action == "rename":
            body["name"] = arguments.name
    told = client.post(f"/v1/devices/{action}", body)
    if arguments.json:
        print(json.dumps(told))
        return 0
    print(f"{text} {told.get('name') or told['id']}")
    if action == "revoke":
        print(f"  next: {_LAST_ADVICE}", file=sys.stderr)
    return 0


def _find(client: Client, text: str) -> str:
    """The identity of the one paired board that is meant."""
    paired = [d for d in client.get("/v1/devices")["devices"] if d["state"] == "paired"]
    meant = [d["id"] for d in paired if d["name"] == text]
    if len(text) >= SHORTEST_PREFIX:
        meant = meant or [d["id"] for d in paired if d["id"].startswith(text)]
    if len(meant) != 1:
        raise UserError(
            f"{'no' if not meant else 'more than one'} paired board is called that",
            hint="`edgemoa devices` shows names and identities",
        )
    return str(meant[0])


def _list(client: Client, *, as_json: bool) -> int:
    told = client.get("/v1/devices")
    if as_json:
        print(json.dumps(told))
        return 0
    found = told["devices"]
    if not found:
        print("no other board has been seen; is one running on this network?")
        return 0
    rows = [("NAME", "STATE", "PRESENCE", "MODEL", "LOAD", "SEEN", "ADDRESS", "ID", "")]
    rows += [
        (
            device["name"] or "-",
            device["state"],
            device.get("presence", "-"),
            device.get("model") or "-",
            f"{device['utilisation']:.0%}" if "utilisation" in device else "-",
            _seen(device),
            device["address"] or "-",
            device["id"],
            device["detail"],
        )
        for device in found
    ]
    print(show.table(rows))
    return 0


def _seen(device: dict[str, Any]) -> str:
    age = device["last_seen_age_ms"]
    return "-" if age is None else f"{show.seconds(age)} ago"


def secret(action: str, config: Config) -> int:
    """Print a join secret."""
    from edgemoa.net.pairing import new_join_secret, parse_join_secret

    if action == "new":
        print(new_join_secret())
        return 0
    if not config.net.join_secret_file:
        raise UserError(
            "no join secret is set on this board",
            hint="`edgemoa join-secret new` makes one; net.join_secret_file says where it is",
        )
    file = Path(config.net.join_secret_file).expanduser()
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}",
            hint="check the path and its permissions",
        ) from error
    parse_join_secret(text)
    print(text)
    return 0


def rotate_key(config: Config, *, as_json: bool) -> int:
    """Give this board a new key, while its daemon does not run."""
    from edgemoa.core import roster
    from edgemoa.net.identity import load_identity, read_certificate, rotate_identity
    from edgemoa.store import Store

    state_dir = config.state_dir()
    store = Store(state_dir)
    store.open()  # and thereby keep a daemon from running meanwhile
    try:
        own = load_identity(state_dir).board_id
        records = (roster.read(data, read_certificate) for data in store.trust().records)
        version = max(
            (r.version for r in records if r and own in (r.board, r.successor)), default=0
        )
        old, new = rotate_identity(state_dir, version)
    finally:
        store.close()
    if as_json:
        print(json.dumps({"old": old.board_id, "id": new.board_id}))
    else:
        print(f"this board is now {new.board_id}")
        print("paired boards are told when the daemon runs again", file=sys.stderr)
    return 0
