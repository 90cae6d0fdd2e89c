"""Judged answers for tests."""

from __future__ import annotations

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
