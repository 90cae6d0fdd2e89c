"""Every line that docs/data.md shows is read as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mistill.errors import TextError
from mistill.preferences.reading import read_labelled, read_pairs
from mistill.text.documents import read_documents, read_prompts
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
ROWS, PROMPTS, PAIRS, LABELS = (
    block.strip().splitlines()
    for block in re.findall(r"```jsonl\n(.*?)```", PAGE.read_text(), re.S)
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory):
    return load_vocabulary(tiny_tokenizer(tmp_path_factory.mktemp("vocabulary")))


@pytest.mark.parametrize("line", ROWS)
def test_a_row_of_the_page_is_read_and_its_last_words_are_learned(line, vocabulary, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    (document,) = read_documents(file, vocabulary)
    learned = vocabulary.decode(document.ids[document.mask].tolist())
    row = json.loads(line)
    last = list(row.values())[-1]
    while isinstance(last, list):
        last = last[-1]
    last = last if isinstance(last, str) else list(last.values())[-1]
    # Nothing predicts the first token of a plain text.
    assert last[4:] in learned


@pytest.mark.parametrize("line", PROMPTS)
def test_a_prompt_of_the_page_is_read(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    ((*_, last),) = read_prompts(file)
    assert last == {"role": "user", "content": "What is a mistral?"}


@pytest.mark.parametrize("line", PAIRS)
def test_a_pair_of_the_page_is_read(line, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(line)
    (pair,) = read_pairs(file)
    assert pair.prompt.messages[-1] == {"role": "user", "content": "What is a mistral?"}
    assert pair.chosen == {"role": "assistant", "content": "A cold wind."}
    assert pair.rejected == {"role": "assistant", "content": "A cheese."}
    assert pair.margin == (None if "score" not in line else 4.5 if "score_chosen" in line else 3.5)


@pytest.mark.parametrize("line", LABELS)
def test_a_label_of_the_page_is_read(line, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(line)
    (labelled,) = read_labelled(file)
    assert labelled.good
    assert labelled.answer["content"] == "A cold wind."
    with pytest.raises(TextError, match="the loss kto"):
        read_pairs(file)


def test_a_row_of_other_columns_is_sent_to_the_page(vocabulary, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"frage": "Was?", "antwort": "Das."}')
    with pytest.raises(TextError, match=r"docs/data\.md shows a line of each"):
        list(read_documents(file, vocabulary))
    with pytest.raises(TextError, match=r"docs/data\.md shows a line of each"):
        read_prompts(file)
