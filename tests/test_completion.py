"""Completion, tried in the shell itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgemoa.cli import main

COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="{words}"
COMP_POINT=${{#COMP_LINE}}
$(complete -p edgemoa | sed 's/.*-F \\([^ ]*\\).*/\\1/') edgemoa
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "there", "not_there"),
    [
        ("edgemoa st", {"status"}, {"serve"}),
        ("edgemoa status --w", {"--watch"}, {"--json"}),
        ("edgemoa model pu", {"pull"}, {"pair"}),
        ("edgemoa completion b", {"bash"}, {"fish"}),
    ],
)
def test_bash_completes_commands_and_options(
    words: str,
    there: set[str],
    not_there: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bash = shutil.which("bash")
    assert bash
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    done = subprocess.run(
        [bash, "--norc", "-c", COMPLETE.format(script=script, words=words)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    offered = {word.strip() for word in done.stdout.split("\n")}
    assert there <= offered
    assert not not_there & offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_of_every_command(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in ("ask", "status", "doctor", "model", "pull", "--watch"):
        assert command.removeprefix("--") in script
    if path := shutil.which(shell):
        subprocess.run([path, "-n", "-c", script], check=True)
