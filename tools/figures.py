"""Figures with a bound to keep: how the slow tools tell and judge them."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def row(
    name: str,
    value: float | None,
    unit: str = "",
    reach: float | None = None,
    note: str = "",
    *,
    least: bool = False,
    around: float | None = None,
) -> Row:
    """A figure; it has to be at most ``reach``, or at least, or there is nothing to keep.

    With ``around``, it may be off from that by ``reach`` at most, to either side: a figure that is
    too good is as wrong as one that is too bad.

    A ``value`` of None says that it could not be measured: short of its reach, if it has one.
    """
    rounded = None if value is None else float(f"{value:.5g}")
    told: Row = {"name": name, "value": rounded, "unit": unit, "note": note}
    if reach is None:
        return told
    good = value is not None and not math.isnan(value)
    if value is not None and good:
        off = value if around is None else abs(value - around)
        good = off >= reach if least else off <= reach
    return {**told, "reach": reach, "least": least, "around": around, "ok": good}


def say(text: str) -> None:
    """Progress, for people."""
    print(f"· {text}", file=sys.stderr, flush=True)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every such tool takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="the text to read: the GNU GPL, version 3, where this system does not hold it",
    )  # fmt: skip
    return parser


def tell(rows: list[Row], given: argparse.Namespace, left_out: list[str]) -> int:
    """Print the rows as the arguments want them; returns the exit code.

    With ``--check``, the last line names what falls short, and what was left out by the arguments:
    nothing is known of that.

    :param left_out: the arguments that left something out.
    """
    if given.json:
        print(json.dumps({"figures": rows, "left_out": left_out}))
    else:
        for told in rows:
            print(_line(told))
    short = [told["name"] for told in rows if told.get("ok") is False]
    without = f"; left out, and not judged: {', '.join(left_out)}" if left_out else ""
    if given.check:
        verdict = f"short of their reach: {', '.join(short)}" if short else "all within their reach"
        print(f"{verdict}{without}", file=sys.stderr if given.json else sys.stdout)
        return 1 if short else 0
    if without and not given.json:
        print(without.removeprefix("; "))
    return 0


def _line(told: Row) -> str:
    bound = ""
    if "reach" in told:
        bound = f"{'>=' if told['least'] else '<='} {told['reach']:g}"
    if told.get("around") is not None:
        bound = f"{told['around']:g} ± {told['reach']:g}"
    mark = {True: "ok", False: "SHORT", None: ""}[told.get("ok")]
    value = "-" if told["value"] is None else f"{told['value']:g}"
    shown = f"{told['name']:64} {value:>10} {told['unit']:10} {bound:10} {mark:5} {told['note']}"
    return shown.rstrip()
