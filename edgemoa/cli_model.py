"""``edgemoa model``: fetch, import, look at and check the models on this board."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgemoa import cli_settings
from edgemoa.errors import (
    EdgemoaError,
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    UserError,
)
from edgemoa.models.catalog import Entry, HubSource, Memory, default_model, load_catalog
from edgemoa.models.library import (
    Manifest,
    ModelLibrary,
    check_regular,
    read_manifest,
)
from edgemoa.models.progress import ConsoleProgress, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PEERS_TIMEOUT_S = 15.0
FACT_LENGTH = 4096  # characters at most that are shown of one fact

DESCRIPTION = """\
Models live in one folder each, below --models DIR, $EDGEMOA_MODELS or
$XDG_DATA_HOME/edgemoa/models (~/.local/share/edgemoa/models). A folder copied
there by hand from another board works, too. Nothing is fetched but by `pull`.
"""

PULL = """\
Fetch a model, check it and import it. REF is one of:

  NAME                                  of the catalog: edgemoa model list --remote
  hf:OWNER/REPO[:FILE.gguf][@REVISION]  a GGUF on the Hugging Face hub; without FILE
                                        the best of 4 bits there: Q4_K_M, then
                                        Q4_K_S, Q4_1, Q4_0, then larger ones
  hf:OWNER/REPO[:FOLDER/][@REVISION]    a ready-made onnxruntime-genai folder there
  https://HOST/FILE.gguf                any address of a GGUF, or of a wheel that
                                        holds one (.whl)
  FILE.whl                              such a wheel on this machine

What is there already is left, if it is the same; what an earlier edgemoa made
of the same file is made anew.

What breaks off goes on with the next try, for up to a week. $HF_TOKEN lets you
in where a licence has to be accepted, $HF_ENDPOINT names another hub, and
$HTTPS_PROXY is heeded.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``model`` and its subcommands. Each sets ``func``: it takes the arguments, returns the
    exit code, and raises :class:`EdgemoaError`.
    """
    parser = subparsers.add_parser(
        "model",
        help="fetch, import, list and check models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, func: Callable[[argparse.Namespace], int], summary: str, description: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter
            if "\n" in description
            else argparse.HelpFormatter,
        )
        command.add_argument(
            "--models",
            type=Path,
            metavar="DIR",
            help="the folder of models (default: that of the board's settings; else "
            "$EDGEMOA_MODELS, or edgemoa/models in $XDG_DATA_HOME or ~/.local/share)",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(func=func)
        return command

    command = add("pull", _pull, "fetch a model and import it", PULL)
    command.add_argument(
        "name", metavar="REF", nargs="?", default="", help="default: what this board is to run"
    )
    command.add_argument(
        "--name", dest="called", metavar="NAME", help="what it is called here (default: its file)"
    )
    command.add_argument(
        "--sha256", metavar="HEX", help="what the file must have; another one is refused"
    )
    command.add_argument(
        "--from-dir",
        type=Path,
        metavar="DIR",
        help="take the file of a catalog's NAME from this folder and fetch nothing (offline); "
        "$EDGEMOA_WHEEL_DIR does the same",
    )
    command.add_argument(
        "--from-peer",
        nargs="?",
        const="",
        metavar="BOARD",
        help="copy it from a paired board, named or whichever has it, not from the internet",
    )
    command.add_argument(
        "--unpin",
        action="store_true",
        help="take what a catalog's NAME stands for now, not what this board got at first",
    )
    command.add_argument("--socket", help="the daemon's, with --from-peer ($EDGEMOA_API_SOCKET)")
    command = add(
        "import",
        _import,
        "import a GGUF file, its weights not quantized once more, or a ready-made folder",
        "Import a GGUF file: its quantized weights are carried over bit for bit where that is "
        "possible. Or take in a folder that is ready for onnxruntime-genai.",
    )
    command.add_argument("file", type=Path, metavar="FILE.gguf|FOLDER")
    command.add_argument("--name", metavar="NAME", help="default: from the file's name")
    command = add("list", _list, "list the models on this board")
    command.add_argument(
        "--remote",
        action="store_true",
        help="also the catalog, with what fits this board, and what paired boards have",
    )
    command.add_argument("--socket", help="the daemon's, with --remote ($EDGEMOA_API_SOCKET)")
    command = add("show", _show, "show what is known of a model")
    command.add_argument("name", metavar="NAME", help="on this board, or of the catalog")
    command = add("verify", _verify, "compare every file of a model with the hashes of its import")
    command.add_argument("name", metavar="NAME")
    command = add("rm", _remove, "remove a model, and what was fetched of it, from this board")
    command.add_argument("name", metavar="NAME")
    command = add("set-default", _set_default, "choose the model that is used if nobody says which")
    command.add_argument("name", metavar="NAME")
    command = add(
        "perplexity",
        _perplexity,
        "measure how well a model predicts a text",
        "Measure a model's perplexity on a text: lower is better. The text is cut into windows "
        "that are scored each by itself.",
    )
    command.add_argument("name", metavar="NAME")
    command.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    command.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens a window (default: 512)"
    )
    command.add_argument("--tokens", type=int, metavar="N", help="stop after so many tokens")


def _library(args: argparse.Namespace, *, to_change: bool = False) -> ModelLibrary:
    library = (
        ModelLibrary(args.models) if args.models else cli_settings.library(cli_settings.load())
    )
    if to_change:
        cli_settings.as_owner(library.root)
    return library


def _pull(args: argparse.Namespace) -> int:
    if args.from_peer is not None:
        from edgemoa.cli_peer_models import pull_from_peer

        if not args.name:
            raise UserError("which model?", hint="see edgemoa model list --remote")
        return pull_from_peer(args)
    from edgemoa.models.pull import pull

    library = _library(args, to_change=True)
    name = args.name
    if not name:
        name = cli_settings.load().model.name or default_model(library)
        if name in library.models():
            return _placed(args, library.find(name))
    with closing(ConsoleProgress()) as progress:
        folder = pull(
            name,
            library,
            progress,
            name=args.called,
            from_dir=args.from_dir,
            sha256=args.sha256,
            unpin=args.unpin,
        )
    return _placed(args, folder)


def _import(args: argparse.Namespace) -> int:
    from edgemoa.models.pull import model_name

    check_regular(args.file)
    folder = args.file.is_dir()
    name = args.name or model_name(args.file.resolve().name if folder else args.file.stem)
    library = _library(args, to_change=True)
    with closing(ConsoleProgress()) as progress:
        if folder:
            from edgemoa.models.ready import REQUIRED, import_folder
            from edgemoa.text.settings import CONFIG

            if not (args.file / CONFIG).is_file():
                raise ModelInvalidError(
                    f"{args.file} is no ready-made model: it holds no {CONFIG}",
                    hint=f"a folder must hold {CONFIG}, the .onnx graph that it names with its "
                    f"weights, {' and '.join(REQUIRED)}; a GGUF file is imported by its own name: "
                    "edgemoa model import FILE.gguf",
                )
            placed = import_folder(args.file, library, name, progress)
        else:
            from edgemoa.models.importer import import_gguf

            placed = import_gguf(args.file, library, name, progress)
    return _placed(args, placed)


def _placed(args: argparse.Namespace, folder: Path) -> int:
    if args.json:
        print(json.dumps(_shown(read_manifest(folder), folder)))
    else:
        print(folder)
    return 0


def _list(args: argparse.Namespace) -> int:
    library = _library(args)
    default = default_model(library)
    here = [_row(name, manifest, default) for name, manifest in library.models().items()]
    shown = _List(str(library.root), default, here)
    if args.remote:
        shown = _remote(args, library, shown)
    if args.json:
        print(json.dumps(msgspec.to_builtins(shown)))
        return 0
    if not here:
        print(f"no model is on this board yet; fetch the default: edgemoa model pull {default}")
    names = [row.name for row in here] + [offer.name for offer in shown.catalog or []]
    width = max(map(len, names), default=4)
    for row in here:
        print(
            f"{'*' if row.default else ' '} {row.name:<{width}}  {_count(row.parameters):>7}  "
            f"{printable(row.quantization or '-'):<6} {row.size_bytes / 1e6:7.0f} MB"
        )
    if here:
        starred = any(row.default for row in here)
        print(f"\n{'* the default' if starred else _the_default(library, default)}")
        print(f"Models are in {library.root}")
    for offer in shown.catalog or []:
        if offer is (shown.catalog or [])[0]:
            print("\nThe catalog; sizes with ~ are estimates, of what nobody here has fetched yet:")
        fits = "on this board" if offer.on_board else offer.obstacle or "fits"
        print(
            f"  {offer.name:<{width}}  {_count(offer.parameters):>7}  {offer.quantization:<6} "
            f"{'' if offer.verified else '~'}{offer.size_bytes / 1e6:.0f} MB".ljust(width + 28)
            + f"  {offer.memory.bytes / 1e9:4.1f} GB of memory  {fits}  ({offer.licence})"
        )
    for board in shown.peers or []:
        label, detail = printable(board["name"] or board["id"]), printable(board["detail"])
        print(f"\nThe paired board {label} has{f' ({detail})' if detail else ''}:")
        for model in board["models"]:
            print(f"  {printable(model['name']):<{width}}  {model['size_bytes'] / 1e6:.0f} MB")
    return 0


class _Row(msgspec.Struct, frozen=True):
    name: str
    default: bool
    parameters: int | None
    quantization: str | None
    size_bytes: int
    model_id: str
    source: str


class _Offer(msgspec.Struct, frozen=True):
    name: str
    default: bool
    on_board: bool
    verified: bool
    parameters: int
    quantization: str
    size_bytes: int
    download_bytes: int
    memory: Memory
    licence: str
    suits: str
    fits: bool
    obstacle: str


class _List(msgspec.Struct, frozen=True, omit_defaults=True):
    folder: str
    default: str
    models: list[_Row]
    catalog: list[_Offer] | None = None
    board: dict[str, int | None] | None = None
    peers: list[dict[str, Any]] | None = None


def _row(name: str, manifest: Manifest, default: str) -> _Row:
    return _Row(
        name=name,
        default=name == default,
        parameters=manifest.parameters,
        quantization=manifest.quantization,
        size_bytes=manifest.size_bytes,
        model_id=manifest.model_id,
        source=manifest.source,
    )


def _remote(args: argparse.Namespace, library: ModelLibrary, shown: _List) -> _List:
    """The list with the catalog and what paired boards have. Asks no one but this board's daemon,
    and does without where none runs.
    """
    from edgemoa.models.fit import obstacle, room

    has, here = room(library.root), {row.name for row in shown.models}
    offers = []
    for entry in sorted(load_catalog().values(), key=lambda entry: entry.memory.bytes):
        against = obstacle(entry, has, on_board=entry.name in here)
        offers.append(
            _Offer(
                name=entry.name,
                default=entry.name == shown.default,
                on_board=entry.name in here,
                verified=entry.verified,
                parameters=entry.parameters,
                quantization=entry.quantization,
                size_bytes=entry.size_bytes,
                download_bytes=entry.download_bytes,
                memory=entry.memory,
                licence=entry.licence,
                suits=entry.suits,
                fits=not against,
                obstacle=against,
            )
        )
    return msgspec.structs.replace(shown, catalog=offers, board=asdict(has), peers=_peers(args))


def _peers(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    from edgemoa.cli_peer_models import peer_models
    from edgemoa.client import Client

    socket = args.socket or os.environ.get("EDGEMOA_API_SOCKET")
    client = Client(Path(socket).expanduser() if socket else None, timeout_s=PEERS_TIMEOUT_S)
    try:
        boards = peer_models(client).boards
    except EdgemoaError:
        return None
    told: list[dict[str, Any]] = msgspec.to_builtins(boards)
    return list(told)


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "-"
    millions = parameters / 1e6
    return f"{millions:.0f} M" if millions < 1000 else f"{millions / 1000:.1f} B"


def _show(args: argparse.Namespace) -> int:
    library = _library(args)
    try:
        folder = library.find(args.name)
    except ModelNotFoundError:
        entry = load_catalog().get(args.name)
        if entry is None:
            raise
        return _show_entry(args, entry)
    manifest = read_manifest(folder)
    if args.json:
        print(json.dumps(_shown(manifest, folder)))
        return 0
    _print_facts(_facts(manifest, folder))
    return 0


def _shown(manifest: Manifest, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(manifest)
    mine = {"name": folder.name, "folder": str(folder), "size_bytes": manifest.size_bytes}
    return {**told, **mine}


def _show_entry(args: argparse.Namespace, entry: Entry) -> int:
    if args.json:
        print(json.dumps({**msgspec.to_builtins(entry), "on_board": False}))
        return 0
    about = "" if entry.verified else "about "
    _print_facts(
        [
            ("name", f"{entry.name}, not on this board: edgemoa model pull {entry.name}"),
            ("family", entry.family),
            ("architecture", entry.architecture),
            ("parameters", _count(entry.parameters)),
            ("quantization", entry.quantization),
            ("context", f"{entry.context} tokens"),
            ("licence", entry.licence),
            ("suits", entry.suits),
            ("on disk", f"{about}{entry.size_bytes / 1e6:.0f} MB"),
            (
                "memory",
                f"{about}{entry.memory.bytes / 1e6:.0f} MB "
                f"with a context of {entry.memory.context} tokens",
            ),
            ("source", _origin(entry)),
            (
                "verified",
                "yes, pinned by hash"
                if entry.verified
                else "no: never fetched by us; this board records what its first pull brings",
            ),
        ]
    )
    return 0


def _origin(entry: Entry) -> str:
    """What the manifest of a model of the catalog has as its source, but for a revision."""
    source = entry.source
    if isinstance(source, HubSource):
        return f"hf:{source.repository}:{source.file}"
    return f"wheel {source.package} {source.version}"


def _again(name: str, manifest: Manifest) -> str:
    """The command that brings a model once more, from where it came."""
    source = printable(manifest.source, FACT_LENGTH)
    known = {_origin(entry): entry.name for entry in load_catalog().values()}
    if source.startswith("wheel "):
        ref = known.get(source, source.removeprefix("wheel "))
    elif source.startswith(("hf:", "http://", "https://")):
        ref = source
    else:  # a file or folder of the user's, which is not on record
        what = "FILE.gguf" if manifest.importer else "FOLDER"
        return f"edgemoa model import {what} --name {name}"
    called = "" if ref == name else f" --name {name}"
    return f"edgemoa model pull {shlex.quote(ref)}{called}"


def _print_facts(facts: list[tuple[str, str]]) -> None:
    for label, value in facts:
        if not value:
            continue
        print(f"{label:<14} {printable(value, FACT_LENGTH)}")


def _facts(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    made = f"by edgemoa, import {manifest.importer}" if manifest.importer else "ready-made"
    if manifest.is_outdated:
        again = _again(folder.name, manifest)
        if "model import" in again:  # a name that is taken is not imported once more
            again = f"edgemoa model rm {folder.name}; {again}"
        made += f"; a later one is better: {again}"
    chat = "by the model's own template"
    if manifest.has_chat_template is None:
        chat = "not known"
    elif not manifest.has_chat_template:
        chat = "no template: a base model, which goes on with the text"
    return [
        ("name", folder.name),
        ("folder", str(folder)),
        ("architecture", f"{manifest.architecture}, {manifest.layers} layers"),
        ("parameters", _count(manifest.parameters) if manifest.parameters else "not known"),
        ("quantization", manifest.quantization or "not known"),
        ("weights", ", ".join(f"{n / 1e6:.1f} M {kind}" for kind, n in manifest.weights.items())),
        ("chat", chat),
        ("context", f"{manifest.context_length} tokens"),
        ("cache", f"{manifest.kv_bytes_per_token / 1024:.0f} KiB for each token of context"),
        ("on disk", f"{manifest.size_bytes / 1e6:.1f} MB"),
        ("made", made),
        ("source", manifest.source or "not known"),
        ("model id", manifest.model_id),
        ("GGUF SHA-256", manifest.source_sha256 or "none"),
        ("files", ", ".join(file.name for file in manifest.files)),
    ]


def _verify(args: argparse.Namespace) -> int:
    library = _library(args)
    try:
        with closing(ConsoleProgress()) as progress:
            manifest = library.verify(args.name, progress)
    except HashMismatchError as error:
        error.hint += f"; {_again(args.name, read_manifest(library.find(args.name)))}"
        raise
    count, size = len(manifest.files), manifest.size_bytes
    if args.json:
        print(json.dumps({"name": args.name, "intact": True, "files": count, "size_bytes": size}))
    else:
        print(f"{args.name}: {count} files, {size / 1e6:.1f} MB, intact")
    return 0


def _remove(args: argparse.Namespace) -> int:
    library = _library(args, to_change=True)
    before = default_model(library)
    with closing(ConsoleProgress()) as progress:
        library.remove(args.name, progress)
    after = default_model(library)
    if args.json:
        print(json.dumps({"name": args.name, "removed": True, "default": after}))
        return 0
    print(f"{args.name} is removed")
    if args.name == before:
        print(_the_default(library, after, now=" now"))
    return 0


def _the_default(library: ModelLibrary, name: str, now: str = "") -> str:
    """Which model is used where nobody says, and what to do where it is not here."""
    here = ", ".join(library.models())
    if name in library.models():
        return f"the default is{now} {name}"
    choice = f"choose another: edgemoa model set-default NAME (here: {here})" if here else ""
    return f"the default is{now} {name}, which is not on this board; " + "; or ".join(
        filter(None, [f"fetch it: edgemoa model pull {name}", choice])
    )


def _set_default(args: argparse.Namespace) -> int:
    _library(args, to_change=True).set_default(args.name)
    if args.json:
        print(json.dumps({"default": args.name}))
    else:
        print(
            f"{args.name} is used where nobody says which model; a daemon that runs takes it when "
            "it is started again"
        )
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    folder = _library(args).find(args.name)
    if read_manifest(folder).importer == 0:
        raise ModelInvalidError(
            f"{args.name} came ready-made, without the scoring graph that a perplexity needs",
            hint="import the same model from its GGUF: edgemoa model import FILE.gguf",
        )
    try:
        text = args.text.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{args.text} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{args.text} is not UTF-8 text") from None
    if args.tokens is not None and args.tokens < 2:
        raise UserError("--tokens must be at least 2")
    from edgemoa.models.perplexity import perplexity

    with closing(ConsoleProgress()) as progress:
        result = perplexity(folder, text, args.window, args.tokens, progress)
    if args.json:
        print(json.dumps({"name": args.name, **msgspec.to_builtins(result)}))
    else:
        print(
            f"perplexity {result.perplexity:.2f} on {result.tokens} tokens "
            f"in {result.windows} windows of {result.window} ({result.seconds:.1f} s)"
        )
    return 0
