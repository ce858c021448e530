"""Answers in JSON as a schema says: which tokens may come next, so that nothing else is written.

By ``llguidance``, which makes a grammar of a schema and, at each token, a mask over the vocabulary
of the grammar. It is imported where a request asks for it, and not before: the model's process is
to stay small.

A schema comes from a client, and some take without end to be made a grammar of; the library's own
limits do not hold for all of that. So :func:`check_schema` tries each in a child that the kernel
ends when it has taken too long, and only what passed there gets to the model's process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgemoa.errors import EdgemoaError, EngineError, SchemaError, UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgemoa.text.tokens import Tokens

CHECK_CPU_S: Final = 1.0  # usual schemas take 1 to 20 ms, and the child's start .1 s
CHECK_MEMORY_BYTES: Final = 64 << 20  # of address space, beyond what the child has

_WHITE_SPACE: Final = r"\x20|\x0A{1,2}[\x20\x09]{0,24}"
"""What may stand between two parts of the JSON: a space, or a new line or two, set in. Where any
white space may, small models can go on with it for ever. Of 64 answers of two small models 40 were
whole with this, as with any 20 characters, which took up to a third more tokens; 35 with one new
line, since who wants another one and may not goes on with digits."""

_TEXT: Final = r'[^"\\\x00-\x1F\x7F]+'
"""Tokens that may stand in any string: looked up once, not at each step. The mask of a step within
a string then takes 30 us instead of 400, for 262,144 tokens."""

_STEP_FUEL: Final = 100_000  # of the lexer, for one mask: some ms at worst
_STEP_ITEMS: Final = 25_000  # of the parser
_START_FUEL: Final = 500_000
_MAX_STATES: Final = 20_000  # of 1 to 2 kB each; 1,000 tokens of a text with maxLength fill them
_WORTH_RENEWING: Final = 64  # tokens
_MAX_GRAMMAR: Final = 100_000
_MAX_CAUSE_CHARACTERS: Final = 160
_TOO_COMPLEX: Final = "The answer's JSON schema is too complex for this board."


class Guide:
    """What one answer may go on with."""

    def __init__(self, begin: Callable[[], Any], size: int, places: int) -> None:
        """
        :param begin: makes a matcher, for ``places`` tokens.
        :param size: how many of those the model has.
        """
        import numpy as np  # noqa: PLC0415 - the child that checks has no use for it

        self._begin = begin
        self._matcher = begin()
        self._written: list[int] = []
        self._renewed = 0  # how many were written when this matcher was made
        self._size = size
        self._mask = np.zeros(-(-places // 32), np.uint32)
        self._bytes = self._mask.view(np.uint8)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next [size].

        Raises :class:`SchemaError` where that takes too much, or nothing may.
        """
        import numpy as np  # noqa: PLC0415 - see above

        if not self._look() and not (self._renew() and self._look()):
            raise SchemaError(_TOO_COMPLEX)
        return np.unpackbits(self._bytes, bitorder="little", count=self._size).view(np.bool_)

    def push(self, token: int) -> bool:
        """Take note of the token that was picked; True where the text is complete with it, and
        nothing can follow.

        Raises :class:`SchemaError` for a token that was not allowed.
        """
        if not self._matcher.consume_token(token) and not (
            self._renew() and self._matcher.consume_token(token)
        ):
            raise SchemaError(_TOO_COMPLEX)
        self._written.append(token)
        return bool(self._matcher.is_stopped())

    def _look(self) -> bool:
        """Make the mask; False where that takes too much."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        return not self._matcher.is_error()

    def _renew(self) -> bool:
        """Go on with a new matcher: of the states that fill the old one, nearly all are of texts
        that could have been written and were not. False where that was done just before."""
        if len(self._written) - self._renewed < _WORTH_RENEWING:
            return False
        self._renewed = len(self._written)
        self._matcher = self._begin()
        return bool(self._matcher.consume_tokens(self._written))


class Guidance:
    """Guides for one model's tokens. The first takes .15 s and 17 MB for 49,152 tokens, .8 s and
    70 MB for 262,144; each one after it a millisecond."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._vocabulary: Any = None

    def guide(self, schema: str) -> Guide:
        """A guide for an answer that obeys a JSON schema.

        Raises :class:`UserError` for what is no such schema, or not one that can be obeyed, and
        :class:`EngineError` where llguidance is not installed.
        """
        llguidance = _library()
        size = self._tokens.size
        if self._vocabulary is None:
            ends = sorted(number for number in self._tokens.end_of_turn if number < size)
            pieces = [self._tokens.piece(number) for number in range(size)]
            # A model without an end goes on for as long as the schema lets it.
            self._vocabulary = _vocabulary(llguidance, pieces, ends or [size])
        begin = partial(_matcher, llguidance, self._vocabulary, schema)
        return Guide(begin, size, self._vocabulary.vocab_size)


class _Pieces:
    """A vocabulary as llguidance asks for it."""

    bos_token_id: int | None = None

    def __init__(self, pieces: list[bytes], ends: list[int]) -> None:
        self.tokens = pieces
        self.eos_token_id = ends[0]
        # What stands for no text is never a part of one: control tokens, and numbers without one.
        self.special_token_ids = [number for number, piece in enumerate(pieces) if not piece]

    def __call__(self, text: str | bytes) -> list[int]:
        """Never called for a result, since nothing is forced; see :func:`_matcher`."""
        raise NotImplementedError


def _vocabulary(llguidance: Any, pieces: list[bytes], ends: list[int]) -> Any:
    if ends[-1] == len(pieces):
        pieces = [*pieces, b""]
    wrapped = llguidance.TokenizerWrapper(_Pieces(pieces, ends))
    return llguidance.LLTokenizer(wrapped, n_vocab=len(pieces), eos_token=ends, slices=[_TEXT])


def _matcher(llguidance: Any, vocabulary: Any, schema: str) -> Any:
    """Raises :class:`UserError` for a schema that cannot be obeyed."""
    try:
        told = json.loads(schema)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise UserError("The JSON schema is no JSON object.")
    # Settings of the library's own, which are not the client's to make. Text that the schema leaves
    # no choice about is not cut into tokens for the model ("forced"): for that, any text would have
    # to have tokens of its own, which those of SentencePiece have not.
    told["x-guidance"] = {"whitespace_pattern": _WHITE_SPACE}
    grammar = '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(told)
    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=_START_FUEL,
        step_lexer_fuel=_STEP_FUEL,
        step_max_items=_STEP_ITEMS,
        max_lexer_states=_MAX_STATES,
        max_grammar_size=_MAX_GRAMMAR,
        precompute_large_lexemes=False,
        verbose_errors=False,  # they would quote the schema and the text
    )
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise UserError(f"The JSON schema cannot be obeyed: {_cause(matcher.get_error())}")
    return matcher


def _cause(said: str) -> str:
    """The first line of what the library said, without the place in its own notation."""
    line = said.strip().splitlines()[0] if said.strip() else "it is too complex"
    line = line.rpartition("failed to compile JSON schema: ")[2]
    line = line.removeprefix('failed to parse "%json": ')
    return line[:_MAX_CAUSE_CHARACTERS].rstrip(" .:")


def _library() -> Any:
    try:
        import llguidance  # noqa: PLC0415 - see above
    except ImportError:
        raise EngineError("Answers cannot be held to JSON: llguidance is not installed.") from None
    return llguidance


def check_schema(schema: str) -> None:
    """Make a grammar of the schema, and masks for the first two tokens, over a vocabulary of bytes.

    Raises as :meth:`Guidance.guide` does. For a child, since some schemas take without end.
    """
    llguidance = _library()
    pieces = [bytes([byte]) for byte in range(256)]
    matcher = _matcher(llguidance, _vocabulary(llguidance, pieces, [256]), schema)
    mask = matcher.compute_bitmask()
    tried = [matcher]
    for begin in b'{["':  # behind these, most is possible
        if mask[begin // 8] >> begin % 8 & 1:
            tried.append(matcher.deep_copy())
            tried[-1].consume_token(begin)
            tried[-1].compute_bitmask()
    if any(each.is_error() for each in tried):
        raise UserError(_TOO_COMPLEX)


def main() -> int:
    """``python -m edgemoa.engine.guidance``: the child that checks the schema on its stdin.

    Ends with 0 where it can be obeyed, with an error's exit code and the reason on stdout where
    not, and by a signal or otherwise where it takes too much.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.setitimer(signal.ITIMER_PROF, CHECK_CPU_S)
    schema = sys.stdin.buffer.read()
    try:
        _library()  # what it takes is not the schema's
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + CHECK_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # llguidance aborts at that limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.setitimer(signal.ITIMER_PROF, CHECK_CPU_S)
        check_schema(schema.decode())
    except EdgemoaError as error:
        sys.stdout.write(str(error))
        sys.stdout.flush()
        return error.exit_code
    return 0


if __name__ == "__main__":
    os._exit(main())
