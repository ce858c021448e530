"""Completion for shells, written out of the command line's own parser.

Words only: commands, options and choices, and files where a value is wanted. It starts nothing
when the Tab key is pressed; a board would take half a second for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell is to read, for :data:`SHELLS`."""
    name = parser.prog
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](name, dict(_commands(parser)))


def _commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[tuple[str, str]]]]:
    """Each command's path with the words that may follow, and what they mean."""
    words: list[tuple[str, str]] = []
    below: list[tuple[tuple[str, ...], argparse.ArgumentParser]] = []
    for action in parser._actions:  # argparse has no other way to look
        if action.help == argparse.SUPPRESS:
            continue
        text = _one_line(action.help or "")
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: _one_line(choice.help or "") for choice in action._choices_actions}
            for name, command in action.choices.items():
                if name in told:
                    words.append((name, told[name]))
                    below.append(((*path, name), command))
        elif action.option_strings:
            words += [(option, text) for option in action.option_strings]
        elif action.choices:
            words += [(str(choice), text) for choice in action.choices]
    yield path, words
    for deeper, command in below:
        yield from _commands(command, deeper)


def _one_line(text: str) -> str:
    kept = "".join(c for c in text if c not in "'\"`\\:[]$%")
    return " ".join(kept.split())[:70]


_Commands = dict[tuple[str, ...], list[tuple[str, str]]]


def _bash(name: str, commands: _Commands) -> str:
    cases = "\n".join(
        f"        '{' '.join(path)}') words='{' '.join(word for word, _ in words)}' ;;"
        for path, words in commands.items()
    )
    paths = " ".join(f"'{' '.join(path)}'" for path in commands if path)
    return f"""# {name}: completion for bash. In ~/.bashrc: source <({name} completion bash)
_{name}() {{
    local words='' path='' longer known word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        longer="${{path:+$path }}$word"
        for known in {paths}; do
            [[ $known == "$longer" ]] && path=$longer
        done
    done
    case $path in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _{name} {name}
"""


def _zsh(name: str, commands: _Commands) -> str:
    cases = ""
    for path, words in commands.items():
        told = " ".join(f"'{word}:{text}'" for word, text in words)
        cases += f"        '{' '.join(path)}') words=({told}) ;;\n"
    paths = " ".join(f"'{' '.join(path)}'" for path in commands if path)
    return f"""#compdef {name}
# {name}: completion for zsh. In ~/.zshrc: source <({name} completion zsh)
_{name}() {{
    local path_='' longer known word
    local -a words_ words
    words_=("${{(@)words[2,CURRENT-1]}}")
    for word in $words_; do
        longer="${{path_:+$path_ }}$word"
        for known in {paths}; do
            [[ $known == "$longer" ]] && path_=$longer
        done
    done
    case $path_ in
{cases}    esac
    _describe '{name}' words || _files
}}
compdef _{name} {name}
"""


def _fish(name: str, commands: _Commands) -> str:
    lines = [f"# {name}: completion for fish. {name} completion fish | source"]
    for path, words in commands.items():
        below = [w for w, _ in words if not w.startswith("-")]
        seen = " and ".join(f"__fish_seen_subcommand_from {word}" for word in path)
        fresh = f"not __fish_seen_subcommand_from {' '.join(below)}" if below else ""
        when = " and ".join(part for part in (seen, fresh) if part) or "true"
        for word, text in words:
            what = (
                f"-l {word[2:]}"
                if word.startswith("--")
                else (f"-s {word[1:]}" if word.startswith("-") else f"-a {word}")
            )
            lines.append(f"complete -c {name} -n '{when}' {what} -d '{text}'")
    return "\n".join(lines) + "\n"
