"""The same text in files that other programs spell in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import TextError
from mistill.text import read_prompts
from mistill.text.rows import read_rows

ROWS: list[dict[str, Any]] = [{"text": "One.", "n": 1}, {"text": "Two. \u00e9"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LIST = json.dumps(ROWS)
MARK = "\ufeff"


def rows(path: Path) -> list[dict[str, Any]]:
    read = list(read_rows(str(path)))
    for row in read:
        if row.problem is not None:
            raise row.problem
    return [dict(row.value) for row in read]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", MARK + LINES),
        ("a.jsonl", "\n\n" + LINES),
        ("a.JSONL", LINES.replace("\n", "\r\n")),
        ("a.json", LIST),
        ("a.json", MARK + LIST),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", LINES),
        ("a.json", MARK + "\n" + LINES),
    ],
)
def test_rows_are_read_however_the_file_is_spelt(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text, "utf-8")
    assert rows(tmp_path / name) == ROWS


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path):
    for name in ("a.txt", "prompts.txt"):
        (tmp_path / name).write_text(f"{MARK}First.\nSecond {MARK}.\n", "utf-8")
    assert rows(tmp_path / "a.txt") == [{"text": f"First.\nSecond {MARK}.\n"}]
    first = read_prompts(str(tmp_path / "prompts.txt"))[0][0]
    assert first["content"] == "First."


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", LIST, "holds one JSON list and not an object on each line; name it .json"),
        ("a.jsonl", json.dumps(ROWS, indent=2), "name it .json"),
        ("a.json", json.dumps({"data": ROWS, "version": 2}), "an object with the keys data, ver"),
        ("a.json", json.dumps({"data": ROWS}, indent=2), "an object with the keys data"),
        ("a.json", "{}", "not an empty object"),
        ("a.json", LINES + "{", "a.json, line 3"),
    ],
)
def test_what_is_spelt_in_no_way_is_refused_by_name(
    name: str, text: str, words: str, tmp_path: Path
):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(TextError, match=words):
        rows(tmp_path / name)


def test_text_in_another_encoding_says_what_to_do(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("Windows".encode("utf-16"))
    with pytest.raises(TextError, match=r"is not UTF-8 text: .* at byte 0; save it as UTF-8"):
        rows(tmp_path / "a.txt")
