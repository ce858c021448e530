"""Structured logs on standard error: one line an event, fields beside the message.

Messages are fixed sentences; what varies goes into fields. No prompt, answer or secret is ever
given to the log, and of an unexpected exception only its type and place are written, since its
text may quote what it choked on.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from typing import Any, Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str, form: Literal["auto", "text", "json"]) -> None:
    """Send this process's log to standard error."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)  # of libraries, which a stranger's certificate can provoke
    for chatty in ("asyncio", "aiohttp", "zeroconf"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {k: v for k, v in vars(record).items() if k not in _STANDARD}
    if record.exc_info and record.exc_info[0] is not None:
        kind, _, trace = record.exc_info
        frames = traceback.extract_tb(trace)[-6:]
        fields["error"] = kind.__name__
        fields["at"] = " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames))
    return fields


class JsonFormatter(logging.Formatter):
    """For journals and scripts."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object a line."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, fields."""
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        clock = self.formatTime(record, "%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()}{fields}"
        return "".join(c if c.isprintable() else " " for c in line)  # one event, one line
