"""Tokenizers of every kind that is imported give llama.cpp's tokens, and the text back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.engine.text import Detokenizer
from edgemoa.errors import ModelInvalidError
from edgemoa.models.gguf import GgufFile
from edgemoa.models.tokenizer import PRE_TOKENIZERS, Tokenizer
from edgemoa.text.tokens import Tokens, load_tokens

from .vocabularies import CASES, FILE, LETTERS, PRE, SENTENCE_PIECE, metadata, write_vocabulary

VECTORS = json.loads(FILE.read_text("utf-8"))


def read(folder: Path, keys: dict[str, Any]) -> Tokenizer:
    with GgufFile(write_vocabulary(folder / "v.gguf", keys)) as file:
        return Tokenizer.read(file)


def load(folder: Path, tokenizer: Tokenizer) -> Tokens:
    settings = {"model": {"eos_token_id": tokenizer.end_of_turn}}
    files = tokenizer.files(64) | {"genai_config.json": json.dumps(settings).encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return load_tokens(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokens]]:
    """Each case as it is imported, and as it is loaded again."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("tokens")
        tokenizer = read(folder, metadata(case, VECTORS["vocabulary"]))
        found[case] = tokenizer, load(folder, tokenizer)
    return found


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_llama_cpp(
    kinds: dict[str, tuple[Tokenizer, Tokens]], case: str
) -> None:
    tokenizer, tokens = kinds[case]
    start = [tokenizer.bos] if tokenizer.add_bos else []
    assert len(VECTORS["vectors"]) > 400
    for text, special, which, ways in VECTORS["vectors"]:
        expected = ways[LETTERS.index(which[CASES.index(case)])]
        if special:
            # A prompt begins with the token that it has to begin with, and with one of it.
            given = start + expected if expected[:1] != start else expected
            assert tokens.encode_prompt(text) == given, text
        else:
            assert tokens.encode(text) == expected, text


@pytest.mark.parametrize("case", CASES)
def test_ends_of_turns_are_those_of_llama_cpp(
    kinds: dict[str, tuple[Tokenizer, Tokens]], case: str
) -> None:
    assert kinds[case][1].end_of_turn == set(VECTORS["end_of_turn"][case])


texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r'’aAzZé09½▁<|>日😀\u0301\u3000\0"), st.characters(codec="utf-8")
    )
)


@pytest.mark.parametrize("case", CASES)
@given(text=texts)
def test_tokens_give_the_text_back(
    kinds: dict[str, tuple[Tokenizer, Tokens]], case: str, text: str
) -> None:
    tokens = kinds[case][1]
    numbers = tokens.encode(text)
    shown = text.replace("▁", " ") if case in SENTENCE_PIECE else text  # its sign for a space
    assert tokens.decode(numbers) == shown
    assert tokens.end_of_turn.isdisjoint(numbers)


@pytest.mark.parametrize("case", ["gpt-2", *SENTENCE_PIECE])
@given(numbers=st.lists(st.integers(0, 1100), max_size=40))
def test_a_stream_is_what_the_whole_is(
    kinds: dict[str, tuple[Tokenizer, Tokens]], case: str, numbers: list[int]
) -> None:
    tokens = kinds[case][1]
    detokenizer = Detokenizer(tokens)
    stream = "".join(map(detokenizer.push, numbers))
    whole = tokens.decode(numbers)
    assert whole.startswith(stream)
    assert whole.removeprefix(stream) in ("", "\ufffd")  # cut off within a character


def test_names_of_one_way_to_cut_are_one_family() -> None:
    assert set(PRE) < set(PRE_TOKENIZERS)
    # Every way to cut is among the cases, so that none goes unproven.
    assert {id(PRE_TOKENIZERS[name]) for name in PRE} == set(map(id, PRE_TOKENIZERS.values()))


def changed(case: str, **changes: Any) -> dict[str, Any]:
    keys = metadata(case, VECTORS["vocabulary"])
    for key, value in changes.items():
        if value is None:
            del keys[f"tokenizer.ggml.{key}"]
        else:
            keys[f"tokenizer.ggml.{key}"] = value
    return keys


def test_white_space_after_control_tokens_of_phi_3(
    kinds: dict[str, tuple[Tokenizer, Tokens]],
) -> None:
    plain, phi = kinds["llama"][1], kinds["phi-3"][1]
    assert phi.encode_prompt("<|user|>\n \tHi<|end|>\n") == phi.encode_prompt("<|user|>Hi<|end|>")
    assert plain.encode_prompt("<|user|>\nHi") != plain.encode_prompt("<|user|>Hi")


def test_what_a_file_does_not_say_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    spm = read(tmp_path, changed("llama", bos_token_id=None, eos_token_id=None))
    assert (spm.bos, spm.end_of_turn[0], spm.add_bos, spm.text_start) == (1, 2, True, 1)
    bpe = read(tmp_path, changed("gpt-2", pre=None))
    assert bpe.pre is PRE_TOKENIZERS["default"]
    assert (bpe.add_bos, bpe.tokens[bpe.text_start]) == (False, "<|endoftext|>")
    assert read(tmp_path, changed("llama-bpe")).add_bos
    assert not read(tmp_path, changed("llama-bpe", add_bos_token=False)).add_bos


def test_people_cannot_put_control_tokens_together(tmp_path: Path) -> None:
    """Not even where a file has the merges for it, or takes a whole word for one."""
    merges = VECTORS["vocabulary"]["merges"]
    letters = metadata("gpt-2", VECTORS["vocabulary"])["tokenizer.ggml.tokens"]
    tokens = [*letters, "xq", "xqz"]
    keys = changed(
        "gpt-2", merges=[*merges, "x q", "xq z"], tokens=tokens,
        token_type=[*[1] * (len(tokens) - 1), 3],
    )  # fmt: skip
    tokenizer = read(tmp_path, keys)
    numbers = load(tmp_path, tokenizer).encode("xqz")
    assert [tokenizer.tokens[number] for number in numbers] == ["xq", "z"]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gpt-2", {"model": "bert"}, "kind 'bert'.*gpt2.*llama"),
        ("gpt-2", {"pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2'.*llama-bpe"),
        ("gpt-2", {"merges": ["a b c"]}, "not a pair"),
        ("gpt-2", {"merges": ["a q"]}, "no tokens of it"),
        ("llama", {"scores": [0.0]}, "tokens and scores"),
        ("llama", {"scores": [float("nan")] * 1021}, "not a number"),
        ("llama", {"bos_token_id": 5000}, "bos_token_id"),
        ("gpt-2", {"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_a_broken_vocabulary_is_refused(
    tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelInvalidError, match=message):
        read(tmp_path, changed(case, **changes))


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    keys = changed("llama")
    keys["tokenizer.ggml.tokens"][3 + 0x41] = "other"
    with pytest.raises(ModelInvalidError, match="byte 0x41"):
        read(tmp_path, keys)


def test_tokens_that_can_be_put_together_in_too_many_ways_are_refused(tmp_path: Path) -> None:
    keys = changed("llama")
    runs = ["\ufdef" * length for length in range(1, 2400)]
    keys["tokenizer.ggml.tokens"] += runs
    keys["tokenizer.ggml.token_type"] += [1] * len(runs)
    keys["tokenizer.ggml.scores"] += [0.0] * len(runs)
    with pytest.raises(ModelInvalidError, match="too many ways"):
        read(tmp_path, keys)
