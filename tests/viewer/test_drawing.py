# SPDX-License-Identifier: Apache-2.0
"""``capo-verl plot``: the logged numbers at their places, and files that can be opened."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from capo_verl.commands.main import main
from capo_verl.viewer.drawing import OKABE_ITO, draw
from capo_verl.viewer.groups import group_runs
from capo_verl.viewer.load import load_runs
from capo_verl.viewer.panels import shown_panels
from tests.viewer.logs import capo_rows, write_file_log, write_runs

KEYS = ["accuracy", "reward", "rejection", "policy_shift", "objective_shift", "entropy", "length"]


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_panels_show_the_logged_numbers(tmp_path):
    runs = load_runs([write_runs(tmp_path)])
    panels = shown_panels(runs)
    assert [
        panel.key for panel in panels
    ] == KEYS  # no KL, no step scale: panels without data are left out
    figure = draw(group_runs(runs), panels, "completions")
    axes = dict(zip(KEYS, figure.axes, strict=True))
    capo, grpo = axes["accuracy"].lines
    assert points(capo) == [
        (0, pytest.approx(0.4)),
        (160, pytest.approx(0.55)),
        (320, pytest.approx(0.65)),
    ]  # mean of two seeds
    assert len(axes["accuracy"].collections) == 1  # one band
    assert (capo.get_color(), grpo.get_color()) == OKABE_ITO[:2]
    rejection = axes["rejection"]
    assert [line.get_ydata()[0] for line in rejection.lines] == [25.0, 10.0, 40.0]
    assert (
        len({str(line.get_linestyle()) + str(line._dash_pattern) for line in rejection.lines}) == 3
    )
    assert [text.get_text() for text in rejection.get_legend().get_texts()] == [
        "all",
        "A > 0",
        "A < 0",
    ]
    assert axes["policy_shift"].get_yscale() == "log"
    assert axes["entropy"].get_ylabel() == "nats per token"
    assert axes["entropy"].get_xlabel() == "completions"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["capo (2 runs)", "grpo"]


def test_files_of_all_panels_and_of_each(tmp_path, capsys):
    out = tmp_path / "figures"
    assert (
        main(["plot", str(write_runs(tmp_path / "runs")), "--output", str(out), "--x", "steps"])
        == 0
    )
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{key}.{kind}" for key in ["curves", *KEYS] for kind in ("png", "svg")
    )
    for path in out.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for path in out.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "Held-out accuracy" in (out / "curves.svg").read_text()  # text stays text
    assert f"16 files in {out}" in capsys.readouterr().out


def test_the_same_log_gives_the_same_svg(tmp_path):
    log = write_file_log(
        tmp_path / "m.jsonl", [(step, {"actor/entropy": 1 / step}) for step in range(1, 9)]
    )
    for name in ("a", "b"):
        assert main(["plot", str(log), "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a" / "curves.svg").read_bytes() == (
        tmp_path / "b" / "curves.svg"
    ).read_bytes()


@pytest.mark.parametrize("command", ["plot", "report"])
def test_what_cannot_be_read_is_one_line_and_exit_code_2(tmp_path, capsys, command):
    assert main([command, str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(
        f"capo-verl {command}: {tmp_path / 'nowhere'}: no such file or folder; give "
    )


def test_nothing_to_draw_is_said(tmp_path, capsys):
    log = write_file_log(tmp_path / "m.jsonl", [(1, {"own/metric": 1.0})])
    assert main(["plot", str(log), "--output", str(tmp_path / "out")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_a_single_run_of_one_step_can_be_drawn(tmp_path):
    log = write_file_log(tmp_path / "m.jsonl", capo_rows(1))
    assert main(["plot", str(log), "--output", str(tmp_path / "out")]) == 0
    assert "Held-out accuracy" in (tmp_path / "out" / "curves.svg").read_text()


def test_many_runs_leave_room_for_the_panels(tmp_path):
    for number in range(20):
        write_file_log(
            tmp_path / f"a run with a rather long name {chr(97 + number)}" / "metrics.jsonl",
            capo_rows(6),
        )
    groups = group_runs(load_runs([tmp_path]))
    figure = draw(groups, shown_panels(groups[0].runs)[:1], "steps")
    figure.draw_without_rendering()
    names, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert len(groups) == 20
    assert axes.height > 100 and axes.y1 < names.y0
    assert (
        len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 20
    )  # markers where colours repeat
