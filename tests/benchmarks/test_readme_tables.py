"""The tables of README and docs: made from the results, and still what the results say."""

import json
from pathlib import Path

import pytest

from benchmarks import readme_tables as tables
from benchmarks import result_tables

ROOT = Path(__file__).parents[2]


def marks(*names: str) -> str:
    return "".join(f"before {name}\n<!-- table: {name} -->\nstale text\n<!-- end -->\nafter\n" for name in names)


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_says_what_the_results_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.fill(text, tables.RESULTS, tables.PAGES[page]) == text, "run python -m benchmarks.readme_tables"


def test_every_table_stands_on_a_page() -> None:
    assert {name for names in tables.PAGES.values() for name in names} == set(tables.TABLES)


def test_another_result_changes_its_table_alone(tmp_path: Path) -> None:
    for file in tables.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = marks(*tables.TABLES)
    before = tables.fill(text, tmp_path, [*tables.TABLES])
    assert "stale text" not in before
    assert tables.fill(before, tmp_path, [*tables.TABLES]) == before
    data = json.loads((tmp_path / "latency-mid-cpu-float32.json").read_text(encoding="utf-8"))
    data["entries"][0]["latency"]["median"] = 123456.0
    (tmp_path / "latency-mid-cpu-float32.json").write_text(json.dumps(data), encoding="utf-8")
    after = tables.fill(before, tmp_path, [*tables.TABLES])
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 1
    assert "123,456" in changed[0]


def test_every_row_of_every_table_has_its_conditions() -> None:
    for name, make in tables.TABLES.items():
        header, _, *rows = make(tables.RESULTS)
        assert rows, name
        if rows[-1].startswith("Conditions of every row: "):
            assert len(rows[-1]) > 40, name
        else:
            assert header.endswith("| conditions |"), name
            assert all(len(row.split(" | ")[-1].strip("| ")) > 10 for row in rows), name


def test_conditions_that_rows_share_are_said_once() -> None:
    rows = [["a", "1", "one CPU"], ["b", "2", "one CPU"]]
    header = ("row", "ms", "conditions")
    assert result_tables.lay_out(header, rows, left=1) == [
        *("| row | ms |", "| --- | ---: |", "| a | 1 |", "| b | 2 |", "", "Conditions of every row: one CPU.")
    ]
    rows[1][2] = "two CPUs"
    assert result_tables.lay_out(header, rows, left=1)[2:] == ["| a | 1 | one CPU |", "| b | 2 | two CPUs |"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: other -->\n<!-- end -->", "mark of table 'other': expected one of paper"),
        ("<!-- table: paper -->\n", "mark of table 'paper': .* closed by <!-- end -->"),
        ("", "marks of the tables none: expected paper"),
        (marks("steps"), "marks of the tables steps: expected paper"),
        (marks("paper", "paper"), "marks of the tables paper, paper: expected paper"),
    ],
)
def test_wrong_marks_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.fill(text, tables.RESULTS, ["paper"])
