"""``edgemoa plan``: what a group of boards can carry, with which M and k, and how fast."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa import cli_sim
from edgemoa.errors import UserError

if TYPE_CHECKING:
    from edgemoa.sim.recording import Recording

MOST_BOARDS: Final = 64
PROMPTS: Final = 400  # that a prediction is simulated with
LEAST_S: Final = 600.0
MOST_S: Final = 86_400.0
WARM_UP: Final = 0.2  # of the time
ABOUT_AS_GOOD: Final = 2.0  # percentage points of accuracy

ACCURACY: Final = {
    (0, 0): 21.91,
    (1, 1): 29.55,
    (1, 2): 39.63,
    (2, 1): 28.88,
    (2, 2): 39.89,
    (1, 3): 39.79,
    (2, 3): 40.63,
}
"""AlpacaEval, % by (M, k) with the same model on every board: arXiv 2412.21200, Table I. It ranks
plans; what your models reach is another matter."""

EXAMPLES: Final = """\
examples:
  edgemoa plan --boards pi5:3,orin:1 --model smollm2-135m-instruct --rate 2/min
  edgemoa plan --board kitchen=kitchen.json:2 --boards pi4:1 --rate 10/h --json
      boards recorded with `edgemoa bench --record`, and one that is estimated
"""


@dataclass(frozen=True, slots=True)
class _Group:
    names: tuple[str, ...]
    recordings: tuple[Recording, ...]
    notes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``plan``."""
    from edgemoa.cli_sim import checked

    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--boards",
        default="",
        metavar="KIND:COUNT[,...]",
        help="kinds: zero2w, pi3, pi4, pi5, jetson-nano, orin-nano, orin-nano-super,"
        " agx-orin; their speeds are estimates",
    )
    parser.add_argument(
        "--board",
        action="append",
        default=[],
        metavar="NAME=FILE[:COUNT]",
        help="boards as recorded by `edgemoa bench --record`; may be repeated",
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="of the catalog, for estimates (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=checked(cli_sim.rates),
        default=(2 / 60,),
        metavar="R",
        help="prompts at each board, as 2/min, which is the default",
    )
    whole = checked(cli_sim.whole(1, 100_000))
    parser.add_argument(
        "--prompt-tokens",
        type=whole,
        default=60,
        metavar="N",
        help="of a usual prompt (default: 60)",
    )
    parser.add_argument(
        "--proposal-tokens", type=whole, default=150, metavar="N", help="default: 150"
    )
    parser.add_argument(
        "--answer-tokens", type=whole, default=250, metavar="N", help="default: 250"
    )
    parser.add_argument(
        "--slots",
        type=checked(cli_sim.whole(1, 64)),
        default=4,
        metavar="N",
        help="jobs at a time of boards that are estimated (default: 4)",
    )
    parser.add_argument(
        "--within",
        type=checked(cli_sim.number(1, 86_400)),
        default=300.0,
        metavar="S",
        help="seconds that 95 %% of answers may take (default: 300)",
    )
    parser.add_argument(
        "--seed", type=checked(cli_sim.whole(0, 2**53)), default=1, help="of the predictions"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Work it out and print; returns the exit code.

    :raises UserError: for unknown boards and models, and what cannot be read.
    """
    from edgemoa.show import Terminal
    from edgemoa.sim.scenario import Scenario, Sizes
    from edgemoa.sim.sweep import figures
    from edgemoa.sim.theory import limits

    cli_sim.refuse_wrong(arguments)
    if len(arguments.rate) > 1 or not arguments.rate[0] > 0:
        raise UserError("--rate is one rate above 0", hint="such as 2/min")
    rate = arguments.rate[0]
    group = _group(arguments)
    n = len(group.recordings)
    seconds = min(max(PROMPTS / (n * rate), LEAST_S) / (1 - WARM_UP), MOST_S)
    scenarios = {
        plan: Scenario(
            boards=n,
            seconds=seconds,
            warm_up_s=WARM_UP * seconds,
            prompts_per_s=rate,
            layers=plan[0],
            proposers=plan[1],
            recordings=group.recordings,
            sizes=Sizes(
                arguments.prompt_tokens, arguments.proposal_tokens, arguments.answer_tokens
            ),
            distribution="gamma",
            cv=0.5,
            own_requests=None,
            peer_jobs=None,
            layer_deadline_s=arguments.within,
            deadline_s=2 * arguments.within,
            node={"promise_ms": round(1000 * arguments.within)},
            reports="table",
        )
        for plan in ACCURACY
        if plan[1] < n
    }
    bounds = {plan: limits(scenario) for plan, scenario in scenarios.items()}
    tried = [plan for plan, bound in bounds.items() if rate < (bound.best or bound.uniform)]
    with cli_sim.Progress(Terminal()) as progress:
        done, interrupted = cli_sim.simulate(
            [scenarios[plan] for plan in tried], 1, arguments.seed, progress
        )
    if interrupted:
        return cli_sim.INTERRUPTED
    predicted = {plan: figures(outcomes) for plan, outcomes in zip(tried, done, strict=True)}
    told = []
    for plan, bound in bounds.items():
        found = predicted.get(plan)
        p95_ms = found["latency_ms_p95"] if found else None
        fast = p95_ms is not None and p95_ms <= 1000 * arguments.within
        told.append(
            {
                "M": plan[0],
                "k": plan[1],
                "uniform_per_min": 60 * bound.uniform,
                "best_per_min": None if bound.best is None else 60 * bound.best,
                "limiting_board": group.names[bound.board],
                "latency_ms_mean": found["latency_ms_mean"] if found else None,
                "latency_ms_p95": p95_ms,
                "utilisation": found["utilisation"] if found else None,
                "carried": bool(found and found["stable"] and fast),
            }
        )
    advice = _advice(told, 60 * rate, arguments.within)
    if arguments.json:
        boards = [
            {"name": name, "recording": recording.note or "recorded"}
            for name, recording in zip(group.names, group.recordings, strict=True)
        ]
        print(
            json.dumps(
                {
                    "boards": boards,
                    "rate_per_min": 60 * rate,
                    "plans": told,
                    "recommendation": advice,
                    "notes": group.notes,
                }
            )
        )
    else:
        _print(told, 60 * rate, group, advice)
    return 0


def _group(arguments: argparse.Namespace) -> _Group:
    from edgemoa.models.catalog import find_entry
    from edgemoa.sim.boards import KINDS, estimate, find_kind
    from edgemoa.sim.recording import read_recording

    names: list[str] = []
    recordings: list[Recording] = []
    notes: list[str] = []

    def add(name: str, recording: Recording, count: int) -> None:
        if len(names) + count > MOST_BOARDS:
            raise UserError(f"a plan is for up to {MOST_BOARDS} boards")
        names.extend(name if count == 1 else f"{name} {i + 1}" for i in range(count))
        recordings.extend([recording] * count)

    for part in filter(None, arguments.boards.split(",")):
        name, count = _counted(part)
        kind = find_kind(name)
        if kind is None:
            known = ", ".join(each.name for each in KINDS)
            raise UserError(
                f"there is no estimate of a board {name!r}",
                hint=f"known are {known}; measure others with edgemoa bench --record",
            )
        entry = find_entry(arguments.model)
        if entry.memory.bytes > kind.memory_mb * 2**20 * 3 // 4:
            notes.append(f"{entry.name} may not fit into a {kind.title} of {kind.memory_mb} MB")
        add(
            name,
            estimate(kind, entry.name, entry.size_bytes, entry.parameters, arguments.slots),
            count,
        )
        notes.append(f"{name} is an estimate: {kind.reason}")
    for part in arguments.board:
        name, _, rest = part.partition("=")
        if not rest:
            raise UserError(f"{part!r} is no recorded board", hint="write NAME=FILE:COUNT")
        file, count = _counted(rest)
        add(name, read_recording(Path(file)), count)
    if not names:
        raise UserError("there are no boards to plan with", hint="such as --boards pi5:3,orin:1")
    return _Group(tuple(names), tuple(recordings), tuple(dict.fromkeys(notes)))


def _counted(text: str) -> tuple[str, int]:
    """``name:3``; one if it does not say."""
    name, colon, count = text.strip().rpartition(":")
    if not colon:
        return text.strip(), 1
    if not count.isdecimal() or not 1 <= int(count[:9]) <= MOST_BOARDS:
        raise UserError(f"{text!r} is no number of boards", hint=f"1 to {MOST_BOARDS}, as in pi5:3")
    return name, int(count)


def _advice(told: list[dict[str, Any]], rate_per_min: float, within_s: float) -> str:
    carried = [each for each in told if each["carried"]]
    if not carried:
        most = max(each["best_per_min"] or each["uniform_per_min"] for each in told)
        return (
            f"{rate_per_min:.3g} prompts a minute at each board, answered within {within_s:.0f} s,"
            f" is more than these boards can do even alone; the most that is stable is {most:.3g}."
        )
    best = max(ACCURACY[each["M"], each["k"]] for each in carried)
    good = [each for each in carried if ACCURACY[each["M"], each["k"]] >= best - ABOUT_AS_GOOD]
    chosen = min(good, key=lambda each: each["latency_ms_mean"])
    plan = "each board alone (M=0)" if not chosen["M"] else f"M={chosen['M']}, k={chosen['k']}"
    why = (
        "no plan with more proposals can be carried"
        if chosen["M"] == 0
        else "in the paper's table larger plans gain less than 2 points"
        if chosen is not carried[-1]
        else "no larger plan can be carried"
    )
    return (
        f"Take {plan}: answers in about {chosen['latency_ms_mean'] / 1000:.0f} s, 95 % within"
        f" {chosen['latency_ms_p95'] / 1000:.0f} s, up to {chosen['best_per_min']:.3g} prompts a"
        f" minute at each board at the very most; {why}."
    )


def _print(told: list[dict[str, Any]], rate_per_min: float, group: _Group, advice: str) -> None:
    from edgemoa import show

    head = ("M", "K", "UNIFORM/MIN", "BEST/MIN", "FULL FIRST", "MEAN S", "P95 S", "BUSY", "CARRIED")
    rows = [
        (
            str(each["M"]),
            str(each["k"]),
            f"{each['uniform_per_min']:.2f}",
            "-" if each["best_per_min"] is None else f"{each['best_per_min']:.2f}",
            each["limiting_board"],
            _seconds(each["latency_ms_mean"]),
            _seconds(each["latency_ms_p95"]),
            "-" if each["utilisation"] is None else f"{each['utilisation']:.0%}",
            "yes" if each["carried"] else "no",
        )
        for each in told
    ]
    print(f"{len(group.names)} boards, {rate_per_min:.3g} prompts a minute at each")
    print(show.table([head, *rows]))
    for note in group.notes:
        print(f"note: {note}")
    print(advice)


def _seconds(milliseconds: int | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1000:.1f}"
