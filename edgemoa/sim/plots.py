"""Plots of what was simulated or measured, as SVG or PNG by the file's name; needs matplotlib.

matplotlib is the optional extra ``plots`` and is imported when the first plot is drawn. The same
data give the same bytes. Colours are Okabe and Ito's, which colour-blind people tell apart; markers
and dashes say the same without any colour.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Final = ("-", "--", "-.", ":")
SHOWN_MARKERS: Final = 40  # of one line; more would only thicken it
LIGHT_FROM: Final = 0.55  # of a heat map's scale: from there on, dark digits are read better

_STYLE: Final[dict[Any, Any]] = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: searchable, and small files
    "svg.hashsalt": "edgemoa",
}


def lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Points],
    *,
    verticals: Mapping[str, float] | None = None,
    log_y: bool = False,
    dots: frozenset[str] = frozenset(),
) -> None:
    """A line with markers through each named series of (x, y).

    :param verticals: named x that are marked, such as a predicted boundary.
    :param dots: those series that are points without a line between them.
    :raises UserError: without matplotlib, or if the file is of no kind that can be written.
    """
    with _figure(path, title, x_label, y_label) as axes:
        for (name, points), marker, dash, colour in zip(
            series.items(), cycle(MARKERS), cycle(DASHES), cycle(COLOURS), strict=False
        ):
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=name,
                color=colour,
                linestyle="none" if name in dots else dash,
                marker=marker,
                markersize=4.5,
                markevery=max(1, len(points) // SHOWN_MARKERS),
            )
        if log_y:
            axes.set_yscale("log")
        _finish(axes, verticals, named=len(series) > 1 or bool(verticals))


def histogram(
    path: Path,
    title: str,
    x_label: str,
    samples: Mapping[str, Sequence[float]],
    *,
    bins: int = 40,
    verticals: Mapping[str, float] | None = None,
) -> None:
    """How often each value occurs, as a share of its sample; all samples have the same bins.

    :raises UserError: as in :func:`lines`.
    """
    everything = [value for sample in samples.values() for value in sample]
    low, high = min(everything, default=0.0), max(everything, default=1.0)
    edges = [low + (high - low or 1.0) * i / bins for i in range(bins + 1)]
    with _figure(path, title, x_label, "share") as axes:
        for (name, sample), dash, colour in zip(
            samples.items(), cycle(DASHES), cycle(COLOURS), strict=False
        ):
            counts = [0] * bins
            for value in sample:
                counts[min(max(bisect_left(edges, value) - 1, 0), bins - 1)] += 1
            shares = [count / max(len(sample), 1) for count in counts]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(shares, edges, label=name, color=colour, linestyle=dash, linewidth=1.5)
        _finish(axes, verticals, named=len(samples) > 1 or bool(verticals))


def cdf(
    path: Path,
    title: str,
    x_label: str,
    samples: Mapping[str, Sequence[float]],
    *,
    verticals: Mapping[str, float] | None = None,
) -> None:
    """The share of each sample that is at most x: a median or a percentile is read off.

    :raises UserError: as in :func:`lines`.
    """
    with _figure(path, title, x_label, "share at most") as axes:
        for (name, sample), dash, colour in zip(
            samples.items(), cycle(DASHES), cycle(COLOURS), strict=False
        ):
            ordered = sorted(sample)
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            axes.step(
                ordered, shares, where="post", label=name, color=colour, linestyle=dash, linewidth=2
            )
        axes.set_ylim(0, 1.02)
        _finish(axes, verticals, named=len(samples) > 1 or bool(verticals))


def heat(
    path: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    value_label: str = "",
) -> None:
    """A table of numbers, each cell coloured by its value and with it written in: ``values`` has a
    sequence for each of ``rows``, the first at the bottom, with a number for each of ``columns``.

    :raises UserError: as in :func:`lines`.
    """
    with _figure(path, title, x_label, y_label) as axes:
        image = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
        axes.grid(visible=False)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        low, high = image.get_clim()
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                light = value > (low or 0) + LIGHT_FROM * ((high or 0) - (low or 0))
                axes.text(x, y, f"{value:.3g}", ha="center", va="center",
                          color="black" if light else "white", fontsize=9)  # fmt: skip
        if axes.figure is not None:
            axes.figure.colorbar(image, ax=axes, label=value_label)


@contextmanager
def _figure(path: Path, title: str, x_label: str, y_label: str) -> Iterator[Axes]:
    """Axes to draw in; what was drawn is written at the end."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UserError(
            f"a plot cannot be written as {path.name!r}", hint="name the file .svg or .png"
        )
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - half a second, and only for plots
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            "plots need matplotlib, which is not installed", hint="pip install 'edgemoa[plots]'"
        ) from error
    with rc_context(_STYLE):
        # A figure of its own, not pyplot's: no display is looked for, and no state is shared.
        figure: Figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        yield axes
        figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _finish(axes: Axes, verticals: Mapping[str, float] | None, *, named: bool) -> None:
    """Marked places and, where there is more than one thing to tell apart, their names."""
    for (name, x), dash in zip((verticals or {}).items(), cycle((":", "--", "-.")), strict=False):
        axes.axvline(x, label=name, color="#555555", linestyle=dash, linewidth=1.5)
    if named:
        axes.legend()
