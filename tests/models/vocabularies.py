"""Small vocabularies of every kind, and what llama.cpp makes of texts with them.

``tokenizer_vectors_kinds.json`` holds a trained vocabulary of each kind, texts, and for each way to
read them (a case) the tokens that llama.cpp makes. As a program, with llama-cpp-python at hand,
this renews the tokens::

    python -m tests.models.vocabularies
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf

from .tiny import _bytes_as_letters

FILE = Path(__file__).with_name("tokenizer_vectors_kinds.json")

SPECIAL = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<|fim_pad|>": 3, "<think>": 4}
SPECIAL_PIECES = {
    "<|end|>": 3, "<|user|>": 3, "<|endoftext|>": 3, "<end_of_turn>": 3, "[multimodal]": 4,
    "\n\n": 4,
}  # fmt: skip
PRE = (
    "default", "gpt-2", "smollm", "falcon", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken",
    "deepseek-llm", "deepseek-coder", "deepseek-v3", "seed-coder", "bailingmoe", "poro-chat",
    "viking",
)  # fmt: skip
SENTENCE_PIECE = ("llama", "llama without prefix", "phi-3")
CASES = (*PRE, *SENTENCE_PIECE)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def metadata(case: str, vocabulary: dict[str, list[str]]) -> dict[str, Any]:
    """The GGUF keys of a case."""
    if case in PRE:
        merges = vocabulary["merges"]
        tokens = [*_bytes_as_letters(), *(merge.replace(" ", "") for merge in merges), *SPECIAL]
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": case,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [SPECIAL.get(token, 1) for token in tokens],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        }
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = vocabulary["pieces"]
    spaces = ["▁" * length for length in range(2, 17)]  # of one score, as in Llama's vocabulary
    special = [
        # There, llama.cpp has every such token swallow white space, its own repetition as well.
        "[blank]" if case == "phi-3" and text == "\n\n" else text
        for text in SPECIAL_PIECES
    ]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *spaces, *pieces, *special]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(spaces) + len(pieces)), *SPECIAL_PIECES.values()]
    scores = [
        *[0.0] * (3 + 256), *[-1e9] * len(spaces), *(-float(n) for n in range(len(pieces))),
        *[-1000.0] * len(SPECIAL_PIECES),
    ]  # fmt: skip
    return {
        "general.name": "Phi-3 mini" if case == "phi-3" else "tiny",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": case != "llama without prefix",
    }


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind is gguf.GGUFValueType.INT32:
            kind = gguf.GGUFValueType.UINT32  # llama.cpp asks for it
        item = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, kind, item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def renew() -> None:
    """Ask llama.cpp anew for the tokens of every text."""
    import llama_cpp  # type: ignore[import-not-found]

    file = json.loads(FILE.read_text("utf-8"))
    texts = [(text, special) for text, special, *_ in file["vectors"]]
    found: list[list[list[int]]] = [[] for _ in texts]
    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            path = write_vocabulary(Path(folder, "v.gguf"), metadata(case, file["vocabulary"]))
            model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
            vocabulary = llama_cpp.llama_model_get_vocab(model.model)
            ends[case] = [
                token
                for token in range(llama_cpp.llama_vocab_n_tokens(vocabulary))
                if llama_cpp.llama_vocab_is_eog(vocabulary, token)
            ]
            for ids, (text, special) in zip(found, texts, strict=True):
                ids.append(model.tokenize(text.encode(), add_bos=False, special=special))
    vectors = []
    for (text, special), ids in zip(texts, found, strict=True):
        ways = [list(way) for way in dict.fromkeys(map(tuple, ids))]
        which = "".join(LETTERS[ways.index(way)] for way in ids)
        vectors.append([text, special, which, ways])
    lines = ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in vectors)
    rest = {
        "made_with": f"llama.cpp by llama-cpp-python {llama_cpp.__version__}",
        "vocabulary": file["vocabulary"],
        "end_of_turn": ends,
        "what": "text, whether control tokens are read, which of the lists of tokens each case has",
    }
    head = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in rest.items()
    )
    FILE.write_text(f'{{{head},\n"vectors": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    renew()
