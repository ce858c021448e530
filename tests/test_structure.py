"""The shape that edgemoa/ARCHITECTURE.md promises, read from the imports."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from free_loop import BlockedError, free_loop

from edgemoa.store import Store

ROOT = Path(__file__).parents[1] / "edgemoa"
MODULES = sorted(ROOT.rglob("*.py"))

# Which parts of edgemoa a part may import, beside itself. Only daemon and the command line join
# the shells.
ALLOWED = {
    "errors": set[str](),
    "log": set[str](),
    "show": set[str](),
    "completion": set[str](),
    "hardware": set[str](),
    "profiles": {"errors"},
    "provision": {"config", "core", "errors"},
    "systemd": {"errors"},
    "config": {"core", "errors"},
    "client": {"config", "errors"},
    "client_async": {"client", "errors"},
    "core": {"errors"},
    "store": {"core", "errors"},
    "net": {"core", "config", "errors", "store"},
    "text": {"core", "errors"},
    "engine": {"core", "errors", "text"},
    "models": {"core", "errors", "text"},
    "journal": {"errors"},
    "desk": {"core", "errors", "journal"},
    "api": {"core", "desk", "errors"},
    "shelf": {"errors", "models", "net"},
    "sim": {"core", "errors"},
}
JOINS = {
    "daemon", "demo", "cli", "cli_model", "cli_bench", "cli_sim", "cli_plan", "cli_peer_models",
    "cli_chat", "cli_devices", "cli_status", "cli_doctor", "cli_settings", "cli_board",
    "__main__",
}  # fmt: skip
IMPURE = {
    "asyncio", "socket", "ssl", "threading", "time", "os", "logging", "subprocess", "select",
    "sqlite3", "pathlib", "datetime", "signal", "tempfile", "secrets", "numpy", "onnx",
    "onnxruntime", "onnxruntime_genai", "aiohttp", "zeroconf",
}  # fmt: skip


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else "edgemoa"


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_layer_reaches_up_or_sideways(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    used = {part(name) for name in imports(file) if name.split(".")[0] == "edgemoa"}
    if own in JOINS or own == "__init__":
        return
    assert used - {own, "__version__"} <= ALLOWED[own]


@pytest.mark.parametrize(
    "file", [f for f in MODULES if "core" in f.relative_to(ROOT).parts], ids=lambda f: f.name
)
def test_the_core_is_pure(file: Path) -> None:
    assert not {name.split(".")[0] for name in imports(file)} & IMPURE
    for node in ast.walk(ast.parse(file.read_text())):
        # Chance comes in as an argument: the class may be named, its module's functions not.
        if isinstance(node, ast.Import):
            assert "random" not in {alias.name for alias in node.names}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edgemoa.core.node", {"asyncio", "aiohttp", "zeroconf", "numpy", "ssl", "sqlite3"}),
        ("edgemoa.cli", {"asyncio", "aiohttp", "zeroconf", "numpy", "onnx", "cryptography"}),
        ("edgemoa.daemon", {"numpy", "onnx", "onnxruntime", "onnxruntime_genai"}),
    ],
)
def test_heavy_imports_are_put_off(module: str, heavy: set[str]) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not heavy & set(loaded)


def test_blocking_the_event_loop_is_noticed(tmp_path: Path) -> None:
    async def open_a_database() -> None:
        Store(tmp_path).open()

    with free_loop(), pytest.raises(BlockedError, match="in the event loop"):
        asyncio.run(open_a_database())
