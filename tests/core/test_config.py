"""Settings from file, environment and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoa import config
from edgemoa.errors import ConfigError


def test_the_reference_is_valid_and_says_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "edgemoa.toml"
    file.write_text(config.reference())
    assert config.load(file, environment={}) == config.Config()


def test_every_setting_says_what_it_means() -> None:
    listed = list(config.settings())
    assert len(listed) > 20
    for section, key, _, meaning in listed:
        assert len(meaning) > 10, f"{section}.{key}"


def test_flags_go_before_environment_before_file(tmp_path: Path) -> None:
    file = tmp_path / "edgemoa.toml"
    file.write_text("[net]\nport = 1\n[moa]\nlayers = 2\nproposers = 1\n")
    loaded = config.load(
        file,
        environment={"EDGEMOA_NET_PORT": "2", "EDGEMOA_MOA_LAYERS": "3", "EDGEMOA_OTHER": "x"},
        flags=["net.port=3"],
    )
    assert (loaded.net.port, loaded.moa.layers, loaded.moa.proposers) == (3, 3, 1)


def test_values_given_as_text_have_the_settings_type() -> None:
    loaded = config.load(
        environment={},
        flags=[
            "net.mdns=false",
            "net.interfaces=127.0.0.1,::1",
            'net.seeds=["a:1"]',
            "api.socket_mode=0o600",
            "moa.proposal_temperature=0.5",
            "board.name=42",
            "log.level=debug",
        ],
    )
    assert loaded.net.mdns is False
    assert loaded.net.interfaces == ("127.0.0.1", "::1")
    assert loaded.net.seeds == ("a:1",)
    assert loaded.api.socket_mode == 0o600
    assert loaded.board.name == "42"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[nett]\n", ("nett", "net")),
        ("[net]\nprot = 1\n", ("net.prot", "port")),
        ("net = 1\n", ("section",)),
        ("[net]\nport = 70000\n", ("65535", "net.port")),
        ("[net]\nport = true\n", ("int", "net.port")),
        ("[net]\nport = ", ("TOML",)),
        ("[moa]\nquorum = 9\n", ("quorum",)),
        ("[moa]\ndeadline_s = 5\n", ("deadline",)),
    ],
)
def test_what_is_wrong_is_named_with_the_next_step(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "edgemoa.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file, environment={})
    told = f"{caught.value} {caught.value.hint}"
    assert all(word in told for word in words), told
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (config.MAX_FILE_BYTES + 1))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for file in (tmp_path / "missing.toml", tmp_path, large, binary):
        with pytest.raises(ConfigError):
            config.load(file, environment={})
    for flag in ("port", "port=1", "=", "net.=1"):
        with pytest.raises(ConfigError):
            config.load(environment={}, flags=[flag])


ROOT = Path(__file__).parents[2]


def test_the_packaged_configuration_is_the_reference() -> None:
    assert (ROOT / "packaging" / "edgemoa.toml").read_text() == config.reference()
