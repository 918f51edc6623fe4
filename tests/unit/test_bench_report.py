"""What the benchmark says: keys, tables, files, and the count of instructions."""

import json
from pathlib import Path

import pytest
from bench.__main__ import SUITES
from bench.figures import Figures
from bench.goals import GOALS
from bench.instructions import totals
from bench.page import markdown, page


@pytest.fixture
def figures() -> Figures:
    found = Figures()
    found.put("hash.512.ours.us", 0.123456)
    found.put("hash.512.limit.us", 0.1)
    found.put("hash.8192.ours.us", 4321.5)
    found.put("hash.8192.goal.us", 3)
    return found


def test_table_has_a_column_per_side_that_was_measured(figures: Figures) -> None:
    assert figures.table("hash, us", "hash", "us", ["512", "8192"]).splitlines() == [
        "hash, us   ours  limit  goal",
        "--------  -----  -----  ----",
        "512       0.123    0.1     -",
        "8192      4,322      -     3",
    ]


def test_figures_are_rounded_to_four_digits(figures: Figures) -> None:
    assert figures.values["hash.512.ours.us"] == 0.1235


def test_file_is_flat_and_gives_the_figures_back(figures: Figures, tmp_path: Path) -> None:
    figures.note("the peer is away")
    figures.note("the peer is away")
    path = tmp_path / "results/latest.json"
    figures.write(path)
    content = json.loads(path.read_text())
    assert content.pop("notes") == ["the peer is away"]
    assert content.pop("machine")
    assert content == figures.values

    again = Figures()
    again.put("hash.512.ours.us", 7)
    again.read(path)
    assert again.values == figures.values | {"hash.512.ours.us": 7}


def test_goals_name_suites_and_sides() -> None:
    for key in GOALS:
        suite, case, side, measure = key.split(".")
        assert suite in SUITES
        assert side == "goal"
        assert case
        assert measure


def test_markdown_of_a_table_and_of_an_empty_one(figures: Figures) -> None:
    rows = figures.rows("hash", "hash", "us", ["512"])
    assert markdown(rows) == "| hash | ours | limit |\n| --- | --: | --: |\n| 512 | 0.123 | 0.1 |"
    assert markdown(figures.rows("memory", "memory", "bytes", ["per_block"])) == "*memory: not measured.*"


def test_page_names_the_machine_the_remarks_and_what_was_not_measured(figures: Figures) -> None:
    text = page(figures, "1 x Abacus", ["the peer is away"])
    assert "Measured on 1 x Abacus." in text
    assert "> the peer is away" in text
    assert "| 8192 | 4,322 | - |" in text, "the goal is not shown"
    assert "*memory per (worker, block), bytes: not measured.*" in text


CALLGRIND = """\
events: Ir
fn=(1) hash_sequence
10 300
cfn=(2) malloc
calls=2 5
11 40
cfn=(3) memcpy
calls=9 5
11 40
fn=(4) match
cfn=(2)
calls=1 5
12 20
cfn=(5) realloc
calls=4 5
12 20
totals: 420
"""


def test_instructions_and_allocations_are_read_out_of_a_file_of_callgrind() -> None:
    assert totals(CALLGRIND.splitlines()) == (420, 2 + 1 + 4)
