"""``edgemoa sim``: a group of boards on a virtual clock, one run or many."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa.errors import UserError

if TYPE_CHECKING:
    from edgemoa.show import Terminal
    from edgemoa.sim.recording import Recording
    from edgemoa.sim.scenario import Outcome, Scenario

UNITS_S: Final = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
MOST_POINTS: Final = 2_000  # runs of a sweep
QUIET_S: Final = 2.0  # what takes longer says how far it is
INTERRUPTED: Final = 130
LEGIBLE: Final = 7  # lines in a plot

EXAMPLES: Final = """\
examples:
  edgemoa sim --nodes 6 --service 1,1,1,2,4,4 --rate 4/min --hours 1
      six boards, three of them slower, each asked four times a minute
  edgemoa sim --sweep rate=.02:.12:.01 --pick uniform,shortest --plot queue.svg
      how queues grow with the load, by how peers are picked
  edgemoa sim --paper --sweep rate=.1:.3:.02 --layers 1 --proposers 0,1,2
      the device of arXiv 2412.21200, around its Theorem 1
  edgemoa sim --board kitchen.json,shed.json --nodes 2 --replay day.csv --json
      boards recorded with `edgemoa bench --record`, prompts as they came
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sim``. Those that take several values make a series of each."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    boards = parser.add_argument_group("boards")
    boards.add_argument(
        "--nodes",
        "--boards",
        dest="boards",
        type=checked(whole(1, 10_000)),
        default=4,
        metavar="N",
        help="default: 4",
    )
    boards.add_argument(
        "--service",
        type=checked(_positives),
        default=(1.0,),
        metavar="S[,S...]",
        help="mean seconds of a proposal, dealt out to the boards in turn",
    )
    boards.add_argument(
        "--cv",
        type=checked(number(0, 10)),
        metavar="C",
        help="coefficient of variation of service times (default: 1, exponential;"
        " 0: always the same)",
    )
    boards.add_argument(
        "--aggregation-factor",
        type=checked(number(0.01, 100)),
        default=1.0,
        metavar="F",
        help="an aggregation takes so many times as long (default: 1)",
    )
    boards.add_argument(
        "--slots",
        type=checked(whole(1, 64)),
        default=1,
        metavar="N",
        help="jobs that a board works on at a time (default: 1)",
    )
    boards.add_argument(
        "--batch-overhead",
        type=checked(number(0, 1)),
        default=0.5,
        metavar="SHARE",
        help="of a step, that does not grow with its jobs (default: 0.5)",
    )
    boards.add_argument(
        "--board",
        type=_files,
        default=(),
        metavar="FILE[,FILE...]",
        help="recordings of `edgemoa bench --record`, dealt out in turn, in place of the above",
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--rate",
        type=checked(rates),
        default=(0.05,),
        metavar="R[,R...]",
        help="prompts at each board: .05/s (the default), 2/min, 40/h; several are"
        " dealt out in turn",
    )
    prompts.add_argument(
        "--burst",
        type=checked(whole(0, 10_000)),
        default=0,
        metavar="N",
        help="so many at each board at the beginning",
    )
    prompts.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="prompts at the times of a .jsonl or .csv file: time_s, board (from 0,"
        " or *), prompt_tokens, answer_tokens",
    )
    prompts.add_argument(
        "--layers", "-M", type=checked(_wholes(0, 8)), default=(1,), metavar="M[,M...]"
    )
    prompts.add_argument(
        "--proposers", "-k", type=checked(_wholes(0, 16)), default=(2,), metavar="K[,K...]"
    )
    prompts.add_argument(
        "--deadline",
        type=checked(number(1, 1e7)),
        default=300.0,
        metavar="S",
        help="seconds that a user waits for an answer (default: 300)",
    )
    rules = parser.add_argument_group("the boards' settings")
    rules.add_argument(
        "--pick",
        type=checked(_words("uniform", "capacity", "shortest")),
        default=(),
        metavar="POLICY[,POLICY...]",
        help="how peers are picked: uniform, capacity, shortest",
    )
    rules.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the nodes, such as ladder=false, discipline=fcfs,"
        " promise_ms=60000, own_requests=8; may be repeated",
    )
    rules.add_argument(
        "--paper",
        action="store_true",
        help="boards as in the paper: one queue without bounds, first come first"
        " served, uniform picks, no ladder",
    )
    rules.add_argument(
        "--report-age",
        type=checked(number(0, 3600)),
        default=1.0,
        metavar="S",
        help="boards report their load so often, unless membership is simulated (default: 1)",
    )
    faults = parser.add_argument_group("faults, with every message of the membership simulated")
    faults.add_argument(
        "--loss",
        type=checked(number(0, 0.999)),
        default=0.0,
        metavar="SHARE",
        help="of datagrams that is lost",
    )
    faults.add_argument(
        "--crashes",
        type=checked(number(0, 3600)),
        default=0.0,
        metavar="N",
        help="per board and hour",
    )
    faults.add_argument(
        "--membership", action="store_true", help="simulate its messages though nothing fails"
    )
    runs = parser.add_argument_group("runs")
    length = runs.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=checked(number(1e-3, 1e7)), help="virtual (default: 600)")
    length.add_argument("--hours", type=checked(number(1e-6, 3000)))
    runs.add_argument(
        "--warm-up",
        type=checked(number(0, 1e7)),
        default=0.0,
        metavar="S",
        help="seconds of that at the beginning that are not counted",
    )
    runs.add_argument(
        "--seed", type=checked(whole(0, 2**53)), default=1, help="the same seed, the same run"
    )
    runs.add_argument(
        "--runs",
        type=checked(whole(1, 1000)),
        default=1,
        metavar="N",
        help="with seeds one after the other, put together",
    )
    runs.add_argument(
        "--sweep",
        type=checked(_sweep),
        metavar="rate=FROM:TO:STEP",
        help="a point for each rate, for each series",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each point")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw a .svg or .png")
    output.add_argument(
        "--plot-kind",
        choices=("queue", "latency", "stability"),
        help="queue against load (of a sweep), distribution of latencies (the"
        " default of a single run), largest stable rates of a sweep",
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print; returns the exit code.

    :raises UserError: for what cannot be simulated, read or drawn.
    """
    from edgemoa.show import Terminal

    refuse_wrong(arguments)
    _check_plot(arguments)
    points = list(_points(arguments))
    if len(points) * arguments.runs > MOST_POINTS:
        raise UserError(f"that would be {len(points) * arguments.runs} runs", hint="take less")
    with Progress(Terminal()) as progress:
        done, interrupted = simulate(
            [scenario for _, scenario in points], arguments.runs, arguments.seed, progress
        )
    if not done:
        return INTERRUPTED
    told = [
        _told(labels, scenario, outcomes)
        for (labels, scenario), outcomes in zip(points, done, strict=False)
    ]
    if arguments.csv is not None:
        _write_csv(arguments.csv, told)
    if arguments.plot is not None:
        _plot(arguments, told, done)
    alone = len(points) == 1
    if arguments.json:
        print(json.dumps(told[0] if alone else {"points": told, "complete": not interrupted}))
    elif alone:
        _print_one(told[0])
    else:
        _print_table(told)
    if interrupted:
        print("edgemoa: interrupted; this is what there was", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


class Progress:
    """Says how far something is, once it has taken a while; the line goes when it is done."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._said_s = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.pending("")
        self._terminal.write("")

    def __call__(self, part: float) -> None:
        """So much of it is done, 0 to 1."""
        now_s = time.monotonic()
        if now_s - self._said_s > QUIET_S:
            self._said_s = now_s - QUIET_S + 0.5
            self._terminal.pending(f"simulated {part:.0%}")


def simulate(
    scenarios: Sequence[Scenario], runs: int, seed: int, progress: Callable[[float], None]
) -> tuple[list[list[Outcome]], bool]:
    """The outcomes of each scenario as far as they are complete, and whether it was interrupted.
    Of a single run, what there is when it is interrupted is its outcome."""
    from edgemoa.sim.sweep import Task, run_all

    tasks = [Task(scenario, seed + i) for scenario in scenarios for i in range(runs)]
    found: list[Outcome] = []
    interrupted = False
    try:
        for outcome in run_all(tasks, progress):
            found.append(outcome)
            interrupted = interrupted or outcome.interrupted
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    complete = [found[i : i + runs] for i in range(0, len(found), runs)]
    if len(scenarios) > 1 and complete and len(complete[-1]) < runs:
        del complete[-1]
    return complete, interrupted


# --- what is simulated


def _points(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Scenario]]:
    """Scenarios by what they differ in."""
    base = _scenario(arguments)
    swept: Sequence[float | None] = arguments.sweep or [None]
    picks: Sequence[str | None] = arguments.pick or [None]
    for pick, layers, proposers in itertools.product(picks, arguments.layers, arguments.proposers):
        node = {**base.node, **({"pick": pick} if pick else {})}
        series = replace(base, layers=layers, proposers=proposers, node=node)
        for rate in swept:
            labels: dict[str, Any] = {"pick": node.get("pick"), "M": layers, "k": proposers}
            if rate is None:
                yield labels, series
            else:
                yield {**labels, "rate": rate}, replace(series, prompts_per_s=rate)


def _scenario(arguments: argparse.Namespace) -> Scenario:
    from edgemoa.sim.replay import read_replay
    from edgemoa.sim.scenario import FREE, PAPER, Scenario

    faults = bool(arguments.loss or arguments.crashes)
    cv = arguments.cv
    seconds = arguments.seconds or (arguments.hours or 1 / 6) * 3600
    settings: dict[str, Any] = {**(PAPER if arguments.paper else {}), **_node(arguments.node)}
    bounds = {
        name: settings.pop(name, FREE if arguments.paper else None)
        for name in ("own_requests", "peer_jobs")
    }
    return Scenario(
        boards=arguments.boards,
        seconds=seconds,
        warm_up_s=arguments.warm_up,
        prompts_per_s=arguments.rate[0] if len(arguments.rate) == 1 else arguments.rate,
        burst=arguments.burst,
        replay=read_replay(arguments.replay, arguments.boards) if arguments.replay else (),
        service_s=arguments.service,
        aggregation_factor=arguments.aggregation_factor,
        distribution="exponential" if cv is None or cv == 1 else "gamma" if cv else "fixed",
        cv=1.0 if cv is None else cv,
        recordings=_recordings(arguments.board),
        slots=arguments.slots,
        batch_overhead=arguments.batch_overhead,
        layer_deadline_s=FREE if arguments.paper else arguments.deadline / 2,
        deadline_s=FREE if arguments.paper else arguments.deadline,
        node=settings,
        reports="messages" if faults or arguments.membership else "table",
        report_age_s=arguments.report_age,
        loss=arguments.loss,
        crashes_per_s=arguments.crashes / 3600,
        **bounds,
    )


def _recordings(files: Sequence[Path]) -> tuple[Recording, ...]:
    from edgemoa.sim.recording import read_recording

    return tuple(read_recording(file) for file in files)


def _node(told: Sequence[str]) -> dict[str, Any]:
    """Settings of the nodes, as their types want them."""
    from typing import get_type_hints

    import msgspec

    from edgemoa.core.node import NodeSettings

    types = get_type_hints(NodeSettings)
    settings = {}
    for each in told:
        name, _, value = each.partition("=")
        if name not in types:
            raise UserError(
                f"boards have no setting {name!r}", hint=f"they have {', '.join(sorted(types))}"
            )
        try:
            settings[name] = msgspec.convert(value, types[name], strict=False)
        except (msgspec.ValidationError, TypeError) as error:
            raise UserError(f"{each!r} is no setting: {error}") from None
    return settings


# --- what came of it


def _told(
    labels: dict[str, Any], scenario: Scenario, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    from edgemoa.sim.sweep import figures
    from edgemoa.sim.theory import limits

    told = {
        **labels,
        "boards": scenario.boards,
        "seconds": outcomes[0].seconds,
        **figures(outcomes),
    }
    if not scenario.replay:
        bound = limits(scenario)
        told["theory"] = {
            "uniform_per_s": bound.uniform,
            "best_per_s": bound.best,
            "limiting_board": bound.board,
        }
    return told


def _print_one(told: dict[str, Any]) -> None:
    for key, value in told.items():
        if isinstance(value, dict):
            for name, each in value.items():
                print(f"{name:18} {_shown(each)}")
        elif value is not None:
            print(f"{key:18} {_shown(value)}")


def _print_table(told: Sequence[dict[str, Any]]) -> None:
    from edgemoa import show

    head = (
        "PICK",
        "M",
        "K",
        "RATE/S",
        "OF LIMIT",
        "QUEUE",
        "BUSY",
        "MEAN S",
        "P95 S",
        "LESS",
        "REFUSED",
        "STABLE",
    )
    rows = []
    for point in told:
        asked = max(point["asked"], 1)
        rate = point.get("rate")
        limit = point.get("theory", {}).get("uniform_per_s")
        rows.append(
            (
                point["pick"] or "-",
                str(point["M"]),
                str(point["k"]),
                "-" if rate is None else f"{rate:.4g}",
                "-" if rate is None or limit is None else f"{rate / limit:.2f}",
                f"{point['mean_queue']:.2f}",
                f"{point['utilisation']:.0%}",
                _seconds(point["latency_ms_mean"]),
                _seconds(point["latency_ms_p95"]),
                f"{point['degraded'] / asked:.1%}",
                f"{point['refused'] / asked:.1%}",
                "yes" if point["stable"] else "no",
            )
        )
    print(show.table([head, *rows]))


def _seconds(milliseconds: int | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1000:.1f}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_csv(file: Path, told: Sequence[dict[str, Any]]) -> None:
    flat = [
        {**{k: v for k, v in each.items() if k != "theory"}, **each.get("theory", {})}
        for each in told
    ]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _check_plot(arguments: argparse.Namespace) -> None:
    """Say before a long run what could not be drawn after it."""
    if arguments.plot is None:
        if arguments.plot_kind:
            raise UserError("there is no file to draw in", hint="add --plot FILE.svg")
        return
    if arguments.plot.suffix.lower() not in (".svg", ".png"):
        raise UserError(
            f"a plot cannot be written as {arguments.plot.name!r}",
            hint="name the file .svg or .png",
        )
    if arguments.plot_kind in ("queue", "stability") and not arguments.sweep:
        raise UserError(
            f"a plot of {arguments.plot_kind} is one of a sweep",
            hint="add --sweep rate=FROM:TO:STEP",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "plots need matplotlib, which is not installed", hint="pip install 'edgemoa[plots]'"
        ) from None


def _plot(
    arguments: argparse.Namespace,
    told: Sequence[dict[str, Any]],
    done: Sequence[Sequence[Outcome]],
) -> None:
    from edgemoa.sim import plots

    kind = arguments.plot_kind or ("queue" if arguments.sweep else "latency")
    title = f"{arguments.boards} boards"
    if kind == "latency":
        samples = {
            _name(point, rate=True): [ms / 1000 for each in outcomes for ms in each.latency_ms]
            for point, outcomes in itertools.islice(zip(told, done, strict=True), LEGIBLE)
        }
        samples = {name: values for name, values in samples.items() if values}
        if not samples:
            raise UserError("no prompt was answered: there is nothing to draw")
        plots.cdf(arguments.plot, title, "seconds until the answer", samples)
        return
    series: dict[str, list[dict[str, Any]]] = {}
    for point in told:
        series.setdefault(_name(point), []).append(point)
    if kind == "queue":
        verticals: dict[str, float] = {}
        for name, points in series.items():
            limit = points[0].get("theory", {}).get("uniform_per_s")
            if limit is not None and limit not in verticals.values() and len(verticals) < LEGIBLE:
                plan = name.removeprefix(f"{points[0]['pick']}, ")
                verticals[f"limit of uniform picks, {plan}"] = limit
        plots.lines(
            arguments.plot,
            title,
            "prompts per second and board",
            "jobs at a board, on average",
            {
                name: [(p["rate"], p["mean_queue"]) for p in points]
                for name, points in itertools.islice(series.items(), LEGIBLE)
            },
            verticals=verticals,
        )
        return
    plans = list(dict.fromkeys((p["M"], p["k"]) for p in told))
    picks = list(dict.fromkeys(p["pick"] for p in told))
    values = [
        [
            max(
                (
                    p["rate"]
                    for p in told
                    if (p["pick"], p["M"], p["k"]) == (pick, *plan) and p["stable"]
                ),
                default=0.0,
            )
            for plan in plans
        ]
        for pick in picks
    ]
    plots.heat(
        arguments.plot,
        f"{title}: the largest rate of the sweep that was stable",
        [f"{m}, {k}" for m, k in plans],
        [pick or "as set" for pick in picks],
        values,
        x_label="M, k",
        y_label="picks",
        value_label="prompts per second and board",
    )


def _name(point: dict[str, Any], *, rate: bool = False) -> str:
    parts = [point["pick"]] if point["pick"] else []
    parts.append(f"M={point['M']}, k={point['k']}")
    if rate and "rate" in point:
        parts.append(f"{point['rate']:.4g}/s")
    return ", ".join(parts)


# --- values of options


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse that leaves it to :func:`refuse_wrong` to say what is wrong with a value,
    so that it is said as everything else is."""

    def later(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            return UserError(f"{text!r}: {error}")

    return later


def refuse_wrong(arguments: argparse.Namespace) -> None:
    """Raise :class:`UserError` for the first value that could not be read."""
    for name, value in vars(arguments).items():
        if isinstance(value, UserError):
            raise UserError(f"--{name.replace('_', '-')} {value}", hint="see --help")


def rates(text: str) -> tuple[float, ...]:
    """Rates per second out of ``2/min`` or ``.05/s,40/h``."""
    return tuple(_rate(part) for part in text.split(","))


def _rate(text: str) -> float:
    count, _, unit = text.strip().partition("/")
    if unit not in UNITS_S:
        raise ValueError(f"{text!r}: a rate is per s, min, h or d, as in 2/min")
    return number(0, 1000)(count) / UNITS_S[unit]


def _sweep(text: str) -> tuple[float, ...]:
    name, _, values = text.partition("=")
    parts = values.split(":")
    if name != "rate" or len(parts) != 3:
        raise ValueError("a sweep is rate=FROM:TO:STEP, as in rate=.02:.12:.01")
    unit = "/" + parts[2].partition("/")[2] if "/" in parts[2] else ""
    low, high, step = (_rate(p if "/" in p else p + unit) for p in parts)
    if not step > 0 or not 0 < low <= high or (high - low) / step > MOST_POINTS:
        raise ValueError("from below to above, in steps above 0")
    return tuple(low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1))


def number(low: float, high: float) -> Callable[[str], float]:
    """Reads numbers within bounds."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # so is what is no number
            raise ValueError(f"must be {low:g} to {high:g}")
        return value

    return parse


def _positives(text: str) -> tuple[float, ...]:
    return tuple(number(1e-6, 86_400)(part) for part in text.split(","))


def whole(low: int, high: int) -> Callable[[str], int]:
    """Reads whole numbers within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"must be {low} to {high}")
        return value

    return parse


def _wholes(low: int, high: int) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(whole(low, high)(part) for part in text.split(","))


def _words(*known: str) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for word in found:
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
        return found

    return words


def _files(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(","))
