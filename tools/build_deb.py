"""Builds edgemoa's .deb packages: one for each Debian release and kind of processor.

Each holds a virtual environment under /opt/edgemoa with everything in it, so that a board needs
neither pip nor a network to install it. It is put together in a small Debian of the release, kept
in the cache, whose Python then compiles it; packages for ARM are fetched ready-made, so nothing is
emulated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import say  # noqa: E402

from edgemoa import __version__, completion  # noqa: E402
from edgemoa.cli import _parser  # noqa: E402
from edgemoa.config import reference  # noqa: E402

PYTHONS: Final = {"bookworm": (3, 11), "trixie": (3, 13)}
MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
# The oldest C library that the packages on PyPI are built for, and newer ones that both have.
PLATFORMS: Final = ("manylinux_2_17", "manylinux2014", "manylinux_2_24", "manylinux_2_27",
                    "manylinux_2_28", "manylinux_2_31", "manylinux_2_34", "linux")  # fmt: skip
PACKAGING: Final = ROOT / "packaging"
PREFIX: Final = Path("opt/edgemoa")
# What a board never opens: tests, headers, and stubs for type checkers.
UNUSED: Final = ("**/tests", "**/test", "**/include", "onnx/backend/test", "onnx/**/*.proto",
                 "**/*.pyi", "**/*.h", "**/*.pxd", "**/*.pyx", "**/*.c", "bin")  # fmt: skip
MAX_DEB_MB: Final = 120
MAX_INSTALLED_MB: Final = 350


class BuildError(Exception):
    """A step failed; says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A package to build."""

    suite: str
    arch: str

    @property
    def python(self) -> str:
        """Its Python, as in 3.11."""
        return ".".join(map(str, PYTHONS[self.suite]))

    @property
    def file(self) -> str:
        """The package's name; that of the release is a part of the version."""
        return f"edgemoa_{self.version}_{self.arch}.deb"

    @property
    def version(self) -> str:
        """Sorts by release: an upgrade of the board's Debian takes the package for it."""
        release = {"bookworm": "deb12u1", "trixie": "deb13u1"}[self.suite]
        return f"{__version__}-1~{release}"


def main() -> int:
    """Build what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/build-deb", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=PYTHONS, action="append", help="default: all")
    parser.add_argument("--arch", choices=MACHINES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default: dist)")
    parser.add_argument("--mirror", default="", help="of Debian (default: debootstrap's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check", action="store_true",
        help=f"exit 1 where a package is over {MAX_DEB_MB} MB, or {MAX_INSTALLED_MB} MB installed",
    )  # fmt: skip
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        print("build-deb: needs root and debootstrap\n  next: sudo apt install debootstrap",
              file=sys.stderr)  # fmt: skip
        return 2
    built = []
    try:
        for suite in arguments.suite or PYTHONS:
            root = debian(suite, arguments.mirror)
            archs = arguments.arch or MACHINES
            built += [build(Target(suite, arch), root, arguments.out) for arch in archs]
    except BuildError as error:
        print(f"build-deb: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"packages": built}))
    else:
        for each in built:
            print(f"{each['file']}  {each['deb_mb']} MB, {each['installed_mb']} MB installed")
    short = [each["file"] for each in built
             if each["deb_mb"] > MAX_DEB_MB or each["installed_mb"] > MAX_INSTALLED_MB]  # fmt: skip
    if arguments.check:
        print(f"falls short: {', '.join(short)}" if short else "all as they are to be")
    return 1 if arguments.check and short else 0


def debian(
    suite: str,
    mirror: str,
    name: str = "build",
    packages: Sequence[str] = ("python3", "python3-venv", "ca-certificates"),
) -> Path:
    """A small Debian with these packages, from the cache or made now.

    :param name: tells it from others of the release.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemoa" / "roots"
    root = cache / f"{suite}-{name}"
    if not (root / "ready").exists():
        say(f"making a Debian {suite} (once)")
        shutil.rmtree(root, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        include = f"--include={','.join(packages)}"
        run("debootstrap", "--variant=minbase", include, suite, root, *([mirror] if mirror else []))
        (root / "ready").touch()
    # Its pip reaches what this machine's pip reaches.
    for path in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt", "etc/pip.conf"):
        there = Path("/") / path
        if there.exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).unlink(missing_ok=True)
            shutil.copy(there, root / path)
    return root


def build(target: Target, root: Path, out: Path) -> dict[str, Any]:
    """Build one package; returns its file and sizes."""
    say(f"building {target.file}")
    work = Path(tempfile.mkdtemp(prefix="build-", dir=root / "tmp"))
    try:
        tree = work / "tree"
        environment(target, root, work, tree / PREFIX)
        files(target, tree)
        kib = sum(f.lstat().st_size for f in tree.rglob("*") if f.is_file()) // 1024
        control(target, tree, kib)
        out.mkdir(parents=True, exist_ok=True)
        deb = out / target.file
        run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, deb)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = round(deb.stat().st_size / 1e6, 1)
    return {"file": str(deb), "deb_mb": size, "installed_mb": round(kib * 1024 / 1e6, 1)}


def environment(target: Target, root: Path, work: Path, prefix: Path) -> None:
    """The virtual environment, put together with the release's own Python and pip."""
    inside = Path("/") / work.relative_to(root)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "-w", work, ROOT)  # fmt: skip
    (wheel,) = work.glob("edgemoa-*.whl")
    shutil.copy(PACKAGING / "requirements.lock", work)
    site = f"lib/python{target.python}/site-packages"
    chroot(root, "python3", "-m", "venv", inside / "pip")
    packages = inside / "packages"
    machine = MACHINES[target.arch]
    tag = target.python.replace(".", "")
    install = (
        inside / "pip/bin/pip", "install", "-q", "--no-compile", "--no-deps",
        "--only-binary=:all:", "--implementation=cp", f"--python-version={target.python}",
        f"--abi=cp{tag}", "--abi=abi3", "--abi=none",
        *(f"--platform={each}_{machine}" for each in PLATFORMS), "--target", packages,
    )  # fmt: skip
    chroot(root, *install, "--require-hashes", "-r", inside / "requirements.lock")
    chroot(root, *install, inside / wheel.name)
    for pattern in UNUSED:
        for path in sorted((work / "packages").glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # Checked by nobody at run time, as the files under /opt change only with the package.
    chroot(root, "python3", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode",
           "unchecked-hash", "-s", packages, "-p", f"/{PREFIX}/{site}", packages)  # fmt: skip
    for path in (work / "packages").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # each as its author's machine had it
    (prefix / "bin").mkdir(parents=True)
    (prefix / site).parent.mkdir(parents=True)
    shutil.move(work / "packages", prefix / site)
    (prefix / "bin" / "python3").symlink_to(f"/usr/bin/python{target.python}")
    (prefix / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n"
    )
    command = prefix / "bin" / "edgemoa"
    command.write_text(
        f"#!/{PREFIX}/bin/python3 -P\nimport sys\n\nfrom edgemoa.cli import main\n\n"
        "sys.exit(main())\n"
    )
    command.chmod(0o755)


def files(target: Target, tree: Path) -> None:
    """What is not Python: units, settings, the manual page, completion."""
    parser = _parser()
    for unit in ("edgemoa.service", "edgemoa.socket"):
        put(tree / "usr/lib/systemd/system" / unit, (PACKAGING / unit).read_text())
    put(tree / "usr/lib/sysusers.d/edgemoa.conf", (PACKAGING / "edgemoa.sysusers").read_text())
    put(tree / "etc/edgemoa/edgemoa.toml", (PACKAGING / "debian/edgemoa.toml").read_text())
    completions = {
        "bash": "usr/share/bash-completion/completions/edgemoa",
        "zsh": "usr/share/zsh/vendor-completions/_edgemoa",
        "fish": "usr/share/fish/vendor_completions.d/edgemoa.fish",
    }
    for shell, path in completions.items():
        put(tree / path, completion.script(parser, shell))
    docs = tree / "usr/share/doc/edgemoa"
    overrides = tree / "usr/share/lintian/overrides/edgemoa"
    put(overrides, (PACKAGING / "debian/lintian-overrides").read_text())
    put(docs / "copyright", (PACKAGING / "debian/copyright").read_text())
    put(docs / "edgemoa.toml", reference())
    for name in ("alerts.yml", "grafana-dashboard.json", "README.md"):
        put(docs / "monitoring" / name, (PACKAGING / "monitoring" / name).read_text())
    put(docs / "NEWS.gz", (ROOT / "CHANGELOG.md").read_text())
    put(docs / "changelog.Debian.gz", changelog(target))
    put(tree / "usr/share/man/man1/edgemoa.1.gz", (PACKAGING / "edgemoa.1").read_text())
    command = tree / "usr/bin/edgemoa"
    command.parent.mkdir(parents=True)
    command.symlink_to(f"/{PREFIX}/bin/edgemoa")


def changelog(target: Target) -> str:
    """In Debian's form; the dates are those of the last commit, so that builds repeat."""
    date = output("git", "-C", ROOT, "log", "-1", "--format=%cD")
    return (
        f"edgemoa ({target.version}) {target.suite}; urgency=medium\n\n"
        f"  * See NEWS.gz.\n\n -- edgemoa developers <edgemoa@users.noreply.github.com>  {date}\n"
    )


def control(target: Target, tree: Path, size_kib: int) -> None:
    """The package's own files."""
    major, minor = PYTHONS[target.suite]
    words = {
        "VERSION": target.version, "ARCH": target.arch, "SIZE_KB": str(size_kib),
        "PYTHON": f"{major}.{minor}", "NEXT_PYTHON": f"{major}.{minor + 1}",
    }  # fmt: skip
    text = (PACKAGING / "debian/control.in").read_text()
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    put(tree / "DEBIAN/control", text)
    put(tree / "DEBIAN/conffiles", "/etc/edgemoa/edgemoa.toml\n")
    for script in ("postinst", "prerm", "postrm"):
        put(tree / "DEBIAN" / script, (PACKAGING / "debian" / script).read_text(), 0o755)
    sums = [
        f"{output('md5sum', file).split()[0]}  {file.relative_to(tree)}\n"
        for file in sorted(tree.rglob("*"))
        if file.is_file() and not file.is_symlink() and file.parts[len(tree.parts)] != "DEBIAN"
        and file.parts[len(tree.parts)] != "etc"
    ]  # fmt: skip
    put(tree / "DEBIAN/md5sums", "".join(sums))


def put(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file, packed if its name says so, readable by all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)
    path.chmod(mode)


def chroot(root: Path, *command: object) -> None:
    """Run in a Debian, with this machine's settings of pip."""
    keep = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("PIP_") and "/opt" not in v]
    run("chroot", root, "env", "-i", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL=C.UTF-8",
        "HOME=/root", *keep, *command)  # fmt: skip


def run(*command: object) -> None:
    """Run a command; it says nothing unless it fails.

    :raises BuildError: it failed.
    """
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command[:4]))} ...\n{done.stdout[-3000:]}")


def output(*command: object) -> str:
    """What a command prints."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
