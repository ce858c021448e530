"""Ready-made onnxruntime-genai folders: what is taken of one, and what its manifest says.

Such a folder is somebody's program for our runtime, so only what a text model on the CPU needs is
let in: settings that are known here and name no other file, one graph, the weights beside it that
it names itself, and the tokenizer. Nothing of it is executed, here or later.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError

from edgemoa.errors import ModelInvalidError
from edgemoa.models.library import (
    Manifest,
    ModelFile,
    ModelLibrary,
    chunks,
    content_id,
    taken,
)
from edgemoa.models.progress import Progress, printable
from edgemoa.text.settings import CONFIG, MAX_CONFIG_BYTES, Config, read_config
from edgemoa.text.template import check_template, read_template
from edgemoa.text.tokens import load_tokens

REQUIRED: Final = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL: Final = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
PROGRAM: Final = b"\x7fELF"  # never let in: settings could find a way to have it loaded
MAX_TEXT_BYTES: Final = 64 << 20  # of a tokenizer's file; the largest in use have some 35 MB
MAX_GRAPH_BYTES: Final = 512 << 20  # read into memory as a whole; weights belong beside it

_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_ELEMENT_BYTES: Final = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
}


def read_graph(path: Path, config: Config) -> tuple[tuple[str, ...], int, str | None]:
    """The files of weights that the graph names, the bytes of one number of its key-value cache,
    and its quantization, where that shows.

    Raises :class:`ModelInvalidError` for a file that is no graph or reaches out of its folder.
    """
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ModelInvalidError(f"{path.name} holds its weights itself; they belong beside it")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelInvalidError(f"{path.name} is no ONNX graph: {printable(error)}") from None
    graph = model.graph
    functions = (node for function in model.functions for node in function.node)
    names = set()
    defaults = (each for function in model.functions for each in function.attribute_proto)
    for tensor in (*_tensors(graph), *_tensors_of(functions), *_tensors_in(defaults)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            names.update(places or [""])
    for name in names:
        if not _PLAIN.fullmatch(name):
            raise ModelInvalidError(f"{path.name} takes weights from another place: {name[:80]!r}")
    return tuple(sorted(names)), _cache_number_bytes(path.name, graph, config), _quantization(graph)


def _cache_number_bytes(file: str, graph: onnx.GraphProto, config: Config) -> int:
    """Bytes of one number of the key-value cache, which has to be what the settings say."""
    model, decoder = config.model, config.model.decoder
    inputs = {each.name: each.type.tensor_type for each in graph.input}
    names = decoder.inputs.get("past_key_names", "")
    expected = [names.replace("%d", str(number)) for number in range(decoder.num_hidden_layers + 1)]
    past = [inputs.get(name) for name in expected]
    if None in past[:-1] or past[-1] is not None or past[0] is None:
        raise ModelInvalidError(
            f"{file} has not the {decoder.num_hidden_layers} layers of key-value cache that "
            f"{CONFIG} says"
        )
    if past[0].elem_type not in _ELEMENT_BYTES:
        raise ModelInvalidError(f"{file} has a key-value cache of numbers that are not known")
    for kind in past[:-1]:
        sizes = [each.dim_value for each in kind.shape.dim] if kind else []
        if len(sizes) == 4 and (
            sizes[1] not in (0, decoder.num_key_value_heads)
            or sizes[3] not in (0, decoder.head_size)
        ):
            raise ModelInvalidError(f"{file} has another key-value cache than {CONFIG} says")
    logits = decoder.outputs.get("logits", "logits")
    for each in graph.output:
        sizes = [size.dim_value for size in each.type.tensor_type.shape.dim]
        if each.name == logits and sizes and sizes[-1] not in (0, model.vocab_size):
            raise ModelInvalidError(f"{file} has another vocabulary than {CONFIG} says")
    ends = model.eos_token_id if isinstance(model.eos_token_id, list) else [model.eos_token_id]
    if max(ends, default=0) >= model.vocab_size:
        raise ModelInvalidError(f"{CONFIG} ends answers with a token that is not in the vocabulary")
    return _ELEMENT_BYTES[past[0].elem_type]


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Raises :class:`ModelInvalidError` unless a folder that came from elsewhere is what is let in:
    its settings, each of its graphs, its tokenizer and chat template.
    """
    config = read_config(folder / CONFIG)
    for name in names:
        if name.endswith(".onnx"):
            read_graph(folder / name, config)
    check_text(folder)


def check_text(folder: Path) -> None:
    """Raises :class:`ModelInvalidError` for files of a tokenizer or chat template that the engine
    would not take.
    """
    try:
        check_template(*read_template(folder))
        load_tokens(folder)
    except ModelInvalidError as error:
        error.hint = "take the folder of a model that was made for conversations"
        raise


def manifest(
    config: Config,
    kv_number_bytes: int,
    quantization: str | None,
    name: str,
    files: Iterable[ModelFile],
) -> Manifest:
    """What is known of a model whose making was not ours."""
    model = config.model
    decoder = model.decoder
    ends = model.eos_token_id if isinstance(model.eos_token_id, list) else [model.eos_token_id]
    stored = tuple(files)
    return Manifest(
        name=name,
        model_id=content_id(stored),
        importer=0,
        architecture=model.type,
        context_length=model.context_length,
        vocabulary=model.vocab_size,
        layers=decoder.num_hidden_layers,
        kv_heads=decoder.num_key_value_heads,
        head_size=decoder.head_size,
        kv_bytes_per_token=2
        * decoder.num_hidden_layers
        * decoder.num_key_value_heads
        * decoder.head_size
        * kv_number_bytes,
        eos_token_ids=tuple(ends),
        files=stored,
        quantization=quantization,
    )


def import_folder(source: Path, library: ModelLibrary, name: str, progress: Progress) -> Path:
    """Take a folder that is on this machine into the library as ``name``; returns its new place.

    Raises :class:`ModelInvalidError` for what it holds, :class:`UserError` if the name is taken or
    a file cannot be read.
    """
    config = read_config(source / CONFIG)
    graph = config.model.decoder.filename
    _check_file(source / graph, MAX_GRAPH_BYTES)
    weights, number_bytes, quantization = read_graph(source / graph, config)
    names = [CONFIG, graph, *weights, *REQUIRED]
    names += [each for each in OPTIONAL if (source / each).is_file()]
    for each in names:
        _check_file(source / each, None if each in weights else limit(each))
    total = sum((source / each).stat().st_size for each in names)
    with library.staging(name, total, progress) as staging:
        if staging.target.exists():
            raise taken(name)
        files = []
        done = 0
        for each in names:
            files.append(_copy(source / each, staging.model / each, done, total, progress))
            done += files[-1].size_bytes
        check_text(staging.model)
        staging.origin = f"folder {source.name}"
        return staging.place(manifest(config, number_bytes, quantization, name, files))


def limit(name: str) -> int:
    """The size at most of a file other than weights."""
    if name == CONFIG:
        return MAX_CONFIG_BYTES
    return MAX_GRAPH_BYTES if name.endswith(".onnx") else MAX_TEXT_BYTES


def _check_file(path: Path, most: int | None) -> None:
    if not path.is_file():
        raise ModelInvalidError(f"{path.name} is missing in {path.parent}")
    if most is not None and path.stat().st_size > most:
        raise ModelInvalidError(f"{path.name} is larger than {most >> 20} MiB")


def _copy(source: Path, target: Path, done: int, total: int, progress: Progress) -> ModelFile:
    """A copy, not a link: the user may change what is theirs."""
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as output:
        for chunk in chunks(source):
            if size == 0 and chunk.startswith(PROGRAM):
                raise ModelInvalidError(f"{source.name} is a program, which no model needs")
            output.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress("copy", min(done + size, total), total)
    return ModelFile(target.name, size, digest.hexdigest())


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a graph holds, those of its branches and loops too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    yield from _tensors_in(each for node in nodes for each in node.attribute)


def _tensors_in(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _tensors(attribute.g)
        for inner in attribute.graphs:
            yield from _tensors(inner)


def _quantization(graph: onnx.GraphProto) -> str | None:
    """The width that most quantized matrices have."""
    widths = Counter(
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    )
    return f"int{widths.most_common(1)[0][0]}" if widths else None
