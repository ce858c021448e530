"""From a GGUF file to a folder that onnxruntime-genai and our engine run, without loss.

Quantized blocks are carried over bit for bit (see ``blocks``); nothing needs torch. Tensors stream
from file to file in slabs, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgemoa.errors import HashMismatchError, ModelInvalidError, UserError
from edgemoa.models.blocks import BLOCK, FORMATS, Format, dequantize, split
from edgemoa.models.gguf import GgufFile, Tensor
from edgemoa.models.graph import ELEMENT, Decoder, Layer, Matrix, WeightsFile, decoder_graph
from edgemoa.models.library import (
    CHUNK_BYTES,
    Manifest,
    ModelFile,
    ModelLibrary,
    Staging,
    content_id,
)
from edgemoa.models.llama import ARCHITECTURE, Llama
from edgemoa.models.progress import Progress
from edgemoa.models.tokenizer import Tokenizer

IMPORTER_VERSION: Final = 1  # raise it when the same GGUF gives other files
WEIGHTS: Final = "weights.bin"
GENERATION_GRAPH: Final = "model.onnx"
SCORING_GRAPH: Final = "score.onnx"
FLOAT32_BYTES: Final = 4


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
    try:
        size = source.stat().st_size
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None
    with library.staging(name, import_bytes(size), progress) as staging:
        if staging.target.exists():
            raise UserError(
                f"there is a model {name!r} already",
                hint=f"choose another --name, or remove it first: edgemoa model rm {name}",
            )
        return place_gguf(source, staging, progress)


def place_gguf(
    source: Path, staging: Staging, progress: Progress, *, sha256: str | None = None
) -> Path:
    """Convert ``source`` in a staging place and make it visible; the hash is checked if given."""
    manifest = convert(source, staging.model, staging.name, progress, sha256=sha256)
    return staging.place(manifest)


def import_bytes(gguf_bytes: int) -> int:
    """What an import writes at most: the weights as they are, graphs, rope caches, tokenizer."""
    return gguf_bytes + gguf_bytes // 10 + (16 << 20)


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
    try:
        gguf = GgufFile(source)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None
    with gguf:
        found = _hash(gguf, progress)
        if sha256 is not None and found != sha256:
            raise HashMismatchError(
                f"{source.name} has the SHA-256 {found}, not {sha256}",
                hint="the file is damaged or another one; fetch it again",
            )
        model = Llama.read(gguf)
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
            GENERATION_GRAPH: decoder_graph(decoder, weights.entries, every_position=False),
            SCORING_GRAPH: decoder_graph(decoder, weights.entries, every_position=True),
        }
        contents = {
            key: graph.SerializeToString(deterministic=True) for key, graph in small.items()
        }
        contents |= tokenizer.files(model.context)
        contents["genai_config.json"] = _genai_config(model, tokenizer)
        for key, content in contents.items():
            (folder / key).write_bytes(content)
            files.append(ModelFile(key, len(content), hashlib.sha256(content).hexdigest()))
        return Manifest(
            name=name,
            model_id=content_id(tuple(files)),
            source_sha256=found,
            importer=IMPORTER_VERSION,
            architecture=ARCHITECTURE,
            quantization="F32" if reference else _quantization(gguf),
            parameters=sum(prod(tensor.shape) for tensor in gguf.tensors.values()),
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


@dataclass(slots=True)
class _Weights:
    """Streams every tensor of a file into the weights file, in the order of the layers."""

    gguf: GgufFile
    model: Llama
    out: WeightsFile
    progress: Progress
    reference: bool
    total: int = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.total = sum(tensor.size for tensor in self.gguf.tensors.values())

    def write(self) -> Decoder:
        model = self.model
        embedding = self._matrix("embedding", "token_embd.weight")
        layers = tuple(self._layer(number) for number in range(model.layers))
        final_norm = self._vector("final_norm.gain", "output_norm.weight")
        head = embedding if model.tied else self._matrix("head", "output.weight")
        self._rope()
        return Decoder(
            layers=layers,
            embedding=embedding,
            head=head,
            final_norm=final_norm,
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_size=model.head_size,
            vocabulary=model.vocabulary,
            norm_epsilon=model.norm_epsilon,
        )

    def _layer(self, number: int) -> Layer:
        source, target = f"blk.{number}.", f"layer{number}."
        return Layer(
            attention_norm=self._vector(
                f"{target}attention_norm.gain", f"{source}attn_norm.weight"
            ),
            qkv=self._fused(
                f"{target}qkv", [f"{source}attn_{part}.weight" for part in ("q", "k", "v")]
            ),
            attention_out=self._matrix(f"{target}attention_out", f"{source}attn_output.weight"),
            feed_forward_norm=self._vector(
                f"{target}feed_forward_norm.gain", f"{source}ffn_norm.weight"
            ),
            gate_up=self._fused(
                f"{target}gate_up", [f"{source}ffn_{part}.weight" for part in ("gate", "up")]
            ),
            down=self._matrix(f"{target}down", f"{source}ffn_down.weight"),
        )

    def _fused(self, name: str, sources: list[str]) -> tuple[Matrix, ...]:
        """One matrix if all are stored alike (a tenth faster at decoding), otherwise each alone."""
        kinds = {self.gguf.tensors[source].type.name for source in sources}
        if len(kinds) == 1 or self.reference:
            return (self._matrix(name, *sources),)
        return tuple(
            self._matrix(f"{name}.{number}", source) for number, source in enumerate(sources)
        )

    def _matrix(self, name: str, *sources: str) -> Matrix:
        """Write tensors of one type, one below the other, as the matrix ``name``."""
        tensors = [self.gguf.tensors[source] for source in sources]
        kind = tensors[0].type.name
        rows, columns = sum(tensor.rows for tensor in tensors), tensors[0].shape[-1]
        slabs = (slab for tensor in tensors for slab in self._slabs(tensor))
        if self.reference:
            parts = (
                dequantize(tensor.type.name, slab)
                for tensor in tensors
                for slab in self._slabs(tensor)
            )
            self.out.add(f"{name}.w", TensorProto.FLOAT, [rows, columns], parts)
            return Matrix(name, rows, columns, Format(0))
        form = FORMATS[kind]
        if not form.bits:
            self.out.add(f"{name}.w", ELEMENT[kind], [rows, columns], slabs)
            return Matrix(name, rows, columns, form)

        scales: list[NDArray[np.float16]] = []
        minima: list[NDArray[np.float16]] = []

        def packed() -> Iterator[NDArray[np.uint8]]:
            for slab in slabs:
                blocks = split(kind, slab)
                scales.append(blocks.scale)
                if blocks.minimum is not None:
                    minima.append(blocks.minimum)
                yield blocks.packed

        count = columns // BLOCK
        self.out.add(
            f"{name}.q", TensorProto.UINT8, [rows, count, BLOCK * form.bits // 8], packed()
        )
        self.out.add(f"{name}.d", TensorProto.FLOAT16, [rows, count], scales)
        if form.minimum:
            self.out.add(f"{name}.m", TensorProto.FLOAT16, [rows, count], minima)
        return Matrix(name, rows, columns, form)

    def _vector(self, name: str, source: str) -> str:
        tensor = self.gguf.tensors[source]
        values = (dequantize(tensor.type.name, slab) for slab in self._slabs(tensor))
        self.out.add(name, TensorProto.FLOAT, tensor.shape, values)
        return name

    def _rope(self) -> None:
        """Caches [context, head_size / 2] of cos and sin of position * base**(-2 i / head_size)."""
        model = self.model
        exponents = np.arange(0, model.head_size, 2, dtype=np.float64) / model.head_size
        frequencies = model.rope_base**-exponents
        step = max(1, CHUNK_BYTES // (8 * len(frequencies)))
        for name, function in (("rope.cos", np.cos), ("rope.sin", np.sin)):
            parts = (
                function(
                    np.outer(np.arange(first, min(first + step, model.context)), frequencies)
                ).astype(np.float32)
                for first in range(0, model.context, step)
            )
            self.out.add(name, TensorProto.FLOAT, [model.context, len(frequencies)], parts)

    def _slabs(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The tensor's rows, those of queries and keys back in the order of the rope's halves."""
        roped = tensor.name.endswith((".attn_q.weight", ".attn_k.weight"))
        size = self.model.head_size
        for slab in self.gguf.slabs(tensor, size if roped else 1):
            self.done += slab.nbytes
            self.progress("import", self.done, self.total)
            # A llama GGUF has the rows of a head as pairs (i, i + half) to turn together; blocks
            # run along the columns, so moving rows leaves them whole.
            yield (
                slab.reshape(-1, size // 2, 2, slab.shape[1]).swapaxes(1, 2).reshape(slab.shape)
                if roped
                else slab
            )


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
        if form is None or (form.bits and len(tensor.shape) < 2):
            raise ModelInvalidError(
                f"the tensor {tensor.name!r} is of the type {tensor.type.name}, "
                f"which is not supported; supported: {', '.join(FORMATS)}",
                hint="take the model in another quantization, for example Q4_0 or Q8_0",
            )


def _quantization(gguf: GgufFile) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        weights[tensor.type.name] += prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _genai_config(model: Llama, tokenizer: Tokenizer) -> bytes:
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
