"""Nobody but the template writes control tokens, and no tokenizer file does harm."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.messages import ChatMessage
from edgemoa.errors import EdgemoaError, InvalidPromptError, ModelInvalidError
from edgemoa.text.tokens import Tokens, load_tokens

CONTROL = ("<s>", "<|end|>", "<|endless|>", "[INST]", "[/INST]")


def content(sentence_piece: bool = False, **changes: Any) -> dict[str, Any]:
    """A tokenizer.json of single characters, byte by byte or as SentencePiece writes them."""
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in bytes_]
    letters = [*map(chr, bytes_), *(chr(256 + number) for number in range(len(hidden)))]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocabulary = [*CONTROL, *(pieces if sentence_piece else letters)]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    steps = [{"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, **added, "special": True}
            for number, text in enumerate(CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prefix, space]}
        if sentence_piece else None,
        "pre_tokenizer": None if sentence_piece else {**step, "use_regex": False},
        "decoder": {"type": "Sequence", "decoders": steps} if sentence_piece else step,
        "model": {
            "type": "BPE",
            "byte_fallback": sentence_piece,
            "vocab": {text: number for number, text in enumerate(vocabulary)},
            "merges": [],
        },
        **changes,
    }  # fmt: skip


def write(folder: Path, file: dict[str, Any] | str, **config: Any) -> Path:
    text = file if isinstance(file, str) else json.dumps(file)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "genai_config.json").write_text('{"model": {"eos_token_id": [1, 2]}}')
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["byte-level", "SentencePiece"])
def tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return load_tokens(write(tmp_path_factory.mktemp("tokens"), content(request.param)))


forgery = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, "<", "|", ">", "[", " ", "\n", "\ufdd0", "<|end", "|>", "INST]"]
        ),
        st.characters(codec="utf-8"),
    ),
    max_size=12,
).map("".join)


@given(
    contents=st.lists(forgery, max_size=3), between=st.sampled_from(["", "\n", "<s>", "[INST] "])
)
def test_nobody_forges_control_tokens(tokens: Tokens, contents: list[str], between: str) -> None:
    """Not by what is written, not by what two texts become together, not by trimming them."""
    messages = tokens.guard(tuple(ChatMessage("user", text) for text in contents))
    for trim in (str, str.strip, str.rstrip):
        prompt = between.join(trim(turn.content) for turn in messages)
        written = between.join("" for _ in messages)
        numbers = tokens.encode_prompt(prompt)
        assert sum(number < len(CONTROL) for number in numbers) == sum(map(written.count, CONTROL))


@given(text=forgery)
def test_guarding_changes_nothing_else(tokens: Tokens, text: str) -> None:
    (guarded,) = tokens.guard((ChatMessage("user", text),))
    plain = text.replace("\ufdd0", "\ufffd")
    assert tokens.encode_prompt(guarded.content) == tokens.encode(plain)


def test_the_template_does_write_control_tokens(tokens: Tokens) -> None:
    numbers = tokens.encode_prompt("<s>[INST]a<|endless|><|end|>")
    assert [number for number in numbers if number < len(CONTROL)] == [0, 3, 2, 1]
    assert tokens.decode(numbers) == "a"
    assert tokens.end_of_turn == {1, 2}


@pytest.mark.parametrize("name", ["<s>", {"content": "<s>"}])
def test_a_prompt_begins_once_with_the_token_that_it_has_to_begin_with(
    tmp_path: Path, name: object
) -> None:
    tokens = load_tokens(write(tmp_path, content(), add_bos_token=True, bos_token=name))
    assert tokens.encode_prompt("a")[0] == 0
    assert tokens.encode_prompt("<s>a") == tokens.encode_prompt("a")
    assert tokens.encode_prompt("") == [0]
    assert 0 not in tokens.encode("a")


def test_white_space_beside_control_tokens_goes_where_they_say_so(tmp_path: Path) -> None:
    file = content()
    for token in file["added_tokens"]:
        token |= {"rstrip": token["content"] == "<s>", "lstrip": token["content"] == "[INST]"}
    tokens = load_tokens(write(tmp_path, file))
    for text, same in [
        ("<s> \n a", "<s>a"), ("a \t[INST]", "a[INST]"), ("<s> \n [INST]", "<s>[INST]"),
    ]:  # fmt: skip
        assert tokens.encode_prompt(text) == tokens.encode_prompt(same)
    assert len(tokens.encode_prompt("<|end|> \n a")) == 5


def test_numbers_beyond_the_vocabulary_are_no_text(tokens: Tokens) -> None:
    assert tokens.decode([5000, 2**31 - 1]) == ""


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
HOSTILE: dict[str, dict[str, Any] | str] = {
    "no JSON": "\0" * 100,
    "deep": "[" * 200_000,
    "cut off": json.dumps(content())[:-300],
    "no object": "[1]",
    "empty": "{}",
    "exponential regex": content(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a|a|b|aa)+$"}}),
    "regex without end": content(pre_tokenizer={**SPLIT, "pattern": {"Regex": "((("}}),
    "deep regex": content(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(" * 50_000}}),
    "doubling": content(normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 30}),
    "letters of letters": content(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [LETTERS] * 30}
    ),
    "long control token": content(
        added_tokens=[{**content()["added_tokens"][0], "content": "x" * 10_000}]
    ),
    "far token": content(added_tokens=[{**content()["added_tokens"][0], "id": 2**32 - 1}]),
    "negative token": content(added_tokens=[{**content()["added_tokens"][0], "id": -1}]),
    "merge of nothing": content(model={**content()["model"], "merges": ["zz yy"]}),
    "no decoder": content(decoder=None),
    "broken table": content(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "padding": content(
        padding={"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    ),
    "truncation": content(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("flaw", HOSTILE)
def test_a_hostile_file_is_refused_or_does_no_harm(tmp_path: Path, flaw: str) -> None:
    started = time.monotonic()
    try:
        tokens = load_tokens(write(tmp_path, HOSTILE[flaw]))
        numbers = tokens.encode_prompt("a" * 5000 + "!")
        assert len(numbers) == 5001
    except EdgemoaError as error:
        assert "aaaa" not in str(error)
    assert time.monotonic() - started < 10


def test_a_folder_without_the_files_says_which(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalidError, match=r"no tokenizer\.json"):
        load_tokens(tmp_path)
    write(tmp_path, content())
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ModelInvalidError, match=r"genai_config\.json \(KeyError\)"):
        load_tokens(tmp_path)
    write(tmp_path, content(), add_bos_token=True, bos_token=1)
    with pytest.raises(ModelInvalidError, match=r"tokenizer_config\.json \(TypeError\)"):
        load_tokens(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, content())
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelInvalidError, match="more than 64 MiB"):
        load_tokens(tmp_path)
    with (tmp_path / "tokenizer_config.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelInvalidError, match="more than 16 MiB"):
        load_tokens(tmp_path)


def test_a_text_that_is_taken_for_a_control_token_is_refused(tmp_path: Path) -> None:
    """Where a file has merges that lead to one."""
    file = content()
    file["model"]["vocab"] |= {"<s": 300}
    file["model"]["merges"] = ["< s", "<s >"]
    tokens = load_tokens(write(tmp_path, file))
    with pytest.raises(InvalidPromptError, match="control token"):
        tokens.encode("<s>")


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "1", "!", "aA", "日", "😀", "\0", "<", "<|end|>", "<|end", "\t x"]
)
def test_the_longest_prompts_take_no_longer_than_others(tokens: Tokens, unit: str) -> None:
    text = unit * (256 * 1024 // len(unit.encode()))
    started = time.process_time()
    (guarded,) = tokens.guard((ChatMessage("user", text),))
    numbers = tokens.encode_prompt(guarded.content)
    assert time.process_time() - started < 8
    # Not one character is lost.
    assert tokens.decode(numbers) == text
    for first, second in itertools.pairwise(numbers[:10]):
        assert first >= len(CONTROL) <= second
