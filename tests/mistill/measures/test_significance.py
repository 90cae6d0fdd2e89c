"""Significance of changes, against tables and examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mistill.measures.significance import (
    Shift,
    between,
    critical,
    holm,
    of_mean,
    of_tail,
    two_sided,
)


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    # Student's table, as printed in any textbook.
    [(1, 0.95, 12.706), (2, 0.99, 9.925), (4, 0.95, 2.776), (4, 0.999, 8.610), (30, 0.99, 2.750)],
)
def test_students_t_is_that_of_the_tables(freedom: float, confidence: float, t: float):
    assert critical(confidence, freedom) == pytest.approx(t, abs=5e-4)
    assert two_sided(t, freedom) == pytest.approx(1 - confidence, rel=2e-3)


def test_with_much_known_students_t_is_the_normal_distribution():
    for t in (0.5, 1.96, 4.0):
        assert two_sided(t, 1e7) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-4)


def test_welch_is_as_worked_by_hand():
    # Means 2 and 5, variances 1 and 4, three samples each: errors 1/3 and 4/3.
    found = between([1, 2, 3], [3, 5, 7])

    assert found is not None
    assert found.change == pytest.approx(3)
    assert found.error == pytest.approx(math.sqrt(5 / 3))
    assert found.freedom == pytest.approx((5 / 3) ** 2 / ((1 / 9 + 16 / 9) / 2))
    assert between([1], [2, 3]) is None


def test_the_same_tokens_are_compared_token_by_token():
    # Two passages differ by 0.1 and 0.3 throughout; hard tokens stand in both models.
    old = [(1.0, 9.0), (3.0, 5.0)]
    new = [(1.1, 9.1), (3.3, 5.3)]
    found = of_mean(old, new)

    assert found is not None
    assert found.change == pytest.approx(0.2)
    # P / (P - 1) * sum((s - m n)^2) / N^2 = 2 * (0.04 + 0.04) / 16
    assert found.error == pytest.approx(0.1)
    assert found.freedom == 1
    assert of_mean(old[:1], new[:1]) is None


def test_the_tail_moves_with_the_tail_alone():
    random = np.random.default_rng(3)
    old = [tuple(random.gamma(1, 0.1, 50)) for _ in range(40)]
    edge = np.quantile(np.concatenate(old), 0.97)
    new = [tuple(x + 0.5 if x > edge else x for x in passage) for passage in old]
    found = of_tail(old, new)

    assert found is not None
    assert found.change == pytest.approx(0.5)
    assert found.p_value() < 0.001
    same = of_tail(old, old)
    assert same is not None
    assert same.p_value() == 1


def test_holm_is_as_worked_by_hand():
    # 0.01 < 0.05 / 4 and 0.015 < 0.05 / 3 hold; 0.03 > 0.05 / 2 does not, nor what follows it.
    assert holm([0.03, 0.01, 0.04, 0.015], 0.05) == [False, True, False, True]
    assert holm([], 0.05) == []


def test_what_is_too_little_to_count_is_taken_off_first():
    moved = Shift(-0.3, 0.1, 4)

    assert moved.p_value(0.1) == pytest.approx(two_sided(2.0, 4))
    assert moved.p_value(0.3) == 1


def test_no_spread_at_all_is_certainty():
    assert Shift(0.1, 0.0, 1.0).p_value() == 0
    assert Shift(0.0, 0.0, 1.0).p_value() == 1
