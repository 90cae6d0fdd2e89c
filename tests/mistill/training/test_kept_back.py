"""Documents that are left to a later step: the same ones, whatever stands beside them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from mistill.text.blocks import Document, pack
from mistill.training.kept_back import is_kept_back, share_not_seen, without_kept_back


def documents(count: int, first: int = 0) -> list[Document]:
    rng = np.random.default_rng(1)
    made = []
    for number in range(count):
        ids = rng.integers(first, 1000, 12)
        ids[-1] = number
        made.append(Document(ids, np.arange(12) >= 4))
    return made


def test_a_share_of_the_documents_is_kept_back_by_what_they_say() -> None:
    made = documents(2000)
    kept = [is_kept_back(document, 0.05) for document in made]
    assert 60 < sum(kept) < 140
    # What need not be predicted, such as a date in a system prompt, decides nothing.
    for document, is_kept in zip(made, kept, strict=True):
        other = Document(document.ids.copy(), document.mask)
        other.ids[:4] = 7
        assert is_kept_back(other, 0.05) == is_kept
        assert not is_kept or is_kept_back(document, 0.2), "a larger share holds a smaller one"
    assert not any(is_kept_back(document, 0) for document in made)
    assert all(is_kept_back(document, 1) for document in made)
    ids = made[3].ids[4:].astype("<i8").tobytes()
    place = int(hashlib.sha256(ids).hexdigest()[:8], 16) / 16**8
    assert is_kept_back(made[3], place + 1e-9)
    assert not is_kept_back(made[3], place)

    rest = without_kept_back(iter(made), 0.05)
    assert [document.number for document in rest] == list(np.flatnonzero(~np.array(kept)))
    assert all(document.ids is made[document.number or 0].ids for document in rest)
    assert set(pack(rest, 16).documents[:, 0]) == {document.number for document in rest}
    only = [document for document, is_kept in zip(made, kept, strict=True) if is_kept]
    assert len(without_kept_back(only, 0.05)) == len(only), "there must be something to learn from"


@pytest.mark.parametrize(
    ("settings", "share"),
    [({"kept_back_share": 0.05}, 0.05), ({}, 0.0), ({"kept_back_share": "all"}, 0.0), ("?", 0.0)],
)
def test_what_was_not_seen_is_read_off_the_steps(settings: Any, share: float) -> None:
    step = {"step": "distill", "texts": ["chats.jsonl", "plain.txt"], "settings": settings}
    assert share_not_seen("chats.jsonl", [step]) == share
    assert share_not_seen("other.jsonl", [step]) == 1
    assert share_not_seen("chats.jsonl", [{**step, "step": "gptq"}]) == 1
    assert share_not_seen("chats.jsonl", [{**step, "texts": "chats.jsonl"}]) == 1
    again = {**step, "settings": {"kept_back_share": 0.02}}
    assert share_not_seen("plain.txt", [step, again]) == min(share, 0.02)


def test_a_text_is_known_by_its_file_name() -> None:
    step = {
        "step": "distill",
        "texts": ["chats.txt", "texts/plain.jsonl", "@demo-train", "owner/name:config:split"],
        "settings": {"kept_back_share": 0.1},
    }
    for name in (
        *("chats.txt", "/home/me/chats.txt", "plain.jsonl", "@demo-train"),
        "owner/name:config:split",
    ):
        assert share_not_seen(name, [step]) == 0.1
    for name in ("chats.jsonl", "@demo-held-out", "owner/other"):
        assert share_not_seen(name, [step]) == 1
