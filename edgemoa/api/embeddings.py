"""Texts as vectors, in OpenAI's shape: ``/v1/embeddings``.

Pure, as :mod:`edgemoa.api.openai`. The vectors are those of this board's own model: what other
boards' models make of a text does not compare with them.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edgemoa.api import openai
from edgemoa.core import limits
from edgemoa.errors import InvalidPromptError, UserError

MAX_TEXTS: Final = 1024  # of one request; the model is given them a few at a time

Texts: TypeAlias = str | Annotated[list[str], Meta(max_length=MAX_TEXTS)]


class EmbeddingRequest(msgspec.Struct):
    """``POST /v1/embeddings``, as far as it is understood."""

    input: Texts
    model: str = openai.GROUP_MODEL
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


decoder: Final = msgspec.json.Decoder(EmbeddingRequest)


def batches(texts: Texts) -> Iterator[list[str]]:
    """The texts, as many at a time as the model is given.

    :raises InvalidPromptError: one is empty, or alone too large.
    """
    batch: list[str] = []
    size_bytes = 0
    for text in [texts] if isinstance(texts, str) else texts:
        if not text:
            raise InvalidPromptError("a text is empty", hint="leave it out")
        bytes_more = len(text.encode())
        if bytes_more > limits.MAX_PROMPT_BYTES:
            raise InvalidPromptError(
                f"a text has {bytes_more} bytes, more than {limits.MAX_PROMPT_BYTES}",
                hint="embed it in parts",
            )
        if batch and (
            len(batch) == limits.MAX_EMBEDDED or size_bytes + bytes_more > limits.MAX_PROMPT_BYTES
        ):
            yield batch
            batch, size_bytes = [], 0
        batch.append(text)
        size_bytes += bytes_more
    if batch:
        yield batch


def check_dimensions(wanted: int | None, vector: bytes) -> None:
    """:raises UserError: vectors of another size were asked for than the model makes."""
    there = len(vector) // 4
    if wanted is not None and wanted != there:
        raise UserError(
            f"this model's vectors have {there} dimensions and cannot be made shorter",
            hint=f"leave 'dimensions' out, or set it to {there}",
        )


def numbers(vector: bytes) -> list[float]:
    """A vector of float32, little-endian, as JSON tells it."""
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


class Embedding(msgspec.Struct):
    """A text's vector: numbers, or these as float32, little-endian, in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The answer to :class:`EmbeddingRequest`."""

    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


def embeddings_json(
    ask: EmbeddingRequest, model: str, vectors: Sequence[bytes], tokens: int
) -> Embeddings:
    """The answer; ``tokens`` are those that were read."""
    compact = ask.encoding_format == "base64"
    data = [
        Embedding(index, b64encode(vector).decode() if compact else numbers(vector))
        for index, vector in enumerate(vectors)
    ]
    return Embeddings(model, data, EmbeddingUsage(tokens, tokens))
