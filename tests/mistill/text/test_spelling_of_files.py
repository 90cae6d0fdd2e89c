"""The same text in files that other programs spell in another way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
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


def packed(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(text.encode())
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", LINES), ("a.json", LIST), ("a.json", LINES), ("a.jsonl", MARK + LINES)],
)
def test_packed_files_are_read_as_what_they_hold(name: str, text: str, ending: str, tmp_path: Path):
    assert rows(packed(tmp_path / f"{name}{ending}", text)) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_text_is_one_document_and_packed_prompts_are_lines(ending: str, tmp_path: Path):
    file = packed(tmp_path / f"a.txt{ending}", "First.\nSecond.\n")
    assert rows(file) == [{"text": "First.\nSecond.\n"}]
    assert [turns[0]["content"] for turns in read_prompts(str(file))] == ["First.", "Second."]


def test_a_packed_file_that_is_damaged_is_one_line(tmp_path: Path):
    whole = gzip.compress(LINES.encode() * 200)
    for name, content in {
        "cut.jsonl.gz": whole[: len(whole) // 2],
        "flipped.jsonl.gz": whole[:20] + bytes([whole[20] ^ 255]) + whole[21:],
        "none.jsonl.gz": b"plain text",
        "none.jsonl.zst": b"plain text",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=f"{name}.* (damaged|cannot be read|not UTF-8)"):
            rows(tmp_path / name)


def test_what_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.text.rows._LONGEST_LINE", 1 << 16)
    file = packed(tmp_path / "a.jsonl.gz", "x" * (1 << 20))
    with pytest.raises(TextError, match=r"a line of 65,536 characters or more"):
        rows(file)
    with pytest.raises(TextError, match=r"more than 65,536 characters; give JSON lines"):
        rows(packed(tmp_path / "a.json.gz", json.dumps(ROWS * 9000, indent=1)))


def test_a_table_of_commas_has_its_columns_by_name(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text(
        MARK + 'question,answer\n"Who, me?","Yes,\nyou."\n\nWhy?,"Say ""because""."\n', "utf-8"
    )
    read = list(read_rows(str(file)))
    assert [dict(row.value) for row in read] == [
        {"question": "Who, me?", "answer": "Yes,\nyou."},
        {"question": "Why?", "answer": 'Say "because".'},
    ]
    assert [row.origin.rpartition(", ")[2] for row in read] == ["line 3", "line 5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2,3\n", "line 2 has 3 fields and the first line 2"),
        ("a,b\n1\n", "line 2 has 1 fields and the first line 2"),
        ("a,a\n1,2\n", "has the column 'a' twice"),
        ('a,b\n"1,2\n', "is no CSV: unexpected end of data"),
        ('a,b\n"1"x,2\n', "is no CSV"),
    ],
)
def test_what_is_no_table_is_refused_by_its_line(text: str, words: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(TextError, match=words):
        rows(tmp_path / "a.csv")


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
