"""The page about robustness names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "robustness.md").read_text("utf-8")


def test_every_test_that_the_page_names_exists_and_holds_tests():
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) >= 15
    for name in named:
        text = (ROOT / name).read_text("utf-8")
        assert re.search(r"^(def )?test_", text, re.MULTILINE), f"{name} holds no test"


def test_every_row_of_the_table_names_a_test():
    table = PAGE.partition("| test |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) >= 15
    assert all("`tests/" in row for row in rows)


def test_the_page_counts_the_inputs_of_the_fuzz_test_rightly():
    fuzz = (ROOT / "tests" / "test_fuzz.py").read_text("utf-8")
    quick, slow = map(int, re.findall(r"inputs=(\d+)", fuzz))
    assert f"{quick}, and {slow:,} in the slow tests" in PAGE
