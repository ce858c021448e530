"""From a GGUF file to a folder that onnxruntime-genai and our engine run.

Quantized weights are not quantized once more (see ``blocks``); nothing needs torch. Tensors stream
from file to file in slabs, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgemoa.errors import HashMismatchError, ModelInvalidError, UserError
from edgemoa.models.architecture import Architecture, read_architecture
from edgemoa.models.blocks import (
    BLOCK,
    FLOAT_TYPES,
    FLOATS,
    FORMATS,
    MOST_DIGITS,
    Format,
    added_blocks,
    dequantize,
    digits_needed,
    pack,
    pack_zeros,
    split,
    with_minima,
)
from edgemoa.models.gguf import GgufFile, Tensor
from edgemoa.models.graph import Decoder, Layer, Matrix, WeightsFile, decoder_graph
from edgemoa.models.library import (
    CHUNK_BYTES,
    IMPORTER_VERSION,
    Manifest,
    ModelFile,
    ModelLibrary,
    Staging,
    check_regular,
    content_id,
    taken,
)
from edgemoa.models.progress import Progress
from edgemoa.models.tokenizer import Tokenizer
from edgemoa.text.files import RAGGED_GRAPH

WEIGHTS: Final = "weights.bin"
GENERATION_GRAPH: Final = "model.onnx"
FLOAT32_BYTES: Final = 4
SCALE_BYTES: Final = 2
SHIFT_BYTES: Final = 2
EMBEDDING: Final = "token_embd.weight"
SMALL_BYTES: Final = 24 << 20  # graphs, and the tokenizer of a vocabulary of 260,000


def import_gguf(
    source: Path,
    library: ModelLibrary,
    name: str,
    progress: Progress,
) -> Path:
    """Import a GGUF file into the library as ``name``; returns the model's folder.

    Raises :class:`ModelInvalidError` for what the file is, :class:`UserError` if the name is taken
    or the file cannot be read, :class:`DiskFullError` and :class:`StateError` for the place.
    """
    with _opened(source) as gguf:
        need_bytes = written_bytes(gguf)
    with library.staging(name, need_bytes, progress) as staging:
        if staging.target.exists():
            raise taken(name)
        return place_gguf(source, staging, progress)


def place_gguf(
    source: Path, staging: Staging, progress: Progress, *, sha256: str | None = None
) -> Path:
    """Convert ``source`` in a staging place and make it visible; the hash is checked if given."""
    manifest = convert(source, staging.model, staging.name, progress, sha256=sha256)
    return staging.place(manifest)


def import_bytes(gguf_bytes: int) -> int:
    """What an import is likely to write, for a file that is not there yet: its weights as they are,
    graphs, tokenizer. Types of 5 and 6 bits take more; :func:`written_bytes` knows the file.
    """
    return gguf_bytes + gguf_bytes // 20 + SMALL_BYTES


def written_bytes(gguf: GgufFile) -> int:
    """What the import of this file writes at most."""
    total = SMALL_BYTES
    for tensor in gguf.tensors.values():
        columns, weights = tensor.shape[-1], prod(tensor.shape)
        form = FORMATS.get(tensor.type.name, FLOATS)
        if columns % BLOCK or len(tensor.shape) < 2 or not form.bits:
            total += FLOAT32_BYTES * weights
            continue
        blocks, width = columns // BLOCK, BLOCK * form.bits // 8 + SCALE_BYTES
        if form.centre:  # a zero point for each block, and blocks for what that leaves
            blocks, width = blocks + added_blocks(columns, MOST_DIGITS), width + 1
            width += SHIFT_BYTES if tensor.name == EMBEDDING else 0
        total += weights // columns * blocks * width
    return total


def _opened(source: Path) -> GgufFile:
    try:
        check_regular(source)  # a pipe would be waited for
        return GgufFile(source)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None


def convert(
    source: Path,
    folder: Path,
    name: str,
    progress: Progress,
    *,
    sha256: str | None = None,
    reference: bool = False,
) -> Manifest:
    """Write every file of the model but its manifest into ``folder``.

    ``reference`` keeps dequantized float32 weights instead of blocks: several times larger and
    slower, the yardstick for what quantized activations cost.
    """
    with _opened(source) as gguf:
        found = _hash(gguf, progress)
        if sha256 is not None and found != sha256:
            raise HashMismatchError(
                f"{source.name} has the SHA-256 {found}, not {sha256}",
                hint="the file is damaged or another one; fetch it again",
            )
        model = read_architecture(gguf)
        tokenizer = Tokenizer.read(gguf)
        if len(tokenizer.tokens) > model.vocabulary:
            raise ModelInvalidError("the tokenizer has more tokens than the embedding has rows")
        _check_types(gguf)

        files = []
        with (folder / WEIGHTS).open("wb") as stream:
            weights = WeightsFile(stream, WEIGHTS)
            decoder = _Weights(gguf, model, weights, progress, reference).write()
        files.append(ModelFile(WEIGHTS, weights.size, weights.sha256))
        small = {
            GENERATION_GRAPH: decoder_graph(decoder, weights.entries, ragged=False),
            RAGGED_GRAPH: decoder_graph(decoder, weights.entries, ragged=True),
        }
        contents = {
            key: graph.SerializeToString(deterministic=True) for key, graph in small.items()
        }
        contents |= tokenizer.files(model.context)
        contents["genai_config.json"] = _genai_config(model, tokenizer)
        for key, content in contents.items():
            (folder / key).write_bytes(content)
            files.append(ModelFile(key, len(content), hashlib.sha256(content).hexdigest()))
        weights_by_type: Counter[str] = Counter()
        for tensor in gguf.tensors.values():
            weights_by_type[tensor.type.name] += prod(tensor.shape)
        return Manifest(
            name=name,
            model_id=content_id(tuple(files)),
            source_sha256=found,
            importer=IMPORTER_VERSION,
            architecture=model.name,
            quantization="F32" if reference else weights_by_type.most_common(1)[0][0],
            parameters=weights_by_type.total(),
            weights=dict(weights_by_type.most_common()),
            has_chat_template=bool(tokenizer.chat_template),
            context_length=model.context,
            vocabulary=model.vocabulary,
            layers=model.layers,
            kv_heads=model.kv_heads,
            head_size=model.head_size,
            kv_bytes_per_token=2 * model.layers * model.kv_heads * model.head_size * FLOAT32_BYTES,
            eos_token_ids=tokenizer.end_of_turn,
            text_start_token_id=tokenizer.text_start,
            files=tuple(files),
        )


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the file; ``parts`` are the rows of what lies in it, if it is more than one."""

    tensor: str
    parts: tuple[int, ...] = ()


@dataclass(slots=True)
class _Weights:
    """Streams every tensor of a file into the weights file, in the order of the layers."""

    gguf: GgufFile
    model: Architecture
    out: WeightsFile
    progress: Progress
    reference: bool
    total: int = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    order: NDArray[np.intp] | None = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.shapes = self.model.shapes()
        self.order = self.model.head_order()
        self.total = sum(self.gguf.tensors[name].size for name in self.shapes)

    def write(self) -> Decoder:
        model = self.model
        embedding = self._matrix(
            "embedding", [Source(EMBEDDING)], gathered=True, multiplied=model.tied
        )
        layers = tuple(self._layer(number) for number in range(model.layers))
        final_norm = self._vector("final_norm.gain", "output_norm.weight")
        head = embedding if model.tied else self._matrix("head", [Source("output.weight")])
        return Decoder(model, layers, embedding, head, final_norm)

    def _layer(self, number: int) -> Layer:
        model = self.model
        source, target = f"blk.{number}.", f"layer{number}."
        queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size

        def gain(name: str, tensor: str, present: bool = True) -> str:
            return self._vector(f"{target}{name}", f"{source}{tensor}.weight") if present else ""

        if model.fused:
            qkv = [Source(f"{source}attn_qkv.weight", (queries, keys, keys))]
            gate_up = [Source(f"{source}ffn_up.weight", (model.feed_forward,) * 2)]
        else:
            qkv = [Source(f"{source}attn_{part}.weight") for part in ("q", "k", "v")]
            gate_up = [Source(f"{source}ffn_{part}.weight") for part in ("gate", "up")]
        return Layer(
            attention_norm=gain("attention_norm.gain", "attn_norm"),
            qkv=self._matrices(f"{target}qkv", qkv),
            query_norm=gain("query_norm.gain", "attn_q_norm", model.head_norms),
            key_norm=gain("key_norm.gain", "attn_k_norm", model.head_norms),
            attention_out=self._matrix(
                f"{target}attention_out", [Source(f"{source}attn_output.weight")]
            ),
            post_attention_norm=gain(
                "post_attention_norm.gain", "post_attention_norm", model.post_norms
            ),
            feed_forward_norm=gain("feed_forward_norm.gain", "ffn_norm"),
            gate_up=self._matrices(f"{target}gate_up", gate_up),
            down=self._matrix(f"{target}down", [Source(f"{source}ffn_down.weight")]),
            post_feed_forward_norm=gain(
                "post_feed_forward_norm.gain", "post_ffw_norm", model.post_norms
            ),
        )

    def _matrices(self, name: str, sources: list[Source]) -> tuple[Matrix, ...]:
        """One matrix of what is stored alike and adjacent: a tenth faster at decoding."""
        groups = [list(group) for _, group in groupby(sources, lambda s: self._format(s.tensor))]
        if len(groups) == 1:
            return (self._matrix(name, sources),)
        return tuple(self._matrix(f"{name}.{number}", group) for number, group in enumerate(groups))

    def _matrix(
        self, name: str, sources: list[Source], *, gathered: bool = False, multiplied: bool = True
    ) -> Matrix:
        """Write tensors of one format, one below the other, as the matrix ``name``, whose rows are
        ``gathered`` or which is ``multiplied``, or both."""
        form = self._format(sources[0].tensor)
        tensors = [self.gguf.tensors[source.tensor] for source in sources]
        parts = [
            source.parts or (tensor.rows,) for source, tensor in zip(sources, tensors, strict=True)
        ]
        columns = tensors[0].shape[-1]
        biases = [source.tensor.removesuffix("weight") + "bias" for source in sources]
        matrix = Matrix(
            name,
            columns,
            form,
            tuple(chain.from_iterable(parts)),
            biases[0] in self.shapes,
            self._digits(form, tensors) if multiplied else 0,
        )
        if form.bits:
            self._blocks(matrix, tensors, gathered=gathered)
        else:
            values = (
                dequantize(tensor.type.name, slab)
                for tensor in tensors
                for slab in self._slabs(tensor)
            )
            self.out.add(f"{name}.w", TensorProto.FLOAT, [matrix.rows, columns], values)
        if matrix.bias:
            values = (
                dequantize(tensor.type.name, slab)
                for tensor in (self.gguf.tensors[bias] for bias in biases)
                for slab in self._slabs(tensor)
            )
            self.out.add(f"{name}.b", TensorProto.FLOAT, [matrix.rows], values)
        return matrix

    def _digits(self, form: Format, tensors: list[Tensor]) -> int:
        """How many columns a block's minimum takes."""
        if not form.centre:
            return 0
        return digits_needed(
            form,
            (split(t.type.name, slab) for t in tensors for slab in self.gguf.slabs(t)),
        )

    def _blocks(self, matrix: Matrix, tensors: list[Tensor], *, gathered: bool) -> None:
        form, rows, own = matrix.format, matrix.rows, matrix.columns // BLOCK
        count = own + matrix.added_blocks
        scales: list[NDArray[np.float16]] = []
        zeros: list[NDArray[np.uint8]] = []
        shifts: list[NDArray[np.float16]] = []

        def packed() -> Iterator[NDArray[np.uint8]]:
            for tensor in tensors:
                for slab in self._slabs(tensor):
                    blocks = split(tensor.type.name, slab)
                    codes, scale = blocks.codes, blocks.scale
                    if gathered and blocks.minimum is not None:
                        shift = blocks.minimum + form.centre * blocks.scale
                        shifts.append(shift.astype(np.float16))
                    if matrix.digits:
                        columns = with_minima(form, blocks, matrix.digits)
                        codes, scale = columns.codes, columns.scale
                        zeros.append(pack_zeros(columns.zeros, form.bits))
                    scales.append(scale.astype(np.float16))
                    yield pack(codes, form.bits)

        name = matrix.name
        width = BLOCK * form.bits // 8
        self.out.add(f"{name}.q", TensorProto.UINT8, [rows, count, width], packed())
        self.out.add(f"{name}.d", TensorProto.FLOAT16, [rows, count], scales)
        if zeros:
            self.out.add(f"{name}.z", TensorProto.UINT8, [rows, zeros[0].shape[1]], zeros)
        if shifts:
            self.out.add(f"{name}.c", TensorProto.FLOAT16, [rows, own], shifts)

    def _format(self, name: str) -> Format:
        tensor = self.gguf.tensors[name]
        if self.reference or tensor.shape[-1] % BLOCK:
            return FLOATS
        return FORMATS[tensor.type.name]

    def _vector(self, name: str, source: str) -> str:
        tensor = self.gguf.tensors[source]
        values = (dequantize(tensor.type.name, slab) for slab in self._slabs(tensor))
        self.out.add(name, TensorProto.FLOAT, tensor.shape, values)
        return name

    def _slabs(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The tensor's rows, those of queries and keys in the order in which heads turn."""
        size = self.model.head_size
        turning = {"attn_q": self.model.heads, "attn_k": self.model.kv_heads,
                   "attn_qkv": self.model.heads + self.model.kv_heads}  # fmt: skip
        heads = turning.get(tensor.name.split(".")[-2], 0) if self.order is not None else 0
        first = 0
        for slab in self.gguf.slabs(tensor, size if heads else 1):
            self.done += slab.nbytes
            self.progress("import", self.done, self.total)
            if heads and self.order is not None:
                # Blocks run along the columns: moving rows leaves them whole.
                turned = slab.reshape(-1, size, slab.shape[1]).copy()
                turned[: max(0, heads - first)] = turned[: max(0, heads - first), self.order]
                first += len(turned)
                slab = turned.reshape(slab.shape)  # noqa: PLW2901
            yield slab


def _hash(gguf: GgufFile, progress: Progress) -> str:
    digest = hashlib.sha256()
    done = 0
    for chunk in gguf.chunks(CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        progress("check", done, gguf.size)
    return digest.hexdigest()


def _check_types(gguf: GgufFile) -> None:
    for tensor in gguf.tensors.values():
        form = FORMATS.get(tensor.type.name)
        vector = len(tensor.shape) < 2 and tensor.type.name not in FLOAT_TYPES
        if form is None or vector:
            raise ModelInvalidError(
                f"the tensor {tensor.name!r} is of the type {tensor.type.name}, "
                f"which is not supported; supported: {', '.join(FORMATS)}",
                hint="take the model in another quantization, for example Q4_0 or Q8_0",
            )


def _genai_config(model: Architecture, tokenizer: Tokenizer) -> bytes:
    """``genai_config.json`` of onnxruntime-genai, for a decoder with a shared key-value buffer."""
    config = {
        "model": {
            "type": "llama",
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.end_of_turn,
            "pad_token_id": tokenizer.pad,
            "context_length": model.context,
            "vocab_size": model.vocabulary,
            "decoder": {
                "session_options": {"log_id": "edgemoa", "provider_options": []},
                "filename": GENERATION_GRAPH,
                "head_size": model.head_size,
                "hidden_size": model.hidden,
                "num_attention_heads": model.heads,
                "num_hidden_layers": model.layers,
                "num_key_value_heads": model.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": model.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
    return json.dumps(config, indent=1).encode()
