"""The default model's text becomes the tokens that llama.cpp makes of it, and tokens the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemoa.core.messages import ChatMessage
from edgemoa.models.library import read_manifest
from edgemoa.text.template import load_template
from edgemoa.text.tokens import Tokens, load_tokens

VECTORS = json.loads(Path(__file__).with_name("tokenizer_vectors.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> Tokens:
    return load_tokens(smollm2)


def test_the_vectors_are_of_this_model(smollm2: Path) -> None:
    assert read_manifest(smollm2).source_sha256 == VECTORS["gguf_sha256"]


def test_tokens_are_those_of_llama_cpp(tokens: Tokens) -> None:
    # Digits, code, emoji, scripts, runs of white space, special tokens, and random mixtures.
    assert len(VECTORS["vectors"]) > 350
    wrong = [v for v in VECTORS["vectors"] if tokens.encode_prompt(v["text"]) != v["ids"]]
    assert not wrong


def test_tokens_give_the_text_back(tokens: Tokens) -> None:
    for vector in VECTORS["vectors"]:
        if "<" not in vector["text"]:  # control tokens are left out of the text
            assert tokens.decode(vector["ids"]) == vector["text"]


def test_every_end_of_turn_is_known(tokens: Tokens) -> None:
    # <|endoftext|>, <|im_end|>, <reponame>: those at which llama.cpp stops.
    assert tokens.end_of_turn == {0, 2, 4}


def test_the_chat_template_is_the_files(smollm2: Path) -> None:
    assert load_template(smollm2).render((ChatMessage("user", "Hi"),)) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
