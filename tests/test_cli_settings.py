"""Root's commands on a board whose daemon is another user."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os, sys
from pathlib import Path
from edgemoa.cli_settings import as_owner
as_owner(Path(sys.argv[1]))
print(os.getuid(), os.getgid(), len(os.getgroups()), os.environ["USER"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_becomes_whose_board_it_is(tmp_path: Path) -> None:
    def who(folder: Path) -> list[str]:
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "USER": "root"}
        command = [sys.executable, "-c", CHILD, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    nobody = pwd.getpwnam("nobody")
    state = tmp_path / "state"
    state.mkdir()
    assert who(state)[0] == "0", "root's own"
    os.chown(state, nobody.pw_uid, nobody.pw_gid)
    assert who(state)[:2] == [str(nobody.pw_uid), str(nobody.pw_gid)]
    assert who(state / "models" / "not-there-yet")[3] == "nobody"
