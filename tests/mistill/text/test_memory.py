"""Texts in memory are read as the same rows in a file are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks
import distill
import export
import mistill
import quantize
from mistill.errors import FolderError, TextError
from mistill.folders.lineage import read_lineage
from mistill.sources.source import resolve_model
from mistill.text.documents import read_documents, read_prompts, read_stream
from mistill.text.rows import check_texts, sources_of
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.tiny import SENTENCES, tiny_tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you."}]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"question": "Two and two?", "answer": "Four."},
    {"text": "The mistral is a wind."},
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(tiny_tokenizer(tmp_path_factory.mktemp("vocabulary")))


def ids_of(texts: Any, vocabulary: Vocabulary) -> list[list[int]]:
    return [document.ids.tolist() for document in read_documents(texts, vocabulary)]


def file_of(rows: list[Any], folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_in_memory_are_those_of_a_file(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = file_of(ROWS, tmp_path)
    assert ids_of(ROWS, vocabulary) == ids_of(file, vocabulary)
    np.testing.assert_array_equal(read_stream(ROWS, vocabulary), read_stream(file, vocabulary))
    assert read_prompts(ROWS[:2]) == read_prompts(file_of(ROWS[:2], tmp_path))


def test_strings_and_conversations_are_rows_too(vocabulary: Vocabulary) -> None:
    rows = [{"text": sentence} for sentence in SENTENCES[:3]]
    assert ids_of(list(SENTENCES[:3]), vocabulary) == ids_of(rows, vocabulary)
    talks = ids_of([TURNS, TURNS], vocabulary)
    assert talks == ids_of([{"messages": TURNS}] * 2, vocabulary)
    assert len(talks) == 2


def test_datasets_are_read_split_by_split(vocabulary: Vocabulary, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    split = Dataset.from_list([ROWS[0], {"messages": [TURNS[0], {**TURNS[1], "weight": 1}]}])
    expected = ids_of([ROWS[0]] * 2, vocabulary)
    assert ids_of(split, vocabulary) == expected
    assert ids_of(split.to_iterable_dataset(), vocabulary) == expected
    file = file_of([ROWS[2]], tmp_path)
    assert ids_of([file, split, ROWS[2]], vocabulary) == ids_of(
        [file], vocabulary
    ) + expected + ids_of([ROWS[2]], vocabulary)
    with pytest.raises(TextError, match=r"splits train, test; give one, such as dataset\['train'"):
        check_texts(DatasetDict(train=split, test=split))


def test_names_stay_names(tmp_path: Path) -> None:
    spaced = tmp_path / "my notes"
    spaced.write_text("text")
    for names in (["a.jsonl", "no such file.jsonl"], ["@demo-train", "owner/name"], [str(spaced)]):
        assert sources_of(names) == names
    with pytest.raises(TextError, match="there is no file no such file"):
        check_texts(["no such file.jsonl"])
    (name,) = sources_of(["Two words.", "And more."])
    assert name.startswith("2 rows in memory (")
    assert sources_of(["Two words.", "And less."]) != [name]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (TURNS, "item 1 of texts is a message; put the messages"),
        ([{"text": "a"}, 3], "item 2 of texts is a int; give a list of strings"),
        ((text for text in SENTENCES), "texts is a generator; give a list of strings"),
        ({"text": ["a"]}, "texts is a dict"),
        ([[{"role": "user", "content": "Hi"}], [3]], "item 2 of texts is a list"),
        ([{"words": "a"}], r"1 row in memory \(\w+\), row 1.*docs/data.md"),
        ([], "no text was given"),
    ],
)
def test_what_is_no_text_is_refused_by_its_type(
    texts: Any, message: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(TextError, match=message) as refusal:
        ids_of(texts, vocabulary)
    assert "\n" not in str(refusal.value)


def test_a_step_reads_memory_and_names_it_in_the_lineage(
    model: Path, teacher: Path, tmp_path: Path
) -> None:
    rows = [{"messages": [TURNS[0], {"role": "assistant", "content": text}]} for text in SENTENCES]
    student = distill.new_student(teacher, tmp_path / "student", layers=2, texts=rows * 4)
    text = json.dumps(read_lineage(student))
    assert f"{4 * len(rows)} rows in memory (" in text
    with pytest.raises(FolderError, match="is a Vocabulary; give a model"):
        distill.new_student(load_vocabulary(model), tmp_path / "no")  # type: ignore[arg-type]


def test_a_model_in_memory_is_refused_by_every_step_with_what_to_do(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    model: Any = LlamaConfig()
    out = tmp_path / "out"
    for call in (
        lambda: resolve_model(model),
        lambda: distill.new_student(model, out),
        lambda: distill.train("student", out, teacher=model, texts="@demo-train"),
        lambda: quantize.to_gptq(model, out, texts="@demo-train"),
        lambda: export.to_onnx(model, out),
        lambda: benchmarks.compare([model], texts="@demo-held-out"),
        lambda: benchmarks.compare(model, texts="@demo-held-out"),
        lambda: mistill.ChatBot(model),
        lambda: mistill.open_folder(model),
        lambda: mistill.save_model(model, out),
    ):
        with pytest.raises(FolderError, match=r"LlamaConfig in memory.*save_pretrained\('folder'"):
            call()
