"""The model's own chat template, rendered as its authors meant it, within bounds.

By Jinja2 with the settings of Hugging Face's ``transformers``, for which templates are written.

A template is a program that comes with a model from elsewhere. It runs in Jinja2's sandbox, which
keeps it from everything but its own values; and so that it can neither hang nor fill the board, it
gets so much processor time and memory and no more, by the kernel's count, in compiling as in
rendering. Python looks for signals between its own steps only, so the few operations that easily
take long in one step (products, powers, rounding to a given place) are bounded one by one; for all
others the kernel has the last word and ends the process. That is the model's process, which is
started anew, or the child in which :func:`check_template` tries a template that comes in.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from edgemoa.core import limits
from edgemoa.core.messages import ChatMessage
from edgemoa.errors import InvalidPromptError, ModelInvalidError
from edgemoa.text.files import read_object, unusable

MAX_SOURCE_CHARACTERS: Final = 256 * 1024  # the longest that are known have 30,000
MAX_PROMPT_CHARACTERS: Final = 4 * limits.MAX_PROMPT_BYTES
CPU_S: Final = 2.0  # a conversation of 512 turns takes some milliseconds
MEMORY_BYTES: Final = 64 * limits.MIB  # beyond what the process has
_MAX_PRODUCT: Final = limits.MIB  # characters or items
_MAX_NUMBER_BITS: Final = 128
_MAX_PLACES: Final = 20

ELSEWHERE: Final = "Take the model from another source."

_PLAIN: Final = "{{ messages | map(attribute='content') | join('\\n\\n') }}"
"""For a model without a template. Such a model was not taught turns, it goes on with a text: one
message is given to it as it stands, several with an empty line between."""

_PROBE: Final = "edgemoa probe"  # a system turn that a template has to show somewhere

_PROBE_TOOL: Final = "edgemoa_probe"  # a tool that a template has to show
_PROBE_FUNCTION: Final = {
    "description": "edgemoa probe",
    "parameters": {
        "type": "object",
        "properties": {"probe": {"type": "string", "description": "edgemoa probe"}},
        "required": ["probe"],
    },
}
_PROBE_ARGUMENTS: Final = {"probe": "edgemoa"}
_MAX_CALL_CHARACTERS: Final = 2048
_MAX_MARK_CHARACTERS: Final = 64
_TEXT_TURN: Final = {"role", "content"}

T = TypeVar("T")

Turns: TypeAlias = list[dict[str, Any]]
"""What templates are given: each turn with its ``role`` and ``content``, and, of calls of tools,
``tool_calls``, ``tool_call_id`` and ``name``."""


class CallForm(NamedTuple):
    """How a model writes a call of a tool: a JSON object with ``name`` and ``arguments`` (some say
    ``parameters``), or a list of these, with these marks around it; either may be empty."""

    before: str
    after: str


class ChatTemplate:
    """Renders a conversation into the text that the model goes on from."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """:param source: the template; empty for a model without one.

        Raises :class:`ModelInvalidError` for what is no template, and for one that cannot render a
        conversation within its bounds.
        """
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ModelInvalidError(
                f"The model's chat template has more than {MAX_SOURCE_CHARACTERS} characters."
            )
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _within_bounds(lambda: _Environment().from_string(source or _PLAIN))
        except _FailedError as failure:
            raise ModelInvalidError(
                f"The model's chat template is no valid template ({failure}).",
                hint=ELSEWHERE,
            ) from None
        if self._try([{"role": "user", "content": "Hello"}]) is None:
            raise ModelInvalidError(
                "The model's chat template fails on a simple conversation, or takes too much time"
                " or memory for it.",
                hint=ELSEWHERE,
            )
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
        self._knows_system = _PROBE in (self._try(probe) or "")

    def render(self, messages: tuple[ChatMessage, ...]) -> str:
        """The prompt, up to where the assistant's turn begins.

        A template that knows no system turns has them put before the text of the next user's turn.
        Where a template refuses the order of turns, as some do when they do not alternate,
        neighbours of one role become one turn.

        Raises :class:`InvalidPromptError` where the template refuses the conversation even so.
        What the template says of it could quote the conversation, so it is left out.
        """
        return self._render([{"role": m.role, "content": m.content} for m in messages])

    def render_with_tools(self, turns: Turns, tools: list[Any]) -> str:
        """The same for turns as templates know them, calls of tools and their results among them,
        with the tools that may be called.

        Raises :class:`InvalidPromptError` as :meth:`render` does.
        """
        return self._render(turns, tools)

    def call_form(self, visible: Callable[[str], str]) -> CallForm | None:
        """How the model was taught to write a call of a tool, read from how the template writes
        one; None where it knows no tools, or has calls written otherwise than as JSON.

        :param visible: what is left of a rendered text when it is read back: no control tokens.
        """
        tools = [{"type": "function", "function": {"name": _PROBE_TOOL} | _PROBE_FUNCTION}]
        user = {"role": "user", "content": "Hello"}
        called = {"name": _PROBE_TOOL, "arguments": _PROBE_ARGUMENTS}
        call = {"id": "edgemoa01", "type": "function", "function": called}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked = self._try([user], tools)
        told = self._try([user, turn], tools, goes_on=False)
        if asked is None or told is None or _PROBE_TOOL not in asked:
            return None
        if told.startswith(asked):
            written = told[len(asked) :]
        else:  # some begin the answer otherwise than they show it later
            differ = (at for at, (a, b) in enumerate(zip(asked, told, strict=False)) if a != b)
            written = told[told.rfind("\n", 0, next(differ, len(told))) + 1 :]
        return _find_call(written[:_MAX_CALL_CHARACTERS], visible)

    def _render(self, turns: Turns, tools: list[Any] | None = None) -> str:
        if not self._knows_system:
            turns = _without_system(turns)
        prompt = self._try(turns, tools)
        if prompt is None and (joined := _joined(turns)) != turns:
            prompt = self._try(joined, tools)
        if prompt is None:
            raise InvalidPromptError(
                "The model's chat template refuses this order of turns.",
                hint="Most take an optional system turn, then user and assistant in alternation.",
            )
        return prompt

    def _try(
        self, turns: Turns, tools: list[Any] | None = None, *, goes_on: bool = True
    ) -> str | None:
        """The rendered template, or None where it fails or goes beyond its bounds."""

        def render() -> str:
            prompt = self._template.render(
                messages=turns,
                add_generation_prompt=goes_on,
                tools=tools,
                documents=None,
                **self._tokens,
            )
            prompt.encode()  # a template can write halves of characters
            return prompt

        try:
            prompt = _within_bounds(render)
        except _FailedError:
            return None
        return prompt if len(prompt) <= MAX_PROMPT_CHARACTERS else None


def _find_call(written: str, visible: Callable[[str], str]) -> CallForm | None:
    """The form of the probe's call, where it stands in a text that a template wrote."""
    decoder = json.JSONDecoder()
    for start in (at for at, letter in enumerate(written) if letter == "{"):
        try:
            call, end = decoder.raw_decode(written, start)
        except (ValueError, RecursionError):
            continue
        if call.get("name") != _PROBE_TOOL or _PROBE_ARGUMENTS not in call.values():
            continue
        before = visible(written[:start]).strip().rpartition("\n")[2].rstrip("[ ")
        after = visible(written[end:]).lstrip("] \n").partition("\n")[0].strip()
        bounded = max(len(before), len(after)) <= _MAX_MARK_CHARACTERS
        return CallForm(before, after) if bounded else None
    return None


def check_template(source: str, bos_token: str = "", eos_token: str = "") -> None:
    """Try a template from elsewhere in a child, which the kernel may end if it takes too long.

    Raises :class:`ModelInvalidError` as :class:`ChatTemplate` does.
    """
    told = json.dumps([source, bos_token, eos_token])
    child = subprocess.run(
        [sys.executable, "-m", "edgemoa.text.template"],
        input=told.encode("utf-8", "surrogatepass"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if child.returncode == 0:
        return
    try:
        message, hint = json.loads(child.stdout)
    except ValueError:  # it died
        message, hint = "The model's chat template takes too much time or memory.", ELSEWHERE
    raise ModelInvalidError(message, hint=hint)


def load_template(model_dir: Path) -> ChatTemplate:
    """The template of a model folder: ``chat_template.jinja``, or in ``tokenizer_config.json``.

    Raises :class:`ModelInvalidError` where it is no template, or the folder no model.
    """
    return ChatTemplate(*read_template(model_dir))


def read_template(model_dir: Path) -> tuple[str, str, str]:
    """A folder's template, untried, and the tokens that it is told: what :class:`ChatTemplate` is
    made of.

    Raises :class:`ModelInvalidError` where the files do not hold one.
    """
    config = read_object(model_dir / "tokenizer_config.json")
    source = config.get("chat_template") or ""
    try:
        if (separate := model_dir / "chat_template.jinja").exists():
            with separate.open(encoding="utf-8") as file:
                source = file.read(MAX_SOURCE_CHARACTERS + 1)
        elif isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}["default"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable("chat template", error) from error
    tokens = [_token(config.get(name)) for name in ("bos_token", "eos_token")]
    if not isinstance(source, str):
        raise ModelInvalidError("The model's chat template is no valid template.")
    return source, tokens[0], tokens[1]


def _token(value: Any) -> str:
    """A special token's text, which a tokenizer's configuration gives in one of two ways."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _without_system(messages: Turns) -> Turns:
    """Each system turn as a user's, in one with the user's turn after it."""
    turns: Turns = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"])
        elif held and message["role"] == "user":
            turns.append({"role": "user", "content": "\n\n".join([*held, message["content"]])})
            held = []
        else:
            turns.append(message)
    if held:
        turns.append({"role": "user", "content": "\n\n".join(held)})
    return turns


def _joined(messages: Turns) -> Turns:
    """Neighbours of one role as one turn, where they are text alone."""
    turns: Turns = []
    for message in messages:
        before = turns[-1] if turns else {}
        if before.get("role") == message["role"] and before.keys() | message.keys() == _TEXT_TURN:
            text = f"{before['content']}\n\n{message['content']}"
            turns[-1] = {"role": message["role"], "content": text}
        else:
            turns.append(message)
    return turns


class _OutOfTimeError(BaseException):
    """Not an ``Exception``, so that nothing on the way takes it for one of its own."""


class _FailedError(Exception):
    """A template did not come to its end."""


def _within_bounds(work: Callable[[], T]) -> T:
    """What ``work`` returns; in the main thread, where Python tells of signals.

    Raises :class:`_FailedError`, with a cause that quotes nothing, where it fails in any way.
    Memory is counted as address space, so the bound holds for all threads of the process; while a
    template is rendered, the others wait.
    """
    armed = True

    def ring(signum: int, frame: object) -> None:
        if armed:
            raise _OutOfTimeError

    before = signal.signal(signal.SIGPROF, ring)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # ends the process
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        # Again and again: Python drops what is raised while it clears up an object.
        signal.setitimer(signal.ITIMER_PROF, CPU_S, CPU_S / 10)
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * CPU_S)
        return work()
    except _OutOfTimeError:
        raise _FailedError("it takes too long") from None
    except Exception as error:  # a template is a program; it may fail in any way
        raise _FailedError(type(error).__name__) from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What templates find, as in ``transformers``, and the operations that need a bound."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self.filters["tojson"] = _to_json
        self.filters["round"] = _round
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            size = _bits(left) * abs(right)
        elif isinstance(left, int | float) and isinstance(right, int | float):
            size = _bits(left) + _bits(right)
        else:
            text, times = (left, right) if isinstance(right, int) else (right, left)
            if len(text) * times > _MAX_PRODUCT:
                raise OverflowError
            size = 0
        if size > _MAX_NUMBER_BITS:
            raise OverflowError
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here it is just shown."""

    tags = {"generation"}  # noqa: RUF012 - as the class above declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bits(value: float) -> int:
    return max(1, value.bit_length()) if isinstance(value, int) else 1


def _to_json(value: Any, **options: Any) -> str:
    # Jinja2's own escapes for HTML, which no model's template means.
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > _MAX_PLACES:
        raise OverflowError
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now(UTC).astimezone().strftime(form)


def main() -> int:
    """The child of :func:`check_template`."""
    try:
        ChatTemplate(*json.load(sys.stdin)).call_form(lambda text: text)
    except ModelInvalidError as error:
        sys.stdout.write(json.dumps([str(error), error.hint]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
