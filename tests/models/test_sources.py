"""Pulling from the hub and from addresses: real clients, and a server that fails at will."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgemoa.errors import (
    DiskFullError,
    EdgemoaError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, Pin, read_manifest
from edgemoa.models.progress import silent
from edgemoa.models.pull import choose, parse_hub, pull

from .stand_in import COMMIT, StandIn, stand_in
from .tiny import Tiny

REF = "hf:owner/repo:tiny.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Tiny("Q4_1").write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture
def server(gguf: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    with stand_in() as server:
        server.files = {"tiny.gguf": gguf, "README.md": b"# tiny"}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "EDGEMOA_WHEEL_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("edgemoa.models.fetch.BACKOFF_S", (0.0, 0.0, 0.0))
        yield server


@pytest.fixture
def library(tmp_path: Path) -> ModelLibrary:
    return ModelLibrary(tmp_path / "models")


def nothing_is_left(library: ModelLibrary) -> bool:
    """Neither a model, nor half of one, nor anything that arrived."""
    left = [path for key in (".staging", ".arriving") for path in (library.root / key).iterdir()]
    return not library.models() and not left


def arrived(library: ModelLibrary, name: str = "tiny") -> int:
    folder = library.root / ".arriving" / name / "files"
    return sum(path.stat().st_size for path in folder.glob("*.part"))


# --- the hub


def test_a_file_of_the_hub_becomes_a_model(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    stages: list[str] = []
    folder = pull(REF, library, lambda stage, *_: stages.append(stage))
    assert folder == library.root / "tiny"
    manifest = library.verify("tiny", silent)
    assert manifest.source == f"{REF}@{COMMIT}"
    assert manifest.source_sha256 == hashlib.sha256(gguf).hexdigest()
    assert [stage for stage in dict.fromkeys(stages) if not stage.startswith("ask")] == [
        "download", "check", "import",
    ]  # fmt: skip
    # No request but those that bring the model: nothing is reported to anybody.
    assert [path.split("?")[0] for path, _ in server.seen] == [
        "/api/models/owner/repo",
        f"/owner/repo/resolve/{COMMIT}/tiny.gguf",
        "/files/tiny.gguf",
    ]
    assert server.sent_bytes == len(gguf)
    assert list((library.root / ".arriving").iterdir()) == []
    assert pull(REF, library, silent) == folder
    assert server.sent_bytes == len(gguf)


def test_what_a_cut_connection_brought_is_not_asked_for_again(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.faults = [("cut", 5000), ("status", 503), ("cut", 700)]
    stages: list[str] = []
    pull(REF, library, lambda stage, *_: stages.append(stage))
    library.verify("tiny", silent)
    assert server.sent_bytes == len(gguf)
    assert [headers.get("range") for headers in server.asked("/files/")] == [
        None, "bytes=5000-", "bytes=5000-", "bytes=5700-",
    ]  # fmt: skip
    assert any("the connection was cut; trying again" in stage for stage in stages)


def test_it_is_not_given_up_while_something_comes(
    server: StandIn, library: ModelLibrary, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemoa.models.fetch.NEWS_BYTES", 1000)
    server.faults = [("cut", 1000)] * 20
    pull(REF, library, silent)
    assert server.sent_bytes == len(gguf)
    assert len(server.asked("/files/")) == 21


def test_the_next_pull_goes_on_where_one_gave_up(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.faults = [("cut", 3000)] + [("cut", 0)] * 3
    with pytest.raises(NetworkError, match="connection was cut; tried 4 times") as caught:
        pull(REF, library, silent)
    assert "has arrived is kept" in caught.value.hint
    assert not library.models()
    assert arrived(library) == 3000
    assert not (library.root / ".staging" / "tiny").exists()
    pull(REF, library, silent)
    library.verify("tiny", silent)
    assert server.sent_bytes == len(gguf)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_the_next_pull_goes_on_where_one_was_ended(
    server: StandIn, library: ModelLibrary, gguf: bytes, number: int, code: int
) -> None:
    server.faults = [("silent", 0)]
    command = [sys.executable, "-m", "edgemoa", "model", "pull", REF, "--models", str(library.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert server.waiting.wait(20)
        while arrived(library) < len(gguf) // 2:
            assert child.poll() is None
        time.sleep(0.1)  # until it waits for more; just before, Python would see the signal late
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert out == b""
    assert b"Traceback" not in err
    assert not library.models()
    pull(REF, library, silent)
    library.verify("tiny", silent)
    assert server.sent_bytes == len(gguf)
    assert not (library.root / ".staging" / "tiny").exists()


def test_two_pulls_at_once_fetch_once(server: StandIn, library: ModelLibrary, gguf: bytes) -> None:
    command = [sys.executable, "-m", "edgemoa", "model", "pull", REF, "--models", str(library.root)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"
    ]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out.decode()) == (0, f"{library.root / 'tiny'}\n"), err.decode()
    assert server.sent_bytes == len(gguf)


def test_a_server_that_gives_no_parts(server: StandIn, library: ModelLibrary, gguf: bytes) -> None:
    server.ranges = False
    server.faults = [("cut", 5000)]
    pull(REF, library, silent)
    library.verify("tiny", silent)
    assert server.sent_bytes == len(gguf) + 5000


def test_other_bytes_are_refused_and_forgotten(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.told_sha256 = "0" * 64
    with pytest.raises(HashMismatchError, match="has the SHA-256"):
        pull(REF, library, silent)
    assert nothing_is_left(library)
    server.told_sha256 = ""
    pull(REF, library, silent)


def test_a_part_that_was_damaged_here_is_refused_and_forgotten(
    server: StandIn, library: ModelLibrary
) -> None:
    server.faults = [("cut", 3000)] + [("cut", 0)] * 3
    with pytest.raises(NetworkError):
        pull(REF, library, silent)
    (part,) = (library.root / ".arriving" / "tiny" / "files").glob("*.part")
    part.write_bytes(b"x" * 3000)
    with pytest.raises(EdgemoaError):
        pull(REF, library, silent)
    assert nothing_is_left(library)
    pull(REF, library, silent)
    library.verify("tiny", silent)


def test_a_file_of_another_length(server: StandIn, library: ModelLibrary) -> None:
    server.told_size = 123_456
    with pytest.raises(HashMismatchError, match="not 123456"):
        pull(REF, library, silent)
    assert nothing_is_left(library)


def test_room_is_looked_for_before_anything_is_fetched(
    server: StandIn, library: ModelLibrary
) -> None:
    server.told_size = 1 << 60
    with pytest.raises(DiskFullError):
        pull(REF, library, silent)
    assert not server.asked("/files/")


def test_a_disk_that_fills_up_costs_nothing_of_what_arrived(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    code = "import resource, sys; from edgemoa.cli import main; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "model", "pull", REF, "--models", library.root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 8, result.stderr
    assert "no space was left" in result.stderr
    assert arrived(library) == 20_000
    pull(REF, library, silent)
    library.verify("tiny", silent)
    assert server.asked("/files/")[-1]["range"] == "bytes=20000-"


def test_names_that_a_terminal_would_obey_are_not_shown(
    server: StandIn, library: ModelLibrary
) -> None:
    server.files = {"a\x1b[2J.gguf": b"", "b-IQ1_S.gguf": b"", "c-IQ2_S.gguf": b""}
    with pytest.raises(ModelInvalidError) as caught:
        pull("hf:owner/repo", library, silent)
    assert "\x1b" not in str(caught.value) + caught.value.hint


def test_a_file_that_git_alone_keeps(server: StandIn, library: ModelLibrary, gguf: bytes) -> None:
    server.plain = True
    server.faults = [("cut", 99)]
    pull(REF, library, silent)
    assert library.verify("tiny", silent).source_sha256 == hashlib.sha256(gguf).hexdigest()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_that_cannot_now_is_asked_again(
    server: StandIn, library: ModelLibrary, status: int
) -> None:
    server.api_faults = [status] * 2
    server.faults = [("status", status)] * 2
    pull(REF, library, silent)
    assert len(server.asked("/api/")) == len(server.asked("/files/")) == 3


def test_a_hub_that_never_can(server: StandIn, library: ModelLibrary) -> None:
    server.api_faults = [503] * 9
    with pytest.raises(NetworkError, match="the hub answers 503; tried 4 times"):
        pull(REF, library, silent)
    assert len(server.asked("/api/")) == 4


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf:owner/other", "no repository owner/other"),
        ("hf:owner/repo@gone", "no revision gone"),
        ("hf:owner/repo:other.gguf", r"no file other\.gguf"),
    ],
)
def test_what_is_not_there(server: StandIn, library: ModelLibrary, ref: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        pull(ref, library, silent)


def test_a_revision_is_what_was_asked_for(server: StandIn, library: ModelLibrary) -> None:
    pull(f"{REF}@v1", library, silent)
    assert len(server.asked("/api/models/owner/repo/revision/v1")) == 1
    assert read_manifest(library.find("tiny")).source.endswith(COMMIT)


def test_a_licence_that_was_not_accepted(
    server: StandIn,
    library: ModelLibrary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.gated = True
    for token in ("", "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match="accepted its licence") as caught:
            pull(REF, library, silent)
        assert f"{server.url}/owner/repo" in caught.value.hint
        assert "HF_TOKEN" in caught.value.hint
        assert "hf_wrong" not in str(caught.value) + caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    pull(REF, library, silent)
    assert server.asked("/resolve/")[-1]["authorization"] == "Bearer hf_right"
    # It goes to the hub alone, not to whoever keeps the files.
    assert all("authorization" not in headers for headers in server.asked("/files/"))
    written = b"".join(path.read_bytes() for path in library.root.rglob("*") if path.is_file())
    assert b"hf_right" not in written
    assert b"s3cret" not in written


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Please log in</html>", b"{}", b"[]", b'{"id": "owner/repo", "siblings": 7}'],
)
def test_something_that_is_no_hub(server: StandIn, library: ModelLibrary, body: bytes) -> None:
    server.api_body = body
    with pytest.raises(NetworkError, match="does not answer as the hub does"):
        pull(REF, library, silent)


def test_nobody_there(
    server: StandIn, library: ModelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="cannot be reached; tried 4 times") as caught:
        pull(REF, library, silent)
    assert "edgemoa model import FILE.gguf" in caught.value.hint
    assert "edgemoa model pull NAME --from-peer" in caught.value.hint


def test_offline_is_offline(server: StandIn, library: ModelLibrary) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "edgemoa", "model", "pull", REF, "--models", library.root, "--json"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 7
    assert "HF_HUB_OFFLINE" in json.loads(result.stdout)["error"]["message"]
    assert server.seen == []


# --- names of the catalog that nobody verified

ENTRY = """\
name = "small"
family = "t"
architecture = "llama"
parameters = 1
context = 64
quantization = "Q4_1"
licence = "none"
suits = "tests"
verified = false
size_bytes = 1
memory = { bytes = 1, context = 1 }
[source]
kind = "hub"
repository = "owner/repo"
file = "tiny.gguf"
"""


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalog"
    folder.mkdir()
    (folder / "small.toml").write_text(ENTRY)
    monkeypatch.setattr("edgemoa.models.catalog.catalog_folder", lambda: folder)
    return folder


def test_a_name_stays_what_its_first_pull_brought(
    server: StandIn, library: ModelLibrary, catalog: Path, gguf: bytes
) -> None:
    assert pull("small", library, silent) == library.root / "small"
    pin = library.pin("small")
    assert pin == Pin(REF, COMMIT, hashlib.sha256(gguf).hexdigest())
    library.remove("small")
    pull("small", library, silent)
    assert server.asked(f"/api/models/owner/repo/revision/{COMMIT}")
    # The same revision with other bytes: refused before they are fetched.
    library.remove("small")
    sent = server.sent_bytes
    server.files["tiny.gguf"] = other = Tiny("Q4_1", seed=8).write(catalog / "o.gguf").read_bytes()
    with pytest.raises(HashMismatchError, match="on the hub, not") as caught:
        pull("small", library, silent)
    assert "edgemoa model pull small --unpin" in caught.value.hint
    assert server.sent_bytes == sent
    assert not library.models()
    pull("small", library, silent, unpin=True)
    pin = library.pin("small")
    assert pin is not None
    assert pin.sha256 == hashlib.sha256(other).hexdigest()


def test_a_recorded_revision_that_is_gone(
    server: StandIn, library: ModelLibrary, catalog: Path
) -> None:
    library.set_pin("small", Pin(REF, "d" * 40, "0" * 64))
    with pytest.raises(ModelNotFoundError, match="no revision d") as caught:
        pull("small", library, silent)
    assert "--unpin" in caught.value.hint


def test_a_pin_of_what_the_catalog_has_left_counts_no_more(
    server: StandIn, library: ModelLibrary, catalog: Path
) -> None:
    library.set_pin("small", Pin("hf:owner/old:tiny.gguf", "d" * 40, "0" * 64))
    pull("small", library, silent)
    pin = library.pin("small")
    assert pin is not None
    assert pin.source == REF


def test_nothing_is_recorded_of_a_pull_that_failed(
    server: StandIn, library: ModelLibrary, catalog: Path
) -> None:
    server.told_sha256 = "0" * 64
    with pytest.raises(HashMismatchError):
        pull("small", library, silent)
    assert library.pin("small") is None


def test_an_entry_of_the_hub_without_the_hub(
    server: StandIn, library: ModelLibrary, catalog: Path, gguf: bytes, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        pull("small", library, silent, from_dir=tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(gguf)
    with pytest.raises(HashMismatchError):
        pull("small", library, silent, from_dir=tmp_path, sha256="0" * 64)
    pull("small", library, silent, from_dir=tmp_path)
    assert library.verify("small", silent).source == REF
    assert (tmp_path / "tiny.gguf").is_file()
    assert server.seen == []


def test_a_name_of_the_catalog_says_how_to_do_without_a_network(
    server: StandIn, library: ModelLibrary, catalog: Path
) -> None:
    server.api_faults = [503] * 9
    with pytest.raises(NetworkError) as caught:
        pull("small", library, silent)
    assert f"bring {REF} here" in caught.value.hint
    assert "edgemoa model pull small --from-dir FOLDER" in caught.value.hint
    assert "edgemoa model pull small --from-peer" in caught.value.hint


# --- which file


def offer(*names: str) -> list[object]:
    from edgemoa.models.hub import HubFile

    return [HubFile(name, 1, None, None) for name in names]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.gguf"], "m.gguf"),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf"], "m-Q4_K_M.gguf"),
        (["m-q8_0.gguf", "m-q4_0.gguf", "m-q4_0_4_4.gguf"], "m-q4_0.gguf"),
        (["m.Q4_K_L.gguf", "m.Q5_K_M.gguf", "m.IQ4_XS.gguf"], "m.Q5_K_M.gguf"),
        (["mmproj-m-f16.gguf", "m-UD-Q2_K_XL.gguf"], "m-UD-Q2_K_XL.gguf"),
        (["m-f16.gguf", "m-bf16.gguf"], "m-bf16.gguf"),
        (["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
    ],
)
def test_the_file_that_is_taken(names: list[str], chosen: str) -> None:
    assert choose("o/r", offer(*names)).path == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [
        ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"],
        ["m-IQ2_S.gguf", "m-IQ3_S.gguf"],
        ["m-00001-of-00002.gguf"],
    ],
)
def test_a_choice_that_is_the_users(names: list[str]) -> None:
    with pytest.raises(ModelInvalidError, match="not clear which") as caught:
        choose("o/r", offer(*names))  # type: ignore[arg-type]
    assert names[0] in caught.value.hint


def test_the_choice_is_told(server: StandIn, library: ModelLibrary, gguf: bytes) -> None:
    server.files = {"t-Q8_0.gguf": b"", "t-Q4_1.gguf": gguf}
    stages: list[str] = []
    assert pull("hf:owner/repo", library, lambda stage, *_: stages.append(stage)).name == "t-q4_1"
    assert "take t-Q4_1.gguf of 2 GGUF files" in stages


def test_one_part_of_several(server: StandIn, library: ModelLibrary, gguf: bytes) -> None:
    server.files = {"t-00001-of-00003.gguf": gguf}
    with pytest.raises(ModelInvalidError, match="one part of a model"):
        pull("hf:owner/repo:t-00001-of-00003.gguf", library, silent)


@pytest.mark.parametrize(
    ("ref", "parsed"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a/b@main", ("a/b", None, "main")),
        ("hf:a/b.c-GGUF:x/y z.gguf@refs/pr/1", ("a/b.c-GGUF", "x/y z.gguf", "refs/pr/1")),
        ("hf:a/b:cpu/int4/", ("a/b", "cpu/int4/", None)),
    ],
)
def test_how_the_hub_is_written(ref: str, parsed: tuple[str, str | None, str | None]) -> None:
    found = parse_hub(ref)
    assert (found.repository, found.path, found.revision) == parsed


@pytest.mark.parametrize(
    "ref",
    ["hf:a", "hf:a/b/c", "hf:a/b:../x.gguf", "hf:a/b:x/../y.gguf", "hf:a/b@../x", "hf:-a/b",
     "hf:a/b:weights.bin", "hf:a/b:x\n.gguf", "hf:"],
)  # fmt: skip
def test_what_is_no_reference(ref: str, library: ModelLibrary) -> None:
    with pytest.raises(UserError):
        pull(ref, library, silent)


@pytest.mark.parametrize("ref", ["./x.gguf", "/tmp/folder", "x.gguf", "ftp://x/y.gguf"])
def test_what_is_to_be_imported_is_said_so(ref: str, library: ModelLibrary) -> None:
    with pytest.raises(UserError, match="nothing that can be fetched") as caught:
        pull(ref, library, silent)
    assert "edgemoa model import" in caught.value.hint


def test_the_name_is_somebody_elses(
    server: StandIn, library: ModelLibrary, tmp_path: Path, gguf: bytes
) -> None:
    (tmp_path / "mine.gguf").write_bytes(gguf)
    import_gguf(tmp_path / "mine.gguf", library, "tiny", silent)
    with pytest.raises(UserError, match="a model 'tiny' already"):
        pull(REF, library, silent)
    assert pull(REF, library, silent, name="theirs") == library.root / "theirs"


def make_older(folder: Path, **changes: str | None) -> None:
    older = msgspec.structs.replace(read_manifest(folder), importer=1, **changes)
    (folder / "model.json").write_bytes(msgspec.json.encode(older))


@pytest.mark.parametrize("source", [f"{REF}@{COMMIT}", f"{REF}@{'d' * 40}", REF, ""])
def test_an_older_import_of_the_same_file_is_made_anew(
    server: StandIn, library: ModelLibrary, gguf: bytes, source: str
) -> None:
    folder = pull(REF, library, silent)
    make_older(folder, source=source)
    assert pull(REF, library, silent) == folder
    assert not read_manifest(folder).is_outdated
    assert server.sent_bytes == 2 * len(gguf)


def test_an_older_import_of_another_file_is_left(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    folder = pull(REF, library, silent)
    make_older(folder, source=f"{REF}@{'d' * 40}", source_sha256="0" * 64)
    with pytest.raises(UserError, match="a model 'tiny' already, from hf:"):
        pull(REF, library, silent)
    assert read_manifest(folder).is_outdated
    assert server.sent_bytes == len(gguf)


# --- addresses


def test_an_older_import_is_not_replaced_from_another_address(
    server: StandIn, library: ModelLibrary, gguf: bytes, tmp_path: Path
) -> None:
    other = Tiny("Q4_1", seed=8).write(tmp_path / "o.gguf").read_bytes()
    server.files["other.gguf"] = other
    folder = pull(f"{server.url}/files/tiny.gguf", library, silent, name="mine")
    make_older(folder)
    for sha256 in (None, hashlib.sha256(other).hexdigest()):
        with pytest.raises(UserError, match="a model 'mine' already, from http") as caught:
            pull(f"{server.url}/files/other.gguf", library, silent, name="mine", sha256=sha256)
        assert "edgemoa model rm mine" in caught.value.hint
    assert read_manifest(folder).source_sha256 == hashlib.sha256(gguf).hexdigest()
    # The same address, or another one of the same file, makes it anew.
    pull(f"{server.url}/files/tiny.gguf", library, silent, name="mine")
    assert not read_manifest(folder).is_outdated
    make_older(folder)
    server.files["moved.gguf"] = gguf
    sha256 = hashlib.sha256(gguf).hexdigest()
    pull(f"{server.url}/files/moved.gguf", library, silent, name="mine", sha256=sha256)
    assert read_manifest(folder).source.endswith("moved.gguf")


def test_an_address_stays_as_it_was_written(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.files["a\x1b[2J b.gguf"] = gguf
    url = f"{server.url}/files/a%1B%5B2J%20b.gguf"
    folder = pull(f"{url}?token=s3cret", library, silent)
    assert folder.name == "a-2j-b"
    assert read_manifest(folder).source == url
    with pytest.raises(ModelNotFoundError) as caught:
        pull(f"{server.url}/files/none%1B%5B2J.gguf", library, silent)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ModelInvalidError) as invalid:
        pull(f"{server.url}/files/x%1B-00001-of-00002.gguf", library, silent)
    assert "\x1b" not in str(invalid.value)


ENDED_AT_THE_END = """
import os, signal, sys
from edgemoa.cli import main

def hook(event, arguments):
    if event == "os.rename" and str(arguments[0]).endswith(".part"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
main()
"""


@pytest.mark.parametrize("known", [True, False])
def test_a_whole_file_without_its_name_is_not_fetched_again(
    server: StandIn, library: ModelLibrary, gguf: bytes, known: bool
) -> None:
    url = f"{server.url}/files/tiny.gguf"
    sha256 = hashlib.sha256(gguf).hexdigest() if known else None
    words = ["model", "pull", url, "--models", str(library.root)]
    words += ["--sha256", sha256] if sha256 else []
    ended = subprocess.run(
        [sys.executable, "-c", ENDED_AT_THE_END, *words], stderr=subprocess.DEVNULL, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert arrived(library) == len(gguf)
    pull(url, library, silent, sha256=sha256)
    library.verify("tiny", silent)
    assert len(server.seen) == 1


def test_an_address_goes_on_where_it_was_cut(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.faults = [("cut", 4000)] + [("cut", 0)] * 3
    url = f"{server.url}/files/tiny.gguf?token=s3cret"
    with pytest.raises(NetworkError) as caught:
        pull(url, library, silent)
    assert "s3cret" not in str(caught.value)
    pull(url, library, silent)
    manifest = library.verify("tiny", silent)
    assert manifest.source == f"{server.url}/files/tiny.gguf"
    assert server.sent_bytes == len(gguf)
    last = server.asked("/files/")[-1]
    assert last["range"] == "bytes=4000-"
    assert last["if-range"].startswith('"')


def test_a_file_that_changes_between_two_tries_is_not_patched_together(
    server: StandIn, library: ModelLibrary, gguf: bytes, tmp_path: Path
) -> None:
    server.files["tiny.gguf"] = bytes(len(gguf))
    server.faults = [("cut", 4000)] + [("cut", 0)] * 3
    with pytest.raises(NetworkError):
        pull(f"{server.url}/files/tiny.gguf", library, silent)
    server.files["tiny.gguf"] = gguf
    pull(f"{server.url}/files/tiny.gguf", library, silent)
    assert library.verify("tiny", silent).source_sha256 == hashlib.sha256(gguf).hexdigest()


@pytest.mark.parametrize("known", [True, False])
def test_without_a_mark_of_the_version_only_a_hash_lets_parts_be_joined(
    server: StandIn, library: ModelLibrary, gguf: bytes, known: bool
) -> None:
    server.tags = False
    server.faults = [("cut", 4000)]
    sha256 = hashlib.sha256(gguf).hexdigest() if known else None
    pull(f"{server.url}/files/tiny.gguf", library, silent, sha256=sha256)
    library.verify("tiny", silent)
    assert server.sent_bytes == len(gguf) + (0 if known else 4000)


@pytest.mark.parametrize("offset", [1, 1000])
def test_a_part_that_begins_elsewhere_is_not_joined(
    server: StandIn, library: ModelLibrary, gguf: bytes, offset: int
) -> None:
    server.faults = [("cut", 4000), ("shift", offset)]
    pull(f"{server.url}/files/tiny.gguf", library, silent)
    assert library.verify("tiny", silent).source_sha256 == hashlib.sha256(gguf).hexdigest()
    assert "range" not in server.asked("/files/")[-1]


def test_what_comes_packed_is_not_taken(server: StandIn, library: ModelLibrary) -> None:
    server.faults = [("packed", 0)]
    with pytest.raises(NetworkError, match="sent packed"):
        pull(f"{server.url}/files/tiny.gguf", library, silent)


@pytest.mark.parametrize(("after", "wait"), [("1", "1 s"), ("soon", "0 s"), ("-5", "0 s")])
def test_a_server_that_says_when_to_come_back(
    server: StandIn, library: ModelLibrary, after: str, wait: str
) -> None:
    server.retry_after = after
    server.faults = [("status", 503)]
    stages: list[str] = []
    began = time.monotonic()
    pull(f"{server.url}/files/tiny.gguf", library, lambda stage, *_: stages.append(stage))
    assert f"the server answers 503; trying again in {wait}" in stages
    assert (time.monotonic() - began >= 1) or wait == "0 s"


def test_a_part_that_is_longer_than_the_file(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.faults = [("cut", 4000)] + [("cut", 0)] * 3
    sha256 = hashlib.sha256(gguf).hexdigest()
    with pytest.raises(NetworkError):
        pull(f"{server.url}/files/tiny.gguf", library, silent, sha256=sha256)
    (part,) = (library.root / ".arriving" / "tiny" / "files").glob("*.part")
    part.write_bytes(gguf + b"more")
    pull(f"{server.url}/files/tiny.gguf", library, silent, sha256=sha256)  # by way of a 416
    library.verify("tiny", silent)


def test_a_server_that_does_not_say_how_long_it_is(server: StandIn, library: ModelLibrary) -> None:
    server.lengths = False
    pull(f"{server.url}/files/tiny.gguf", library, silent)
    library.verify("tiny", silent)


def test_half_a_file_of_unknown_length_is_no_model(
    server: StandIn, library: ModelLibrary, gguf: bytes
) -> None:
    server.lengths = False
    server.faults = [("cut", len(gguf) // 2)]
    with pytest.raises(ModelInvalidError):
        pull(f"{server.url}/files/tiny.gguf", library, silent)
    assert nothing_is_left(library)


def test_another_hash_than_the_users(server: StandIn, library: ModelLibrary) -> None:
    with pytest.raises(HashMismatchError):
        pull(f"{server.url}/files/tiny.gguf", library, silent, sha256="0" * 64)
    assert nothing_is_left(library)
    folder = pull(f"{server.url}/files/tiny.gguf", library, silent)
    with pytest.raises(HashMismatchError, match="a model 'tiny' already"):
        pull(f"{server.url}/files/tiny.gguf", library, silent, sha256="0" * 64)
    found = read_manifest(folder).source_sha256
    assert pull(f"{server.url}/files/tiny.gguf", library, silent, sha256=found) == folder
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        pull(f"{server.url}/files/tiny.gguf", library, silent, sha256="abc")


def test_a_redirect_in_circles(server: StandIn, library: ModelLibrary) -> None:
    server.redirect = f"{server.url}/files/again.gguf"
    with pytest.raises(NetworkError, match="in circles"):
        pull(f"{server.url}/files/tiny.gguf", library, silent)
    assert len(server.seen) == 11


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for this machine, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "stand-in.pem"
    kind = serialization.PrivateFormat.PKCS8
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    )
    return path


def test_tls_is_verified_and_not_left(
    server: StandIn, library: ModelLibrary, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(certificate) as secure:
        secure.files = server.files
        with pytest.raises(NetworkError, match="certificate cannot be verified") as caught:
            pull(f"{secure.url}/files/tiny.gguf", library, silent)
        assert "clock" in caught.value.hint
        assert not secure.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        secure.redirect = f"{server.url}/files/tiny.gguf"
        with pytest.raises(NetworkError, match="leads from https to an address without"):
            pull(f"{secure.url}/files/tiny.gguf", library, silent)
        assert not server.seen
        secure.redirect = ""
        pull(f"{secure.url}/files/tiny.gguf", library, silent)
    library.verify("tiny", silent)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/files/none.gguf", ModelNotFoundError),
        ("/files/tiny.zip", UserError),
        ("/files/t-00002-of-00003.gguf", ModelInvalidError),
    ],
)
def test_an_address_that_is_no_good(
    server: StandIn, library: ModelLibrary, path: str, error: type[EdgemoaError]
) -> None:
    with pytest.raises(error):
        pull(f"{server.url}{path}", library, silent)
    assert not library.models()


def test_what_is_not_given_to_everybody(server: StandIn, library: ModelLibrary) -> None:
    server.faults = [("status", 403)]
    with pytest.raises(NetworkError, match="not given out to everybody"):
        pull(f"{server.url}/files/tiny.gguf", library, silent)


# --- wheels


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_any_wheel_with_a_gguf(
    server: StandIn, library: ModelLibrary, gguf: bytes, tmp_path: Path
) -> None:
    path = wheel(tmp_path / "w-1-py3-none-any.whl", {"w/Tiny 1.gguf": gguf, "w/x.py": b"boom"})
    assert pull(str(path), library, silent) == library.root / "tiny-1"
    assert library.verify("tiny-1", silent).source == f"wheel {path.name}"
    server.files[path.name] = path.read_bytes()
    server.faults = [("cut", 2000)]
    placed = pull(f"{server.url}/files/{path.name}", library, silent, name="fetched")
    assert (
        library.verify(placed.name, silent).model_id
        == read_manifest(library.find("tiny-1")).model_id
    )


def test_of_a_wheel_that_is_there_already_the_hash_is_not_compared(
    server: StandIn, library: ModelLibrary, gguf: bytes, tmp_path: Path
) -> None:
    path = wheel(tmp_path / "w-1-py3-none-any.whl", {"w/tiny.gguf": gguf})
    server.files[path.name] = path.read_bytes()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for ref in (str(path), f"{server.url}/files/{path.name}"):
        name = "local" if ref == str(path) else "fetched"
        folder = pull(ref, library, silent, name=name, sha256=sha256)
        stages: list[str] = []

        def progress(stage: str, *_: int, stages: list[str] = stages) -> None:
            stages.append(stage)

        assert pull(ref, library, progress, name=name, sha256="0" * 64) == folder
        assert stages == [f"{name} is there already: --sha256, of a wheel, is not compared"]


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"", "b.gguf": b""}, {"a.bin": b""}])
def test_a_wheel_without_one_gguf(
    library: ModelLibrary, tmp_path: Path, members: dict[str, bytes]
) -> None:
    path = wheel(tmp_path / "w-1-py3-none-any.whl", members)
    with pytest.raises(ModelInvalidError, match="does not hold one GGUF"):
        pull(str(path), library, silent)


def test_a_wheel_that_cannot_be_read(library: ModelLibrary, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        pull(str(tmp_path / "none.whl"), library, silent)
    (tmp_path / "folder.whl").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        pull(str(tmp_path / "folder.whl"), library, silent)


def test_a_wheel_that_is_a_pipe(library: ModelLibrary, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.whl")
    with pytest.raises(UserError, match="no regular file"):
        pull(str(tmp_path / "pipe.whl"), library, silent)


def test_a_wheel_that_says_it_holds_more_than_there_is_room_for(
    library: ModelLibrary, tmp_path: Path, gguf: bytes
) -> None:
    path = wheel(tmp_path / "w-1-py3-none-any.whl", {"w/tiny.gguf": gguf})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (0xFFFFFF00).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises((DiskFullError, ModelInvalidError), match=r"cut off|MB free"):
        pull(str(path), library, silent)
    assert not library.models()
