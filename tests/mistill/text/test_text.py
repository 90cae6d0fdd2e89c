"""Text and conversations become tokens, masks and blocks; whatever is wrong with them is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistill.errors import MissingExtraError, SettingsError, TextError, VocabularyError
from mistill.sources.source import resolve_model
from mistill.text.answers import conversation_documents
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.text.documents import read_documents, read_prompts
from mistill.text.rows import check_texts
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.mistill import made
from tests.reference.packing import best_fit, kept_positions, positions
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a mistral?"},
    {"role": "assistant", "content": "A cold wind. 12"},
    {"role": "user", "content": "From where?"},
    {"role": "assistant", "content": "The north\n\nof France."},
]
SIMPLE = TURNS[1:3]
USER, ANSWER = SIMPLE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def chatml(place: Path) -> Vocabulary:
    return load_vocabulary(tiny_tokenizer(place / "chatml"))


def sentencepiece(place: Path, name: str, template: str, **settings: Any) -> Vocabulary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        folder = made.sentencepiece_folder(place / name, template, **settings)
        return load_vocabulary(resolve_model(folder))


@pytest.fixture(scope="module")
def mistral_v1(place: Path) -> Vocabulary:
    return sentencepiece(place, "v1", made.MISTRAL_V1)


@pytest.fixture(scope="module")
def mistral_v3(place: Path) -> Vocabulary:
    return sentencepiece(place, "v3", made.MISTRAL_V3, legacy=False)


@pytest.fixture(scope="module")
def llama_2(place: Path) -> Vocabulary:
    return sentencepiece(place, "llama2", made.LLAMA_2)


def forgetful(place: Path) -> Vocabulary:
    return load_vocabulary(made.put_template(tiny_tokenizer(place / "forgetful"), made.FORGETFUL))


def lines(file: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_text(text, "utf-8")
    return file


def learned(document: Document, vocabulary: Vocabulary) -> str:
    """What the mask marks, as text."""
    marked = document.ids[document.mask].tolist()
    return b"".join(vocabulary.token_bytes(token) for token in marked).decode()


def only(texts: Any, vocabulary: Vocabulary, **options: Any) -> Document:
    [document] = read_documents(texts, vocabulary, **options)
    return document


# --- masks --------------------------------------------------------------------------------------


def test_the_mask_marks_what_a_template_with_marks_would(place: Path, chatml: Vocabulary):
    from transformers import PreTrainedTokenizerFast

    marked = made.put_template(tiny_tokenizer(place / "marked"), made.CHATML_WITH_MARKS)
    theirs = PreTrainedTokenizerFast.from_pretrained(marked).apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    [document] = conversation_documents(TURNS, chatml)
    assert document.ids.tolist() == theirs["input_ids"]
    assert document.mask.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]
    assert 0 < document.mask.sum() < len(document.mask)


def test_the_assistant_learns_to_end_its_turn_and_not_the_line_break_after(chatml: Vocabulary):
    [document] = conversation_documents(TURNS, chatml)
    assert learned(document, chatml) == (
        "A cold wind. 12<|im_end|>The north\n\nof France.<|im_end|>"
    )
    assert chatml.decode(document.ids.tolist()).endswith("<|im_end|>\n")


def test_a_conversation_is_tokenised_as_one_text(
    chatml: Vocabulary, mistral_v1: Vocabulary, llama_2: Vocabulary
):
    for vocabulary in (chatml, mistral_v1, llama_2):
        [document] = conversation_documents(TURNS[1:], vocabulary)
        assert document.ids.tolist() == vocabulary.encode(vocabulary.render(TURNS[1:]))


def test_sentencepiece_boundaries_do_not_drift(mistral_v1: Vocabulary):
    """Piece by piece, every answer would begin with a space that the model never sees."""
    [document] = conversation_documents(SIMPLE, mistral_v1)
    prompt = mistral_v1.render(SIMPLE[:1], add_generation_prompt=True)
    apart = mistral_v1.encode(prompt) + mistral_v1.encode(SIMPLE[1]["content"] + "</s>")
    assert document.ids.tolist() != apart
    assert learned(document, mistral_v1) == "A cold wind. 12</s>"


def test_there_is_one_token_for_the_beginning(mistral_v1: Vocabulary, llama_2: Vocabulary):
    for vocabulary in (mistral_v1, llama_2):
        [document] = conversation_documents(SIMPLE, vocabulary)
        assert document.ids.tolist().count(1) == 1
        assert document.ids[0] == 1
        assert not document.mask[0]


def test_a_space_that_the_template_puts_before_an_answer_is_learned(llama_2: Vocabulary):
    [document] = conversation_documents(SIMPLE, llama_2)
    assert learned(document, llama_2) == " A cold wind. 12 </s>"


def test_what_the_model_would_see_in_use_is_what_it_is_taught(
    chatml: Vocabulary, mistral_v1: Vocabulary, mistral_v3: Vocabulary, llama_2: Vocabulary
):
    """Before each marked run stand exactly the tokens of the prompt that chat would give."""
    for vocabulary in (chatml, mistral_v1, mistral_v3, llama_2):
        [document] = conversation_documents(SIMPLE, vocabulary)
        first = int(document.mask.argmax())
        prompt = vocabulary.encode(vocabulary.render(SIMPLE[:1], add_generation_prompt=True))
        assert document.ids[:first].tolist() == prompt
        assert int(document.ids[document.mask][-1]) in vocabulary.end_ids


def test_a_template_that_moves_the_system_prompt_makes_a_document_of_every_answer(
    mistral_v3: Vocabulary,
):
    documents = conversation_documents(TURNS, mistral_v3)
    assert [learned(document, mistral_v3) for document in documents] == [
        " A cold wind. 12</s>",
        " The north\n\nof France.</s>",
    ]
    for document, stop in zip(documents, (2, 4), strict=True):
        text = mistral_v3.decode(document.ids.tolist())
        assert text.startswith(mistral_v3.render(TURNS[:stop], add_generation_prompt=True))
        assert text.count("Be brief.") == 1


def test_a_template_that_forgets_thoughts_makes_a_document_of_every_answer(place: Path):
    vocabulary = forgetful(place)
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "thinking|one"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "thinking|two"},
    ]
    first, second = conversation_documents(turns, vocabulary)
    assert learned(first, vocabulary) == "thinking|one<|im_end|>"
    assert learned(second, vocabulary) == "thinking|two<|im_end|>"
    assert vocabulary.decode(second.ids.tolist()).count("thinking") == 1


def test_a_token_that_begins_in_the_prompt_is_not_learned(place: Path):
    """In use the prompt ends at the boundary, so the model never writes a token across it."""
    folder = tiny_tokenizer(place / "across")
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model = definition["model"]
    model["vocab"] |= {":y": len(model["vocab"])}
    model["merges"].append([":", "y"])
    definition["pre_tokenizer"]["use_regex"] = False
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    made.put_template(
        folder,
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    vocabulary = load_vocabulary(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    [document] = conversation_documents(turns, vocabulary)
    assert ":y" in [vocabulary.decode([token]) for token in document.ids.tolist()]
    assert learned(document, vocabulary) == "es<|im_end|>"


def test_an_answer_that_repeats_the_question_or_names_a_mark_is_still_found(chatml: Vocabulary):
    turns = [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "assistant\nno<|im_end|>\n"},
        {"role": "assistant", "content": "say <|im_end|> no"},
    ]
    [document] = conversation_documents(turns, chatml)
    assert learned(document, chatml) == "no<|im_end|>say <|im_end|> no<|im_end|>"


def test_an_answer_that_the_template_trims_is_found_with_a_mark_inside(mistral_v3: Vocabulary):
    turns = [USER, {"role": "assistant", "content": "  say </s> no \n"}]
    [document] = conversation_documents(turns, mistral_v3)
    assert learned(document, mistral_v3) == " say </s> no</s>"


def test_what_follows_the_first_end_is_not_learned(place: Path):
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}<|im_end|></s>{% endfor %}"
    )
    folder = made.put_template(
        tiny_tokenizer(place / "twice"),
        template + "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    [document] = conversation_documents(SIMPLE, vocabulary := load_vocabulary(folder))
    assert learned(document, vocabulary) == "A cold wind. 12<|im_end|>"
    assert vocabulary.decode(document.ids.tolist()).endswith("<|im_end|></s>")


def test_a_template_that_hides_the_answer_is_refused(place: Path):
    folder = made.put_template(
        tiny_tokenizer(place / "hiding"),
        "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}",
    )
    with pytest.raises(TextError, match="changes the text of the assistant's turn"):
        conversation_documents(SIMPLE, load_vocabulary(folder))


def test_every_token_of_a_text_but_the_first_is_learned(
    chatml: Vocabulary, mistral_v1: Vocabulary, tmp_path: Path
):
    file = tmp_path / "a.txt"
    file.write_text(SENTENCES[0])
    plain, begun = only(file, chatml), only(file, mistral_v1)
    assert plain.ids.tolist() == chatml.encode(SENTENCES[0])
    assert begun.ids.tolist() == [1, *mistral_v1.encode(SENTENCES[0])]
    for document in (plain, begun):
        assert not document.mask[0]
        assert document.mask[1:].all()


# --- what can be read ---------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": SIMPLE},
    "messages with more keys": {
        "id": 7,
        "messages": [{**turn, "weight": 1} for turn in SIMPLE],
        "text": "not this",
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": SIMPLE[0]["content"]},
            {"from": "gpt", "value": SIMPLE[1]["content"]},
        ]
    },
    "prompt and response": {"prompt": SIMPLE[0]["content"], "response": SIMPLE[1]["content"]},
    "prompt and completion": {"prompt": SIMPLE[0]["content"], "completion": SIMPLE[1]["content"]},
    "instruction and output": {
        "instruction": SIMPLE[0]["content"],
        "input": "",
        "output": SIMPLE[1]["content"],
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_conversations_are_read_by_any_usual_name(kind: str, chatml: Vocabulary, tmp_path: Path):
    [expected] = conversation_documents(SIMPLE, chatml)
    document = only(lines(tmp_path / "a.jsonl", ROWS[kind]), chatml)
    np.testing.assert_array_equal(document.ids, expected.ids)
    np.testing.assert_array_equal(document.mask, expected.mask)


def test_an_instruction_is_followed_by_the_input_it_speaks_of(chatml: Vocabulary, tmp_path: Path):
    row = {"instruction": "Shorten this.", "input": "A long text.", "output": "Text."}
    document = only(lines(tmp_path / "a.jsonl", row), chatml)
    assert "Shorten this.\n\nA long text.<|im_end|>" in chatml.decode(document.ids.tolist())


def test_every_kind_of_file_gives_the_same_documents(chatml: Vocabulary, tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": sentence} for sentence in SENTENCES]
    lines(tmp_path / "a.jsonl", *rows, "", "  ")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [chatml.encode(sentence) for sentence in SENTENCES]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        found = [d.ids.tolist() for d in read_documents(tmp_path / name, chatml)]
        assert found == expected, name


def test_conversations_are_read_from_parquet(chatml: Vocabulary, tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"messages": SIMPLE, "text": None}, {"messages": None, "text": "Plain."}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_documents(tmp_path / "a.parquet", chatml)
    assert learned(first, chatml) == "A cold wind. 12<|im_end|>"
    assert chatml.decode(second.ids.tolist()) == "Plain."


def test_names_with_brackets_and_stars_are_names(chatml: Vocabulary, tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "a [b] *c*"
    folder.mkdir()
    table = pa.Table.from_pylist([{"text": "Hello"}])
    parquet.write_table(table, folder / "x[1].parquet")
    assert only(folder / "x[1].parquet", chatml).ids.tolist() == chatml.encode("Hello")


def test_several_texts_are_read_in_their_order(chatml: Vocabulary, tmp_path: Path):
    first, second = tmp_path / "a.txt", lines(tmp_path / "b.jsonl", {"text": "two"})
    first.write_text("one")
    found = [chatml.decode(d.ids.tolist()) for d in read_documents([second, str(first)], chatml)]
    assert found == ["two", "one"]


def test_text_that_looks_like_a_date_stays_text(chatml: Vocabulary, tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", {"text": "2020-01-01"}, {"text": "2020-01-02"})
    found = [chatml.decode(d.ids.tolist()) for d in read_documents(file, chatml)]
    assert found == ["2020-01-01", "2020-01-02"]


def test_columns_may_appear_late(chatml: Vocabulary, tmp_path: Path):
    rows = [{"text": "x", "messages": None}] * 3 + [{"messages": SIMPLE, "more": {"a": 1}}]
    *_, last = read_documents(lines(tmp_path / "a.jsonl", *rows), chatml)
    assert learned(last, chatml) == "A cold wind. 12<|im_end|>"


def test_empty_rows_are_passed_over(chatml: Vocabulary, tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "a"})
    assert only(file, chatml).ids.tolist() == chatml.encode("a")


def test_a_text_file_is_one_document_whatever_lines_it_has(chatml: Vocabulary, tmp_path: Path):
    text = "\n\n = Title = \n\n first \u2028 line\x0b\n second\n\n\nlast, without an end"
    file = tmp_path / "a.TXT"
    file.write_text(text, "utf-8")
    assert only(file, chatml).ids.tolist() == chatml.encode(text)


def test_a_very_long_text_file_is_cut_where_a_line_ends_and_nothing_is_lost(
    chatml: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.text.rows.DOCUMENT_CHARACTERS", 300)
    text = "".join(f"{sentence}\n" for sentence in SENTENCES * 4)
    file = tmp_path / "a.txt"
    file.write_text(text, "utf-8")
    pieces = [chatml.decode(d.ids.tolist()) for d in read_documents(file, chatml)]
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


def test_reading_stops_at_a_limit_of_tokens(chatml: Vocabulary, tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", *({"text": sentence} for sentence in SENTENCES), "broken")
    whole = [len(chatml.encode(sentence)) for sentence in SENTENCES]
    limit = whole[0] + whole[1] + 3
    found = list(read_documents(file, chatml, limit=limit))
    assert [len(document.ids) for document in found] == [whole[0], whole[1], 3]
    assert [len(document.mask) for document in found] == [whole[0], whole[1], 3]
    exact = list(read_documents(file, chatml, limit=whole[0]))
    assert [len(document.ids) for document in exact] == whole[:1]
    with pytest.raises(SettingsError, match="limit must be above 0"):
        read_documents(file, chatml, limit=0)


def test_reading_leaves_no_cache_behind(empty_home: Path, place: Path, tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"text": "Hello"}] * 50), tmp_path / "a.parquet")
    tiny_tokenizer(tmp_path / "v")
    code = (
        "from mistill.text.documents import read_documents\n"
        "from mistill.text.vocabulary import load_vocabulary\n"
        f"v = load_vocabulary({str(tmp_path / 'v')!r})\n"
        f"print(len(list(read_documents({str(tmp_path / 'a.parquet')!r}, v))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "50"
    assert [file for file in empty_home.rglob("*") if file.is_file()] == []


def test_chats_are_read_without_datasets_or_torch(chats: Path, chatml: Vocabulary, place: Path):
    code = (
        "import sys\n"
        "from mistill.text.blocks import pack\nfrom mistill.text.documents import read_documents\n"
        "from mistill.text.vocabulary import load_vocabulary\n"
        f"v = load_vocabulary({str(place / 'chatml')!r})\n"
        f"print(len(pack(read_documents({str(chats)!r}, v), 64)) > 0)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["True", "[]"]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"', r"line 2 is not valid JSON: Expecting"),
        ("[1, 2]", r"line 2 should hold a JSON object, not a list"),
        ("null", r"line 2 should hold a JSON object, not null"),
        ({"body": "a", "id": 1}, r"line 2 has the columns body, id; mistill reads messages, conv"),
        ({}, r"line 2 has the columns none; mistill reads"),
        ({"prompt": "a"}, r"line 2 has the columns prompt; mistill reads"),
        ({"text": 5}, r"the text of .*line 2 should be text, not a number"),
        ({"prompt": "a", "response": ["b"]}, r"the response of .*line 2 should be text, not a lis"),
        ({"messages": "hello"}, r"conversation of .*line 2 should be a list of turns"),
        ({"messages": []}, r"conversation of .*line 2 should be a list of turns"),
        ({"messages": ["a"]}, r"turn 1 of .*line 2 should be an object with role and content"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"turn 1 of .* has the role 'wizard'"),
        ({"messages": [{"content": "a"}]}, r"turn 1 of .* has the role None"),
        ({"messages": [USER, {"role": "assistant"}]}, r"content of turn 2 of .*, not null"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            r"content of turn 2 of .* should be text, not a list",
        ),
        ({"messages": [USER]}, r"line 2 ends with the user's turn"),
        ({"messages": [USER, ANSWER, USER]}, r"line 2 ends with the user's turn"),
        ({"messages": [ANSWER]}, r"line 2 should begin with the user's turn"),
        ({"messages": [TURNS[0]]}, r"line 2 should begin with the user's turn"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"line 2 has an empty turn"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_line(
    row: Any, message: str, chatml: Vocabulary, tmp_path: Path
):
    documents = read_documents(lines(tmp_path / "a.jsonl", {"text": "fine"}, row), chatml)
    assert len(next(documents).ids) > 0
    with pytest.raises(TextError, match=message) as refused:
        next(documents)
    assert "\n" not in str(refused.value)


def test_what_a_template_refuses_is_named_with_its_line(mistral_v1: Vocabulary, tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(TextError, match=r"line 1: the chat template refuses .*alternate"):
        read_documents(file, mistral_v1)


def test_conversations_need_a_template(place: Path, tmp_path: Path):
    folder = tiny_tokenizer(place / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(VocabularyError, match="has no chat template"):
        read_documents(lines(tmp_path / "a.jsonl", {"messages": SIMPLE}), load_vocabulary(folder))


def write_bytes(name: str, content: bytes) -> Any:
    return lambda place: (place / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        (
            "a.jsonl",
            None,
            r"there is no file a\.jsonl; give a \.txt, \.jsonl, \.json, \.csv or \.parquet",
        ),
        ("some/where/a", None, r"there is no file some/where/a"),
        ("@demo", None, r"ships no text @demo; it ships @demo-train, @demo-held-out"),
        ("folder", lambda place: (place / "folder").mkdir(), r"folder is a folder; name the \.txt"),
        ("a.docx", write_bytes("a.docx", b"x"), r"a\.docx ends in \.docx; mistill reads \.txt"),
        ("notes", write_bytes("notes", b"x"), r"notes ends in nothing; mistill reads"),
        ("a.txt", write_bytes("a.txt", b""), r"a\.txt holds no text"),
        ("a.txt", write_bytes("a.txt", b" \n\n"), r"there is no text in a\.txt"),
        ("a.txt", write_bytes("a.txt", b"ab\xff\xfe"), r"not UTF-8 text: invalid start byte at by"),
        ("a.jsonl", write_bytes("a.jsonl", b"\n\n"), r"a\.jsonl holds no text"),
        ("a.jsonl", write_bytes("a.jsonl", b'{"text": ""}'), r"there is no text in a\.jsonl"),
        ("a.json", write_bytes("a.json", b"{}"), r"a list of objects, not an empty object"),
        ("a.json", write_bytes("a.json", b"[]"), r"a\.json holds no text"),
        ("a.json", write_bytes("a.json", b"[1]"), r"a\.json, item 1 should hold a JSON object"),
        ("a.parquet", write_bytes("a.parquet", b"no"), r"a\.parquet cannot be read: Parquet"),
        ("owner/name", None, r"no file owner/name, and the Hub cannot be reached"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_at_once(
    name: str,
    prepare: Any,
    message: str,
    chatml: Vocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(TextError, match=message) as refused:
        read_documents(name, chatml)
    assert "\n" not in str(refused.value)
    if "there is no text" not in message:  # that takes more than the first row
        with pytest.raises(TextError, match=message):
            check_texts([name])


def test_no_texts_are_refused(chatml: Vocabulary):
    with pytest.raises(TextError, match="no text was given"):
        read_documents([], chatml)


def test_the_missing_extra_is_named(
    chatml: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.text.rows.find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'mistill\[compress\]'"):
        read_documents(tmp_path / "a.parquet", chatml)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/name:config:test", ("owner/name", "config", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_a_dataset_of_the_hub_is_streamed(
    name: str,
    expected: tuple[str, str | None, str],
    chatml: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, config, split, streaming))
        return iter([{"text": "from the Hub"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("mistill.text.rows.hub_answers", lambda: True)
    assert only(name, chatml).ids.tolist() == chatml.encode("from the Hub")
    assert asked == [(*expected, True)]


def test_what_the_hub_refuses_is_told_in_a_line(
    chatml: Vocabulary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from datasets.exceptions import DatasetNotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mistill.text.rows.hub_answers", lambda: False)
    with pytest.raises(TextError, match="no file owner/name, and the Hub cannot be reached"):
        read_documents("owner/name", chatml)
    monkeypatch.setattr("mistill.text.rows.hub_answers", lambda: True)
    for error, message in (
        (DatasetNotFoundError("no"), "no dataset of that name on the Hub"),
        (ValueError("Config name is missing.\nPick one of: ['a', 'b']"), r"missing\. Pick one of"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("datasets.load_dataset", fail)
        with pytest.raises(TextError, match=message) as refused:
            read_documents("owner/name", chatml)
        assert "\n" not in str(refused.value)


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_are_read_from_lines_and_rows(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("  What is a mistral?\n\n\nWhy?  \n", "utf-8")
    rows = lines(
        tmp_path / "a.jsonl",
        {"prompt": "One?"},
        {"instruction": "Shorten.", "input": "Long."},
        {"question": "Two?"},
        {"messages": TURNS},
        {"messages": TURNS[:4]},
        {"conversations": [{"from": "human", "value": "Three?"}]},
    )
    found = read_prompts([text, rows])
    assert [[turn["content"] for turn in prompt] for prompt in found] == [
        ["What is a mistral?"],
        ["Why?"],
        ["One?"],
        ["Shorten.\n\nLong."],
        ["Two?"],
        [turn["content"] for turn in TURNS[:4]],
        [turn["content"] for turn in TURNS[:4]],
        ["Three?"],
    ]
    assert all(prompt[-1]["role"] == "user" for prompt in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", r"there are no prompts in .*a\.txt"),
        ("a.jsonl", '{"text": "a"}', r"has the columns text; prompts are read from prompt"),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "a"}]}', r"begin with the user"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    name: str, content: str, message: str, tmp_path: Path
):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        read_prompts(tmp_path / name)


# --- packing ------------------------------------------------------------------------------------


def numbered(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [
        Document(generator.integers(1, 300, length), generator.random(length) < 0.7)
        for length in lengths
    ]


def test_documents_lie_where_best_fit_puts_them():
    generator = np.random.default_rng(1)
    for block_length in (2, 7, 16):
        lengths = generator.integers(1, 40, 60).tolist()
        documents = numbered(lengths)
        packed = pack(documents, block_length)
        placed = best_fit(lengths, block_length)
        assert len(packed) == len(placed)
        for row, pieces in enumerate(placed):
            column = 0
            for number, start, length in pieces:
                span = slice(column, column + length)
                expected = documents[number].ids[start : start + length]
                assert packed.ids[row, span].tolist() == expected.tolist()
                expected_mask = documents[number].mask[start : start + length].copy()
                expected_mask[0] = False
                assert packed.mask[row, span].tolist() == expected_mask.tolist()
                assert (packed.documents[row, span] == number).all()
                column += length
            assert (packed.documents[row, column:] == -1).all()
            assert not packed.mask[row, column:].any()


def test_a_document_that_fits_is_never_split_and_a_longer_one_only_at_the_block():
    packed = pack(numbered([5, 20, 3, 8, 8]), 8)
    for number, length in enumerate([5, 20, 3, 8, 8]):
        rows, counts = np.unique(np.nonzero(packed.documents == number)[0], return_counts=True)
        assert counts.sum() == length
        assert len(rows) == (1 if length <= 8 else 3)
    assert packed.tokens == 44
    assert len(packed) == 6


def test_the_positions_that_count_are_those_of_the_definition():
    packed = pack(numbered(np.random.default_rng(3).integers(1, 30, 80).tolist()), 12)
    assert list(zip(*map(np.ndarray.tolist, packed.kept.nonzero()), strict=True)) == (
        kept_positions(packed)
    )
    assert 0 < packed.kept.sum() < packed.mask.sum() + 1
    np.testing.assert_array_equal(packed.position_ids, positions(packed))


def test_what_belongs_to_no_document_never_counts():
    blocks = TokenBlocks(
        np.ones((1, 4), np.int64), np.ones((1, 4), bool), np.array([[0, 0, -1, -1]], np.int32)
    )
    assert blocks.kept.tolist() == [[True, False, False, False]]


def test_every_wanted_token_is_counted_once_unless_it_begins_a_piece():
    documents = [Document(np.arange(1, 31), np.ones(30, bool))]
    packed = pack(documents, 10)
    assert packed.ids.tolist() == np.arange(1, 31).reshape(3, 10).tolist()
    assert packed.kept.sum(axis=1).tolist() == [9, 9, 9]


def test_some_blocks_can_be_taken():
    packed = pack(numbered([8, 8, 8, 8]), 8)
    some = packed[1:3]
    assert isinstance(some, TokenBlocks)
    np.testing.assert_array_equal(some.ids, packed.ids[1:3])
    np.testing.assert_array_equal(packed[[3, 0]].documents, packed.documents[[3, 0]])
    assert (len(some), some.block_length) == (2, 8)


def test_packing_nothing_and_packing_into_nothing_are_refused():
    with pytest.raises(TextError, match="no text to pack"):
        pack([], 8)
    with pytest.raises(SettingsError, match="block_length must be at least 2, not 1"):
        pack(numbered([3]), 1)


def test_blocks_that_differ_in_anything_have_different_digests():
    blocks = pack([Document(np.arange(1, 9), np.ones(8, bool))], 16)
    same = TokenBlocks(blocks.ids.copy(), blocks.mask.copy(), blocks.documents.copy())
    assert same.digest == blocks.digest

    other_ids, other_mask = blocks.ids.copy(), blocks.mask.copy()
    other_documents = blocks.documents + 1
    other_ids[0, 3] += 1
    other_mask[0, 3] = False
    others = [
        TokenBlocks(other_ids, blocks.mask, blocks.documents),
        TokenBlocks(blocks.ids, other_mask, blocks.documents),
        TokenBlocks(blocks.ids, blocks.mask, other_documents),
        TokenBlocks(blocks.ids.T, blocks.mask.T, blocks.documents.T),
    ]
    assert len({blocks.digest, *(other.digest for other in others)}) == 5


def test_many_documents_are_packed_tightly():
    lengths = np.random.default_rng(0).integers(2, 600, 5000)
    packed = pack([Document(np.ones(n, np.int64), np.ones(n, bool)) for n in lengths], 512)
    assert packed.tokens == lengths.sum()
    assert packed.tokens / packed.ids.size > 0.97


@pytest.mark.parametrize("window", [None, 7])
def test_packed_documents_do_not_see_one_another(window: int | None, tmp_path: Path):
    """Position ids alone, without an attention mask or a cache, keep them apart."""
    import torch

    from mistill.pytorch.loading import load_pytorch

    model = load_pytorch(tiny_model(tmp_path / "m", sliding_window=window))
    documents = numbered([11, 23, 5, 30, 9, 2])
    packed = pack(documents, 32)
    assert any(len(set(row.tolist()) - {-1}) > 1 for row in packed.documents)
    with torch.no_grad():
        together = model(
            torch.from_numpy(packed.ids),
            position_ids=torch.from_numpy(packed.position_ids),
            use_cache=False,
        ).logits.numpy()
        for number, document in enumerate(documents):
            alone = model(torch.from_numpy(document.ids)[None]).logits[0].numpy()
            np.testing.assert_allclose(
                together[packed.documents == number], alone, atol=2e-5, rtol=1e-4
            )


# --- the shipped text ---------------------------------------------------------------------------


def test_the_shipped_conversations_are_read_and_share_no_prompt(chatml: Vocabulary):
    from mistill.text.rows import _DATA

    asked = {}
    for name in ("@demo-train", "@demo-held-out"):
        documents = list(read_documents(name, chatml))
        prompts = [prompt[-1]["content"] for prompt in read_prompts(name)]
        assert len(documents) == len(prompts) == len(set(prompts))
        asked[name] = set(prompts)
    assert len(asked["@demo-train"]) > 250
    assert len(asked["@demo-held-out"]) > 40
    assert not asked["@demo-train"] & asked["@demo-held-out"]
    shipped = {prompt[-1]["content"] for prompt in read_prompts("@demo-prompts")}
    assert asked["@demo-train"] | asked["@demo-held-out"] <= shipped
    plain = list(read_documents("@demo-plain", chatml))
    assert len(plain) > 70
    assert all(bool(document.mask[1:].all()) for document in plain), "all of a text is predicted"
    requests = {prompt[-1]["content"] for prompt in read_prompts(_DATA / "demo-plain-prompts.txt")}
    assert not requests & shipped
    assert sum(file.stat().st_size for file in _DATA.iterdir()) < 1_000_000
    assert "Apache-2.0" in (_DATA / "README.md").read_text("utf-8")


def test_runs_are_where_a_document_begins_and_ends_in_a_block() -> None:
    documents = np.array([[0, 0, 0, 1], [1, 1, 2, -1]])
    blank = np.zeros((2, 4))
    blocks = TokenBlocks(blank.astype(np.int64), blank.astype(bool), documents)
    assert blocks.runs.tolist() == [[0, 0, 3], [0, 3, 4], [1, 0, 2], [1, 2, 3], [1, 3, 4]]
