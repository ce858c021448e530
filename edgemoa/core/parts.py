"""A text that another board writes, while it does: what is told of it, and what to make of that.

Parts come unsigned over the link and may stop at any time. The signed proposal at the end says what
the text is; until then, parts say what it will begin with, if all goes well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgemoa.core import limits

ANSWER_MS: Final = 100  # from one part to the next, at least, where a person reads along
PROPOSAL_MS: Final = 300  # where a model does, which reads much at a time faster
READ_CHARACTERS: Final = 160  # more, before a model is told again what to read
STALL_MS: Final = 30_000  # without a part: whoever writes an answer that is shown has stopped
BYTES_PER_TOKEN: Final = 4  # or so


@dataclass(slots=True)
class Telling:
    """At the proposer: a text and how much of it was told. Where the link has no room for a part,
    that is taken back, and the next part is so much longer: nothing heaps up."""

    every_ms: int
    written: str = ""  # by the running attempt
    told: str = ""
    next_ms: int = 0

    def write(self, text: str, now_ms: int) -> tuple[int, str] | None:
        """The model wrote on; the part to tell now, and the character that it starts at.

        None between two parts, beyond :data:`~edgemoa.core.limits.MAX_PROPOSAL_BYTES`, and where
        an attempt after a loss of the model process writes something else than was told.
        """
        if len(self.written) < limits.MAX_PROPOSAL_BYTES:
            self.written += text
        start = len(self.told)
        if (
            now_ms < self.next_ms
            or len(self.written) <= start
            or not self.written.startswith(self.told)
            or len(self.written.encode()) > limits.MAX_PROPOSAL_BYTES
        ):
            return None
        self.told, self.next_ms = self.written, now_ms + self.every_ms
        return start, self.written[start:]

    def take_back(self, start: int) -> None:
        """The part that starts there was not sent."""
        self.told = self.told[:start]

    def begin_anew(self) -> None:
        """The model process is gone; the text will be written from its beginning."""
        self.written = ""


@dataclass(slots=True)
class Hearing:
    """At the owner: what was heard so far of a text, ``most_bytes`` of it at most in UTF-8."""

    most_bytes: int
    text: str = ""
    size_bytes: int = 0
    read: int = 0  # characters that the own model was told to read

    def hear(self, start: int, text: str) -> bool:
        """Take a part; False, and nothing changes, where it does not go on from what is there or
        would make it too much."""
        size_bytes = self.size_bytes + len(text.encode())
        if start != len(self.text) or not text or size_bytes > self.most_bytes:
            return False
        self.text += text
        self.size_bytes = size_bytes
        return True
