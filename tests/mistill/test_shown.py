"""What strangers wrote is shown as letters: no control character, no markup, no link."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mistill.cli import main
from mistill.shown import facts_table, one_line, plain, visible
from tests.tiny import tiny_model

HOSTILE = "\x1b]0;OWNED\x07\x9b31m\u202e[link=https://example.org]x[/link][/bold]\udcff"


def test_controls_are_spelt_out_and_the_rest_stays():
    assert visible("a\tb\nc \u00e9\ud55c") == "a\tb\nc \u00e9\ud55c"
    assert visible("\x1b[31m\x9b\u202e\U000e0001\udcff") == (
        "\\x1b[31m\\x9b\\u202e\\U000e0001\\udcff"
    )


def test_an_error_of_several_lines_becomes_one_and_is_cut_where_asked_for():
    assert one_line(ValueError("bad\n  shape:\t[2]")) == "bad shape: [2]"
    assert one_line("bad\n  shape", 5) == "bad s"


@given(st.text(max_size=40))
def test_no_text_keeps_a_control(text):
    assert all(letter.isprintable() or letter in "\n\t" for letter in visible(text))
    visible(text).encode()


def test_a_table_shows_markup_as_it_is_written():
    written = io.StringIO()
    console = Console(file=written, width=200, force_terminal=True, color_system=None)
    console.print(facts_table({"name": HOSTILE}))
    console.print(plain(HOSTILE))
    text = written.getvalue()
    assert text.count("[link=https://example.org]x[/link][/bold]") == 2
    assert "\x1b]" not in text
    assert "\x9b" not in text


def test_an_error_and_a_warning_show_no_controls(tmp_path, capsys, monkeypatch):
    assert main(["inspect", str(tmp_path / "\x1b[31mnothing")]) == 2
    error = capsys.readouterr().err
    assert "\\x1b[31mnothing" in error
    assert "\x1b" not in error


@pytest.mark.parametrize("field", ["step", "source", "date"])
def test_a_lineage_of_a_stranger_is_shown_as_letters(tmp_path, capsys, field):
    import json

    folder = tiny_model(tmp_path / "model")
    entry = {"step": "teacher", "settings": {}, "source": "x", "date": "2026"}
    hostile = HOSTILE.replace("\udcff", "")  # half of a character is refused
    entry |= {field: hostile, "note": hostile}
    (folder / "lineage.json").write_text(json.dumps([entry]))
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x9b" not in printed
    assert "\u202e" not in printed
