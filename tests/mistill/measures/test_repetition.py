"""How much a text repeats itself, counted by hand."""

from __future__ import annotations

import pytest

from mistill.measures.repetition import distinct_share, most_repeats, runs_of, words_of


def test_case_and_punctuation_do_not_count():
    assert words_of("Rain, rain -- go AWAY!") == ["rain", "rain", "go", "away"]


def test_runs_overlap():
    assert runs_of("a b c", 2) == [("a", "b"), ("b", "c")]
    assert runs_of("a b", 3) == []


@pytest.mark.parametrize(
    ("text", "length", "share"),
    [
        ("bananas, oranges, bananas, oranges, bananas", 2, 2 / 4),
        ("bananas, oranges, bananas, oranges, bananas", 3, 2 / 3),
        ("one two three four five", 2, 1.0),
        ("no no no no", 1, 1 / 4),
        ("Yes.", 2, 1.0),
        ("", 2, 1.0),
    ],
)
def test_distinct_runs_are_a_share_of_all_of_a_reply(text: str, length: int, share: float):
    assert distinct_share(text, length) == share


def test_the_run_that_stands_most_often_is_counted():
    assert most_repeats("the cat sat down and the cat sat down. The cat sat down!") == 3
    assert most_repeats("to be or not to be", 2) == 2
    assert most_repeats("too short") == 0
