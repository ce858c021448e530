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

from edgemoa.models.architecture import Architecture
from edgemoa.models.blocks import BLOCK, SUPERBLOCK, Format

OPSET: Final = 21
MICROSOFT: Final = "com.microsoft"
ALIGNMENT: Final = 64  # a cache line: kernels may read weights in place
INT8_ACTIVATIONS: Final = 4  # accuracy_level of MatMulNBits: the fast path on CPUs

WANTED: Final = "wanted_positions"
"""The input of generation graphs that has a default; onnxruntime-genai does not know of it."""

SESSION_CONFIG: Final = {"session.disable_quant_qdq": "1"}
"""What a session that runs these graphs must be told. By default onnxruntime does not compute
``DequantizeLinear`` when it loads a graph, and ``MatMulNBits`` gives wrong results, without a word,
if its scales are not constant by then (1.32)."""


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
    float16 [rows, blocks]. Superblocks: ``name.d`` and ``name.m`` float16 [rows, superblocks],
    ``name.ds`` and ``name.ms`` uint8 [rows, blocks]. Floats: ``name.w`` [rows, columns]. With a
    bias: ``name.b`` [rows]. ``parts`` are the rows of what lies in it, one below the other.
    """

    name: str
    columns: int
    format: Format
    parts: tuple[int, ...]
    bias: bool = False

    @property
    def rows(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. ``qkv`` and ``gate_up`` are as few matrices as formats allow. Names of gains are
    empty where the architecture has no such norm.
    """

    attention_norm: str
    qkv: tuple[Matrix, ...]
    query_norm: str
    key_norm: str
    attention_out: Matrix
    post_attention_norm: str
    feed_forward_norm: str
    gate_up: tuple[Matrix, ...]
    down: Matrix
    post_feed_forward_norm: str


@dataclass(frozen=True, slots=True)
class Decoder:
    """An architecture with its weights by name."""

    architecture: Architecture
    layers: tuple[Layer, ...]
    embedding: Matrix
    head: Matrix
    final_norm: str


def decoder_graph(
    decoder: Decoder, entries: dict[str, TensorProto], *, every_position: bool
) -> onnx.ModelProto:
    """The graph that onnxruntime-genai and our engine run.

    Inputs: ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, total] (its row
    sums tell each sequence's length), ``past_key_values.N.key|value`` float32 [batch, kv_heads,
    past, head_size]. Outputs: ``logits`` float32 [batch, 1 or sequence, vocabulary] and
    ``present.N.key|value``, which may be the very buffers of the past.

    Without ``every_position`` there are also ``hidden`` float32 [batch, sequence, hidden], what the
    head is given, and ``wanted_logits`` [batch, wanted, vocabulary] for the input
    ``wanted_positions`` int64 [wanted], indices into the sequence; by default there are none.
    """
    return _Graph(decoder, entries, every_position).build()


class _Graph:
    def __init__(
        self, decoder: Decoder, entries: dict[str, TensorProto], every_position: bool
    ) -> None:
        self.decoder = decoder
        self.sizes = decoder.architecture
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
            normed, residual = self._add_norm(
                f"{prefix}.attention_norm", hidden, residual, layer.attention_norm
            )
            hidden = self._attention(prefix, number, layer, normed)
            if layer.post_attention_norm:
                hidden = self._norm(
                    f"{prefix}.post_attention_norm", hidden, layer.post_attention_norm
                )
            normed, residual = self._add_norm(
                f"{prefix}.feed_forward_norm", hidden, residual, layer.feed_forward_norm
            )
            hidden = self._feed_forward(prefix, layer, normed)
            if layer.post_feed_forward_norm:
                hidden = self._norm(
                    f"{prefix}.post_feed_forward_norm", hidden, layer.post_feed_forward_norm
                )
        normed, _ = self._add_norm("final_norm", hidden, residual, d.final_norm)
        if self.every_position:
            logits = self._products("head", normed, (d.head,))[0]
            self._by_sequence(logits, self.sizes.vocabulary, "logits")
        else:
            self._logits(normed)
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
        ids = self._node("Reshape", ["input_ids", self._constant([-1])], "ids")
        if matrix.format.bits:
            rows = self._embed_blocks(matrix, ids)
        else:
            rows = self._node("Gather", [self._weight(f"{matrix.name}.w"), ids], "embedding.rows")
        if self.sizes.embedding_scale == 1.0:
            return rows
        scale = self._constant(self.sizes.embedding_scale)
        return self._node("Mul", [rows, scale], "embedding.scaled")

    def _embed_blocks(self, matrix: Matrix, ids: str) -> str:
        shape = self._constant([matrix.rows, matrix.columns // BLOCK, 1])
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
        if matrix.format.centre:
            shift = self._node("Gather", [self._shift(matrix), ids], "embedding.shifts")
            shift = self._node("Unsqueeze", [shift, self._constant([2])], "embedding.shifts.3d")
            rows = self._node("Add", [rows, shift], "embedding.shifted")
        return self._node("Reshape", [rows, self._constant([-1, matrix.columns])], "embedding")

    def _norm(self, name: str, x: str, gain: str) -> str:
        """RMS norm over the last dimension."""
        return self._node(
            "SimplifiedLayerNormalization",
            [x, self._weight(gain)],
            name,
            axis=-1,
            epsilon=self.sizes.norm_epsilon,
            stash_type=1,
        )

    def _add_norm(self, name: str, x: str, residual: str, gain: str) -> tuple[str, str]:
        """RMS norm of ``x + residual``; returns it and the sum."""
        if not residual:
            return self._norm(name, x, gain), x
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, residual, self._weight(gain)],
                [name, "", "", f"{name}.sum"],
                name=name,
                domain=MICROSOFT,
                epsilon=self.sizes.norm_epsilon,
            )
        )
        return name, f"{name}.sum"

    def _attention(self, prefix: str, number: int, layer: Layer, x: str) -> str:
        sizes = self.sizes
        past = f"past_key_values.{number}"
        present = f"present.{number}"
        out = f"{prefix}.attention"
        attributes: dict[str, object] = {}
        if sizes.windows[number]:
            attributes["local_window_size"] = sizes.windows[number]
        if sizes.attention_scale:
            attributes["scale"] = sizes.attention_scale
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [
                    *self._queries_keys_values(prefix, layer, x),
                    f"{past}.key",
                    f"{past}.value",
                    "seqlens_k",
                    "total_sequence_length",
                    *self._rope(sizes.layer_ropes[number]),
                ],
                [out, f"{present}.key", f"{present}.value"],
                name=out,
                domain=MICROSOFT,
                num_heads=sizes.heads,
                kv_num_heads=sizes.kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
                **attributes,
            )
        )
        shape = self._constant([-1, sizes.heads * sizes.head_size])
        flat = self._node("Reshape", [out, shape], f"{out}.flat")
        return self._products(f"{prefix}.attention_out", flat, (layer.attention_out,))[0]

    def _queries_keys_values(self, prefix: str, layer: Layer, x: str) -> list[str]:
        """Three inputs of attention. The first may hold all, the others are empty then."""
        name = f"{prefix}.qkv"
        outputs = self._products(name, x, layer.qkv)
        if len(outputs) == 1 and not layer.query_norm:
            return [self._by_sequence(outputs[0], layer.qkv[0].rows, f"{name}.3d"), "", ""]
        norms = (layer.query_norm, layer.key_norm, "")
        inputs = []
        for part, (flat, width) in enumerate(self._parts(name, outputs, layer.qkv)):
            state = flat
            if norms[part]:
                shape = self._constant([-1, self.sizes.head_size])
                heads = self._node("Reshape", [flat, shape], f"{name}.heads.{part}")
                state = self._norm(f"{name}.normed.{part}", heads, norms[part])
            inputs.append(self._by_sequence(state, width, f"{name}.3d.{part}"))
        return inputs

    def _rope(self, name: str) -> list[str]:
        """Caches [context, head_size / 2] of cosines and sines.

        onnxruntime computes them once, when it loads the graph: as files they would be a quarter
        of a small model. In float64, as the angle of a late position has few digits behind the
        point in float32; it has no cosine for that, so sine it is, a quarter turn ahead.
        """
        cos, sin = f"{name}.cos", f"{name}.sin"
        if sin in self.made:
            return [cos, sin]
        rope = self.sizes.ropes[name]
        if "positions" not in self.made:
            ends = [self._float64(x) for x in (0.0, float(self.sizes.context), 1.0)]
            self._node("Range", ends, "positions.1d")
            self._node("Unsqueeze", ["positions.1d", self._constant([1])], "positions")
        frequencies = self._array(f"{name}.frequencies", rope.frequencies)
        self._node("Mul", ["positions", frequencies], f"{name}.angles")
        self._node("Add", [f"{name}.angles", self._float64(np.pi / 2)], f"{name}.angles.ahead")
        even = bool((rope.magnitudes == 1).all())
        for target, angles in ((cos, f"{name}.angles.ahead"), (sin, f"{name}.angles")):
            exact = self._node("Sin", [angles], f"{target}.float64")
            if not even:
                magnitudes = self._array(f"{name}.magnitudes", rope.magnitudes)
                exact = self._node("Mul", [exact, magnitudes], f"{target}.scaled")
            self._node("Cast", [exact], target, to=TensorProto.FLOAT)
        return [cos, sin]

    def _feed_forward(self, prefix: str, layer: Layer, x: str) -> str:
        name = f"{prefix}.gate_up"
        (gate, _), (up, _) = self._parts(
            name, self._products(name, x, layer.gate_up), layer.gate_up
        )
        if self.sizes.gelu:
            active = self._node("FastGelu", [gate], f"{prefix}.gelu", domain=MICROSOFT)
        else:  # a SiLU
            active = self._node("QuickGelu", [gate], f"{prefix}.silu", domain=MICROSOFT, alpha=1.0)
        product = self._node("Mul", [active, up], f"{prefix}.gated")
        return self._products(f"{prefix}.down", product, (layer.down,))[0]

    def _logits(self, x: str) -> None:
        """Logits of the last position of each sequence and of those that are wanted; in one
        product, because onnxruntime would keep the head's weights once for each of two.
        """
        sizes = self.sizes
        hidden = self._by_sequence(x, sizes.hidden, "hidden")
        self._array(WANTED, np.empty(0, np.int64))
        self._node("Concat", [self._constant([-1]), WANTED], "picked", axis=0)
        self._node("Gather", [hidden, "picked"], "picked.3d", axis=1)
        self._node("Reshape", ["picked.3d", self._constant([-1, sizes.hidden])], "picked.hidden")
        logits = self._products("head", "picked.hidden", (self.decoder.head,))[0]
        self._node("Shape", ["picked"], "picked.count")
        batch, vocabulary = self._constant([-1]), self._constant([sizes.vocabulary])
        self._node("Concat", [batch, "picked.count", vocabulary], "picked.shape", axis=0)
        self._node("Reshape", [logits, "picked.shape"], "picked.logits")
        zero, one, end = (self._constant([n]) for n in (0, 1, np.iinfo(np.int64).max))
        self._node("Slice", ["picked.logits", zero, one, one], "logits")
        self._node("Slice", ["picked.logits", one, end, one], "wanted_logits")

    def _products(self, name: str, x: str, matrices: tuple[Matrix, ...]) -> list[str]:
        """``x @ w.T + b`` for each matrix; they share the block sums of ``x``."""
        outputs = []
        for matrix in matrices:
            out = name if len(matrices) == 1 else matrix.name
            bias = [self._weight(f"{matrix.name}.b")] if matrix.bias else []
            if not matrix.format.bits:
                weight = self._weight(f"{matrix.name}.w")
                outputs.append(self._node("Gemm", [x, weight, *bias], f"{out}.y", transB=1))
                continue
            unused = ["", ""] if bias else []
            product = self._node(
                "MatMulNBits",
                [x, self._weight(f"{matrix.name}.q"), self._scale(matrix), *unused, *bias],
                f"{out}.product",
                domain=MICROSOFT,
                K=matrix.columns,
                N=matrix.rows,
                bits=matrix.format.bits,
                block_size=BLOCK,
                accuracy_level=INT8_ACTIVATIONS,
            )
            if matrix.format.centre:
                sums = self._block_sums(x, matrix.columns)
                product = self._node(
                    "Gemm", [sums, self._shift(matrix), product], f"{out}.y", transB=1
                )
            outputs.append(product)
        return outputs

    def _parts(
        self, name: str, outputs: list[str], matrices: tuple[Matrix, ...]
    ) -> list[tuple[str, int]]:
        """The products with each part of the matrices, and their widths."""
        found: list[tuple[str, int]] = []
        for output, matrix in zip(outputs, matrices, strict=True):
            if len(matrix.parts) == 1:
                found.append((output, matrix.rows))
                continue
            names = [f"{name}.part.{len(found) + n}" for n in range(len(matrix.parts))]
            self.nodes.append(
                helper.make_node(
                    "Split",
                    [output, self._constant(list(matrix.parts))],
                    names,
                    name=f"{output}.split",
                    axis=-1,
                )
            )
            found += zip(names, matrix.parts, strict=True)
        return found

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

    def _float(self, stored: str) -> str:
        """A stored float16 tensor as float32."""
        name = f"{stored}.float"
        if name not in self.made:
            self._node("Cast", [self._weight(stored)], name, to=TensorProto.FLOAT)
        return name

    def _scale(self, matrix: Matrix) -> str:
        """``d`` by row and block."""
        whole = self._float(f"{matrix.name}.d")
        if not matrix.format.superblocks:
            return whole
        return self._by_block(f"{matrix.name}.ds", whole, f"{matrix.name}.scale.blocks")

    def _shift(self, matrix: Matrix) -> str:
        """``m + centre * d`` by row and block: what ``u - 2**(bits - 1)`` left out."""
        name = f"{matrix.name}.shift"
        if name in self.made:
            return name
        centre = self._constant(float(matrix.format.centre))
        scale, minimum = self._float(f"{matrix.name}.d"), self._float(f"{matrix.name}.m")
        raised = self._node("Mul", [scale, centre], f"{matrix.name}.raised")
        if not matrix.format.superblocks:
            return self._node("Add", [minimum, raised], name)
        raised = self._by_block(f"{matrix.name}.ds", raised, f"{matrix.name}.raised.blocks")
        minimum = self._by_block(f"{matrix.name}.ms", minimum, f"{matrix.name}.minimum.blocks")
        return self._node("Sub", [raised, minimum], name)

    def _by_block(self, of_blocks: str, of_superblocks: str, name: str) -> str:
        """uint8 [rows, blocks] times what the superblocks have, float32 [rows, superblocks]."""
        if name not in self.made:
            self._node(
                "DequantizeLinear",
                [self._weight(of_blocks), of_superblocks],
                name,
                axis=1,
                block_size=SUPERBLOCK // BLOCK,
            )
        return name

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
        return self._array(f"{array.dtype}{value}".replace(" ", ""), array)

    def _float64(self, value: float) -> str:
        return self._array(f"float64:{value}", np.array(value, np.float64))

    def _array(self, name: str, array: NDArray[np.generic]) -> str:
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def _model(self) -> onnx.ModelProto:
        sizes = self.sizes
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [
            info(
                "logits",
                TensorProto.FLOAT,
                ["batch", "sequence" if self.every_position else 1, sizes.vocabulary],
            )
        ]
        if not self.every_position:
            inputs.append(info(WANTED, TensorProto.INT64, ["wanted"]))
            outputs += [
                info("wanted_logits", TensorProto.FLOAT, ["batch", "wanted", sizes.vocabulary]),
                info("hidden", TensorProto.FLOAT, ["batch", "sequence", sizes.hidden]),
            ]
        for number in range(sizes.layers):
            for side in ("key", "value"):
                inputs.append(
                    info(
                        f"past_key_values.{number}.{side}",
                        TensorProto.FLOAT,
                        ["batch", sizes.kv_heads, "past", sizes.head_size],
                    )
                )
                outputs.append(
                    info(
                        f"present.{number}.{side}",
                        TensorProto.FLOAT,
                        ["batch", sizes.kv_heads, "present", sizes.head_size],
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
