"""What is drawn, read back from the files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgemoa.errors import UserError
from edgemoa.sim import plots

ROOT = Path(__file__).parents[2]

DRAW: dict[str, Callable[[Path], None]] = {
    "lines": lambda path: plots.lines(
        path, "Queue", "load", "jobs", {"M=1": [(0, 1), (1, 3)], "M=2": [(0, 2), (1, 9)]},
        verticals={"Theorem 1": 0.5}, dots=frozenset({"M=2"}), log_y=True,
    ),
    "histogram": lambda path: plots.histogram(
        path, "Latency", "seconds", {"M=1": [1, 2, 2, 3], "M=2": [4.0]}, verticals={"promise": 3}
    ),
    "cdf": lambda path: plots.cdf(path, "Latency", "seconds", {"M=1": [1, 2, 2, 3], "M=2": []}),
    "heat": lambda path: plots.heat(
        path, "Stable rate", ["k=1", "k=2"], ["M=1", "M=2"], [[0.333, 0.25], [0.2, 0.143]],
        x_label="proposers", y_label="layers", value_label="per second",
    ),
}  # fmt: skip
TEXTS = {
    "lines": {"Queue", "load", "jobs", "M=1", "M=2", "Theorem 1"},
    "histogram": {"Latency", "seconds", "share", "M=1", "M=2", "promise"},
    "cdf": {"Latency", "seconds", "share at most", "M=1", "M=2"},
    "heat": {"Stable rate", "proposers", "layers", "k=1", "M=2", "0.333", "0.143", "per second"},
}


@pytest.mark.parametrize("kind", DRAW)
def test_an_svg_says_what_it_shows_and_is_the_same_each_time(kind: str, tmp_path: Path) -> None:
    first, again = tmp_path / "first.svg", tmp_path / "again.svg"
    DRAW[kind](first)
    DRAW[kind](again)
    written = {"".join(each.itertext()).strip() for each in ElementTree.parse(first).iter()}  # noqa: S314 - our own
    assert TEXTS[kind] <= written
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("kind", DRAW)
def test_a_png_is_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "plot.PNG"
    DRAW[kind](path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert [int.from_bytes(header[at : at + 4]) for at in (16, 20)] == [1200, 750]


def test_nothing_to_draw_is_drawn(tmp_path: Path) -> None:
    plots.lines(tmp_path / "lines.svg", "Nothing", "x", "y", {})
    plots.histogram(tmp_path / "histogram.svg", "Nothing", "x", {"none": []})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written as 'plot\.jpeg'") as refused:
        DRAW["lines"](tmp_path / "plot.jpeg")
    assert refused.value.hint == "name the file .svg or .png"
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(tmp_path / "plot.svg")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert (
        found.stdout
        == "plots need matplotlib, which is not installed | pip install 'edgemoa[plots]'\n"
    )
    assert not list(tmp_path.iterdir())


_WITHOUT = """
import sys
from pathlib import Path
sys.modules["matplotlib"] = None  # as if it were not there
from edgemoa.errors import UserError
from edgemoa.sim import plots
try:
    plots.lines(Path(sys.argv[1]), "", "", "", {})
except UserError as error:
    print(error, "|", error.hint)
"""
