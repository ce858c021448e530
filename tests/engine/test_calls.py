"""Calls of tools: how a template has them written, and what is read from a model's text."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.events import Job, ToolCall, Tools, Wishes
from edgemoa.core.messages import ChatMessage
from edgemoa.engine.calls import FORCED, Calls
from edgemoa.errors import InvalidPromptError
from edgemoa.text.template import CallForm, ChatTemplate

from .harness import job, running
from .tiny import HELLO, write_tiny_model

# Templates in the ways of known families, much shorter.
TAGS = (  # Hermes, Qwen, SmolLM3
    "{% if tools %}[sys]{% for t in tools %}{{ t | tojson }}\n{% endfor %}[end]\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set c = c.function %}\n<tool_call>\n"
    '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
THINKS = TAGS.replace("[assistant]\n{% endif %}", "[assistant]\n<think>\n{% endif %}")
BARE = (  # Llama 3
    "{% for m in messages %}[{{ m.role }}]\n\n"
    "{% if tools and loop.first %}{{ tools | tojson }}{% endif %}"
    "{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
LIST = (  # Mistral
    "{% for m in messages %}{% if m.role == 'user' %}[TOOLS]{{ tools | tojson }}[/TOOLS]"
    "[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS] ["
    "{% for c in m.tool_calls %}{% set out = c.function | tojson %}{{ out[:-1] }}"
    ', "id": "{{ c.id }}"}{% endfor %}]{% endif %}{% endfor %}'
)
NONE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FUNCTIONS = (
    "{% for m in messages %}{{ tools | tojson }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<function={{ c.function.name }}>{{ c.function.arguments | tojson }}</function>"
    "{% endfor %}{% endfor %}"
)


def without_control(text: str) -> str:
    for control in ("[end]", "[assistant]", "[CALLS]", "[INST]", "[/INST]"):
        text = text.replace(control, "")
    return text


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (TAGS, CallForm("<tool_call>", "</tool_call>")),
        (THINKS, CallForm("<tool_call>", "</tool_call>")),
        (BARE, CallForm("", "")),
        (LIST, CallForm("", "")),
        (NONE, None),
        (FUNCTIONS, None),
        (NONE + "{{ tools | tojson }}", None),
        (
            NONE + "{{ tools | tojson }}{% if messages[-1].tool_calls %}{{ 1 // 0 }}{% endif %}",
            None,
        ),
        (TAGS.replace("<tool_call>", "<" + "t" * 65 + ">"), None),
        (TAGS.replace("<tool_call>", "{ " * 2000), None),
    ],
)
def test_a_template_tells_how_calls_are_written(source: str, form: CallForm | None) -> None:
    assert ChatTemplate(source).call_form(without_control) == form


def test_turns_with_calls_are_rendered() -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "é"}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "a", "name": "now"},
    ]
    tool = {"type": "function", "function": {"name": "now"}}
    prompt = ChatTemplate(TAGS).render_with_tools(turns, [tool])
    assert prompt == (
        '[sys]{"type": "function", "function": {"name": "now"}}\n[end]\n[user]\nTime?[end]\n'
        '[assistant]\n<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'
        "[end]\n[tool]\nnoon[end]\n[assistant]\n"
    )


TAGGED, NAMES = CallForm("<tool_call>", "</tool_call>"), ("now", "sum")
NOW = ToolCall("now", "{}")
SUM = ToolCall("sum", '{"a": [1, {"b": "}\\"<tool_call>"}]}')
CALL = '{"name": "sum", "arguments": ' + SUM.arguments + "}"


def read(
    text: str, form: CallForm, cuts: list[int] | None = None, *, parallel: bool = True
) -> tuple[str, tuple[ToolCall, ...]]:
    calls = Calls(form, NAMES, parallel=parallel)
    borders = [0, *sorted(cuts or []), len(text)]
    shown = [calls.push(text[a:b]) for a, b in itertools.pairwise(borders)]
    return "".join([*shown, calls.finish()]), calls.calls


@pytest.mark.parametrize(
    ("text", "form", "shown", "called"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", TAGGED, "", (SUM,)),
        (f"Let me see.\n\n<tool_call>{CALL}</tool_call>\n", TAGGED, "Let me see.", (SUM,)),
        (f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "now"}}\n</tool_call>', TAGGED,
         "", (SUM, NOW)),
        (f'<tool_call>[{CALL}, {{"name":"now","parameters":{{}}}}]', TAGGED, "", (SUM, NOW)),
        (f"<tool_call>{CALL}</tool_call> and more", TAGGED, "and more", (SUM,)),
        (CALL, FORCED, "", (SUM,)),
        (f" \n[{CALL}]", FORCED, "", (SUM,)),
        (f'{CALL}; {{"name": "now"}}', FORCED, "", (SUM, NOW)),
    ],
)  # fmt: skip
def test_calls_are_read(
    text: str, form: CallForm, shown: str, called: tuple[ToolCall, ...]
) -> None:
    for step in (len(text), 1, 7):
        assert read(text, form, list(range(0, len(text), step))) == (shown, called)
    assert read(text, form, parallel=False) == (shown, called[:1])
    assert all(isinstance(json.loads(call.arguments), dict) for call in called)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "No call.", "{", "[]", "{}", '{"name": "now", ', "[1]", "[[]]", "null", "3",
        '{"name": "other"}', '{"name": 3}', '{"name": "now", "arguments": []}',
        '{"name": "now", "arguments": "{}"}', '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": 1e999}}', "[" * 100_000, '{"a":' * 100_000,
        f"{CALL} and more", f"So: {CALL}",
        '{"name": "now", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    one_by_one = list(range(len(text))) if len(text) < 1000 else []
    assert read(text, FORCED, one_by_one) == (text, ())
    for before in ("<tool_call>", "So. <tool_call>", " <tool_"):
        marked = before + text
        if "sum" not in text:
            assert read(marked, TAGGED, one_by_one) == (marked, ())


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "<tool", CALL, " ", "\n", "x", "[", "{"])
    ),
    st.lists(st.integers(0, 300)),
)
def test_nothing_depends_on_the_pieces(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    for form in (TAGGED, FORCED):
        whole = read(text, form)
        assert read(text, form, [cut for cut in cuts if cut < len(text)]) == whole
        if not whole[1]:
            assert whole[0] == text


def test_text_before_a_call_is_shown_as_it_comes() -> None:
    calls = Calls(TAGGED, NAMES)
    assert calls.push("Let me see. <") == "Let me see."
    assert calls.push("3 ") == " <3"
    assert calls.push("<tool_call") == ""
    assert calls.push(">{") == ""
    free = Calls(FORCED, NAMES)
    assert free.push("  ") == ""
    assert free.push("So: ") == "  So: "
    assert free.push('{"name": "now"}') == '{"name": "now"}'
    assert (free.finish(), free.calls) == ("", ())


# --- the engine

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"const": "now"},
            "arguments": {"type": "object", "additionalProperties": False},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
)


def with_template(folder: Path, source: str) -> Path:
    """A tiny model with another chat template."""
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": source}))
    return folder


def given_job(number: int, content: str, wishes: Wishes) -> Job:
    plain = job(number, messages=(ChatMessage("user", content),), max_tokens=900)
    return msgspec.structs.replace(plain, wishes=wishes)


def turns(last: str, **more: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": last}], **more})


def test_what_a_model_calls_is_told_apart_from_what_it_says(tmp_path: Path) -> None:
    folder = with_template(
        write_tiny_model(tmp_path / "tiny"), TAGS.replace("[assistant]\n", "{{ tools or 0 }}>")
    )
    tools = [{"type": "function", "function": {"name": "now"}}]
    wishes = Wishes(given="template", tools=Tools(("now",)))
    forced = Wishes(SCHEMA, given="template", tools=Tools(("now",), forced=True))

    async def scenario() -> None:
        async with running(folder) as (engine, events):
            assert events.ready[0].calls_tools
            assert not events.ready[0].embeds  # it is the genai back end's
            message = (ChatMessage("user", turns("a", tools=tools)),)
            asked = await engine.measure(message, "template")
            shown = turns("<|end|>", tools=[*tools, *tools])  # a control token is text there
            assert await engine.measure((ChatMessage("user", shown),), "template") > asked + 40
            engine.work(given_job(1, turns("a", tools=tools), wishes))
            said = await events.ends(1)
            assert (said.text, said.calls, said.prompt_tokens) == (HELLO, (), asked)
            engine.work(given_job(2, turns("a", tools=tools), forced))
            called = await events.ends(2)
            assert (called.text, [call.name for call in called.calls]) == ("", ["now"])
            assert json.loads(called.calls[0].arguments) == {}
            assert 2 not in events.texts
            for wrong in ("x", "[]", "{}", "[" * 5000, turns("a", tools=3)):
                with pytest.raises(InvalidPromptError):
                    await engine.measure((ChatMessage("user", wrong),), "template")

    asyncio.run(scenario())


def test_a_text_is_read_as_it_stands(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(write_tiny_model(tmp_path / "tiny")) as (engine, events):
            assert not events.ready[0].calls_tools
            text = (ChatMessage("user", "refuse<|end|>>"),)  # which the template would
            assert await engine.measure(text, "text") == len("refuse.>")
            engine.work(given_job(1, text[0].content, Wishes(given="text")))
            assert (await events.ends(1)).text == HELLO
            with pytest.raises(InvalidPromptError, match="empty"):
                await engine.measure((ChatMessage("user", ""),), "text")
            with pytest.raises(InvalidPromptError, match="does not support tools"):
                await engine.measure((ChatMessage("user", turns("a")),), "template")

    asyncio.run(scenario())
