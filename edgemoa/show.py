"""How a terminal shows a prompt being answered: progress, the text, then who did what."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


class Terminal:
    """Progress on one stream, the answer on another; colour and repainting only on a terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self._live = self.err.isatty()
        self._painted = False

    def step(self, text: str) -> None:
        """A line of progress that stays."""
        self._wipe()
        print(self._dim(f"· {harmless(text)}"), file=self.err, flush=True)

    def pending(self, text: str) -> None:
        """A line of progress that the next one replaces; only on a terminal."""
        if self._live:
            self._wipe()
            print(self._dim(f"· {text}"), end="", file=self.err, flush=True)
            self._painted = True

    def write(self, text: str) -> None:
        """A piece of the answer, which may have come from another board."""
        self._wipe()
        self.out.write(harmless(text))
        self.out.flush()

    def _wipe(self) -> None:
        if self._painted:
            print("\r\x1b[2K", end="", file=self.err, flush=True)
            self._painted = False

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._live else text


def follow(chunks: Iterable[dict[str, Any]], terminal: Terminal | None) -> dict[str, Any]:
    """Show a streamed answer as it comes; returns the ``answered`` event that ends it.

    :param terminal: None shows nothing.
    """
    answered: dict[str, Any] = {}
    wrote = False
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            text = choice.get("delta", {}).get("content", "")
            if text and terminal is not None:
                terminal.write(text)
                wrote = True
        event = chunk.get("edgemoa")
        if isinstance(event, dict):
            if event.get("type") == "answered":
                answered = {"id": chunk.get("id", "")} | event
            elif terminal is not None:
                for line in _progress(event):
                    terminal.step(line)
    if wrote and terminal is not None:
        terminal.write("\n")
    return answered


def _progress(event: dict[str, Any]) -> Iterator[str]:
    match event.get("type"):
        case "accepted":
            granted = event["granted"]
            why = f" ({granted['why']})" if granted["why"] else ""
            yield f"accepted: {plan(granted)}{why}"
        case "layer":
            boards = ", ".join(event["boards"])
            yield f"layer {event['layer']}: {boards} write a proposal each"
        case "proposal":
            p = event["proposal"]
            yield (
                f"layer {p['layer']}: {p['board']} proposes, {p['tokens']} tokens in "
                f"{seconds(p['work_ms'])} after {seconds(p['queue_ms'])} in its queue"
            )
        case "left_out":
            out = event["left_out"]
            yield f"layer {out['layer']}: {out['board']} left out: {out['reason']}"
        case "aggregating":
            whom = f", by {event['board']}" if event.get("board") else ""
            yield f"aggregating {event['proposals']} proposals{whom}"


def summary(answered: dict[str, Any]) -> str:
    """The table of what happened, for people. ``cached`` and ``read`` are the prompt's tokens,
    ``bytes`` of text what was sent there and came back."""
    rows: list[tuple[str, ...]] = [
        ("board", "layer", "waited", "read for", "wrote for", "cached", "read", "wrote",
         "network", "bytes", "model")
    ]  # fmt: skip
    rows += [
        (
            *_whose(p),
            *_spent(p, p["prompt_tokens"]),
            seconds(p["network_ms"]),
            f"{p['sent_bytes']}/{p['received_bytes']}",
            p["model"],
        )
        for p in answered["proposals"]
    ]
    rows.append(("answer", "", *_spent(answered, answered["job_tokens"]), "", "", ""))
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [row[i].rjust(widths[i]) for i in range(1, last)]
        lines.append("  ".join((*cells, row[last])).rstrip())
    lines += [
        f"left out: {out['board']} (layer {out['layer']}): {out['reason']}"
        for out in answered["left_out"]
    ]
    if answered["note"]:
        lines.append(f"note: {answered['note']}")
    if answered.get("id"):
        lines.append(f"id {answered['id']}")
    granted = answered["granted"]
    why = f" ({granted['why']})" if granted["why"] else ""
    lines.append(f"plan {plan(granted)}{why}; {seconds(answered['total_ms'])} in all")
    return harmless("\n".join(lines))


_NETWORK, _WAITED, _READ, _WROTE = "·░▒█"


def timeline(answered: dict[str, Any], columns: int) -> str:
    """When who did what, drawn: a row each, from the acceptance of the prompt to its answer.

    :param columns: how wide it may be.
    """
    jobs = [(*_whose(each), each["asked_at_ms"], each) for each in answered["proposals"]]
    spent_ms = answered["queue_ms"] + answered["work_ms"]
    jobs.append(("answer", "", answered["total_ms"] - spent_ms, answered))
    names = [f"{name} {layer}" for name, layer, _, _ in jobs]
    width = max(map(len, names))
    wide = max(columns - width - 2, 20)
    scale = wide / max(answered["total_ms"], 1)
    lines = []
    for shown, (_, _, begun_ms, job) in zip(names, jobs, strict=True):
        parts = (
            (" ", max(begun_ms, 0)),
            (_NETWORK, job.get("network_ms", 0)),
            (_WAITED, job["queue_ms"]),
            (_READ, job["prefill_ms"]),
            (_WROTE, job["work_ms"] - job["prefill_ms"]),
        )
        bar, at_ms = "", 0
        for mark, lasted_ms in parts:
            at_ms += lasted_ms
            bar += mark * (round(at_ms * scale) - len(bar))
        lines.append(f"{shown:<{width}}  {bar[:wide].rstrip()}")
    end = seconds(answered["total_ms"])
    lines.append(f"{'':<{width}}  0{end:>{wide - 1}}")
    key = f"{_NETWORK} network  {_WAITED} waited  {_READ} read  {_WROTE} wrote"
    lines.append(f"{'':<{width}}  {key}")
    return harmless("\n".join(lines))


def _whose(proposal: dict[str, Any]) -> tuple[str, str]:
    return proposal["board"] + (" (owner)" if proposal["own"] else ""), str(proposal["layer"])


def _spent(job: dict[str, Any], prompt_tokens: int) -> tuple[str, ...]:
    """Where a job's time and tokens went."""
    return (
        seconds(job["queue_ms"]),
        seconds(job["prefill_ms"]),
        seconds(job["work_ms"] - job["prefill_ms"]),
        str(job["cached_tokens"]),
        str(prompt_tokens - job["cached_tokens"]),
        str(job["tokens"]),
    )


def speed(rates: dict[str, Any]) -> str:
    """Tokens a second in all, as measured, by context and by how many jobs are written at a time;
    empty while nothing was."""
    batches = sorted({each["rows"] for each in rates["decode"]})
    lines: dict[int, dict[int, str]] = {}
    for rows, each in [(0, each) for each in rates["prefill"]] + [
        (each["rows"], each) for each in rates["decode"]
    ]:
        ms = each["step_ms"] / rows if rows else each["ms_per_token"]
        below = 1 << max(int(each["context"]), 64).bit_length()
        lines.setdefault(below, {})[rows] = f"{1000 / ms:.0f}" if ms else "-"
    if not lines:
        return ""
    head = ("context", "read", *(f"write {rows}" for rows in batches))
    body = [
        (f"< {below}", *(line.get(rows, "-") for rows in (0, *batches)))
        for below, line in sorted(lines.items())
    ]
    return table([head, *body])


def cap(bound: dict[str, Any]) -> str:
    """How many requests are taken, and why so many."""
    set_to = "" if bound["setting"] is None else f", set {bound['setting']}"
    places = f"memory {bound['memory']}, latency {bound['latency']}, blocking {bound['blocking']}"
    return (
        f"{places}{set_to}"
        f" ({bound['budget_bytes'] >> 20} MB of {bound['usual_bytes'] / 1024:.0f} KB,"
        f" {seconds(bound['promise_ms'])} of {seconds(bound['service_ms'])},"
        f" variation {bound['scv'] ** 0.5:.1f})"
    )


def headroom(room: dict[str, Any], names: dict[str, str]) -> str:
    """How many more prompts a minute there is room for with a plan, and who limits it."""
    plan = f"M={room['layers']} k={room['proposers']}" if room["layers"] else "alone  "
    limits = ", ".join(harmless(names.get(each, each[:7])) for each in room["limited_by"])
    return f"{plan}  {max(room['prompts_per_min'], 0):6.1f}  {limits}"


def report(answered: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object that scripts get."""
    return {"answer": answered["text"]} | {
        key: value for key, value in answered.items() if key not in ("text", "type")
    }


def plan(granted: dict[str, Any]) -> str:
    """A plan in words."""
    if not granted["layers"]:
        return "alone"
    return f"M={granted['layers']}, k={granted['proposers']}"


def seconds(milliseconds: int) -> str:
    """A duration for people."""
    return f"{milliseconds / 1000:.2f} s"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows in columns; the first row is the heading."""
    rows = [tuple(harmless(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def harmless(text: str) -> str:
    """Text without what a terminal would act on, but for line ends and tabs."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
