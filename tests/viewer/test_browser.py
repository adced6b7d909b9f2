# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: it loads without a network, its controls do what they say, text
cannot run as code.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

selenium = pytest.importorskip("selenium")

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from capo_verl.commands.main import main
from tests.viewer.conftest import SECONDS, requested
from tests.viewer.logs import SCRIPT_END, write_config, write_file_log


def wait(driver, condition, what: str):
    return WebDriverWait(driver, SECONDS).until(lambda _: condition(), message=what)


def find(driver, selector: str):
    return driver.find_element("css selector", selector)


def count(driver, selector: str) -> int:
    return len(driver.find_elements("css selector", selector))


def paths(driver, panel: str) -> list[str]:
    return [
        e.get_attribute("d") for e in driver.find_elements("css selector", f"#panel-{panel} .curve")
    ]


def set_value(driver, selector: str, value: object) -> None:
    driver.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true}))",
        selector, str(value),
    )  # fmt: skip


def errors(driver) -> list[str]:
    return [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]


def texts(driver) -> list[str]:
    return [
        e.get_attribute("textContent")
        for e in driver.find_elements("css selector", "#token-text .token")
    ]


def test_loads_without_network_or_errors(open_page, report):
    driver = open_page()
    assert errors(driver) == []
    assert [url for url in requested(driver) if not url.startswith("data:")] == [report.as_uri()]
    assert count(driver, "#plots figure") == 7


def test_toggling_runs_and_averaging_changes_the_curves(open_page):
    driver = open_page()
    assert (len(paths(driver, "accuracy")), count(driver, "#panel-accuracy .band")) == (
        2,
        1,
    )  # CAPO with a band, GRPO
    assert len(paths(driver, "rejection")) == 3  # all, A > 0, A < 0, of CAPO alone
    find(driver, "#average").click()
    wait(driver, lambda: len(paths(driver, "accuracy")) == 3, "a curve for each run")
    assert (count(driver, "#panel-accuracy .band"), len(paths(driver, "rejection"))) == (0, 6)
    boxes = driver.find_elements("css selector", "#runs input")
    boxes[0].click()
    wait(driver, lambda: len(paths(driver, "accuracy")) == 2, "one run less")
    boxes[1].click()
    wait(driver, lambda: len(paths(driver, "rejection")) == 0, "no run with CAPO left")
    assert "no values of the chosen runs" in find(driver, "#panel-rejection").text
    boxes[0].click()
    wait(driver, lambda: len(paths(driver, "rejection")) == 3, "back again")


def test_smoothing_and_the_x_axis_move_the_points(open_page):
    driver = open_page()
    before = paths(driver, "objective_shift")
    set_value(driver, "#smoothing", 0.9)
    wait(driver, lambda: paths(driver, "objective_shift") != before, "smoothed")
    assert find(driver, "#smoothing-value").text == "0.9"
    set_value(driver, "#smoothing", 0)
    wait(driver, lambda: paths(driver, "objective_shift") == before, "as before")
    options = {
        o.get_attribute("value"): o.is_enabled() for o in Select(find(driver, "#axis")).options
    }
    assert options == {"steps": True, "completions": True, "accepted": True}
    labels = {}
    for axis in options:
        Select(find(driver, "#axis")).select_by_value(axis)
        labels[axis] = driver.execute_script(
            "return document.querySelector('#panel-accuracy').textContent"
        )
    assert "training step" in labels["steps"] and "accepted tokens" in labels["accepted"]
    # 20 steps of 4 prompts times 8 completions; GRPO accepts all 8 tokens of each: 640 and 5,120.
    assert "600" in labels["completions"] and "4,000" in labels["accepted"]


def test_hovering_and_arrow_keys_read_values(open_page):
    driver = open_page()
    Select(find(driver, "#axis")).select_by_value("steps")
    svg = find(driver, "#panel-entropy svg")
    driver.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.END)
    tip = find(driver, "#tip")
    wait(driver, tip.is_displayed, "the tooltip")
    assert "step 20" in tip.text
    assert tip.text.split("\n")[1:] == ["grpo", "0.05"]  # 1 / 20; CAPO ends at step 10
    svg.send_keys(Keys.HOME)
    wait(driver, lambda: "step 1" in tip.text.split("\n")[0], "the first step")
    assert tip.text.split("\n")[1:] == ["capo (2 runs)", "1", "grpo", "1"]
    svg.send_keys(Keys.ESCAPE)
    wait(driver, lambda: not tip.is_displayed(), "closed")
    box = driver.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.left + b.width / 2, b.top + 40]",
        svg,
    )
    driver.execute_script(
        "arguments[0].dispatchEvent(new PointerEvent('pointermove', {clientX: arguments[1], "
        "clientY: arguments[2]}))",
        svg,
        *box,
    )
    wait(driver, tip.is_displayed, "the tooltip of the mouse")
    assert count(driver, "#panel-entropy .cross[visibility=visible]") == 1


def test_configurations_side_by_side(open_page):
    driver = open_page()

    def rows() -> dict[str, list[str]]:
        found = driver.find_elements("css selector", "#config-table tbody tr")
        return {
            row.find_element("css selector",
                "th").text: [c.text for c in row.find_elements("css selector",
                    "td")] for row in found
        }  # fmt: skip

    assert rows() == {
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max": [
            "0.0001",
            "0.0001",
            "not set",
        ],
        "data.seed": ["1", "2", "1"],
        "trainer.note": ["not set", "not set", SCRIPT_END.replace('"', '\\"')],
    }
    find(driver, "#only-differences").click()
    wait(driver, lambda: len(rows()) == 5, "all keys")
    assert count(driver, "#config-table tr.differs") == 3
    find(driver, "#config-search").send_keys("rollout.n")
    wait(driver, lambda: rows() == {"actor_rollout_ref.rollout.n": ["8", "8", "8"]}, "found")
    assert find(driver, "#config-count").text == "1 of 5 keys"


def test_tokens_in_their_text(open_page):
    driver = open_page()
    assert (
        Select(find(driver, "#token-step")).first_selected_option.text == "step 5"
    )  # the last one
    Select(find(driver, "#token-step")).select_by_visible_text("step 1")
    wait(driver, lambda: texts(driver)[:2] == ["one ", "two "], "the first sequence")
    assert texts(driver)[2] == SCRIPT_END  # as text: nothing of it has run
    assert driver.title == "CAPO report"
    assert count(driver, "#tokens img, #configurations img") == 0
    Select(find(driver, "#token-sequence")).select_by_index(1)
    wait(driver, lambda: len(texts(driver)) == 5, "the second sequence")
    assert texts(driver) == ["a↵\n", " b", "▯", "d", "é"]
    tokens = driver.find_elements("css selector", "#token-text .token")
    assert ["rejected" in t.get_attribute("class") for t in tokens] == [
        False,
        False,
        True,
        False,
        True,
    ]
    verdicts = [t.get_attribute("aria-label").split(", id ")[0] for t in tokens]
    assert verdicts[2].endswith("outside the trust region, trained on") and verdicts[4].endswith(
        "rejected"
    )
    assert all("negative" in t.get_attribute("class") for t in tokens)
    shares = [
        float(
            driver.execute_script("return arguments[0].style.getPropertyValue('--share')", t)[:-1]
        )
        for t in tokens
    ]
    assert (
        shares == sorted(shares) and shares[0] == 0 and shares[-1] == 90
    )  # m_F grows tenfold from token to token
    assert "5 tokens, 2 outside the trust region, 3 inside" in find(driver, "#token-about").text


def test_the_filter_leaves_rejected_tokens_only(open_page):
    driver = open_page()
    Select(find(driver, "#token-step")).select_by_visible_text("step 1")
    wait(driver, lambda: len(texts(driver)) == 4, "the first sequence")
    find(driver, "#rejected-only").click()
    wait(
        driver, lambda: texts(driver) == ["▯", "é"], "of the only sequence of step 1 that has some"
    )
    assert [o.text for o in Select(find(driver, "#token-sequence")).options] == [
        "sequence 1: 2 of 5 rejected, chosen for them"
    ]
    assert [e.text.strip() for e in driver.find_elements("css selector", "#token-text .gap")] == [
        "⋯ 2",
        "⋯ 1",
    ]
    find(driver, "#rejected-only").click()
    wait(driver, lambda: len(texts(driver)) == 5, "all tokens again")


def test_what_a_tool_says_between_turns_is_not_the_policys(open_page):
    driver = open_page()
    Select(find(driver, "#token-step")).select_by_visible_text("step 2")
    wait(driver, lambda: texts(driver) == ["1", "+", "2", "=3", "!", "so", "3"], "the turns")
    spoken = "; 2 tokens between or beside them are not the policy's"
    about = find(driver, "#token-about").text
    assert "5 tokens, 2 outside the trust region, 3 inside. 2 turns" + spoken in about
    assert [e.text for e in driver.find_elements("css selector", "#token-text .voice")] == [
        "turn 1", "not the policy's", "turn 2",
    ]  # fmt: skip
    tools = driver.find_elements("css selector", "#token-text .foreign .token")
    assert [t.text for t in tools] == ["=3", "!"]
    assert all("not the policy's" in t.get_attribute("aria-label") for t in tools)
    assert all("rejected" not in t.get_attribute("class") for t in tools)
    find(driver, "#rejected-only").click()
    wait(driver, lambda: texts(driver) == ["+", "3"], "the rejected ones")
    assert find(driver, "#token-text .foreign").text.strip() == "not the policy's⋯ 2"
    assert errors(driver) == []


def test_tokens_are_reached_by_keyboard(open_page):
    driver = open_page()
    driver.execute_script("document.querySelector('#rejected-only').focus()")
    driver.switch_to.active_element.send_keys(Keys.TAB)
    tip = find(driver, "#tip")
    wait(driver, tip.is_displayed, "the numbers of the first token")
    assert tip.text.split("\n")[:2] == ['"x"', "accepted"]
    driver.switch_to.active_element.send_keys(Keys.END)
    wait(driver, lambda: tip.text.startswith('"z"'), "the last token")
    assert tip.text.split("\n") == [
        '"z"', "rejected", "id", "2", "m_F", "1.00e-5 nats", "m_H", "0.001", "advantage", "1",
        "probability", "0.5", "weight", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def odd_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about a run with gaps and with values in small ranges, and one with odd names."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [
        (
            step,
            {
                "actor/entropy": math.nan if step in (5, 7) else 1.0,
                "critic/score/mean": 1000.0001 + 1e-5 * step,
                "capo/objective_shift_p50": 1e-3 + 1e-4 * step,
                "capo/objective_shift_p99": -1e-5 * step,
                "capo/kl_mean": 1.02e-4 + 1e-8 * step,
                "capo/lr": 1.0 + 1e-16 * step,
                "capo/batch_objective_shift_before": 12_345_678.0 + step,
                "response_length/mean": 1e99,
            },
        )
        for step in range(20)
    ]
    write_file_log(folder / "runs" / "gaps" / "metrics.jsonl", rows)
    odd = folder / "runs" / SCRIPT_END.replace("/", "")
    write_file_log(odd / "metrics.jsonl", [(1, {"capo/weight_mean": math.nan})])
    write_config(odd, constructor={"toString": [math.nan]})
    arguments = [str(folder / "runs"), "--output", str(folder / "report.html")]
    assert main(["report", *arguments]) == 0
    return folder / "report.html"


def labels(driver, panel: str, axis: str = "y") -> list[str]:
    found = driver.find_elements("css selector", f"#panel-{panel} .tick-{axis}")
    return [e.get_attribute("textContent") for e in found]


@pytest.mark.parametrize(
    ("panel", "first"),
    [
        ("reward", ["1,000.0001", "1,000.00015", "1,000.0002"]),
        ("objective_shift", ["0", "0.0005", "0.001"]),
        ("kl", ["1.0200e-4", "1.0205e-4", "1.0210e-4"]),
        ("batch_objective_shift", ["12,345,680", "12,345,685", "12,345,690"]),
        ("rate", ["0.5", "1", "2"]),
        ("length", ["0", "2e98", "4e98"]),
        ("entropy", ["0", "0.2", "0.4"]),
    ],
)
def test_labels_of_ticks_tell_them_apart(open_page, odd_report, panel, first):
    driver = open_page(page=odd_report)
    found = labels(driver, panel)
    assert len(set(found)) == len(found) > 1
    assert found[:3] == first


def test_labels_of_ticks_are_within_the_picture(open_page, odd_report):
    driver = open_page(page=odd_report)
    outside = driver.execute_script(
        "return [...document.querySelectorAll('.plot .tick-y')].filter((e) => "
        "e.getBBox().x < 0).map((e) => e.textContent)"
    )
    assert outside == []


def test_a_gap_is_no_line_and_is_read_as_no_number(open_page, odd_report):
    driver = open_page(page=odd_report)
    assert errors(driver) == []
    (path,) = paths(driver, "entropy")
    assert path.count("M") == 3 and path.count("L") == 4 + 0 + 11
    assert count(driver, "#panel-entropy circle") == 1  # step 6, without a line to a neighbour
    svg = find(driver, "#panel-entropy svg")
    driver.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 5)
    tip = find(driver, "#tip")
    wait(driver, tip.is_displayed, "the tooltip")
    assert tip.text.split("\n") == ["step 5", "gaps", "no number"]
    set_value(driver, "#smoothing", 0.9)
    assert paths(driver, "entropy") == [path]  # of equal values


def test_small_differences_are_read_in_the_tooltip(open_page, odd_report):
    driver = open_page(page=odd_report)
    svg = find(driver, "#panel-reward svg")
    driver.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    tip = find(driver, "#tip")
    wait(driver, tip.is_displayed, "the tooltip")
    assert tip.text.split("\n")[-1] == "1,000.00011"


def test_notes_and_odd_names_are_shown_as_text(open_page, odd_report):
    driver = open_page(page=odd_report)
    assert find(driver, "#notes summary").text == "Not all could be read or drawn: 2 notes"
    notes = [e.text for e in driver.find_elements("css selector", "#notes li")]
    assert any("capo/weight_mean is NaN" in note and SCRIPT_END[2:9] in note for note in notes)
    assert (driver.title, count(driver, "main img")) == ("CAPO report", 0)
    cells = [e.text for e in driver.find_elements("css selector", "#config-table tbody th")]
    assert "constructor.toString" in cells


def test_without_notes_there_is_no_box(open_page):
    assert not find(open_page(), "#notes").is_displayed()


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_fits_the_window_in_both_themes(open_page, tmp_path, width, theme):
    driver = open_page(width=width)
    root = find(driver, "html")
    if root.get_attribute("data-theme") != theme:
        find(driver, "#theme").click()
    wait(driver, lambda: root.get_attribute("data-theme") == theme, theme)
    Select(find(driver, "#token-step")).select_by_visible_text("step 1")
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[theme]
    wide = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]  # nothing to scroll sideways
    picture = tmp_path / f"{theme}-{width}.png"
    assert driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000
    assert errors(driver) == []
