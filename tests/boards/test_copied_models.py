"""Models copied between whole boards: real daemons, TLS, disks; killed in the middle, or lying."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from engine.tiny import write_tiny_model
from hypothesis import example, given
from hypothesis import strategies as st

from edgemoa.cli_peer_models import (
    KEPT,
    Copy,
    Patience,
    check_manifest,
    copy_model,
    peer_models,
)
from edgemoa.client import Client
from edgemoa.demo import LocalBoard, start_board, stop
from edgemoa.errors import (
    DaemonUnreachableError,
    DiskFullError,
    EdgemoaError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    OverloadedError,
    PeerError,
    UserError,
)
from edgemoa.models.library import ARRIVING, Manifest, ModelFile, ModelLibrary, content_id
from edgemoa.models.progress import Progress, silent
from edgemoa.net.pairing import new_join_secret

BIG = 24 << 20
FIELD = st.sampled_from([*Manifest.__struct_fields__, *ModelFile.__struct_fields__])
HASTY = Patience(gone=1.0, busy=1.0, retry=(0.05, 0.2))


def manifest(folder: Path, **other: Any) -> Manifest:
    """What is in a folder, written there; ``other`` replaces fields, truly or not."""
    files = tuple(
        ModelFile(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.iterdir())
        if path.name != "model.json"
    )
    made = Manifest(
        name=folder.name, model_id=content_id(files), importer=1, architecture="llama",
        context_length=64, vocabulary=300, layers=1, kv_heads=1, head_size=2,
        kv_bytes_per_token=16, eos_token_ids=(256,), files=files,
    )  # fmt: skip
    made = msgspec.structs.replace(made, **other)
    (folder / "model.json").write_bytes(msgspec.json.encode(made))
    return made


def model(library: Path, name: str, size: int = 5000, seed: int = 1) -> Path:
    """A tiny model, and beside it random bytes as large weights would be."""
    folder = library / name
    write_tiny_model(folder)
    (folder / "weights.bin").write_bytes(random.Random(seed).randbytes(size))
    (folder / "empty.txt").touch()
    manifest(folder)
    return folder


@dataclass
class Board:
    """A daemon with a library of its own, and how to start it again."""

    place: Path
    flags: tuple[str, ...]
    local: LocalBoard

    @property
    def library(self) -> Path:
        return self.place / "models"

    @property
    def client(self) -> Client:
        return self.local.client

    def kill(self) -> None:
        self.local.process.kill()
        self.local.process.wait()

    def restart(self) -> None:
        stop([self.local])
        self.local = start_board(self.place, *self.flags)

    def lent(self) -> int:
        return int(self.client.get("/v1/status")["lent_bytes"])

    def visible(self) -> set[str]:
        return {path.name for path in self.library.iterdir() if path.name[0] != "."}

    def sees(self, *others: str) -> bool:
        try:
            told = peer_models(self.client)
        except DaemonUnreachableError:
            return False
        return {b.name for b in told.boards if not b.detail} >= set(others)


@pytest.fixture(scope="module")
def boards() -> Iterator[list[Board]]:
    """a, b and c, paired; "a" and "c" hold the model "big"."""
    place = Path(tempfile.mkdtemp(prefix="edgemoa-"))
    started: list[Board] = []
    try:
        secret = place / "join-secret"
        secret.touch(mode=0o600)
        secret.write_text(new_join_secret())
        for name in "abc":
            own = place / name
            manifest(write_tiny_model(own / "models" / "tiny"))
            if name != "b":
                manifest(model(own / "models", "big", BIG), source="hf:x/y; rm -rf")
            flags = (
                f"board.name={name}", f"board.models_dir={own / 'models'}", "model.name=tiny",
                f"net.join_secret_file={secret}", "model.threads=1",
            )  # fmt: skip
            started.append(Board(own, flags, start_board(own, *flags)))
        until(lambda: all(b.sees(*({"a", "b", "c"} - {b.place.name})) for b in started))
        yield started
    finally:
        stop([board.local for board in started])
        shutil.rmtree(place)


@pytest.fixture(autouse=True)
def b_as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "boards" in request.fixturenames:
        library = request.getfixturevalue("boards")[1].library
        for folder in library.iterdir():
            if folder.name != "tiny":
                shutil.rmtree(folder)


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def copy(to: Board, name: str, board: str = "", progress: Progress = silent, **more: Any) -> Copy:
    return copy_model(name, board, to.client, progress, **{"patience": HASTY, **more})


def once(at: int, action: Callable[[], None]) -> Progress:
    """Does something when so many bytes have arrived."""
    left = [action]

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("copy") and done >= at and left:
            left.pop()()

    return progress


def whole(board: Board, name: str) -> int:
    """Bytes of a model, without what says what it is."""
    return sum(f.stat().st_size for f in (board.library / name).iterdir() if f.name != "model.json")


def same(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names - {"model.json"}
    )


# --- as it should be


def test_a_model_is_copied_whole(boards: list[Board]) -> None:
    a, b, c = boards
    before = a.lent() + c.lent()
    told = peer_models(b.client)
    assert told.models_dir == str(b.library)
    assert {x.name: sorted(m.name for m in x.models) for x in told.boards} == {
        "a": ["big", "tiny"],
        "c": ["big", "tiny"],
    }
    copied = copy(b, "big")
    assert copied.folder == b.library / "big"
    assert (
        copied.copied_bytes == copied.size_bytes == whole(a, "big") == a.lent() + c.lent() - before
    )
    assert same(a.library / "big", b.library / "big")
    told = json.loads((b.library / "big" / "model.json").read_text("utf-8"))
    assert told["source"] == f"a paired board's model {copied.model_id}"  # not what "a" says
    assert not any(path.stat().st_mode & 0o111 for path in copied.folder.iterdir())
    ModelLibrary(b.library).verify("big", silent)
    assert list((b.library / ARRIVING).iterdir()) == []
    again = copy(b, "big")
    assert again.copied_bytes == 0
    # It can be lent on at once.
    assert "big" in {
        m.name for x in peer_models(a.client).boards if x.name == "b" for m in x.models
    }


def test_the_command(boards: list[Board]) -> None:
    a, b, _ = boards
    told = command(b, "big", "a", "--json")
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    assert report["boards"] == ["a"]
    assert report["folder"] == str(b.library / "big")
    identity = a.client.get("/v1/status")["id"]
    assert command(b, "big", identity[:6]).stdout.strip() == str(b.library / "big")
    told = command(b, "nonesuch", "--json")
    assert told.returncode == 4
    assert "list --remote" in told.stderr


KILLED = """
import os, sys
from edgemoa import cli, cli_peer_models
class Progress(cli_peer_models.ConsoleProgress):
    def __call__(self, stage, done, total):
        if done >= 8 << 20:
            os.kill(os.getpid(), 9)
cli_peer_models.ConsoleProgress = Progress
sys.exit(cli.main(sys.argv[1:]))
"""


def command(
    board: Board, name: str, *more: str, killed: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    start = ["-c", KILLED] if killed else ["-m", "edgemoa"]
    told = ["model", "pull", name, "--socket", str(board.local.socket), "--from-peer", *more]
    return subprocess.run(
        [sys.executable, *start, *told], check=False, capture_output=True, text=True, timeout=60
    )


def test_which_model_is_meant(boards: list[Board]) -> None:
    a, b, c = boards
    model(a.library, "same", seed=1)
    model(c.library, "same", seed=1)
    model(a.library, "other", seed=1)
    model(c.library, "other", seed=2)
    try:
        assert copy(b, "same").copied_bytes == whole(a, "same")
        with pytest.raises(UserError, match=r"different models.*a \(.{8}\), c \(") as told:
            copy(b, "other")
        assert "--from-peer BOARD" in told.value.hint
        assert copy(b, "other", "c").boards == ["c"]
        assert same(c.library / "other", b.library / "other")
        with pytest.raises(UserError, match="another model called 'other'"):
            copy(b, "other", "a")
        with pytest.raises(ModelNotFoundError, match="no paired board that is there holds"):
            copy(b, "nonesuch")
        with pytest.raises(ModelNotFoundError, match="c does not hold"):
            copy(b, "nonesuch", "c")
        with pytest.raises(UserError, match="no paired board is called 'd'; paired are: a, c"):
            copy(b, "same", "d")
        with pytest.raises(UserError, match="cannot be the name"):
            copy(b, "../same")
        assert b.visible() == {"tiny", "same", "other"}
    finally:
        for board in (a, c):
            for name in ("same", "other"):
                shutil.rmtree(board.library / name)


# --- what goes wrong on the way


def test_a_board_killed_in_the_middle_and_back_lends_the_rest(boards: list[Board]) -> None:
    a, b, _ = boards
    model(a.library, "only-here", BIG, seed=3)
    try:
        with pytest.raises(NetworkError, match="a ") as told:
            copy(b, "only-here", progress=once(8 << 20, a.kill))
        assert told.value.hint == KEPT
        assert b.visible() == {"tiny"}
        arrived = sum(p.stat().st_size for p in b.library.glob(f"{ARRIVING}/only-here/files/*"))
        assert 8 << 20 <= arrived < BIG
        a.restart()
        until(lambda: b.sees("a"))
        copied = copy(b, "only-here")
        assert copied.copied_bytes == whole(a, "only-here") - arrived == a.lent()
        assert same(a.library / "only-here", b.library / "only-here")
    finally:
        shutil.rmtree(a.library / "only-here")


def test_a_board_that_comes_back_in_time_goes_on(boards: list[Board]) -> None:
    a, b, _ = boards
    model(a.library, "only-here", BIG, seed=4)

    def again() -> None:
        a.kill()
        a.restart()

    try:
        copied = copy(
            b, "only-here", progress=once(4 << 20, again), patience=Patience(retry=(0.05, 0.5))
        )
        assert copied.copied_bytes == whole(a, "only-here")
        assert same(a.library / "only-here", b.library / "only-here")
    finally:
        shutil.rmtree(a.library / "only-here")


def test_another_board_with_the_same_model_takes_over(boards: list[Board]) -> None:
    a, b, c = boards
    until(lambda: b.sees("a", "c"))
    before = c.lent()
    copied = copy(b, "big", "a", once(8 << 20, a.kill))
    assert copied.boards == ["a", "c"]
    assert copied.copied_bytes == whole(c, "big")
    assert c.lent() - before < BIG - (6 << 20)
    assert same(c.library / "big", b.library / "big")
    a.restart()
    until(lambda: b.sees("a"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_this_boards_daemon_stopped_in_the_middle(boards: list[Board], how: signal.Signals) -> None:
    a, b, _ = boards

    def end() -> None:
        b.local.process.send_signal(how)
        time.sleep(0.5)  # it must not have sent the rest by then

    with pytest.raises(DaemonUnreachableError) as told:
        copy(b, "big", progress=once(8 << 20, end))
    assert b.local.process.wait(2) == (0 if how is signal.SIGTERM else -how)
    assert told.value.hint == KEPT
    assert b.visible() == {"tiny"}
    b.restart()
    until(lambda: b.sees("a", "c"))
    copied = copy(b, "big")
    assert copied.copied_bytes <= whole(a, "big") - (8 << 20)
    assert same(a.library / "big", b.library / "big")


def test_the_command_killed_in_the_middle(boards: list[Board]) -> None:
    """And what it left was spoiled, as a power cut may do: it is fetched anew."""
    a, b, _ = boards
    killed = command(b, "big", killed=True)
    assert killed.returncode == -signal.SIGKILL
    assert b.visible() == {"tiny"}
    (part,) = b.library.glob(f"{ARRIVING}/big/files/weights.bin")
    arrived = part.stat().st_size
    assert 4 << 20 < arrived < BIG
    with part.open("r+b") as stream:
        stream.write(b"spoiled")
    copied = copy(b, "big")
    assert copied.copied_bytes == BIG - arrived + BIG
    assert same(a.library / "big", b.library / "big")


def test_a_board_that_lends_to_others_is_not_waited_for_if_another_does(
    boards: list[Board],
) -> None:
    a, b, c = boards
    path = f"/v1/peers/{a.client.get('/v1/status')['id']}/models/"
    path += next(m.model_id for m in peer_models(b.client).boards[0].models if m.name == "big")
    with b.client.open(f"{path}/weights.bin") as held:
        held.read(1)
        with pytest.raises(OverloadedError, match="a: it lends to others"):
            b.client.open(f"{path}/tokenizer.json")
        assert answers(c.client, f"{path}/tokenizer.json")  # it still has room for another board
        copied = copy(b, "big", "a")  # "c" has it, too
        assert copied.boards == ["c"]
    until(lambda: answers(b.client, f"{path}/tokenizer.json"))  # who leaves, leaves room


def answers(client: Client, path: str) -> bool:
    try:
        return client.open(path).read().startswith(b"{")
    except OverloadedError:
        return False


def test_no_room_is_said_before_anything_is_written(boards: list[Board]) -> None:
    a, b, _ = boards
    folder = model(a.library, "huge")
    files = tuple(
        msgspec.structs.replace(f, size_bytes=1 << 47) if f.name == "weights.bin" else f
        for f in manifest(folder).files
    )
    manifest(folder, files=files)
    before = a.lent()
    try:
        with pytest.raises(DiskFullError, match="needs"):
            copy(b, "huge")
        assert a.lent() == before
        assert b.visible() == {"tiny"}
    finally:
        shutil.rmtree(folder)


# --- a paired board that lies


def lie(folder: Path, what: str) -> None:
    weights = folder / "weights.bin"
    told = manifest(folder)
    first, *rest = told.files
    match what:
        case "other bytes":
            weights.write_bytes(weights.read_bytes()[::-1])
        case "shorter" | "longer":
            weights.write_bytes(b"x" * (4000 if what == "shorter" else 6000))
        case "size":
            size = msgspec.structs.replace(rest[-1], size_bytes=4999)
            manifest(folder, files=(first, *rest[:-1], size))
        case "another id":
            manifest(folder, model_id="0" * 64)
        case "a path" | "absolute" | "the manifest" | "hidden" | "no file" | "line":
            name = {"a path": "../tiny/model.json", "absolute": "/etc/passwd", "hidden": ".x",
                    "the manifest": "Model.json", "no file": "", "line": "x\n"}[what]  # fmt: skip
            files = (msgspec.structs.replace(first, name=name), *rest)
            manifest(folder, files=files, model_id=content_id(files))
        case "twice":
            files = (first, first, *rest)
            manifest(folder, files=files, model_id=content_id(files))
        case "many files":
            files = tuple(ModelFile(f"f{i}", 0, "0" * 64) for i in range(65))
            manifest(folder, files=files, model_id=content_id(files))
        case "huge manifest":
            files = tuple(ModelFile(f"f{i}", 0, "0" * 64) for i in range(10_000))
            manifest(folder, files=files, model_id=content_id(files))
        case "negative":
            manifest(folder, layers=-1)
        case "escapes":
            manifest(folder, architecture="\x1b[2J")
        case "not offered":
            manifest(folder, parameters=2**70)
        case "settings":
            config = json.loads((folder / "genai_config.json").read_text("utf-8"))
            config["model"]["decoder"]["session_options"] = {"custom_ops_library": "weights.bin"}
            (folder / "genai_config.json").write_text(json.dumps(config), "utf-8")
            manifest(folder)
        case "graph":
            tensor = onnx.TensorProto(name="w", data_type=1, dims=[1])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../tiny/weights.bin")
            graph = onnx.load(folder / "model.onnx")
            graph.graph.initializer.append(tensor)
            onnx.save(graph, folder / "model.onnx")
            manifest(folder)
        case "program":
            shutil.copyfile(sys.executable, folder / "vocab.txt")
            manifest(folder)
        case "link":
            weights.rename(folder.parent / "elsewhere")
            weights.symlink_to(folder.parent / "elsewhere")
        case "pipe":
            weights.unlink()
            os.mkfifo(weights)
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("other bytes", HashMismatchError, "weights.bin from a"),
        ("shorter", PeerError, "damaged"),
        ("longer", PeerError, "damaged"),
        ("size", PeerError, "damaged"),
        ("another id", ModelInvalidError, "another model"),
        ("a path", ModelInvalidError, "not allowed"),
        ("absolute", ModelInvalidError, "not allowed"),
        ("the manifest", ModelInvalidError, "not allowed"),
        ("hidden", ModelInvalidError, "not allowed"),
        ("no file", ModelInvalidError, "not allowed"),
        ("line", ModelInvalidError, "not allowed"),
        ("twice", ModelInvalidError, "one twice"),
        ("many files", ModelInvalidError, "too many"),
        ("huge manifest", PeerError, "too large"),
        ("negative", ModelInvalidError, "number"),
        ("escapes", ModelInvalidError, "text"),
        ("not offered", ModelNotFoundError, "holds a model 'lie'"),
        ("program", ModelInvalidError, "vocab.txt is a program"),
        ("settings", ModelInvalidError, "custom_ops_library"),
        ("graph", ModelInvalidError, "takes weights from another place"),
        ("link", PeerError, "cannot be read"),
        ("pipe", PeerError, "cannot be read"),
    ],
)
def test_a_board_that_lies(
    boards: list[Board], what: str, error: type[EdgemoaError], words: str
) -> None:
    a, b, _ = boards
    folder = model(a.library, "lie")
    try:
        lie(folder, what)
        with pytest.raises(error, match=words) as told:
            copy(b, "lie")
        assert told.value.hint
        assert b.visible() == {"tiny"}
        assert not (b.library / ARRIVING / "lie" / "files" / "vocab.txt").exists()
        assert a.local.process.poll() is None
    finally:
        shutil.rmtree(folder)
        time.sleep(0.15)  # a board takes 20 connections a second from one address, all boards' here
        (a.library / "elsewhere").unlink(missing_ok=True)


class Trickling:
    """What a daemon says whose one paired board withholds: asked for a file, it sends ``some``
    bytes at most, and never the last, and leaves."""

    def __init__(self, place: Path, folder: Path, name: str, some: int) -> None:
        self.asked = 0
        told = manifest(folder)
        data = (folder / name).read_bytes()
        files = tuple(f for f in told.files if f.name == name)
        told = msgspec.structs.replace(told, files=files, model_id=content_id(files))
        offer = {"name": "lie", "model_id": told.model_id, "size_bytes": len(data)}
        there = {"id": "x" * 56, "name": "x", "models": [offer]}
        models = json.dumps({"models_dir": str(place), "boards": [there]}).encode()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body, length = models, 0
                if self.path.endswith(told.model_id):
                    body = msgspec.json.encode(told)
                elif self.path.endswith(name):
                    outer.asked += 1
                    offset = int(self.headers.get("Range", "bytes=0-")[6:-1])
                    body, length = data[offset : min(offset + some, len(data) - 1)], offset
                    length = len(data) - offset
                self.send_response(200)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "here"

            def log_message(self, *_: object) -> None:
                pass

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self._server = Server(str(place / "s"), Handler)
        self.client = Client(place / "s", timeout_s=5)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def __enter__(self) -> Trickling:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize("some", [1, 1 << 30])
def test_of_a_program_nothing_stays_that_could_be_loaded(tmp_path: Path, some: int) -> None:
    """Also where its last byte never comes."""
    folder = model(tmp_path, "lie")
    shutil.copyfile(sys.executable, folder / "weights.bin")
    with Trickling(tmp_path, folder, "weights.bin", some) as there:
        with pytest.raises(ModelInvalidError, match="is a program"):
            copy_model("lie", "", there.client, silent, root=tmp_path / "m", patience=HASTY)
        assert there.asked == (4 if some == 1 else 1)
        assert [p for p in tmp_path.glob("m/**/*") if p.name == "weights.bin"] == []
        # Nor one that is there from before programs were looked for in what has not arrived.
        part = tmp_path / "m" / ARRIVING / "lie" / "files" / "weights.bin"
        part.write_bytes((folder / "weights.bin").read_bytes()[:-1])
        with pytest.raises(ModelInvalidError, match="is a program"):
            copy_model("lie", "", there.client, silent, root=tmp_path / "m", patience=HASTY)
        assert not part.exists()


def test_a_board_that_gives_a_byte_now_and_then_is_given_up(tmp_path: Path) -> None:
    folder = model(tmp_path, "lie")
    with Trickling(tmp_path, folder, "weights.bin", 1) as there:
        began = time.monotonic()
        with pytest.raises(NetworkError, match="went away") as told:
            copy_model("lie", "", there.client, silent, root=tmp_path / "m", patience=HASTY)
        assert told.value.hint == KEPT
        assert HASTY.gone <= time.monotonic() - began < 5
        assert there.asked > 3


@given(data=st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=6),
        max_leaves=12,
    ).map(msgspec.json.encode),
))  # fmt: skip
@example(data=b"[" * 100_000)
@example(data=b'{"format": 1e400}')
def test_no_manifest_is_believed_but_a_true_one(data: bytes) -> None:
    with pytest.raises(ModelInvalidError):
        check_manifest(data, "0" * 64)


def test_nothing_is_said_of_it_in_the_logs_but_what_happened(boards: list[Board]) -> None:
    """No test above was a defect to any daemon."""
    for board in boards:
        lines = board.local.log.read_text().splitlines()
        assert [line for line in lines if json.loads(line)["level"] == "error"] == []


def test_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="no edgemoa daemon"):
        copy_model("x", "", Client(tmp_path / "none"), silent, root=tmp_path)
    assert list(tmp_path.iterdir()) == []
