"""Profiles of boards: each is valid and goes with the catalog, and each machine finds its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoa import cli_board, cli_settings, config, hardware, profiles
from edgemoa.errors import ConfigError
from edgemoa.models.catalog import load_catalog
from edgemoa.profiles import Facts, Profile

GIB = 1 << 30
MIB = 1 << 20
ALL = profiles.load_all()
PI4 = ("raspberrypi,4-model-b", "brcm,bcm2711")


def test_there_is_one_for_every_board_that_we_name() -> None:
    boards = "pi-3b-plus pi-4-2gb pi-4-4gb pi-4-8gb pi-5-4gb pi-5-8gb pi-5-16gb pi-zero-2w"
    jetsons = "jetson-nano jetson-orin-nano jetson-agx-orin"
    assert set(ALL) == {*boards.split(), *jetsons.split(), "generic-arm64", "generic-x86-64"}


@pytest.mark.parametrize("name", ALL)
def test_its_settings_are_valid_and_its_model_fits(name: str) -> None:
    profile = ALL[name]
    loaded = config.load(
        environment={}, flags=[f"board.profile={name}"], profile=lambda _: profile.settings
    )
    for section, table in profile.settings.items():
        for key, value in table.items():
            assert getattr(getattr(loaded, section), key) == value
            assert getattr(getattr(config.Config(), section), key) != value, "it changes nothing"
    entry = load_catalog()[profile.model]
    if profile.service_memory_mb and not entry.default:  # the default one runs in less, slower
        assert entry.memory.bytes + 100 * MIB <= profile.service_memory_mb * MIB


@pytest.mark.parametrize("name", ALL)
def test_each_figure_has_its_source_or_is_called_an_estimate(name: str) -> None:
    text = (profiles.profiles_folder() / f"{name}.toml").read_text()
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line
        if " = " in line and line.split(" = ")[1][0].isdigit() and "memory_gb" not in line:
            said = f"{section} {line}"
            assert "estimated" in said or "documentation" in said or "data sheet" in said, line


@pytest.mark.parametrize(
    ("compatible", "machine", "memory_mb", "found"),
    [
        (PI4, "aarch64", 1848, "pi-4-2gb"),
        (PI4, "aarch64", 3792, "pi-4-4gb"),
        (PI4, "aarch64", 7811, "pi-4-8gb"),
        (PI4, "aarch64", 906, "generic-arm64"),  # a Pi 4 of 1 GB: less than each of its sizes
        (("raspberrypi,5-model-b", "brcm,bcm2712"), "aarch64", 16_220, "pi-5-16gb"),
        (("raspberrypi,5-model-b", "brcm,bcm2712"), "aarch64", 8050, "pi-5-8gb"),
        (("raspberrypi,model-zero-2-w", "brcm,bcm2837"), "aarch64", 416, "pi-zero-2w"),
        (("raspberrypi,3-model-b-plus", "brcm,bcm2837"), "aarch64", 906, "pi-3b-plus"),
        (("nvidia,p3450-0000", "nvidia,tegra210"), "aarch64", 3956, "jetson-nano"),
        (
            ("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"),
            "aarch64", 7620, "jetson-orin-nano",
        ),
        (("nvidia,p3737-0000+p3701-0005", "nvidia,tegra234"), "aarch64", 62_800, "jetson-agx-orin"),
        (("radxa,rock-5b", "rockchip,rk3588"), "aarch64", 16_000, "generic-arm64"),
        ((), "x86_64", 24_000, "generic-x86-64"),
        ((), "riscv64", 4000, "none"),
        (PI4, "aarch64", 0, "generic-arm64"),
    ],
)  # fmt: skip
def test_a_machine_finds_its_own(
    compatible: tuple[str, ...], machine: str, memory_mb: int, found: str
) -> None:
    assert profiles.choose(Facts(compatible, machine, memory_mb * MIB), ALL) == found


def test_the_machine_is_read_from_the_kernels_files(tmp_path: Path) -> None:
    tree = tmp_path / "sys/firmware/devicetree/base"
    tree.mkdir(parents=True)
    (tree / "compatible").write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        3883396 kB\nMemFree: 1 kB\n")
    compatible, _, memory_bytes = hardware.facts(tmp_path)
    assert compatible == PI4
    assert memory_bytes == 3883396 * 1024
    assert hardware.facts(tmp_path / "nothing")[::2] == ((), 0)


def test_what_the_user_sets_goes_before_the_profile_and_that_before_what_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("EDGEMOA_MOA_DEADLINE_S", "EDGEMOA_BOARD_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    file = tmp_path / "edgemoa.toml"
    file.write_text("[board]\nprofile = 'pi-zero-2w'\n[moa]\npromise_s = 77\n")
    monkeypatch.setenv("EDGEMOA_MOA_LAYER_DEADLINE_S", "55")
    loaded = cli_settings.load(str(file), ["moa.max_tokens=44"]).moa
    zero = ALL["pi-zero-2w"].settings["moa"]
    assert (loaded.max_tokens, loaded.layer_deadline_s, loaded.promise_s) == (44, 55, 77)
    assert loaded.deadline_s == zero["deadline_s"] != config.Config().moa.deadline_s
    assert cli_settings.load(str(file), ["board.profile=none"]).moa.deadline_s == 600
    with pytest.raises(ConfigError, match="no profile 'pi-9'") as error:
        cli_settings.load(str(file), ["board.profile=pi-9"])
    assert "pi-zero-2w" in error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "board = 'x'\nmodel = 'y'\nslow_from_c = 80\nthrottle_at_c = 75\nmachine = 'aarch64'",
        "board = 'x'\nmodel = 'y'\nslow_from_c = 70\nthrottle_at_c = 75",
        "board = 'x'\nmodel = 'y'\nslow_from_c = 70\nthrottle_at_c = 75\nmachine = 'z80'",
        "board = 'x'\nmodel = 'y'\nslow_from_c = 70\nthrottle_at_c = 75\nmachine = 'aarch64'\n"
        "devices = ['/etc/shadow']",
        "board = 'x'\nmodel = 'y'\nslow_from_c = 70\nthrottle_at_c = 75\nmachine = 'aarch64'\n"
        "[settings.board]\nstate_dir = '/'",
        "more = 1",
        "=",
    ],
)
def test_one_that_is_not_valid_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.toml").write_text(text)
    with pytest.raises(ConfigError, match="not valid"):
        profiles.load("odd", tmp_path)


def test_the_service_never_gets_the_whole_memory() -> None:
    zero = ALL["pi-zero-2w"]
    assert zero.service_bytes(Facts((), "aarch64", 416 * MIB)) < 380 * MIB
    assert zero.service_bytes(Facts((), "aarch64", GIB)) == 380 * MIB
    assert zero.service_bytes(Facts((), "aarch64", 0)) == 380 * MIB
    generic = ALL["generic-arm64"]
    assert generic.service_bytes(Facts((), "aarch64", GIB)) == round(0.7 * GIB)
    assert generic.service_bytes(Facts((), "aarch64", 0)) == 0


def test_systemd_is_told_the_limit_and_the_devices_that_are_there() -> None:
    facts = Facts((), "aarch64", 8 * GIB)
    profile = Profile(
        "x", "y", 70, 80, machine="aarch64", service_memory_mb=512, devices=("/dev/nul*",)
    )
    text = cli_board.drop_in("x", profile, facts)
    assert "MemoryMax=512M\n" in text
    assert "DeviceAllow=/dev/null rw\n" in text
    assert "PrivateDevices=no\n" in text
    plain = cli_board.drop_in("pi-4-4gb", ALL["pi-4-4gb"], facts)
    assert "PrivateDevices" not in plain
    assert cli_board.drop_in("none", None, facts) == ""
