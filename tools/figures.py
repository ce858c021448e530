"""Figures with a bound to keep: how bench-import and prove-models tell and judge them."""

from __future__ import annotations

import argparse
import json
import math
import sys
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
) -> Row:
    """A figure; it has to be at most ``reach``, or at least, or there is nothing to keep.

    A ``value`` of None says that it could not be measured: short of its reach, if it has one.
    """
    rounded = None if value is None else float(f"{value:.5g}")
    told: Row = {"name": name, "value": rounded, "unit": unit, "note": note}
    if reach is None:
        return told
    good = value is not None and not math.isnan(value)
    good = good and (value >= reach if least else value <= reach)  # type: ignore[operator]
    return {**told, "reach": reach, "least": least, "ok": good}


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
    return parser


def tell(rows: list[Row], given: argparse.Namespace, **more: Any) -> int:
    """Print the rows as the arguments want them; returns the exit code.

    With ``--check``, the last line names what falls short.
    """
    if given.json:
        print(json.dumps({"figures": rows, **more}))
    else:
        for told in rows:
            print(_line(told))
        for key, value in more.items():
            print(f"{key.replace('_', ' ')}: {value}")
    short = [told["name"] for told in rows if told.get("ok") is False]
    if given.check and short:
        print(f"short of their reach: {', '.join(short)}")
        return 1
    return 0


def _line(told: Row) -> str:
    bound = ""
    if "reach" in told:
        bound = f"{'>=' if told['least'] else '<='} {told['reach']:g}"
    mark = {True: "ok", False: "SHORT", None: ""}[told.get("ok")]
    value = "-" if told["value"] is None else f"{told['value']:g}"
    shown = f"{told['name']:64} {value:>10} {told['unit']:10} {bound:10} {mark:5} {told['note']}"
    return shown.rstrip()
