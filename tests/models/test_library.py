"""The library: whole models or none, one maker at a time."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from edgemoa.errors import (
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    StateError,
    UserError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import ModelLibrary, default_model_dir, read_manifest
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
    descriptor = os.open(tmp_path / ".staging" / "tiny.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    assert not (tmp_path / ".staging" / "tiny").exists()
