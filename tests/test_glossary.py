"""The glossary lists each term once, in order, and names code that exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = [
    [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("| ") and not line.startswith("| term ")
    ]
    for section in (ROOT / "docs" / "glossary.md").read_text("utf-8").split("\n## ")[1:]
]
ROWS = [row for table in TABLES for row in table]


def exists(name: str) -> bool:
    """Whether a path of the repository, or a dotted name of Python, stands for something."""
    if "/" in name:
        return (ROOT / name).exists()
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part):
                return part == parts[-1] and part in fields
            found = getattr(found, part)
        return True
    return False


def test_there_are_two_tables_of_terms():
    assert len(TABLES) == 2
    assert len(TABLES[0]) >= 60


def test_terms_are_sorted_and_occur_once():
    for table in TABLES:
        terms = [row[0].lower() for row in table]
        assert terms == sorted(terms)
    terms = [row[0].lower() for row in ROWS]
    assert len(terms) == len(set(terms))


@pytest.mark.parametrize("row", TABLES[0], ids=lambda row: row[0])
def test_a_term_of_the_field_has_a_source(row):
    assert re.search(r"https://\S+", row[2])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_code_that_a_term_names_exists(row):
    names = re.findall(r"`([^`]+)`", row[-1])
    assert names
    assert [name for name in names if not exists(name)] == []


@pytest.mark.parametrize(
    "name", ["export.to_nothing", "export/nothing.py", "nothing", "export.OnnxSettings.nothing"]
)
def test_a_name_of_nothing_is_noticed(name):
    assert not exists(name)
