"""Judged answers for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import SENTENCES


def pair_rows(count: int = 40) -> list[dict[str, str]]:
    """Pairs of which the better answer is another sentence, of about the same length."""
    return [
        {
            "prompt": f"Question {n}? {SENTENCES[n % 6]}",
            "chosen": f"{SENTENCES[(n * 5 + 1) % 6]} {n}",
            "rejected": f"{n * 7} numbers: " + "1 2 3 4 5 "[: 2 + n % 8] * (1 + n % 5),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of answers, as JSON lines; read only."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pair_rows()), "utf-8")
    return file
