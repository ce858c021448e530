"""Ready-made onnxruntime-genai folders: what is let in, from a disk and from the hub."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgemoa.errors import (
    HashMismatchError,
    ModelInvalidError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.importer import import_gguf
from edgemoa.models.library import MANIFEST, ModelLibrary
from edgemoa.models.progress import silent
from edgemoa.models.pull import pull
from edgemoa.models.ready import import_folder
from edgemoa.text.settings import read_config

from .stand_in import StandIn, stand_in
from .tiny import Tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a folder that genai runs: those of an import of ours, without what is ours."""
    place = tmp_path_factory.mktemp("made")
    source = Tiny("Q4_1").write(place / "tiny.gguf")
    folder = import_gguf(source, ModelLibrary(place / "models"), "tiny", silent)
    ours = {MANIFEST, "ragged.onnx"}
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ours}
    return files | {"README.md": b"# hello", "custom_ops.so": b"\x7fELF", "setup.py": b"boom()"}


@pytest.fixture
def folder(made: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny CPU"
    folder.mkdir()
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def library(tmp_path: Path) -> ModelLibrary:
    return ModelLibrary(tmp_path / "models")


@pytest.fixture
def server(made: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as server:
        server.files = {f"cpu/int4/{name}": content for name, content in made.items()}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("edgemoa.models.fetch.BACKOFF_S", (0.0, 0.0))
        yield server


def test_a_folder_is_taken_in_and_runs(
    folder: Path, library: ModelLibrary, made: dict[str, bytes]
) -> None:
    placed = import_folder(folder, library, "tiny", silent)
    manifest = library.verify("tiny", silent)
    assert (manifest.importer, manifest.architecture, manifest.quantization) == (0, "llama", "int4")
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert (manifest.context_length, manifest.eos_token_ids) == (64, (2, 0, 3))
    # What is not known is not made up.
    assert (manifest.parameters, manifest.source_sha256, manifest.text_start_token_id) == (
        None,
    ) * 3
    taken = {file.name for file in manifest.files}
    assert {path.name for path in placed.iterdir()} == taken | {MANIFEST}
    assert not taken & {"README.md", "custom_ops.so", "setup.py"}
    (folder / "weights.bin").write_bytes(b"changed by its owner")
    library.verify("tiny", silent)
    code = "import sys; from pathlib import Path; from edgemoa.engine.genai import load; "
    code += "print(load(Path(sys.argv[1]), 1).context_tokens)"
    child = subprocess.run(
        [sys.executable, "-c", code, placed], capture_output=True, text=True, check=True
    )
    assert child.stdout == "64\n"


def test_a_name_that_is_taken(folder: Path, library: ModelLibrary) -> None:
    import_folder(folder, library, "tiny", silent)
    with pytest.raises(UserError, match="a model 'tiny' already"):
        import_folder(folder, library, "tiny", silent)


@pytest.mark.parametrize(
    "missing", ["genai_config.json", "model.onnx", "weights.bin", "tokenizer.json"]
)
def test_a_folder_without_all_it_needs(folder: Path, library: ModelLibrary, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelInvalidError, match=f"{missing} is missing"):
        import_folder(folder, library, "tiny", silent)
    assert not library.models()


def settings(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_bytes())
    change(config)
    path.write_text(json.dumps(config))


def options(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"]["decoder"]["session_options"].update(values)


def decoder(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"]["decoder"].update(values)


@pytest.mark.parametrize("key", ["session_options", "filename", "head_size"])
def test_a_key_that_comes_twice(folder: Path, library: ModelLibrary, key: str) -> None:
    """The checker would see the last of two; the runtime obeys the first as well."""
    path = folder / "genai_config.json"
    text = path.read_text("utf-8")
    bad = (
        '"session_options": {"custom_ops_library": "x.data"}, '
        if key[0] == "s"
        else f'"{key}": 1, '
    )
    assert f'"{key}"' in text
    path.write_text(text.replace(f'"{key}"', f'{bad}"{key}"', 1))
    with pytest.raises(ModelInvalidError, match="a key comes twice"):
        import_folder(folder, library, "tiny", silent)


def test_a_program_is_not_let_in(folder: Path, library: ModelLibrary) -> None:
    (folder / "vocab.json").write_bytes(b"\x7fELF and the rest of a library")
    with pytest.raises(ModelInvalidError, match=r"vocab\.json is a program"):
        import_folder(folder, library, "tiny", silent)
    assert not library.models()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (options(custom_ops_library="custom_ops.so"), "custom_ops_library"),
        (options(optimized_model_filepath="/tmp/x"), "optimized_model_filepath"),
        (options(enable_profiling="trace"), "enable_profiling"),
        (options(config_entries={"ep.context_file_path": "/x"}), "config_entries"),
        (
            options(**{"session.model_external_initializers_file_folder_path": "/etc"}),
            "folder_path",
        ),
        (options(**{"ep.context_enable": "1"}), "context_enable"),
        (options(provider_options=[{"cuda": {}}]), "made for cuda, not for the CPU"),
        (options(provider_options=[{"qnn": {"backend_path": "x.so"}}]), "made for qnn"),
        (decoder(filename="../model.onnx"), "filename"),
        (decoder(filename="/etc/model.onnx"), "filename"),
        (decoder(filename="custom_ops.so"), "filename"),
        (decoder(pipeline=[]), "pipeline"),
        (decoder(head_size=0), "head_size"),
        (decoder(num_hidden_layers=10**20), "num_hidden_layers"),
        (decoder(inputs={"past_key_names": "else.%d"}), "layers of key-value cache"),
        # onnxruntime-genai takes these for a format of C: any of them crashed the process.
        *(
            (decoder(**{side: {key: name}}), "not taken")
            for side, key, name in itertools.product(
                ("inputs", "outputs"),
                ("past_key_names", "past_value_names", "present_key_names"),
                ("%s%s%s%s", "%n%n", "%*d", "%d%d", "past.%d.%s", "past.%d\n"),
            )
        ),
        (options(**{"session.optimized_model_filepath": "1"}), "optimized_model_filepath"),
        (options(**{"session.intra_op.spin_duration_us": "٣"}), "spin_duration_us"),
        (options(**{"session.intra_op.spin_duration_us": "/x"}), "spin_duration_us"),
        (options(**{"session.disable_quant_qdq": "/x"}), "disable_quant_qdq"),
        (decoder(filename="model.onnx\n"), "filename"),
        (decoder(num_hidden_layers=1), "the 1 layers of key-value cache"),
        (decoder(num_key_value_heads=7), "another key-value cache than"),
        (decoder(head_size=1 << 19), "another key-value cache than"),
        (lambda config: config["model"].update(vocab_size=1000), "another vocabulary than"),
        (lambda config: config["model"].update(eos_token_id=[100_000]), "not in the vocabulary"),
        (lambda config: config["model"].update(type="whisper"), "type"),
        (lambda config: config["model"].update(type="llama\x1b]0;"), "type"),
        (lambda config: config["model"].update(vision={"filename": "v.onnx"}), "vision"),
        (lambda config: config.update(plugins=["x"]), "plugins"),
        (lambda config: config.pop("model"), "model"),
    ],
)
def test_settings_that_are_not_let_in(
    folder: Path, library: ModelLibrary, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    settings(change, folder)
    with pytest.raises(ModelInvalidError, match=message):
        import_folder(folder, library, "tiny", silent)
    assert not library.root.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"model": 1}'])
def test_settings_that_are_none(folder: Path, library: ModelLibrary, content: bytes) -> None:
    (folder / "genai_config.json").write_bytes(content)
    with pytest.raises(ModelInvalidError, match=r"genai_config\.json is not taken"):
        import_folder(folder, library, "tiny", silent)


def test_a_template_or_tokenizer_that_is_none(folder: Path, library: ModelLibrary) -> None:
    (folder / "chat_template.jinja").write_text("{% for each in")
    with pytest.raises(ModelInvalidError, match="chat template") as caught:
        import_folder(folder, library, "tiny", silent)
    assert "made for conversations" in caught.value.hint
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelInvalidError, match="tokenizer"):
        import_folder(folder, library, "tiny", silent)
    assert not library.models()


def test_settings_that_are_endless(folder: Path, library: ModelLibrary) -> None:
    with (folder / "genai_config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ModelInvalidError, match="larger than"):
        import_folder(folder, library, "tiny", silent)


@pytest.mark.parametrize("where", ["initializer", "node", "branch", "function"])
@pytest.mark.parametrize("location", ["/etc/passwd", "../tiny.gguf", "a/b", "", ".."])
def test_weights_from_another_place(
    folder: Path, library: ModelLibrary, where: str, location: str
) -> None:
    path = folder / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    tensor = onnx.TensorProto(
        name="stolen", data_type=2, dims=[8], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Constant", [], ["stolen"], value=tensor)
    match where:
        case "initializer":
            model.graph.initializer.append(tensor)
        case "node":
            model.graph.node.append(node)
        case "branch":
            inner = onnx.helper.make_graph([node], "then", [], [])
            model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner))
        case "function":
            model.functions.add(name="f", domain="d").node.append(node)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelInvalidError, match="takes weights from another place"):
        import_folder(folder, library, "tiny", silent)
    assert not library.root.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_graph_that_is_none(folder: Path, library: ModelLibrary, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelInvalidError):
        import_folder(folder, library, "tiny", silent)


# --- from the hub


def test_the_hubs_folder_becomes_the_same_model(
    server: StandIn, library: ModelLibrary, folder: Path
) -> None:
    placed = pull("hf:owner/repo:cpu/int4/", library, silent)
    assert placed.name == "repo-cpu-int4"
    manifest = library.verify(placed.name, silent)
    assert manifest.source.startswith("hf:owner/repo:cpu/int4/@")
    import_folder(folder, library, "copied", silent)
    assert manifest.model_id == library.verify("copied", silent).model_id
    fetched = {path.split("?")[0].rpartition("/")[2] for path, _ in server.seen}
    assert not fetched & {"README.md", "custom_ops.so", "setup.py"}
    assert list((library.root / ".arriving").iterdir()) == []


def test_the_only_folder_need_not_be_named(server: StandIn, library: ModelLibrary) -> None:
    assert pull("hf:owner/repo", library, silent, name="x") == library.root / "x"


def test_several_folders_are_told(server: StandIn, library: ModelLibrary) -> None:
    server.files |= {"gpu/genai_config.json": b"{}"}
    with pytest.raises(ModelInvalidError, match="in folders") as caught:
        pull("hf:owner/repo", library, silent)
    assert "cpu/int4/, gpu/" in caught.value.hint
    with pytest.raises(ModelInvalidError, match="in folders"):
        pull("hf:owner/repo:none/", library, silent)


def test_a_repository_without_any(server: StandIn, library: ModelLibrary) -> None:
    server.files = {"model.safetensors": b"x"}
    with pytest.raises(ModelInvalidError, match="neither a GGUF file nor a folder"):
        pull("hf:owner/repo", library, silent)


def test_a_folder_goes_on_where_it_was_cut(server: StandIn, library: ModelLibrary) -> None:
    weights = len(server.files["cpu/int4/weights.bin"])
    pull("hf:owner/repo", library, silent, name="whole")
    others = len(server.asked("/files/")) - 1  # the weights come last
    server.faults = [("", 0)] * others + [("cut", weights - 100)] + [("cut", 0)] * 2
    with pytest.raises(NetworkError):
        pull("hf:owner/repo", library, silent, name="x")
    assert list(library.models()) == ["whole"]
    before = len(server.seen)
    pull("hf:owner/repo", library, silent, name="x")
    library.verify("x", silent)
    again = [(path, headers) for path, headers in server.seen[before:] if "/files/" in path]
    assert [headers.get("range") for _, headers in again] == [f"bytes={weights - 100}-"]


def test_hostile_settings_cost_one_request(server: StandIn, library: ModelLibrary) -> None:
    config = json.loads(server.files["cpu/int4/genai_config.json"])
    options(custom_ops_library="custom_ops.so")(config)
    server.files["cpu/int4/genai_config.json"] = json.dumps(config).encode()
    with pytest.raises(ModelInvalidError, match="custom_ops_library"):
        pull("hf:owner/repo", library, silent)
    assert len(server.asked("/files/")) == 1
    assert not library.models()
    assert list((library.root / ".arriving").iterdir()) == []


def test_other_bytes_of_one_file(server: StandIn, library: ModelLibrary) -> None:
    server.told_sha256 = "0" * 64
    with pytest.raises(HashMismatchError, match="arrived with the hash"):
        pull("hf:owner/repo", library, silent)
    assert not library.models()


def test_a_file_that_the_settings_name_is_not_there(server: StandIn, library: ModelLibrary) -> None:
    del server.files["cpu/int4/model.onnx"]
    with pytest.raises((ModelInvalidError, ModelNotFoundError), match=r"no cpu/int4/model\.onnx"):
        pull("hf:owner/repo", library, silent)


def test_what_an_earlier_version_imported_is_let_in(tmp_path: Path, made: dict[str, bytes]) -> None:
    config = json.loads(made["genai_config.json"])
    config["model"]["decoder"]["session_options"]["session.disable_quant_qdq"] = "1"
    file = tmp_path / "genai_config.json"
    file.write_text(json.dumps(config))
    assert read_config(file).model.decoder.filename == "model.onnx"
