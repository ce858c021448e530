"""Text becomes the tokens that llama.cpp makes of it, and tokens the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgemoa.models.library import read_manifest

VECTORS = json.loads(Path(__file__).with_name("tokenizer_vectors.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    import onnxruntime_genai as og

    return og.Tokenizer(og.Model(str(smollm2)))


def test_the_vectors_are_of_this_model(smollm2: Path) -> None:
    assert read_manifest(smollm2).source_sha256 == VECTORS["gguf_sha256"]


def test_tokens_are_those_of_llama_cpp(tokenizer: Any) -> None:
    # Digits, code, emoji, scripts, runs of white space, special tokens, and random mixtures.
    assert len(VECTORS["vectors"]) > 350
    wrong = [v for v in VECTORS["vectors"] if tokenizer.encode(v["text"]).tolist() != v["ids"]]
    assert not wrong


def test_tokens_give_the_text_back(tokenizer: Any) -> None:
    for vector in VECTORS["vectors"]:
        if "<" not in vector["text"]:  # special tokens are left out of the text
            assert tokenizer.decode(vector["ids"]) == vector["text"]


def test_every_end_of_turn_is_known(smollm2: Path) -> None:
    config = json.loads((smollm2 / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 0]  # <|im_end|>, <|endoftext|>


def test_the_chat_template_is_the_files(tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
