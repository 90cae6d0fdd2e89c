from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from benchmarks.picture.drawing import svg_file
from benchmarks.picture.laying_out import draw
from benchmarks.picture.marks import TALL, WIDE, Disc, Plane, Stroke, Words
from benchmarks.picture.scales import divergence_scale, speed_scale
from benchmarks.report.report import Report
from tests.benchmarks.made import made_comparison


@pytest.fixture(scope="module")
def comparison() -> Report:
    return made_comparison()


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
