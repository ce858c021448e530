"""The queues against theory and against what is to be reached; all of it in the simulator, which
drives the daemon's own core on a virtual clock. Takes some minutes on two processors.

tools/prove-queue does the like with real daemons, real models and real prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import bench_queue_policy as policy  # beside this file
import bench_queue_theory as theory
from figures import Row, arguments, tell

PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "theorem": lambda quick: theory.theorem_1(1_000 if quick else 3_000),
    "table": lambda quick: theory.table_1(400 if quick else theory.RUNS),
    "blocking": lambda quick: theory.blocking(15_000 if quick else 60_000),
    "policies": lambda quick: policy.policies(4 if quick else policy.SETS),
    "overload": lambda quick: policy.overload((1,) if quick else (1, 2, 3)),
    "admission": lambda _: policy.admission(),
    "simulator": lambda _: policy.simulator(),
}


def main() -> int:
    """Measure, print, judge; returns the exit code."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="shorter runs: noisier figures")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=list(PARTS), metavar="NAME",
        help=f"leave out any of {', '.join(PARTS)}",
    )  # fmt: skip
    given = parser.parse_args()
    rows: list[Row] = []
    for name, part in PARTS.items():
        if name not in given.without:
            rows += part(given.quick)
    return tell(rows, given, given.without)


if __name__ == "__main__":
    sys.exit(main())
