"""``edgemoa sim`` and ``edgemoa plan`` as a person or a script uses them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from edgemoa.cli import main
from edgemoa.core.rates import DecodeRate, PrefillRate, Rates
from edgemoa.sim.recording import Recording, write_recording

SHORT = ["--seconds", "200", "--rate", "3/min"]


def test_a_sweep_as_table_json_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    argv = ["sim", "--paper", "--seconds", "200", "--sweep", "rate=3:9:3/min", "--proposers", "1,2",
            "--csv", str(file)]  # fmt: skip
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"]
    assert [(p["k"], round(60 * p["rate"])) for p in told["points"]] == [
        (1, 3), (1, 6), (1, 9), (2, 3), (2, 6), (2, 9),
    ]  # fmt: skip
    assert told["points"][0]["theory"]["uniform_per_s"] == pytest.approx(1 / 3)
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["digest"] for row in rows] == [p["digest"] for p in told["points"]]
    assert main(argv) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize(("kind", "ending"), [("latency", "svg"), ("queue", "png"),
                                              ("stability", "svg")])  # fmt: skip
def test_plots(kind: str, ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{ending}"
    sweep = [] if kind == "latency" else ["--sweep", "rate=.02:.06:.02", "--pick",
                                          "uniform,shortest"]  # fmt: skip
    assert main(["sim", *SHORT, *sweep, "--plot", str(file), "--plot-kind", kind]) == 0
    assert file.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


@pytest.mark.parametrize("wrong", [
    ["--rate", "2/fortnight"], ["--rate", "x"], ["--rate", "-1"], ["--sweep", "rate=1:2:0"],
    ["--sweep", "other=1:2:1"], ["--sweep", "rate=.1:1:.0001"], ["--pick", "best"],
    ["--node", "ladder=perhaps"], ["--node", "unknown=1"], ["--plot", "x.pdf"],
    ["--plot-kind", "queue"], ["--service", "0"], ["--warm-up", "900"],
])  # fmt: skip
def test_errors_say_what_is_wrong(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *wrong, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid_request"


def test_a_plan_from_estimates_and_a_recording(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "shelf.json"
    rates = Rates((PrefillRate(64, 2.0),), (DecodeRate(1, 64, 20.0), DecodeRate(4, 64, 40.0)))
    write_recording(file, Recording(1, "shelf", "m", 2, rates))
    argv = ["plan", "--boards", "pi5:2", "--board", f"shelf={file}:1", "--rate", "1/min", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert [board["name"] for board in told["boards"]] == ["pi5 1", "pi5 2", "shelf"]
    assert told["boards"][0]["recording"].startswith("estimate")
    by_plan = {(p["M"], p["k"]): p for p in told["plans"]}
    assert by_plan[0, 0]["uniform_per_min"] > by_plan[1, 2]["uniform_per_min"] > 1
    assert by_plan[1, 2]["carried"]
    assert by_plan[1, 2]["limiting_board"]
    assert "M=1, k=2" in told["recommendation"]
    assert main(["sim", "--nodes", "2", "--board", str(file), *SHORT]) == 0


def test_plans_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for argv, code in (
        (["--boards", "toaster:1"], 2), ([], 2), (["--boards", "pi5:0"], 2),
        (["--boards", "pi5:99"], 2), (["--boards", "pi5:1", "--model", "none"], 4),
        (["--board", f"x={tmp_path / 'bad.json'}"], 2), (["--boards", "pi5:1", "--rate", "0"], 2),
    ):  # fmt: skip
        assert main(["plan", *argv, "--json"]) == code, argv
        assert json.loads(capsys.readouterr().out)["error"]["message"]
