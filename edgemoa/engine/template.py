"""The model's own chat template, rendered as its authors meant it.

By Jinja2 with the settings of Hugging Face's ``transformers``, for which templates are written.
onnxruntime-genai's renderer (0.18) does not remove the line ends after block tags, as those
settings do, and strips only ASCII white space, so a template that leans on either renders
differently there. A template comes with a model from elsewhere: it runs in Jinja2's sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from edgemoa.core.messages import ChatMessage
from edgemoa.errors import InvalidPromptError, ModelInvalidError


class ChatTemplate:
    """Renders a conversation into the text that the model goes on from."""

    def __init__(self, template: jinja2.Template, tokens: dict[str, str]) -> None:
        self._template = template
        self._tokens = tokens

    def render(self, messages: tuple[ChatMessage, ...]) -> str:
        """The prompt, up to where the assistant's turn begins.

        Raises :class:`InvalidPromptError` where the template refuses the conversation, as some do
        when turns do not alternate. What the template says of it could quote the conversation, so
        it is left out.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, **self._tokens
            )
        except Exception:  # a model's template is a program; it may fail in any way
            raise InvalidPromptError(
                "The model's chat template refuses this order of turns.",
                hint="Most take an optional system turn, then user and assistant in alternation.",
            ) from None


class ControlTokens:
    """Keeps what people and other boards write from being read as control tokens.

    A tokenizer takes the characters ``<|im_end|>`` for the end of a turn wherever they stand, so a
    proposal could forge a turn of the user's. Such characters in a message are torn apart before
    the template is rendered, and the parts are encoded each by itself: the model then reads the
    characters, and only the template writes control tokens.
    """

    _TEAR: Final = "\ufdd0"  # a code point that Unicode keeps out of texts

    def __init__(self, texts: Iterable[str]) -> None:
        """:param texts: what the control tokens are written as."""
        longest_first = sorted((re.escape(text) for text in texts if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first)) if longest_first else None

    def guard(self, messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
        """The messages with their control characters torn apart; for the template."""
        return tuple(ChatMessage(turn.role, self._guard(turn.content)) for turn in messages)

    def split(self, prompt: str) -> list[str]:
        """The rendered prompt in the parts that are to be encoded each by itself."""
        return [part for part in prompt.split(self._TEAR) if part]

    def _guard(self, text: str) -> str:
        # NUL, because onnxruntime-genai (0.18) reads a text only up to there.
        for unreadable in (self._TEAR, "\0"):
            text = text.replace(unreadable, "\N{REPLACEMENT CHARACTER}")
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: found[0][0] + self._TEAR + found[0][1:], text)


def load_control_tokens(model_dir: Path) -> ControlTokens:
    """The control tokens that a model folder's ``tokenizer.json`` declares, if it has one.

    Raises :class:`ModelInvalidError` for a file of another shape.
    """
    file = model_dir / "tokenizer.json"
    if not file.exists():
        return ControlTokens(())
    try:
        added = json.loads(file.read_text("utf-8"))["added_tokens"]
        return ControlTokens(str(token["content"]) for token in added)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelInvalidError(
            f"The model has no usable tokenizer.json ({type(error).__name__}).",
            hint="Import the model again.",
        ) from error


def load_template(model_dir: Path) -> ChatTemplate:
    """The template of a model folder: ``chat_template.jinja``, or in ``tokenizer_config.json``.

    Raises :class:`ModelInvalidError` where there is none or it is no template.
    """
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_text("utf-8"))
        file = model_dir / "chat_template.jinja"
        source = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelInvalidError(
            f"The model has no usable tokenizer_config.json ({type(error).__name__}).",
            hint="Import the model again.",
        ) from error
    if isinstance(source, list):  # several, by name
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    if not isinstance(source, str) or not source:
        raise ModelInvalidError(
            "The model has no chat template.",
            hint="Import one that is made for conversations, often named Instruct or Chat.",
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelInvalidError("The model's chat template is no valid template.") from error
    tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token")}
    return ChatTemplate(template, tokens)


def _token(value: Any) -> str:
    """A special token's text, which a tokenizer's configuration gives in one of two ways."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _to_json(value: Any, **options: Any) -> str:
    # Jinja2's own escapes for HTML, which no model's template means.
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now(UTC).astimezone().strftime(form)
