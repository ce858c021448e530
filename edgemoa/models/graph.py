"""The ONNX graphs of a decoder, and the file of weights that they share.

Graphs work on ``[tokens, hidden]``: batch and sequence are one dimension wherever no attention is
computed, which lets ``Gemm`` add the minimum's part of a product to the rest of it in one node.

The weights file is written front to back, tensor by tensor; graphs refer to places in it as ONNX
external data, so two graphs share one file (and the pages of it in memory).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgemoa.models.blocks import BLOCK, Format

OPSET: Final = 21
MICROSOFT: Final = "com.microsoft"
ALIGNMENT: Final = 64  # a cache line: kernels may read weights in place
INT8_ACTIVATIONS: Final = 4  # accuracy_level of MatMulNBits: the fast path on CPUs

ELEMENT: Final = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
}


class WeightsFile:
    """Writes tensors one behind the other and keeps the ONNX entries that refer to them."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file = file
        self._location = location
        self._hash = hashlib.sha256()
        self.size = 0
        self.entries: dict[str, TensorProto] = {}

    def add(
        self,
        name: str,
        element: int,
        shape: Sequence[int],
        parts: Iterable[NDArray[np.generic]],
    ) -> None:
        """Append a tensor whose bytes are ``parts`` in order (little endian)."""
        self._write(bytes(-self.size % ALIGNMENT))
        start = self.size
        for part in parts:
            self._write(np.ascontiguousarray(part).data.cast("B"))
        entry = TensorProto(name=name, data_type=element, dims=shape)
        entry.data_location = TensorProto.EXTERNAL
        where = {"location": self._location, "offset": start, "length": self.size - start}
        for key, value in where.items():
            entry.external_data.add(key=key, value=str(value))
        self.entries[name] = entry

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [rows, columns] in the weights file, under names that start with ``name``.

    Blocks: ``name.q`` uint8 [rows, blocks, bytes], ``name.d`` and, with a minimum, ``name.m``
    float16 [rows, blocks]. Plain floats: ``name.w`` [rows, columns].
    """

    name: str
    rows: int
    columns: int
    format: Format


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. ``qkv`` and ``gate_up`` are one fused matrix, or one for each part."""

    attention_norm: str
    qkv: tuple[Matrix, ...]
    attention_out: Matrix
    feed_forward_norm: str
    gate_up: tuple[Matrix, ...]
    down: Matrix


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder of the llama family; sizes in elements. ``cos`` and ``sin`` name rope caches."""

    layers: tuple[Layer, ...]
    embedding: Matrix
    head: Matrix
    final_norm: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    norm_epsilon: float
    cos: str = "rope.cos"
    sin: str = "rope.sin"


def decoder_graph(
    decoder: Decoder, entries: dict[str, TensorProto], *, every_position: bool
) -> onnx.ModelProto:
    """The graph that onnxruntime-genai and our engine run.

    Inputs: ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, total] (its row
    sums tell each sequence's length), ``past_key_values.N.key|value`` float32 [batch, kv_heads,
    past, head_size]. Outputs: ``logits`` float32 [batch, 1 or sequence, vocabulary] and
    ``present.N.key|value``, which may be the very buffers of the past.
    """
    return _Graph(decoder, entries, every_position).build()


class _Graph:
    def __init__(
        self, decoder: Decoder, entries: dict[str, TensorProto], every_position: bool
    ) -> None:
        self.decoder = decoder
        self.entries = entries
        self.every_position = every_position
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.made: set[str] = set()

    def build(self) -> onnx.ModelProto:
        d = self.decoder
        self._lengths()
        hidden = self._embed()
        residual = ""
        for number, layer in enumerate(d.layers):
            prefix = f"layer{number}"
            normed, residual = self._norm(
                f"{prefix}.attention_norm", hidden, residual, layer.attention_norm
            )
            hidden = self._attention(prefix, number, layer, normed)
            normed, residual = self._norm(
                f"{prefix}.feed_forward_norm", hidden, residual, layer.feed_forward_norm
            )
            hidden = self._feed_forward(prefix, layer, normed)
        if not self.every_position:
            hidden = self._last("last.hidden", hidden)
            residual = self._last("last.residual", residual)
        normed, _ = self._norm("final_norm", hidden, residual, d.final_norm)
        logits = self._products("head", normed, (d.head,))[0]
        if self.every_position:
            self._by_sequence(logits, d.vocabulary, "logits")
        else:
            self._node("Reshape", [logits, self._constant([-1, 1, d.vocabulary])], "logits")
        return self._model()

    # --- parts

    def _lengths(self) -> None:
        """What attention asks for: lengths less one by row, and the longest."""
        self._node("ReduceSum", ["attention_mask", self._constant([1])], "lengths", keepdims=0)
        self._node("Sub", ["lengths", self._constant([1])], "lengths_less_one")
        self._node("Cast", ["lengths_less_one"], "seqlens_k", to=TensorProto.INT32)
        self._node("Shape", ["attention_mask"], "mask_shape")
        self._node("Gather", ["mask_shape", self._constant(1)], "total", axis=0)
        self._node("Cast", ["total"], "total_sequence_length", to=TensorProto.INT32)
        self._node("Shape", ["input_ids"], "batch_sequence")

    def _by_sequence(self, x: str, width: int, output: str) -> str:
        """[tokens, width] as [batch, sequence, width]."""
        shape = f"batch_sequence_{width}"
        if shape not in self.made:
            self._node("Concat", ["batch_sequence", self._constant([width])], shape, axis=0)
        return self._node("Reshape", [x, shape], output)

    def _embed(self) -> str:
        matrix = self.decoder.embedding
        blocks = matrix.columns // BLOCK
        ids = self._node("Reshape", ["input_ids", self._constant([-1])], "ids")
        if not matrix.format.bits:
            stored = self._weight(f"{matrix.name}.w")
            return self._float(self._node("Gather", [stored, ids], "embedding.row"), stored)
        shape = self._constant([matrix.rows, blocks, 1])
        scale = self._node("Reshape", [self._scale(matrix), shape], "embedding.scale")
        rows = self._node(
            "GatherBlockQuantized",
            [self._weight(f"{matrix.name}.q"), ids, scale],
            "embedding.blocks",
            domain=MICROSOFT,
            bits=matrix.format.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=2,
        )
        if matrix.format.minimum:
            shift = self._node("Gather", [self._shift(matrix), ids], "embedding.shifts")
            shift = self._node("Unsqueeze", [shift, self._constant([2])], "embedding.shifts.3d")
            rows = self._node("Add", [rows, shift], "embedding.shifted")
        return self._node("Reshape", [rows, self._constant([-1, matrix.columns])], "embedding")

    def _norm(self, name: str, x: str, residual: str, gain: str) -> tuple[str, str]:
        """RMS norm of ``x + residual``; returns it and the sum."""
        epsilon = self.decoder.norm_epsilon
        if not residual:
            self._node(
                "SimplifiedLayerNormalization",
                [x, self._weight(gain)],
                name,
                axis=-1,
                epsilon=epsilon,
                stash_type=1,
            )
            return name, x
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, residual, self._weight(gain)],
                [name, "", "", f"{name}.sum"],
                name=name,
                domain=MICROSOFT,
                epsilon=epsilon,
            )
        )
        return name, f"{name}.sum"

    def _attention(self, prefix: str, number: int, layer: Layer, x: str) -> str:
        d = self.decoder
        parts = self._products(f"{prefix}.qkv", x, layer.qkv)
        inputs = [
            self._by_sequence(part, matrix.rows, f"{part}.3d")
            for part, matrix in zip(parts, layer.qkv, strict=True)
        ]
        inputs += [""] * (3 - len(inputs))  # one fused matrix: queries, keys and values in one
        past = f"past_key_values.{number}"
        present = f"present.{number}"
        out = f"{prefix}.attention"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [
                    *inputs,
                    f"{past}.key",
                    f"{past}.value",
                    "seqlens_k",
                    "total_sequence_length",
                    self._weight(d.cos),
                    self._weight(d.sin),
                ],
                [out, f"{present}.key", f"{present}.value"],
                name=out,
                domain=MICROSOFT,
                num_heads=d.heads,
                kv_num_heads=d.kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        shape = self._constant([-1, d.heads * d.head_size])
        flat = self._node("Reshape", [out, shape], f"{out}.flat")
        return self._products(f"{prefix}.attention_out", flat, (layer.attention_out,))[0]

    def _feed_forward(self, prefix: str, layer: Layer, x: str) -> str:
        parts = self._products(f"{prefix}.gate_up", x, layer.gate_up)
        if len(parts) == 1:
            gate, up = f"{prefix}.gate", f"{prefix}.up"
            self.nodes.append(
                helper.make_node(
                    "Split", parts, [gate, up], name=f"{prefix}.split", axis=-1, num_outputs=2
                )
            )
        else:
            gate, up = parts
        silu = self._node("QuickGelu", [gate], f"{prefix}.silu", domain=MICROSOFT, alpha=1.0)
        product = self._node("Mul", [silu, up], f"{prefix}.gated")
        return self._products(f"{prefix}.down", product, (layer.down,))[0]

    def _last(self, name: str, x: str) -> str:
        """The last position of each sequence: [tokens, hidden] to [batch, hidden]."""
        spread = self._by_sequence(x, self.decoder.hidden, f"{name}.3d")
        return self._node("Gather", [spread, self._constant(-1)], name, axis=1)

    def _products(self, name: str, x: str, matrices: tuple[Matrix, ...]) -> list[str]:
        """``x @ w.T`` for each matrix; they share the block sums of ``x``."""
        outputs = []
        for matrix in matrices:
            out = name if len(matrices) == 1 else matrix.name
            if not matrix.format.bits:
                stored = self._weight(f"{matrix.name}.w")
                weight = self._float(stored, stored)
                outputs.append(self._node("Gemm", [x, weight], f"{out}.y", transB=1))
                continue
            product = self._node(
                "MatMulNBits",
                [x, self._weight(f"{matrix.name}.q"), self._scale(matrix)],
                f"{out}.product",
                domain=MICROSOFT,
                K=matrix.columns,
                N=matrix.rows,
                bits=matrix.format.bits,
                block_size=BLOCK,
                accuracy_level=INT8_ACTIVATIONS,
            )
            if matrix.format.minimum:
                sums = self._block_sums(x, matrix.columns)
                product = self._node(
                    "Gemm", [sums, self._shift(matrix), product], f"{out}.y", transB=1
                )
            outputs.append(product)
        return outputs

    def _block_sums(self, x: str, columns: int) -> str:
        """Sums over blocks of 32: [tokens, columns] to [tokens, columns / 32]."""
        name = f"{x}.block_sums"
        if name in self.made:
            return name
        shape = self._constant([-1, columns // BLOCK, BLOCK])
        spread = self._node("Reshape", [x, shape], f"{name}.3d")
        return self._node("ReduceSum", [spread, self._constant([2])], name, keepdims=0)

    # --- weights

    def _weight(self, name: str) -> str:
        self.initializers.setdefault(name, self.entries[name])
        return name

    def _float(self, value: str, stored: str) -> str:
        """``value`` as float32, where the tensor it came from, ``stored``, is narrower."""
        if self.entries[stored].data_type == TensorProto.FLOAT:
            return value
        name = f"{value}.float"
        if name not in self.made:
            self._node("Cast", [value], name, to=TensorProto.FLOAT)
        return name

    def _scale(self, matrix: Matrix) -> str:
        stored = self._weight(f"{matrix.name}.d")
        return self._float(stored, stored)

    def _shift(self, matrix: Matrix) -> str:
        """``m + 2**(bits - 1) * d`` by row and block: what ``u - 2**(bits - 1)`` left out."""
        name = f"{matrix.name}.shift"
        if name in self.made:
            return name
        half = self._constant(float(1 << (matrix.format.bits - 1)))
        raised = self._node("Mul", [self._scale(matrix), half], f"{matrix.name}.raised")
        minimum = self._weight(f"{matrix.name}.m")
        return self._node("Add", [self._float(minimum, minimum), raised], name)

    # --- pieces of protobuf

    def _node(
        self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object
    ) -> str:
        self.made.add(output)
        self.nodes.append(
            helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes)
        )
        return output

    def _constant(self, value: list[int] | int | float) -> str:
        """A constant under a name that is its value, so that equal ones are one."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"{array.dtype}{value}".replace(" ", "")
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def _model(self) -> onnx.ModelProto:
        d = self.decoder
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [
            info(
                "logits",
                TensorProto.FLOAT,
                ["batch", "sequence" if self.every_position else 1, d.vocabulary],
            )
        ]
        for number in range(len(d.layers)):
            for side in ("key", "value"):
                inputs.append(
                    info(
                        f"past_key_values.{number}.{side}",
                        TensorProto.FLOAT,
                        ["batch", d.kv_heads, "past", d.head_size],
                    )
                )
                outputs.append(
                    info(
                        f"present.{number}.{side}",
                        TensorProto.FLOAT,
                        ["batch", d.kv_heads, "present", d.head_size],
                    )
                )
        graph = helper.make_graph(
            self.nodes, "decoder", inputs, outputs, list(self.initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            producer_name="edgemoa",
            ir_version=10,
        )
