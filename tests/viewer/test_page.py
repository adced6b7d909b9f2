# SPDX-License-Identifier: Apache-2.0
"""The page's data and the text of tokens, without a browser."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from capo_verl.viewer.groups import group_runs
from capo_verl.viewer.load import load_runs
from capo_verl.viewer.page import MOST_RUNS, embed, page_data, render, write_page
from capo_verl.viewer.samples import put_into_text, read_samples
from capo_verl.viewer.token_text import token_pieces
from tests.viewer.logs import SCRIPT_END, sample, write_runs, write_samples


def test_nothing_in_the_data_can_end_its_element():
    data = {SCRIPT_END: "a & b <!-- \u2028 é"}
    text = embed(data)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == data


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    page = render(group_runs(load_runs([write_runs(tmp_path)])), "a < b")
    assert page.count("</script>") == 2
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page and "url(" not in page
    assert "<title>a &lt; b</title>" in page
    assert "default-src 'none'" in page and "unsafe" not in page
    embedded = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    data = json.loads(embedded.group(1))
    assert [run["name"] for run in data["runs"]] == ["capo-seed1", "capo-seed2", "grpo"]
    assert data["runs"][0]["samples"][0]["response"]["text"][2] == SCRIPT_END


def test_data_of_the_curves(tmp_path):
    data = page_data(group_runs(load_runs([write_runs(tmp_path)])))
    first = data["runs"][0]
    assert first["panels"]["accuracy"] == [[[0, 5, 10], [0.35, 0.5, 0.6]]]
    assert first["panels"]["rejection"][2] == [list(range(1, 11)), [40.0] * 10]
    assert first["axes"]["completions"][10] == 320
    assert [(group["label"], group["runs"]) for group in data["groups"]] == [
        ("capo (2 runs)", [0, 1]),
        ("grpo", [2]),
    ]


def test_a_configuration_with_infinity_is_still_json(tmp_path):
    runs = load_runs([write_runs(tmp_path)])
    runs[0].config["clip"] = float("inf")
    assert '"clip":"inf"' in render(group_runs(runs), "t")


def test_too_many_runs_are_refused(tmp_path):
    groups = group_runs(load_runs([write_runs(tmp_path)])) * (MOST_RUNS // 3 + 1)
    with pytest.raises(
        ValueError, match="runs are more than a page can show .*choose with --where"
    ):
        write_page(groups, tmp_path / "r.html")


def test_samples_of_a_repeated_step_are_the_later_ones(tmp_path):
    path = write_samples(
        tmp_path / "capo_tokens.jsonl",
        [
            sample(1, 0, ["a"], []),
            sample(5, 0, ["old"], []),
            sample(5, 0, ["new\u2028"], []),
            sample(3, 1, ["b"], []),
        ],
    )
    with path.open("a") as file:
        file.write('{"step": 9')  # still being written
    found = read_samples(path)
    assert [(s["step"], s["sample"], s["response"]["text"]) for s in found] == [
        (1, 0, ["a"]), (3, 1, ["b"]), (5, 0, ["new\u2028"]),
    ]  # fmt: skip


def test_a_tokenizer_puts_ids_into_text():
    entry = sample(1, 0, ["", ""], [])
    entry["prompt"]["ids"], entry["response"]["ids"] = [72, 105], [195, 169]
    put_into_text(
        [entry], SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    )
    assert entry["prompt"]["text"] == ["H", "i"]
    assert entry["response"]["text"] == ["", "é"]  # one character of two tokens belongs to the last


@pytest.mark.parametrize("text", ["plain words", "é€🙂", "mixed 🙂 text\n\n", ""])
def test_pieces_of_bytes_join_to_the_text(text):
    ids = list(text.encode())
    pieces = token_pieces(ids, lambda part: bytes(part).decode(errors="replace"))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_bytes_that_are_no_character_are_shown_and_pass():
    pieces = token_pieces([0x61, 0xFF, 0x62], lambda part: bytes(part).decode(errors="replace"))
    assert pieces == ["a", "\ufffd", "b"]


def test_a_space_that_a_tokenizer_drops_at_the_start_is_kept():
    words = ["▁Hello", "▁big", "▁wo", "rld", "▁", "▁!"]
    pieces = token_pieces(
        range(6), lambda part: "".join(words[i] for i in part).replace("▁", " ").removeprefix(" ")
    )
    assert pieces == ["Hello", " big", " wo", "rld", " ", " !"]
