"""Lines of a terminal break between words, and no letter is lost."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from mistill.chat.whole_words import WholeWords


@pytest.mark.parametrize("width", [7, 12, 30])
@pytest.mark.parametrize(
    "text",
    [
        "A cold wind blows from the north.\nIt is strong, and unforgettably-long-lived it is.",
        "\ubc14\ub78c\uc774 \ubd84\ub2e4. \uc624\ub298\uc740 \ub0a0\uc528\uac00 \ub9d1\ub2e4.",
        "  two  spaces\tand a tab\n\n- a list",
    ],
)
def test_lines_break_between_words_and_no_letter_is_lost(text: str, width: int) -> None:
    wrap = WholeWords(width)
    pieces = [wrap.add(letter) for letter in text]
    written = "".join(pieces) + wrap.finish()
    assert re.sub(r"\s", "", written) == re.sub(r"\s", "", text)
    lines = written.split("\n")
    for word in text.split():
        if cell_len(word) < width:
            assert any(word in line for line in lines)
    for line in lines:  # the terminal itself breaks a word that is longer than a line
        if all(cell_len(word) < width for word in line.split()):
            assert cell_len(line.replace("\t", " ")) <= width
    whole = WholeWords(width)
    assert whole.add(text) + whole.finish() == written
