"""Boards as their kernels show them: files made here as Pis, Jetsons and PCs have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoa.hardware import Condition, board_name, condition

PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
ZONE = "sys/class/thermal/thermal_zone{}/temp"
COOLING = "sys/class/thermal/cooling_device{}/{}"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, Condition(None, None, None)),
        ({ZONE.format(0): "61204\n", PI: "0\n"}, Condition(61.204, False, False)),
        ({ZONE.format(0): "84000\n", PI: "80008\n"}, Condition(84.0, True, False)),
        ({PI: "50005\n"}, Condition(None, True, True)),
        # Only in the past: the high half says what has happened since the board started.
        ({PI: "50000\n"}, Condition(None, False, False)),
        ({ZONE.format(0): "40000\n", ZONE.format(7): "52500\n"}, Condition(52.5, None, None)),
        (
            {COOLING.format(0, "type"): "thermal-cpufreq-0\n", COOLING.format(0, "cur_state"): "2"},
            Condition(None, True, None),
        ),
        (
            {COOLING.format(0, "type"): "pwm-fan\n", COOLING.format(0, "cur_state"): "3"},
            Condition(None, None, None),
        ),
        (
            {
                "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
                "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
            },
            Condition(None, None, True),
        ),
        # Broken sensors.
        ({ZONE.format(0): "-274000\n", ZONE.format(1): "hot\n"}, Condition(None, None, None)),
        ({ZONE.format(0): "9" * 5000, PI: "zz"}, Condition(None, None, None)),
    ],
)
def test_condition(tmp_path: Path, files: dict[str, str], told: Condition) -> None:
    assert condition(machine(tmp_path, files)) == told


def test_name_out_of_the_device_tree_first(tmp_path: Path) -> None:
    assert board_name(tmp_path) == ""
    machine(tmp_path, {"sys/class/dmi/id/product_name": "NUC\n"})
    assert board_name(tmp_path) == "NUC"
    machine(tmp_path, {"sys/firmware/devicetree/base/model": "Raspberry Pi 4 Model B Rev 1.5\x00"})
    assert board_name(tmp_path) == "Raspberry Pi 4 Model B Rev 1.5"


def test_this_machine() -> None:
    told = condition()
    assert told.temperature_c is None or -60 < told.temperature_c < 150
