"""What is written on a card for a board's first boot, and what the board makes of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edgemoa import cli_settings, config, provision
from edgemoa.errors import ConfigError
from edgemoa.net.pairing import new_join_secret
from edgemoa.provision import Provision

GID = os.getgid()


def take_over(card: Path, etc: Path) -> bool:
    data = provision.read(card)
    return provision.take_over(card, data, provision.parse(data, str(card)), etc, GID)


def test_the_secret_is_taken_over_once_and_wiped_from_the_card(tmp_path: Path) -> None:
    secret, card, etc = new_join_secret(), tmp_path / "edgemoa.toml", tmp_path / "etc"
    wanted = Provision(name="küche", model="smollm2-135m-instruct", join_secret=secret)
    card.write_text(provision.to_toml(wanted) + f"# by hand: {secret}\n")
    size, inode = card.stat().st_size, card.stat().st_ino
    assert take_over(card, etc)
    assert secret not in card.read_text()
    assert (card.stat().st_size, card.stat().st_ino) == (size, inode), "the same blocks"
    kept = etc / provision.SECRET
    assert kept.read_text().strip() == secret
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    loaded = config.load(etc / provision.SETTINGS, environment={})
    assert loaded.board.name == "küche"
    assert loaded.model.name == "smollm2-135m-instruct"
    assert loaded.net.join_secret_file == str(kept)
    before = {path: path.stat().st_mtime_ns for path in etc.iterdir()}
    assert not take_over(card, etc), "the next boot"
    assert {path: path.stat().st_mtime_ns for path in etc.iterdir()} == before, "no writes"
    assert kept.read_text().strip() == secret


def test_a_power_cut_before_the_wiping_loses_nothing(tmp_path: Path) -> None:
    secret, card, etc = new_join_secret(), tmp_path / "edgemoa.toml", tmp_path / "etc"
    text = provision.to_toml(Provision(join_secret=secret))
    card.write_text(text)
    take_over(card, etc)
    card.write_text(text)  # as if the card had not been written yet
    assert not take_over(card, etc)
    assert secret not in card.read_text()
    assert (etc / provision.SECRET).read_text().strip() == secret


def test_a_later_card_changes_the_board(tmp_path: Path) -> None:
    card, etc = tmp_path / "edgemoa.toml", tmp_path / "etc"
    card.write_text('name = "a"\n')
    take_over(card, etc)
    assert not (etc / provision.SECRET).exists()
    other = new_join_secret()
    card.write_text(f'name = "b"\njoin_secret = "{other}"\n')
    assert take_over(card, etc)
    assert config.load(etc / provision.SETTINGS, environment={}).board.name == "b"
    assert (etc / provision.SECRET).read_text().strip() == other


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("name = 1", "cannot be used"),
        ("wifi = 'x'", "cannot be used"),
        ("name = 'x", "cannot be used"),
        (f"name = '{'x' * 999}'", "cannot be used"),
        ("\0" * 10, "cannot be used"),
        ('join_secret = "\\u0065dgemoa"', "cannot be wiped"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_taken_over(
    tmp_path: Path, text: str, cause: str
) -> None:
    card, etc = tmp_path / "edgemoa.toml", tmp_path / "etc"
    card.write_text(text)
    with pytest.raises(ConfigError, match=cause):
        take_over(card, etc)
    assert not etc.exists()
    assert card.read_text() == text


def test_too_much_is_not_read(tmp_path: Path) -> None:
    card = tmp_path / "edgemoa.toml"
    card.write_bytes(b"#" * (1 << 20))
    with pytest.raises(ConfigError, match="too large"):
        provision.read(card)
    with pytest.raises(ConfigError, match="cannot read"):
        provision.read(tmp_path / "not-there")


def test_the_boards_own_file_goes_before_what_it_was_provisioned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, below = tmp_path / "edgemoa.toml", tmp_path / "provisioned.toml"
    own.write_text('[model]\nname = "mine"\n')
    below.write_text('[model]\nname = "theirs"\n[board]\nname = "x"\nprofile = "pi-zero-2w"\n')
    monkeypatch.setattr(cli_settings, "CONFIG_FILES", (str(own),))
    monkeypatch.setattr(cli_settings, "PROVISIONED", str(below))
    loaded = cli_settings.load()
    assert (loaded.model.name, loaded.board.name, loaded.board.profile) == (
        "mine", "x", "pi-zero-2w",
    )  # fmt: skip
    assert loaded.moa.deadline_s == 1200, "of the profile"
    assert cli_settings.load(str(tmp_path / "edgemoa.toml")).board.name == "x"
    other = tmp_path / "other.toml"
    other.write_text("")
    assert cli_settings.load(str(other)).board.name == ""
