"""How much everyday replies repeat themselves, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.figures.replies import Replies
from benchmarks.report.columns import columns_of, summary
from benchmarks.report.report import Report
from tests.benchmarks.made import made_comparison

FRUIT = "bananas, oranges, apples, " * 4 + "bananas"
REPLIES = Replies(
    fingerprint="ab" * 32,
    texts=(FRUIT, "A cat sat on a mat.", "Yes."),
    ended=(False, True, True),
)


def test_distinct_runs_are_the_mean_over_replies():
    # FRUIT has 13 words: 12 runs of two and 11 of three, of which 3 differ.
    assert REPLIES.distinct(2) == pytest.approx((3 / 12 + 1 + 1) / 3)
    assert REPLIES.distinct(3) == pytest.approx((3 / 11 + 1 + 1) / 3)
    # The standard deviation of 3/12, 1 and 1 is 0.75 / sqrt(3); its error divides by sqrt(3) again.
    assert REPLIES.distinct_error(2) == pytest.approx(0.75 / 3)


def test_a_run_of_four_words_more_than_three_times_is_a_loop():
    # Ten runs of four words in turn, three of them different: 4, 3 and 3 times.
    assert REPLIES.repeats == (4, 1, 0)
    assert REPLIES.most_repeats == 4
    assert REPLIES.loops == (True, False, False)


def test_the_report_shows_them_for_the_models_that_were_asked():
    comparison = made_comparison()
    asked = replace(comparison.models[-1], replies=REPLIES)
    report = replace(comparison, models=(*comparison.models[:-1], asked))

    titles = [column.title for column in columns_of(report.models, report.reference)]
    assert {"Distinct-2", "Distinct-3", "Repeats", "Looping"} <= set(titles)
    assert "Repeats" not in [
        column.title for column in columns_of(comparison.models, comparison.reference)
    ]
    figures = summary(asked)
    assert (figures["most_repeats"], figures["looping_replies"]) == (4, pytest.approx(1 / 3))
    assert Report.from_json(report.to_json()) == report
    assert "| 75.0 " in report.to_markdown()
