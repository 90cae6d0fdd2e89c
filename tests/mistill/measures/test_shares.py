"""Confidence intervals of shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.figures.conventions import (
    Convention,
)
from benchmarks.figures.fidelity import Fidelity
from mistill.measures.shares import clustered_interval, simple_interval

LN2 = math.log(2)
SMALL = Convention(context_length=8, first_predicted=5, begins_windows=True)


def test_wilsons_interval_is_the_one_worked_by_hand():
    # 8 of 10 with 1.96: middle (0.8 + 0.19207) / 1.38415, reach sqrt(...) as in every textbook.
    low, high = simple_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert simple_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("right", "asked"), [(0, 5), (1, 7), (30, 40), (399, 400)])
def test_wilsons_interval_is_that_of_scipy(right: int, asked: int):
    from scipy.stats import binomtest

    expected = binomtest(right, asked).proportion_ci(method="wilson")

    assert simple_interval(right, asked) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_tokens_that_resemble_each_other_count_for_less():
    alike = [[1] * 10 if place % 4 else [0] * 10 for place in range(40)]
    mixed = [[int((place + token) % 4 > 0) for token in range(10)] for place in range(40)]
    (low, high), (low_mixed, high_mixed) = clustered_interval(alike), clustered_interval(mixed)
    assert low < low_mixed < 0.75 < high_mixed < high
    # Passages that agree throughout are worth one token each.
    few, many = simple_interval(30, 40), (low, high)
    assert many == pytest.approx(few, abs=0.02)
    # There are never more independent tokens than tokens.
    assert high_mixed - low_mixed >= 0.99 * (
        simple_interval(300, 400)[1] - simple_interval(300, 400)[0]
    )


def test_an_interval_of_tokens_that_all_agree_is_not_empty():
    low, high = clustered_interval([[1] * 20] * 20)
    assert high == 1
    assert 0.98 < low < 0.995
    assert Fidelity(divergences=((0.1,),), agreements=((1, 1), (0, 1))).agreement_interval[0] < 0.75


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        passages = [
            (random.random(30) < share).astype(int).tolist() for share in random.beta(8, 2, size=25)
        ]
        low, high = clustered_interval(passages)
        held += low <= 0.8 <= high
    # 95% of 200, give or take three standard errors of that count.
    assert 180 <= held <= 199
