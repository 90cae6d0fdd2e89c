"""Perplexity as people quote it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures.conventions import (
    CONVENTIONS,
    Convention,
    QuotedPerplexity,
    cut_windows,
    spelled_bytes,
)
from benchmarks.figures.perplexity import Perplexity
from benchmarks.settings import QUOTED, BenchSettings
from mistill.errors import SettingsError
from mistill.text.documents import read_stream
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import SENTENCES

LN2 = math.log(2)
SMALL = Convention(context_length=8, first_predicted=5, begins_windows=True)


# --- windows ------------------------------------------------------------------------------------


def test_gptq_predicts_all_but_the_first_of_2048():
    ids = np.arange(2 * 2048 + 700)
    windows = cut_windows(ids, CONVENTIONS["gptq"], bos_id=1)
    assert [len(window.ids) for window in windows] == [2048, 2048]
    assert windows[1].ids[0] == 2048
    assert windows[1].targets.tolist() == list(range(2049, 4096))


def test_llama_cpp_predicts_the_last_255_of_512_after_a_token_for_the_beginning():
    windows = cut_windows(np.arange(1300), CONVENTIONS["llama.cpp"], bos_id=7)
    assert len(windows) == 2
    assert windows[0].targets.tolist() == list(range(257, 512))
    assert windows[1].targets.tolist() == list(range(769, 1024))
    assert windows[1].ids[:3].tolist() == [7, 513, 514]


def test_a_vocabulary_that_writes_no_token_for_the_beginning_gets_none():
    windows = cut_windows(np.arange(16), SMALL, bos_id=None)
    assert windows[1].ids.tolist() == list(range(8, 16))


def test_what_is_shorter_than_a_window_has_none():
    assert cut_windows(np.arange(7), SMALL, bos_id=None) == []


def test_names_of_conventions_are_read_with_commas_and_without():
    given = BenchSettings(perplexity=("gptq, llama.cpp", "gptq"))
    assert given.perplexity == QUOTED == tuple(CONVENTIONS)
    assert BenchSettings(perplexity=given.perplexity) == given
    with pytest.raises(
        SettingsError, match=r"perplexity must be gptq or llama\.cpp, not 'lama.cpp'"
    ):
        BenchSettings(perplexity=("lama.cpp",))


def test_marks_spell_no_bytes():
    windows = cut_windows(np.arange(16), SMALL, bos_id=None)
    # Targets are 5, 6, 7 and 13, 14, 15; even tokens are marks.
    assert spelled_bytes(windows, lambda token: token if token % 2 else 0) == (12, 28)


# --- figures ------------------------------------------------------------------------------------


def quoted(losses: tuple[float, ...], tokens: tuple[int, ...]) -> QuotedPerplexity:
    return QuotedPerplexity(
        convention="gptq",
        context_length=4,
        text_fingerprint="",
        window_losses=losses,
        window_tokens=tokens,
        window_bytes=(10, 6),
    )


def test_figures_of_windows_are_those_worked_by_hand():
    found = quoted((4 * LN2, 12 * LN2), (4, 4))
    # 16 ln 2 over 8 tokens: perplexity 2^2; 16 bits over 16 bytes.
    assert found.value == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(1)
    # Deviations of 4 - 8 and 12 - 8: sqrt(2 / 1 * 32) / 8 = 1 (ln 2), times the perplexity.
    assert found.standard_error == pytest.approx(4 * LN2)
    assert quoted((LN2,), (1,)).standard_error is None


def test_bits_per_byte_are_those_worked_by_hand():
    found = Perplexity(losses=((LN2, 3 * LN2), (2 * LN2,)), passage_bytes=(4, 2))
    assert found.bits_per_byte == pytest.approx(1)
    # Deviations 4 - 4 and 2 - 2: all passages say the same.
    assert found.bits_per_byte_standard_error == pytest.approx(0)
    other = Perplexity(losses=((LN2, 3 * LN2), (2 * LN2,)), passage_bytes=(3, 3))
    # Ratio 1 bit; deviations 1 and -1; sqrt(2 / 1 * 2) / 6.
    assert other.bits_per_byte_standard_error == pytest.approx(1 / 3)
    assert Perplexity(losses=((1.0,),)).bits_per_byte is None


# --- text ---------------------------------------------------------------------------------------


def test_a_text_file_is_one_run_of_tokens(model: Path, tmp_path: Path):
    vocabulary = load_vocabulary(model)
    file = tmp_path / "text.txt"
    text = "\n".join(SENTENCES) + "\n"
    file.write_text(text, "utf-8")
    assert read_stream(file, vocabulary).tolist() == vocabulary.encode(text)


def test_a_long_text_file_is_one_run_of_tokens_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.text.rows.DOCUMENT_CHARACTERS", 30)  # it is read in pieces
    vocabulary = load_vocabulary(model)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(SENTENCES), "utf-8")
    assert read_stream(file, vocabulary).tolist() == vocabulary.encode("\n".join(SENTENCES))


def test_rows_are_joined_by_an_empty_line_as_gptq_joins_them(model: Path, tmp_path: Path):
    vocabulary = load_vocabulary(model)
    file = tmp_path / "rows.jsonl"
    rows = [SENTENCES[0], "", SENTENCES[1]]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    assert read_stream(file, vocabulary).tolist() == vocabulary.encode("\n\n".join(rows))


def test_a_token_for_the_beginning_comes_once(tmp_path: Path):
    from tests.tiny import tiny_tokenizer

    folder = tiny_tokenizer(tmp_path / "tokens")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    vocabulary = load_vocabulary(folder)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(SENTENCES[0]), second.write_text(SENTENCES[1])
    expected = vocabulary.encode("\n\n".join(SENTENCES[:2]))
    assert read_stream([first, second], vocabulary).tolist() == [vocabulary.bos_id, *expected]


def test_conversations_are_written_out_by_the_template(model: Path, chats: Path):
    vocabulary = load_vocabulary(model)
    ids = read_stream(chats, vocabulary).tolist()
    text = vocabulary.decode(ids)
    assert text.startswith("<|im_start|>user\n")
    assert text.count("<|im_start|>") == 80
