"""What a step is, from its number alone."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest

from distill.training.on_policy import is_on_policy
from mistill.training.schedule import blocks_of_step, learning_rate_at, step_count
from tests.distill.training.test_step import make_blocks


def test_the_learning_rate_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 10, peak=1.0, warmup=0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert all(later <= earlier for earlier, later in pairwise(rates[1:]))
    assert learning_rate_at(0, 1, peak=1.0, warmup=0.1) == 1.0


def test_every_epoch_reads_every_block_once_in_an_order_of_its_own() -> None:
    read = [blocks_of_step(step, 10, 4, seed=1) for step in range(5)]
    flat = [block for rows in read for block in rows]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert flat[:10] != list(range(10))
    assert blocks_of_step(2, 10, 4, seed=1) == read[2]
    assert blocks_of_step(2, 10, 4, seed=2) != read[2]
    assert Counter(blocks_of_step(0, 2, 6, seed=0)) == {0: 3, 1: 3}


def test_steps_are_counted_in_text_tokens_without_padding() -> None:
    blocks = make_blocks(rows=4, length=24)  # 3 * 24 + 12 tokens
    assert blocks.tokens == 84
    assert step_count(blocks, tokens=420, batch_size=2) == 10
    assert step_count(blocks, tokens=1, batch_size=2) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_student_writes_its_share_of_the_steps_evenly_spread(share: float) -> None:
    written = [is_on_policy(step, share) for step in range(40)]
    for steps in range(1, 41):
        assert sum(written[:steps]) == math.floor(share * steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_the_learning_rate_is_above_0_in_every_step_and_reaches_its_peak(
    steps: int, warmup: float
) -> None:
    rates = [learning_rate_at(step, steps, peak=0.3, warmup=warmup) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.3)
