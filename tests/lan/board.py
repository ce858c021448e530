"""``python board.py TOKEN_MS ...`` is ``python -m edgemoa ...`` with an engine without a model, so
that twenty boards fit on one machine: each token takes that long, and nothing else any time.

All but the model process is the real daemon. The model's folder is still looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests, from wherever it is run

from engine.fake import FakeEngine

from edgemoa import cli, daemon
from edgemoa.engine.engine import EngineEvents

TOKEN_S = float(sys.argv[1]) / 1000


class Stand(FakeEngine):
    """Made as the daemon makes its engine."""

    def __init__(
        self, folder: Path, model: str, threads: int, events: EngineEvents, **_: Any
    ) -> None:
        super().__init__(model, events, token_s=TOKEN_S, slots=4, context_tokens=8192)


if __name__ == "__main__":
    del sys.argv[1]
    with mock.patch.object(daemon, "Engine", Stand):
        sys.exit(cli.main())
