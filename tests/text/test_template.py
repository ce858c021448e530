"""Chat templates render as in transformers, and end within their bounds whatever they are."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.messages import ChatMessage, Role
from edgemoa.errors import InvalidPromptError, ModelInvalidError
from edgemoa.text.template import CPU_S, MEMORY_BYTES, ChatTemplate, check_template, load_template


def turns(*contents: str) -> tuple[ChatMessage, ...]:
    """A conversation of user and assistant by turns, where nothing before a text says otherwise."""
    roles: tuple[Role, ...] = ("user", "assistant")
    found = []
    for number, content in enumerate(contents):
        role: Role = roles[number % 2]
        for named in ("system", "user", "assistant"):
            if content.startswith(f"{named}:"):
                role, content = named, content.removeprefix(f"{named}:")  # noqa: PLW2901
        found.append(ChatMessage(role, content))
    return tuple(found)


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate, starting with the user') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
DEAF = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "given_", "prompt"),
    [
        (PLAIN, ("a", "b"), "[user]a[assistant]b"),
        (PLAIN, ("system:s", "user:a"), "[system]s[user]a"),
        # One that refuses system turns, and one that leaves them out without a word.
        (ALTERNATING, ("system:s", "user:a", "assistant:b", "user:c"),
         "[user]s\n\na[assistant]b[user]c"),
        (DEAF, ("system:s", "user:a", "b"), "[user]s\n\na[user]b"),
        (DEAF, ("system:s", "user:a", "assistant:b"), "[user]s\n\na[assistant]b"),
        (ALTERNATING, ("system:s",), "[user]s"),
        (ALTERNATING, ("system:s", "system:t", "user:a"), "[user]s\n\nt\n\na"),
        (ALTERNATING, ("user:a", "assistant:b", "system:s", "user:c"),
         "[user]a[assistant]b[user]s\n\nc"),
        (ALTERNATING, ("user:a", "user:b", "assistant:c"), "[user]a\n\nb[assistant]c"),
        # What several boards proposed, as an aggregation has it.
        (ALTERNATING, ("system:s", "user:a", "assistant:b", "user:c", "assistant:p", "user:q"),
         "[user]s\n\na[assistant]b[user]c[assistant]p[user]q"),
    ],
)  # fmt: skip
def test_turns_that_a_template_does_not_know_are_put_otherwise(
    source: str, given_: tuple[str, ...], prompt: str
) -> None:
    assert ChatTemplate(source).render(turns(*given_)) == prompt


def test_what_no_template_takes_is_refused_and_not_quoted() -> None:
    template = ChatTemplate(ALTERNATING)
    with pytest.raises(InvalidPromptError, match="order of turns") as refusal:
        template.render(turns("assistant:secret"))
    assert "secret" not in f"{refusal.value} {refusal.value.hint}"


def test_a_model_without_a_template_goes_on_with_the_text() -> None:
    template = ChatTemplate("")
    assert template.render(turns("Once upon a")) == "Once upon a"
    assert template.render(turns("system:s", "user:a {{ 1 }}", "b")) == "s\n\na {{ 1 }}\n\nb"


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n", "Hello\n"),
        ("  {% if true %}x{% endif %}", "x"),
        ("{{ messages[0]['content'] ~ bos_token ~ eos_token }}", "Hello<s></s>"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'none' if tools is none and documents is none }}", "none"),
        ("{{ add_generation_prompt }}{{ enable_thinking is defined }}", "TrueFalse"),
        ("{{ '-' * 3 }}{{ 3 * 4 }}{{ 2 ** 3 }}{{ 2 * 1.5 }}{{ 2.567 | round(1) }}", "---1283.02.6"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}", "<1>"),
        ("{{ messages[0].get('tool_calls') }}{{ messages[0].content.split('l')[0] }}", "NoneHe"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, prompt: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render(turns("Hello")) == prompt


@pytest.mark.parametrize(
    "source",
    [
        "{% set a='x'*1000000 %}{% set b='x'*1000000 %}{{ ([a]*1000000).count(b) }}",
        "{% set a='x'*1000000 %}{% set b='x'*1000000 %}{{ [a]*1000000 == [b]*1000000 }}",
    ],
)
def test_what_python_cannot_interrupt_the_kernel_ends(source: str) -> None:
    with pytest.raises(ModelInvalidError, match="too much time or memory") as told:
        check_template(source)
    assert told.value.hint


def test_a_template_is_tried_in_a_child() -> None:
    check_template("{{ bos_token }}{{ messages[0].content }}", "<s>", "\ud800")
    with pytest.raises(ModelInvalidError, match="is no valid template") as told:
        check_template("{% if %}")
    assert told.value.hint


GROWING = "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = ... %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        GROWING.replace("...", "n.x ~ n.x"),
        GROWING.replace("'a'", "[1]").replace("...", "n.x + n.x"),
        GROWING.replace("'a'", "7").replace("...", "n.x * n.x"),
        GROWING.replace("...", "n.x | replace('a', 'aaaaaaaa')"),
        "{{ 10 ** 10 ** 10 }}",
        "{{ 1 | round(100000000, 'ceil') }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{% for i in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' * 10 }}{% endfor %}",
        "{{ '\\ud800' }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_hostile_template_is_refused_within_its_bounds(source: str) -> None:
    started = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises(ModelInvalidError, match="simple conversation"):
        ChatTemplate(source)
    assert time.process_time() - started < CPU_S + 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < 2 * MEMORY_BYTES  # some of what the process had mapped was not in memory yet
    # Nothing of the bounds stays behind.
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
        "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
        "{{ " + "+".join(["1"] * 50_000) + " }}",
        "{% import 'os' as os",
        "{{ 1 | nothing_like_this }}",
        "x" * 300_000,
    ],
    ids=lambda source: source[:12],
)
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(ModelInvalidError, match="chat template"):
        ChatTemplate(source)


@given(st.text(st.sampled_from("{}%-# ifsetor(1)'[]|~+*.\n"), max_size=40))
def test_anything_is_a_template_or_refused(source: str) -> None:
    try:
        ChatTemplate(f"{{{{{source}}}}}")
    except ModelInvalidError as error:
        assert "chat template" in str(error)


@pytest.mark.parametrize(
    ("config", "file", "prompt"),
    [
        ({"chat_template": "{{ bos_token }}1", "bos_token": "<s>"}, None, "<s>1"),
        ({"chat_template": "{{ bos_token }}1", "bos_token": {"content": "<b>"}}, None, "<b>1"),
        ({"chat_template": "1"}, "2", "2"),
        ({"chat_template": [{"name": "tool_use", "template": "1"},
                            {"name": "default", "template": "2"}]}, None, "2"),
        ({"chat_template": ""}, None, "Hi"),
        ({}, None, "Hi"),
    ],
)  # fmt: skip
def test_where_the_template_stands(
    tmp_path: Path, config: dict[str, object], file: str | None, prompt: str
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert load_template(tmp_path).render(turns("Hi")) == prompt


@pytest.mark.parametrize(
    "config", ["{", "[]", "1", '{"chat_template": 1}', '{"chat_template": [1]}', "[" * 100_000]
)
def test_a_broken_configuration_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ModelInvalidError):
        load_template(tmp_path)
