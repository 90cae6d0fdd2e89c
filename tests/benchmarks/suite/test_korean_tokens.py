"""Syllables and tokens are counted as one would by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import engine_tables, korean_tokens
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_tokenizer


def test_syllables_are_the_letters_of_one_block_of_unicode() -> None:
    assert [letter for letter in "가힣각a ㄱㅏ한!漢" if korean_tokens.is_syllable(letter)] == list(
        "가힣각한"
    )


def test_tokens_of_a_syllable_are_those_of_the_text_over_its_syllables(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(tiny_tokenizer(tmp_path / "vocabulary"))
    texts = ["바람이 분다.", "바람 한국어"]
    counted = korean_tokens.count(texts, vocabulary)
    tokens = sum(len(vocabulary.encode(text)) for text in texts)
    assert (counted["syllables"], counted["tokens"]) == (10, tokens)
    assert counted["tokens_per_syllable"] == tokens / 10
    assert counted["different_syllables"] == 8
    # Whether a syllable has a token of its own, asked of the library's tokenizer.
    alone = {letter: len(vocabulary.encode(letter)) == 1 for letter in "바람이분다한국어"}
    in_pieces = [letter for letter in "바람이분다바람한국어" if not alone[letter]]
    assert counted["different_syllables_in_pieces"] == len(set(in_pieces))
    assert counted["share_of_syllables_in_pieces"] == len(in_pieces) / 10


def test_the_rate_of_a_row_is_that_after_its_first_token() -> None:
    rows = {
        "0.4b": {"first_token_seconds": [0.5, 0.25, 9.0], "reply_seconds": [3.0, 3.25]},
        "nf4": {"first_token_seconds": [20.0], "reply_seconds": []},
    }
    # 59 tokens in 2.5 and in 3 seconds.
    rates = korean_tokens.tokens_per_second({"rows": rows, "new_tokens": 60})
    assert rates == {"0.4b": pytest.approx(59 / 2.75)}


def test_the_program_counts_a_file_and_its_table_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(tmp_path / "vocabulary")
    texts = tmp_path / "korean.jsonl"
    texts.write_text(json.dumps({"instruction": "한국어", "input": "바람"}) + "\n", "utf-8")
    laptop: dict[str, Any] = {
        "found": {
            "rows": {"0.4b": {"first_token_seconds": [1.0], "reply_seconds": [2.0]}},
            "new_tokens": 60,
        }
    }
    (tmp_path / "laptop.json").write_text(json.dumps(laptop, indent=1))
    words = [str(texts), "--vocabularies", f"tiny={tmp_path / 'vocabulary'}"]
    words += ["--laptop", str(tmp_path / "laptop.json")]
    monkeypatch.setattr(sys, "argv", ["korean_tokens", *words])
    korean_tokens.main()
    found = json.loads(capsys.readouterr().out)
    tokens = found["vocabularies"]["tiny"]["tokens"]
    lines = engine_tables.korean_tokens(found)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert cells[2][:3] == ["tiny", "384", f"{tokens / 5:.2f}"]
    assert cells[-1] == ["0.4b", "59.0", f"{59 / (tokens / 5):.1f}"]
    texts.write_text('{"text": "English."}\n')
    with pytest.raises(SystemExit):
        korean_tokens.main()
    assert "holds no Korean syllable" in capsys.readouterr().err
