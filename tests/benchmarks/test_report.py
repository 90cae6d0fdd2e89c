from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks.figures.column import significant
from benchmarks.figures.comparison import SCHEMA
from benchmarks.figures.frontier import dominators
from benchmarks.figures.latency import Latency, Turn
from benchmarks.figures.model_result import ModelResult
from benchmarks.picture.drawing import svg_file, to_png
from benchmarks.picture.laying_out import draw
from benchmarks.picture.marks import TALL, WIDE, Disc, Plane, Stroke, Words
from benchmarks.picture.scales import divergence_scale, speed_scale
from benchmarks.report.columns import COLUMNS, columns_of, summary
from benchmarks.report.report import Report
from mistill.errors import FolderError, SettingsError, TargetExistsError
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


# --- JSON ---------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was(comparison: Report):
    assert Report.from_json(comparison.to_json()) == comparison


def test_json_holds_derived_figures_for_scripts(comparison: Report):
    document = json.loads(comparison.to_json())

    assert document["schema"] == SCHEMA
    record = document["models"][6]["summary"]
    assert record["size_mb"] == pytest.approx(74)
    assert record["bits_per_weight"] == pytest.approx(74 * 8 / 106)
    assert record["decode_tokens_per_second"] == pytest.approx(131)
    assert record["mean_kl_nats"] == comparison["chatbot-4"].mean_kl
    assert record["slow_token_ms"] == pytest.approx(1000 * 1.06 / 131)
    assert document["models"][0]["summary"]["mean_kl_nats"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "mistill-comparison-99"}'])
def test_what_is_not_a_report_is_refused(text: str):
    with pytest.raises(FolderError, match="the report"):
        Report.from_json(text)


def test_a_model_is_found_by_its_name(comparison: Report):
    assert comparison["student-nf4"].form == "nf4"
    with pytest.raises(KeyError, match="not among teacher, pruned"):
        comparison["stranger"]


def test_speedup_is_over_transformers_on_the_model_named(comparison: Report):
    assert comparison.speedup("chatbot-4", over="student") == pytest.approx(131 / 23)
    with pytest.raises(SettingsError, match="was not timed on chatbot-8"):
        comparison.speedup("chatbot-4", over="chatbot-8")


# --- the frontier -------------------------------------------------------------------------------


def placed(model: ModelResult, *, speed: float, size: int, name: str) -> ModelResult:
    turn = Turn(prompt_tokens=1, first_token_seconds=1.0, token_seconds=(1 / speed,))
    return dataclasses.replace(
        model,
        name=name,
        latency=Latency(turns=(turn,)),
        footprint=dataclasses.replace(model.footprint, weight_bytes=size),
    )


def test_a_model_worse_in_one_thing_and_better_in_none_is_dominated(comparison: Report):
    model = comparison["student"]
    best = placed(model, speed=20, size=100, name="best")
    slower = placed(model, speed=10, size=100, name="slower")
    slower_and_smaller = placed(model, speed=10, size=50, name="smaller")

    found = dominators([best, slower, slower_and_smaller])

    assert found == {"best": (), "slower": ("best", "smaller"), "smaller": ()}


def test_differences_within_the_noise_dominate_nobody(comparison: Report):
    model = comparison["student"]
    one = placed(model, speed=20.2, size=1000, name="one")
    other = placed(model, speed=20.0, size=1010, name="other")

    assert dominators([one, other]) == {"one": (), "other": ()}


def test_fidelity_saves_a_large_and_slow_model(comparison: Report):
    found = dominators(comparison.models)

    assert found["teacher"] == ()
    assert "student" in found["pruned"]


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


# --- the picture --------------------------------------------------------------------------------


def test_faster_is_to_the_right_and_closer_is_higher(comparison: Report):
    places = {
        mark.name: mark.centre for mark in draw(comparison) if isinstance(mark, Disc) and mark.name
    }

    assert len(places) == 7
    assert places["student-nf4"][0] < places["teacher"][0] < places["chatbot-4"][0]
    assert places["teacher"][1] < places["chatbot-8"][1] < places["pruned"][1]


def test_the_area_of_a_disc_is_the_size_on_disk(comparison: Report):
    radii = {m.name: m.radius for m in draw(comparison) if isinstance(m, Disc) and m.name}

    assert (radii["teacher"] / radii["chatbot-4"]) ** 2 == pytest.approx(538 / 74)


@pytest.mark.parametrize("plane", [WIDE, TALL], ids=lambda plane: plane.name)
def test_names_stay_in_the_picture_and_off_each_other(comparison: Report, plane: Plane):
    marks = draw(comparison, plane)
    names = [mark for mark in marks if isinstance(mark, Words) and mark.name]

    assert {name.text for name in names} == {model.name for model in comparison.models}
    for mark in names:
        assert 0 < mark.place[0] < plane.width
        assert plane.top < mark.place[1] < plane.bottom < plane.height
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            beside = abs(one.place[0] - other.place[0]) > 4.3 * (len(one.text) + len(other.text))
            assert beside or abs(one.place[1] - other.place[1]) >= 15
    upper = min(m.points[0][1] for m in marks if isinstance(m, Stroke) and m.role == "grid")
    for words in (m for m in marks if isinstance(m, Words) and m.role == "legend"):
        assert words.place[0] + 7.3 * len(words.text) <= plane.width
        assert words.place[1] < upper


def test_divergences_of_many_sizes_get_a_logarithmic_axis_with_a_place_for_zero():
    scale = divergence_scale([0.0, 2e-8, 0.003, 0.05, 1.3])

    assert scale.logarithmic
    assert scale.place(0.0) == scale.place(2e-8) == scale.zero
    assert scale.place(0.0) < scale.place(0.003) < scale.place(0.05) < scale.place(1.3)
    equally_far = scale.place(0.1) - scale.place(0.01), scale.place(1.0) - scale.place(0.1)
    assert equally_far[0] == pytest.approx(equally_far[1])


def test_divergences_of_one_size_get_a_linear_axis_from_zero():
    scale = divergence_scale([0.0, 0.5, 1.3])

    assert not scale.logarithmic
    assert scale.place(1.0) - scale.place(0.5) == pytest.approx(scale.place(0.5) - scale.place(0.0))
    assert scale.ticks[0] == 0


def test_equal_ratios_of_speed_are_equally_far_apart():
    scale = speed_scale([5, 100])

    assert scale.place(20) - scale.place(10) == pytest.approx(scale.place(100) - scale.place(50))
    assert scale.ticks == (5, 10, 20, 50, 100)


def test_a_picture_file_needs_nothing_from_outside(comparison: Report):
    file = svg_file(draw(comparison), "Title & more", "What is <seen>")

    root = ET.fromstring(file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    discs = root.iter("{http://www.w3.org/2000/svg}circle")
    assert sum("data-model" in part.attrib for part in discs) == len(comparison.models)
    assert not re.search(r"url\(|@import|href|<script", file)
    assert file.count("http") == 1


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
