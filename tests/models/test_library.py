"""The library: whole models or none, one maker at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from edgemoa.errors import (
    DiskFullError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    StateError,
    UserError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import (
    KEEP_ARRIVING_S,
    SPARE_BYTES,
    ModelLibrary,
    Pin,
    default_model_dir,
    read_manifest,
)
from edgemoa.models.progress import silent

from .tiny import Tiny


@pytest.fixture
def library(tmp_path: Path) -> ModelLibrary:
    library = ModelLibrary(tmp_path / "models")
    import_gguf(Tiny("Q4_1").write(tmp_path / "t.gguf"), library, "tiny", silent)
    return library


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMOA_MODELS", "/some/where")
    assert default_model_dir() == Path("/some/where")
    monkeypatch.delenv("EDGEMOA_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_model_dir() == Path("/data/edgemoa/models")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_model_dir() == Path("/home/someone/.local/share/edgemoa/models")


def test_finding(library: ModelLibrary) -> None:
    assert library.find("tiny") == library.root / "tiny"
    with pytest.raises(ModelNotFoundError) as caught:
        library.find("other")
    assert caught.value.hint == "fetch it: edgemoa model pull other"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".staging", "A", "-x", "x" * 65, "ü"])
def test_names_that_lead_elsewhere_are_refused(library: ModelLibrary, name: str) -> None:
    for act in (library.find, library.remove):
        with pytest.raises(UserError, match="cannot be the name"):
            act(name)


def test_an_empty_or_missing_folder_has_no_models(tmp_path: Path) -> None:
    assert ModelLibrary(tmp_path).models() == {}
    assert ModelLibrary(tmp_path / "nowhere").models() == {}


def test_a_folder_copied_by_hand_works_under_its_new_name(library: ModelLibrary) -> None:
    (library.root / "tiny").rename(library.root / "copied")
    assert list(library.models()) == ["copied"]
    assert library.verify("copied", silent).name == "tiny"


def test_what_is_no_model_is_passed_over(library: ModelLibrary) -> None:
    (library.root / "notes").mkdir()
    (library.root / "broken").mkdir()
    (library.root / "broken" / "model.json").write_text("{")
    assert list(library.models()) == ["tiny"]
    with pytest.raises(ModelInvalidError, match="damaged"):
        read_manifest(library.root / "broken")
    with pytest.raises(ModelInvalidError, match="holds no model"):
        read_manifest(library.root / "notes")


def test_a_manifest_of_another_format(library: ModelLibrary) -> None:
    folder = library.find("tiny")
    newer = msgspec.structs.replace(read_manifest(folder), format=2)
    (folder / "model.json").write_bytes(msgspec.json.encode(newer))
    with pytest.raises(ModelInvalidError, match="format 2"):
        read_manifest(folder)


def test_verify_finds_a_changed_byte_and_a_missing_file(library: ModelLibrary) -> None:
    assert library.verify("tiny", silent).name == "tiny"
    path = library.find("tiny") / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(HashMismatchError, match=r"weights\.bin is not what was imported") as caught:
        library.verify("tiny", silent)
    assert "edgemoa model rm tiny" in caught.value.hint
    path.unlink()
    with pytest.raises(HashMismatchError, match="is missing"):
        library.verify("tiny", silent)


def test_verify_finds_what_was_not_imported(library: ModelLibrary) -> None:
    extra = library.find("tiny") / "chat_template\x1b.jinja"
    extra.write_text("{{ messages }}")  # the engine would prefer it to the model's own
    with pytest.raises(HashMismatchError, match=r"not imported: chat_template\?\.jinja") as caught:
        library.verify("tiny", silent)
    assert "take it out of that folder" in caught.value.hint
    extra.unlink()
    library.verify("tiny", silent)


def test_verify_never_reads_outside_the_folder(library: ModelLibrary) -> None:
    folder = library.find("tiny")
    manifest = read_manifest(folder)
    outside = msgspec.structs.replace(manifest.files[0], name="../../t.gguf")
    changed = msgspec.structs.replace(manifest, files=(outside,))
    (folder / "model.json").write_bytes(msgspec.json.encode(changed))
    with pytest.raises(HashMismatchError, match="is missing"):
        library.verify("tiny", silent)


def test_removing(library: ModelLibrary) -> None:
    library.remove("tiny")
    assert library.models() == {}
    with pytest.raises(ModelNotFoundError):
        library.remove("tiny")


def test_removing_waits_for_a_maker_and_says_so(library: ModelLibrary) -> None:
    stages: list[str] = []
    remove = threading.Thread(
        target=library.remove, args=("tiny", lambda stage, *_: stages.append(stage))
    )
    with library.staging("tiny", 0, silent):
        remove.start()
        deadline = time.monotonic() + 10
        while not stages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stages == ["wait for another process that works on this model"]
        assert library.find("tiny")
    remove.join(10)
    assert library.models() == {}


# What a process does that dies, or fails, at a certain call of the system. An audit hook is told of
# the call just before it is made.
CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from edgemoa.models.library import ModelLibrary, Pin, read_manifest
from edgemoa.models.progress import silent

library = ModelLibrary(Path(sys.argv[1]))

def at(event, matches, act):
    def hook(name, arguments):
        if name == event and matches(*(str(each) for each in arguments)):
            act()
    sys.addaudithook(hook)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fail():
    raise OSError(5, "Input/output error")
"""
REPLACE = """
manifest = read_manifest(library.find("tiny"))
with library.staging("tiny", 0, silent) as place:
    for file in manifest.files:
        shutil.copy(place.target / file.name, place.model)
    at("os.rename", lambda source, *_: Path(source).name == "model", {how})
    place.place(manifest)
"""


def child(library: ModelLibrary, code: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", CHILD + code, library.root],
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    ).returncode


def test_a_replacement_that_is_killed_costs_nothing(library: ModelLibrary) -> None:
    assert child(library, REPLACE.format(how="die")) == -signal.SIGKILL
    assert (library.root / ".staging" / "tiny" / "replaced").is_dir()  # it was between the two
    assert not (library.root / "tiny").exists()
    with library.staging("other", 0, silent):
        library.verify("tiny", silent)
    assert list((library.root / ".staging").iterdir()) == []


def test_what_a_killed_replacement_left_can_be_removed(library: ModelLibrary) -> None:
    assert child(library, REPLACE.format(how="die")) == -signal.SIGKILL
    library.remove("tiny")
    with library.staging("other", 0, silent):
        assert library.models() == {}


def test_a_replacement_that_fails_costs_nothing(library: ModelLibrary) -> None:
    assert child(library, REPLACE.format(how="fail")) == 1
    library.verify("tiny", silent)
    assert list((library.root / ".staging").iterdir()) == []


def test_a_removal_that_is_killed_is_done_by_the_next(library: ModelLibrary) -> None:
    # Even of a model with a file that is called as the folder of what is replaced.
    (library.root / "tiny" / "replaced").mkdir()
    code = 'at("os.rmdir", lambda *_: True, die)\nlibrary.remove("tiny")'
    assert child(library, code) == -signal.SIGKILL
    with library.staging("other", 0, silent):
        pass
    assert library.models() == {}
    assert not (library.root / "tiny").exists()


def test_a_maker_that_ends_while_it_is_looked_at(library: ModelLibrary) -> None:
    """Between the look at another's staging folder and the lock, that one may be through."""
    code = """
other = library.root / ".staging" / "other"
other.mkdir()
at("open", lambda path, *_: path.endswith(".locks/other"), lambda: other.rmdir())
with library.staging("third", 0, silent):
    assert not other.exists()
"""
    assert child(library, code) == 0


def test_a_choice_that_is_killed_leaves_nothing_for_good(library: ModelLibrary) -> None:
    pin = 'Pin(source="hf:a/b:c.gguf", revision="1" * 40, sha256="2" * 64)'
    for choice in ('set_default("tiny")', f'set_pin("tiny", {pin})'):
        for code in ('at("os.rename", lambda *_: True, die)\n', ""):
            assert child(library, f"{code}library.{choice}") == (-signal.SIGKILL if code else 0)
    assert library.default() == "tiny"
    assert library.pin("tiny") is not None
    assert list(library.root.rglob("*.new")) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StateError, match="cannot be kept below") as caught,
        ModelLibrary(tmp_path / "file").staging("tiny", 0, silent),
    ):
        pass
    assert "EDGEMOA_MODELS" in caught.value.hint


def test_a_second_maker_waits_and_says_so(tmp_path: Path) -> None:
    library = ModelLibrary(tmp_path)
    stages: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with library.staging("tiny", 0, lambda stage, *_: stages.append(stage)):
            entered.set()

    with library.staging("tiny", 0, silent):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 10
        while not stages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stages == ["wait for another process that works on this model"]
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()


def test_the_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    library = ModelLibrary(tmp_path)
    with library.staging("one", 0, silent) as one, library.staging("two", 0, silent):
        assert one.model.is_dir()


def test_the_lock_is_free_after_a_failure(tmp_path: Path) -> None:
    library = ModelLibrary(tmp_path)
    with pytest.raises(RuntimeError), library.staging("tiny", 0, silent):
        raise RuntimeError
    descriptor = os.open(tmp_path / ".locks" / "tiny", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    assert not (tmp_path / ".staging" / "tiny").exists()


# --- what arrives


def interrupted(library: ModelLibrary, name: str, source: str, content: bytes = b"half") -> Path:
    """A fetch that broke off; returns where its part lies."""
    with pytest.raises(KeyboardInterrupt), library.staging(name, 0, silent, source=source) as place:
        part = place.arriving / "weights.bin.part"
        part.write_bytes(content)
        raise KeyboardInterrupt
    return part


def test_what_arrived_is_kept_for_the_same_source(library: ModelLibrary) -> None:
    part = interrupted(library, "other", "hub, version 1")
    assert part.read_bytes() == b"half"
    assert list(library.models()) == ["tiny"]
    with library.staging("other", 0, silent, source="hub, version 1") as place:
        assert (place.arriving / part.name).read_bytes() == b"half"
    with library.staging("other", 0, silent, source="hub, version 2") as place:
        assert list(place.arriving.iterdir()) == []


def test_what_arrived_is_left_alone_by_a_making_that_fetches_nothing(library: ModelLibrary) -> None:
    part = interrupted(library, "other", "hub")
    with library.staging("other", 0, silent):
        pass
    assert part.read_bytes() == b"half"


def test_a_placed_model_needs_no_copy_and_leaves_nothing(library: ModelLibrary) -> None:
    manifest = read_manifest(library.find("tiny"))
    with library.staging("copy", 0, silent, source="a board") as place:
        for file in manifest.files:
            (place.arriving / file.name).write_bytes(
                (library.root / "tiny" / file.name).read_bytes()
            )
            number = (place.arriving / file.name).stat().st_ino
            place.take(place.arriving / file.name, file.name)
            assert (place.model / file.name).stat().st_ino == number
        place.origin = "another board"
        place.place(manifest)
    assert library.verify("copy", silent).model_id == manifest.model_id
    assert read_manifest(library.find("copy")).source == "another board"
    assert list((library.root / ".arriving").iterdir()) == []


def test_taking_without_hard_links(library: ModelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", none)
    with library.staging("copy", 0, silent, source="a board") as place:
        (place.arriving / "x").write_bytes(b"x")
        place.take(place.arriving / "x", "x")
        assert (place.model / "x").read_bytes() == b"x"
        assert not (place.arriving / "x").exists()


def test_what_arrived_needs_no_room_again(
    library: ModelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(library, "other", "hub", os.urandom(1 << 20))
    free = 1 << 30  # said, not measured: others write to the same disk meanwhile
    usage = type(shutil.disk_usage("/"))(2 * free, free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    need = free - SPARE_BYTES + (512 << 10)  # half a MiB too much
    with pytest.raises(DiskFullError), library.staging("third", need, silent, source="hub"):
        pass
    with library.staging("other", need, silent, source="hub"):
        pass


def test_what_nobody_went_on_with_is_swept(library: ModelLibrary) -> None:
    old, fresh = interrupted(library, "old", "hub"), interrupted(library, "fresh", "hub")
    past = time.time() - KEEP_ARRIVING_S - 60
    for path in (old, old.parent, old.parent.parent, old.parent.parent / "source"):
        os.utime(path, (past, past))
    with library.staging("other", 0, silent):
        pass
    assert not old.parent.parent.exists()
    assert fresh.exists()


def test_what_arrives_now_is_not_swept(library: ModelLibrary) -> None:
    with library.staging("slow", 0, silent, source="hub") as place:
        part = place.arriving / "x"
        part.write_bytes(b"x")
        past = time.time() - KEEP_ARRIVING_S - 60
        for path in (part, part.parent, place.kept, place.kept / "source"):
            os.utime(path, (past, past))
        with library.staging("other", 0, silent):
            pass
        assert part.exists()


def test_removing_forgets_what_arrived(library: ModelLibrary) -> None:
    part = interrupted(library, "other", "hub")
    library.remove("other")
    assert not part.parent.parent.exists()
    with pytest.raises(ModelNotFoundError):
        library.remove("other")


def test_a_model_may_be_called_as_a_lock_was(library: ModelLibrary) -> None:
    with (
        library.staging("x", 0, silent, source="a") as one,
        library.staging("x.lock", 0, silent, source="b") as two,
    ):
        assert one.arriving.is_dir() and two.arriving.is_dir()


def test_a_link_is_removed_and_what_it_leads_to_is_not(library: ModelLibrary) -> None:
    (library.root / "linked").symlink_to(library.root / "tiny")
    library.remove("linked")
    assert library.verify("tiny", silent)
    assert list(library.models()) == ["tiny"]


# --- choices


def test_the_default(library: ModelLibrary) -> None:
    assert library.default() is None
    with pytest.raises(ModelNotFoundError):
        library.set_default("other")
    library.set_default("tiny")
    assert ModelLibrary(library.root).default() == "tiny"
    library.remove("tiny")
    assert library.default() is None


def test_pins(library: ModelLibrary) -> None:
    assert library.pin("qwen") is None
    pin = Pin(source="hf:a/b:c.gguf", revision="1" * 40, sha256="2" * 64)
    library.set_pin("qwen", pin)
    library.set_pin("qwen", pin)
    assert ModelLibrary(library.root).pin("qwen") == pin
    assert [path.name for path in (library.root / ".pins").iterdir()] == ["qwen.json"]
    (library.root / ".pins" / "qwen.json").write_text("{")
    with pytest.raises(StateError, match="cannot be read") as caught:
        library.pin("qwen")
    assert "--unpin" in caught.value.hint
