"""The ONNX graphs of a decoder, and the file of weights that they share.

There are two, of the same weights:

*model.onnx*, as onnxruntime-genai wants one. ``input_ids`` and ``attention_mask`` int64 [batch,
sequence] and [batch, total] (its row sums tell each sequence's length). ``logits`` [batch, 1,
vocabulary] of the last position.

*ragged.onnx*, for any number of new tokens in each row of a cache, which may differ. All tokens of
a run lie one behind the other; only attention sees them by rows. With ``span`` the most tokens
that a row has:

- ``input_ids`` int64 [tokens]
- ``row_tokens`` int64 [rows, span, 2]: 0 and the token that stands at each place of each row, any
  where there is none; ``token_places`` int64 [1, tokens, 2]: row and place of each token
- ``query_seqlens`` int32 [rows]: places in use, 0 to ``span``; ``seqlens_k`` int32 [rows]: tokens
  that the row has with them, less one; ``total_sequence_length`` int32 []: most tokens of any row
- ``wanted`` int64 [wanted], one at least: the tokens that ``logits`` [1, wanted, vocabulary] and
  ``hidden`` [1, wanted, hidden] (what the head is given) are computed for
- ``logits_wanted`` int64 [1], which may be left out, one at least: ``logits`` of so many of them
  alone. The head is a fifth to two thirds of what a small model computes for a token

A text gives the same bits in any pieces and company, as long as each row that has new tokens has
two places in use: for one, onnxruntime takes another kernel. So a single token is given twice; the
token after it takes the second place. ``past`` must have room for ``span`` places behind what
each row has, also where a row is idle: onnxruntime refuses the run else, as it does if ``span`` is
more than ``total_sequence_length``. Nothing is written behind the places in use.

Both have ``past_key_values.N.key|value`` float32 [rows, kv_heads, past, head_size], and
``present.N.key|value``, which may be the very buffers of the past.

The flow through the layers is [batch, sequence, hidden], in the second [1, tokens, hidden].

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
from edgemoa.models.blocks import BLOCK, Format, added_blocks

OPSET: Final = 21
MICROSOFT: Final = "com.microsoft"
ALIGNMENT: Final = 64  # a cache line: kernels may read weights in place
LOGITS_WANTED: Final = "logits_wanted"
INT8_ACTIVATIONS: Final = 4  # accuracy_level of MatMulNBits: the fast path on CPUs


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

    Blocks: ``name.q`` uint8 [rows, blocks, bytes] and ``name.d`` float16 [rows, blocks],
    with ``digits`` sets of columns behind its own (see :mod:`edgemoa.models.blocks`), then also
    ``name.z``, packed zero points. Rows to be gathered, with a minimum: ``name.c`` float16 [rows,
    own blocks], what to add. Floats: ``name.w`` [rows, columns]. With a bias: ``name.b`` [rows].
    ``parts`` are the rows of what lies in it, one below the other.
    """

    name: str
    columns: int
    format: Format
    parts: tuple[int, ...]
    bias: bool = False
    digits: int = 0

    @property
    def rows(self) -> int:
        return sum(self.parts)

    @property
    def added_blocks(self) -> int:
        """Blocks behind its own."""
        return added_blocks(self.columns, self.digits)


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
    decoder: Decoder, entries: dict[str, TensorProto], *, ragged: bool
) -> onnx.ModelProto:
    """One of the two graphs; see the module."""
    return _Graph(decoder, entries, ragged).build()


class _Graph:
    def __init__(self, decoder: Decoder, entries: dict[str, TensorProto], ragged: bool) -> None:
        self.decoder = decoder
        self.sizes = decoder.architecture
        self.entries = entries
        self.ragged = ragged
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.made: set[str] = set()

    def build(self) -> onnx.ModelProto:
        d = self.decoder
        if not self.ragged:
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
        hidden = self._wanted("wanted.hidden", hidden)
        residual = self._wanted("wanted.residual", residual)
        self._add_norm("hidden", hidden, residual, d.final_norm)
        self._products("head", self._first_wanted("hidden"), (d.head,), "logits")
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

    def _by_row(self, x: str) -> str:
        """For attention: the flow as [rows, span, width]."""
        if not self.ragged:
            return x
        return self._node("GatherND", [x, "row_tokens"], f"{x}.by_row")

    def _in_line(self, x: str) -> str:
        """Back from :meth:`_by_row`."""
        if not self.ragged:
            return x
        return self._node("GatherND", [x, "token_places"], f"{x}.in_line")

    def _wanted(self, name: str, x: str) -> str:
        """The tokens whose logits are asked for."""
        which = "wanted" if self.ragged else self._constant([-1])
        return self._node("Gather", [x, which], name, axis=1)

    def _first_wanted(self, x: str) -> str:
        """Of those, as many as the head is to be computed for: all, unless told."""
        if not self.ragged:
            return x
        most = self._array(LOGITS_WANTED, np.array([np.iinfo(np.int64).max]))
        ends = [self._constant([0]), most, self._constant([1])]
        return self._node("Slice", [x, *ends], f"{x}.wanted")

    def _embed(self) -> str:
        matrix = self.decoder.embedding
        ids = "input_ids"
        if self.ragged:
            ids = self._node("Unsqueeze", [ids, self._constant([0])], "ids")
        if matrix.format.bits:
            rows = self._embed_blocks(matrix, ids)
        else:
            rows = self._node("Gather", [self._weight(f"{matrix.name}.w"), ids], "embedding.rows")
        if self.sizes.embedding_scale == 1.0:
            return rows
        scale = self._constant(self.sizes.embedding_scale)
        return self._node("Mul", [rows, scale], "embedding.scaled")

    def _embed_blocks(self, matrix: Matrix, ids: str) -> str:
        own = matrix.columns // BLOCK
        shape = self._constant([matrix.rows, own + matrix.added_blocks, 1])
        scale = self._node("Reshape", [self._float(f"{matrix.name}.d"), shape], "embedding.scale")
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
        if matrix.added_blocks:  # they are for products
            ends = [self._constant([n]) for n in (0, own, 2)]
            rows = self._node("Slice", [rows, *ends], "embedding.own")
        if matrix.format.centre:
            shift = self._node("Gather", [self._float(f"{matrix.name}.c"), ids], "embedding.shifts")
            shift = self._node("Unsqueeze", [shift, self._constant([3])], "embedding.shifts.4d")
            rows = self._node("Add", [rows, shift], "embedding.shifted")
        return self._node("Reshape", [rows, self._constant([0, 0, matrix.columns])], "embedding")

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
                    *([""] * 7 + ["query_seqlens"] if self.ragged else []),
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
        attended = self._in_line(out)
        return self._products(f"{prefix}.attention_out", attended, (layer.attention_out,))[0]

    def _queries_keys_values(self, prefix: str, layer: Layer, x: str) -> list[str]:
        """Three inputs of attention. The first may hold all, the others are empty then."""
        name = f"{prefix}.qkv"
        outputs = self._products(name, x, layer.qkv)
        if len(outputs) == 1 and not layer.query_norm:
            return [self._by_row(outputs[0]), "", ""]
        norms = (layer.query_norm, layer.key_norm, "")
        inputs = []
        for part, (flat, width) in enumerate(self._parts(name, outputs, layer.qkv)):
            state = flat
            if norms[part]:
                shape = self._constant([0, -1, self.sizes.head_size])
                heads = self._node("Reshape", [flat, shape], f"{name}.heads.{part}")
                state = self._norm(f"{name}.normed.{part}", heads, norms[part])
                shape = self._constant([0, -1, width])
                state = self._node("Reshape", [state, shape], f"{name}.flat.{part}")
            inputs.append(self._by_row(state))
        return inputs

    def _rope(self, name: str) -> list[str]:
        """Caches [context + 1, head_size / 2] of cosines and sines.

        onnxruntime computes them once, when it loads the graph: as files they would be a quarter
        of a small model. In float64, as the angle of a late position has few digits behind the
        point in float32; it has no cosine for that, so sine it is, a quarter turn ahead.
        """
        cos, sin = f"{name}.cos", f"{name}.sin"
        if sin in self.made:
            return [cos, sin]
        rope = self.sizes.ropes[name]
        if "positions" not in self.made:
            # One more than the context: its last token, too, may be given twice.
            ends = [self._float64(x) for x in (0.0, self.sizes.context + 1.0, 1.0)]
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

    def _products(
        self, name: str, x: str, matrices: tuple[Matrix, ...], last: str = ""
    ) -> list[str]:
        """``x @ w.T + b`` for each matrix; the last product is called ``last``."""
        outputs = []
        for matrix in matrices:
            out = last or f"{name if len(matrices) == 1 else matrix.name}.y"
            bias = [self._weight(f"{matrix.name}.b")] if matrix.bias else []
            if not matrix.format.bits:
                product = f"{out}.product" if bias else out
                weight = self._weight(f"{matrix.name}.w")
                self._node("FusedMatMul", [x, weight], product, domain=MICROSOFT, transB=1)
                outputs.append(self._node("Add", [product, *bias], out) if bias else out)
                continue
            given, columns = self._with_means(x, matrix)
            zeros = self._weight(f"{matrix.name}.z") if matrix.digits else ""
            product = self._node(
                "MatMulNBits",
                [
                    given,
                    self._weight(f"{matrix.name}.q"),
                    self._float(f"{matrix.name}.d"),
                    zeros,
                    "",  # the order of columns
                    *bias,
                ],
                out,
                domain=MICROSOFT,
                K=columns,
                N=matrix.rows,
                bits=matrix.format.bits,
                block_size=BLOCK,
                accuracy_level=INT8_ACTIVATIONS,
            )
            outputs.append(product)
        return outputs

    def _with_means(self, x: str, matrix: Matrix) -> tuple[str, int]:
        """What such a matrix is multiplied with, and its width: ``x`` and the means of its blocks,
        once for each digit.
        """
        if not matrix.digits:
            return x, matrix.columns
        count = matrix.columns // BLOCK
        means = f"{x}.means"
        if means not in self.made:
            self._node("AveragePool", [x], means, kernel_shape=[BLOCK], strides=[BLOCK])
        padded = means
        room = -count % BLOCK if matrix.digits > 1 else 0
        if room:  # each digit has blocks of its own
            padded = f"{means}.padded"
            if padded not in self.made:
                self._node("Pad", [means, self._constant([0, 0, 0, 0, 0, room])], padded)
        name = f"{x}.with_means.{matrix.digits}"
        if name not in self.made:
            self._node("Concat", [x, *[padded] * matrix.digits], name, axis=-1)
        return name, matrix.columns + matrix.digits * (count + room)

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
        long, short, number = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
        if self.ragged:
            rows = "rows"
            inputs = [
                info("input_ids", long, ["tokens"]),
                info("row_tokens", long, ["rows", "span", 2]),
                info("token_places", long, [1, "tokens", 2]),
                info("query_seqlens", short, ["rows"]),
                info("seqlens_k", short, ["rows"]),
                info("total_sequence_length", short, []),
                info("wanted", long, ["wanted"]),
                info(LOGITS_WANTED, long, [1]),  # has a value of its own, as an initializer
            ]
            outputs = [
                info("logits", number, [1, "logits_wanted", sizes.vocabulary]),
                info("hidden", number, [1, "wanted", sizes.hidden]),
            ]
        else:
            rows = "batch"
            inputs = [
                info("input_ids", long, ["batch", "sequence"]),
                info("attention_mask", long, ["batch", "total"]),
            ]
            outputs = [info("logits", number, ["batch", 1, sizes.vocabulary])]
        for layer in range(sizes.layers):
            for side in ("key", "value"):
                for values, name, length in (
                    (inputs, "past_key_values", "past"),
                    (outputs, "present", "present"),
                ):
                    shape = [rows, sizes.kv_heads, length, sizes.head_size]
                    values.append(info(f"{name}.{layer}.{side}", number, shape))
        graph = helper.make_graph(
            self.nodes, "decoder", inputs, outputs, list(self.initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            producer_name="edgemoa",
            ir_version=10,
        )
