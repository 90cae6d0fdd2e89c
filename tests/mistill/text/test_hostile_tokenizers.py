"""Tokenizers and templates that fail, never end or fill the memory are refused, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mistill import bounded
from mistill.cli.app import main
from mistill.errors import FolderError, MistillError, TextError, VocabularyError
from mistill.text.vocabulary import load_vocabulary

MANY = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}
BACKTRACKS = {
    "type": "Split",
    "pattern": {"Regex": "(a+)+$|([a-zA-Z ]+)*X"},
    "behavior": "Isolated",
    "invert": False,
}


def with_tokenizer(source: Path, target: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, target))
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(definition | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post_processor": [1]}, "post_processor in it should be an object"),
        ({"post_processor": {"a": 1}}, "lacks type"),
        ({"post_processor": {"type": "Sequence", "processors": [1]}}, r"processors\[0\]"),
        ({"post_processor": {"type": "TemplateProcessing", "single": "$A"}}, "single in it"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, r"added_tokens\[0\]\.id"),
        ({"added_tokens": [{"id": 10**9, "content": "x", "special": 1}]}, "special"),
        ({"model": 3}, "is not a tokenizer: "),
        ({"normalizer": {"type": "Sequence", "normalizers": [MANY] * 3}}, "bytes of one byte"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, "bytes of one byte"),
    ],
)
def test_a_tokenizer_of_other_types_or_that_multiplies_text_is_refused(
    model, tmp_path, capsys, changes, words
):
    folder = with_tokenizer(model, tmp_path / "folder", **changes)
    with pytest.raises(VocabularyError, match=words):
        load_vocabulary(folder)
    assert main(["inspect", str(folder)]) == 1
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_vocabulary_whose_ids_run_beyond_its_file_is_refused(model, tmp_path):
    folder = with_tokenizer(model, tmp_path / "folder")
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"]["far"] = 2**31 - 1
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(VocabularyError, match="the id 2147483647, in a file of"):
        load_vocabulary(folder)


def test_an_expression_that_gives_up_is_named_and_writes_nothing_else(model, tmp_path, capfd):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    level["trim_offsets"] = True
    parts = {"type": "Sequence", "pretokenizers": [BACKTRACKS, level]}
    folder = with_tokenizer(model, tmp_path / "folder", pre_tokenizer=parts)
    vocabulary = load_vocabulary(folder)
    for encode in (vocabulary.encode, vocabulary.encode_spans, vocabulary.encode_as_text):
        with pytest.raises(VocabularyError, match=r"tokenizer\.json cannot split this text"):
            encode("a" * 40 + "b " + "word " * 40 + "!")
    assert capfd.readouterr().err == ""


def test_half_a_character_is_refused_as_text(model):
    with pytest.raises(TextError, match="half"):
        load_vocabulary(model).encode("\ud800")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "takes more than",
        ),
        ("{{ range(99999)|slice(99999999)|list|length }}", "takes more than"),
        ("{{ 'x' * 10 ** 12 }}", "takes more than"),
        ("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
         "{% endfor %}", "takes more than"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than"),
        ("{% macro f(n) %}{{ f(n+1) }}{{ f(n+1) }}{% endmacro %}{{ f(0) }}", "refuses|takes more"),
        ("{{ 'a'|center(10 ** 12) }}", "takes more than"),
        ("{% for x in y", "has a mistake in line 1"),
    ],
)  # fmt: skip
def test_a_template_that_never_ends_or_fills_the_memory_is_refused(
    model, tmp_path, monkeypatch, template, words
):
    monkeypatch.setattr(bounded, "SECONDS", 1.0)
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(MistillError, match=words):
        load_vocabulary(folder).render([{"role": "user", "content": "hi"}])


def test_a_template_that_writes_nothing_is_a_problem(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / "chat_template.jinja").write_text("{{ '' }}")
    assert main(["inspect", str(folder)]) == 1


@pytest.mark.parametrize("value", [[{"x": 1}], ["x"], 3])
def test_a_template_of_another_type_is_refused(model, tmp_path, value):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": value}))
    with pytest.raises(FolderError, match=r"chat_template.* in .*tokenizer_config\.json"):
        load_vocabulary(folder)


def test_a_template_that_is_not_text_is_refused(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
    with pytest.raises(VocabularyError, match="is not UTF-8"):
        load_vocabulary(folder)
