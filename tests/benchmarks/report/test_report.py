from __future__ import annotations

import dataclasses
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.figures.column import significant
from benchmarks.picture.drawing import to_png
from benchmarks.picture.laying_out import draw
from benchmarks.report.columns import COLUMNS, columns_of, summary
from benchmarks.report.report import Report
from mistill.errors import TargetExistsError
from tests.benchmarks.made import made_comparison

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def comparison() -> Report:
    return made_comparison()


class Outline(HTMLParser):
    """Checks that elements close in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(html: str) -> Outline:
    parsed = Outline()
    parsed.feed(html)
    parsed.close()
    return parsed


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 3, "0"),
        (0.00312, 3, "0.00312"),
        (0.5, 3, "0.500"),
        (17.44, 3, "17.4"),
        (1234.5, 3, "1,234"),
        (2.4e-8, 3, "2e-8"),
        (0.0196, 2, "0.020"),
        (0.0000998, 2, "0.00010"),
        (0.999, 2, "1.0"),
    ],
)
def test_numbers_keep_their_significant_digits(value: float, digits: int, text: str):
    assert significant(value, digits) == text


def test_distance_from_a_parent_is_shown_where_it_is_another_than_the_reference(
    comparison: Report,
):
    def with_parent(name: str) -> Report:
        last = comparison.models[-1]
        last = dataclasses.replace(last, parent=name, parent_fidelity=last.fidelity)
        return dataclasses.replace(comparison, models=(*comparison.models[:-1], last))

    assert "KL to parent" in with_parent("student").to_markdown()
    assert "KL to parent" not in with_parent("teacher").to_markdown()


def test_every_column_says_what_it_means():
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
    assert all(column.meaning.endswith(".") for column in COLUMNS)


def test_the_terminal_table_fits_ninety_columns(comparison: Report):
    from rich.console import Console

    console = Console(width=90, record=True, file=io.StringIO())
    console.print(comparison.table())
    shown = console.export_text()

    assert "…" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("chatbot-4"))
    assert re.split(r"\s{1,}", row.strip())[:3] == ["chatbot-4", "74.0", "5.58"]
    assert "131" in row
    assert "pruned*" in shown


def test_a_narrow_terminal_gets_several_tables_with_every_name(comparison: Report):
    from rich.console import Console

    console = Console(width=60, record=True, file=io.StringIO())
    console.print(comparison.table())
    shown = console.export_text()

    assert "…" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("chatbot-4 ")]
    assert len(rows) == 2
    assert {"74.0", "131"} <= {word for row in rows for word in row.split()}


def test_markdown_holds_every_figure_with_its_unit(comparison: Report):
    text = comparison.to_markdown()
    table = [line for line in text.split("\n\n")[2].splitlines() if line.startswith("|")]

    assert len(table) == 2 + len(comparison.models)
    assert len({line.count("|") for line in table}) == 1
    assert "Writing (tok/s)" in table[0]
    nf4 = next(line for line in table if "student-nf4" in line)
    assert "6.00 (5.83\u20136.09)" in nf4
    assert "AMD EPYC 7763" in text
    assert "teacher (@smollm2) → student (22 layers)" in text
    assert "What is a &lt;mistral>?" in text


def test_one_model_makes_a_report_too():
    alone = made_comparison(count=1, samples=False)

    assert outline(alone.to_html()).open == []
    assert "| teacher |" in alone.to_markdown()
    assert to_png(draw(alone)).startswith(b"\x89PNG")


# --- the page -----------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_outside(comparison: Report):
    page = comparison.to_html()

    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    named = dict(outline(page).attributes)
    assert not {"src", "href", "srcset", "action", "data", "poster"} & named.keys()
    assert "default-src 'none'" in page


def test_the_page_is_well_formed(comparison: Report):
    parsed = outline(comparison.to_html())

    assert parsed.open == []
    words = "".join(parsed.text)
    assert "What is a <mistral>?" in words
    assert "from the north & it is strong." in words


def test_the_page_shows_every_model_with_every_figure(comparison: Report):
    page = comparison.to_html()

    rows = re.findall(r'<tr data-model="([^"]+)"[^>]*>(.*?)</tr>', page, re.DOTALL)
    assert [name for name, _ in rows] == [model.name for model in comparison.models]
    for name, row in rows:
        values = re.findall(r'<td [^>]*data-value="([^"]*)"', row)
        figures = [
            column.figure(comparison[name])
            for column in columns_of(comparison.models, comparison.reference)
        ]
        assert [float(value) if value else None for value in values] == figures
    assert page.count("<small>beaten by") == 4
    assert "7.3 times smaller than teacher" in page
    assert "5.7 times transformers&#39; generate on student" in page


def test_a_hostile_name_stays_text(comparison: Report):
    hostile = "<script>alert(1)</script>"
    models = (dataclasses.replace(comparison.models[1], name=hostile), *comparison.models[2:])
    renamed = dataclasses.replace(
        comparison, models=models, samples={hostile: {hostile: hostile}}, reference=hostile
    )

    page = renamed.to_html()

    assert hostile not in page
    assert page.count("<script>") == 1


# --- saving -------------------------------------------------------------------------------------


def test_a_report_is_saved_whole(comparison: Report, tmp_path: Path):
    folder = comparison.save(tmp_path / "report")

    assert sorted(file.name for file in folder.iterdir()) == [
        "figure.png",
        "figure.svg",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert Report.from_json((folder / "report.json").read_text("utf-8")) == comparison
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TargetExistsError):
        comparison.save(folder)
    assert comparison.save(folder, overwrite=True) == folder


def test_a_report_that_fails_leaves_nothing(
    comparison: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: object) -> bytes:
        raise OSError("the disk went away")

    monkeypatch.setattr("benchmarks.report.report.to_png", fail)

    with pytest.raises(OSError, match="went away"):
        comparison.save(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_a_laptop_without_matplotlib_gets_the_rest(
    comparison: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    folder = comparison.save(tmp_path / "report")

    assert {file.suffix for file in folder.iterdir()} == {".json", ".md", ".html", ".svg"}
    assert "figure.png is left out: matplotlib is not installed" in caplog.text


def test_the_summary_has_every_column(comparison: Report):
    assert {column.key for column in COLUMNS} <= summary(comparison.models[1]).keys()


def test_a_report_is_short_in_a_prompt_and_a_table_in_a_notebook():
    report = made_comparison()
    assert "\n" not in repr(report)
    assert all(model.name in repr(report) for model in report.models)
    for shown in (str(report), report._repr_html_()):
        assert all(model.name in shown for model in report.models)
        assert "\x1b" not in shown
    last = dataclasses.replace(report.models[-1], name="<script>\x1b[2J")
    hostile = dataclasses.replace(report, models=(*report.models[:-1], last))
    assert "\x1b" not in repr(hostile) + str(hostile)
    assert "<script>" not in hostile._repr_html_()
