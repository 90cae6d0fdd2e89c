"""What the tests of tuning share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_precision_is_fixed_for_other_tests() -> Iterator[None]:
    """TRL's own trainers, which some tests ask, fix the precision of the whole process."""
    from mistill.training.processes import precision_of_its_own

    with precision_of_its_own():
        yield
