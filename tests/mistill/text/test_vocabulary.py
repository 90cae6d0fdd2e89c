"""Vocabularies: what tokens spell, how conversations are written, when two are the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import TextError, VocabularyError
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import Vocabulary, load_vocabulary, same_vocabulary
from tests.mistill import made
from tests.mistill.text.templates import theirs
from tests.tiny import CHATML, SENTENCES, tiny_tokenizer

STRINGS = (
    *SENTENCES,
    "",
    " ",
    "  two  spaces ",
    "a\nb\n\n\tc\r\n",
    "don't I'LL 12345 1.5e-3",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00e9 e\u0301 \u4f60\u597d \u0000\u007f\u00a0",
    "<|im_start|>user\nhi<|im_end|>",
)
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "a question": [{"role": "user", "content": "Hi"}],
    "an answer": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes. "}],
    "two turns": [
        {"role": "user", "content": "<b>'quoted' & \"more\"</b>"},
        {"role": "assistant", "content": "\ud55c\uad6d\uc5b4 \U0001f600\n\n"},
        {"role": "user", "content": "  {{ braces }} {% if %} "},
        {"role": "assistant", "content": "Fine"},
    ],
    "a system prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "More"},
    ],
}
TEMPLATES = {
    "chatml": CHATML,
    "mistral v1": made.MISTRAL_V1,
    "mistral v3": made.MISTRAL_V3,
    "llama 2": made.LLAMA_2,
    "zephyr": made.ZEPHYR,
    "indented": "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n  {# no #}\nend",
    "generation marks": made.CHATML_WITH_MARKS,
    "json": "{{ messages | tojson(indent=2) }} {{ messages[0]['content'] | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.role }}\n{% endfor %}",
    "the date": "{{ strftime_now('%Y') }} {{ bos_token }}{{ eos_token }}{{ unk_token }}",
    "what is absent": "{{ tools is none }} {{ documents is none }} {{ nothing is defined }}",
}


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("vocabulary") / "bytes")


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vocabulary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return resolve_model(made.sentencepiece_folder(place / "pieces"))


@pytest.fixture(params=["bytes", "pieces"])
def folder(request: pytest.FixtureRequest, bytes_folder: Path, pieces_folder: Path) -> Path:
    return bytes_folder if request.param == "bytes" else pieces_folder


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a vocabulary's files with keys of tokenizer.json changed."""
    target.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (target / name).write_text((folder / name).read_text("utf-8"), "utf-8")
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (target / "tokenizer.json").write_text(json.dumps({**definition, **changes}), "utf-8")
    return target


def write_config(folder: Path, name: str = "config.json", **values: Any) -> Path:
    (folder / name).write_text(json.dumps(values), "utf-8")
    return folder


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", STRINGS)
def test_the_bytes_of_a_texts_tokens_are_the_texts_own(bytes_folder: Path, text: str):
    vocabulary = load_vocabulary(bytes_folder)
    spelled = b"".join(vocabulary.token_bytes(token) for token in vocabulary.encode(text))
    assert spelled == text.encode()
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize("text", STRINGS)
def test_sentencepiece_tokens_spell_the_text_after_its_added_space(pieces_folder: Path, text: str):
    vocabulary = load_vocabulary(pieces_folder)
    spelled = b"".join(vocabulary.token_bytes(token) for token in vocabulary.encode(text))
    assert spelled == (b" " + text.encode() if text else b"")
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize("text", STRINGS)
def test_converted_sentencepiece_tokens_are_those_of_sentencepiece(pieces_folder: Path, text: str):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor()
    theirs.Load(str(pieces_folder / "tokenizer.model"))
    assert load_vocabulary(pieces_folder).encode(text) == theirs.Encode(text)


def test_single_bytes_are_known_as_bytes(pieces_folder: Path):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor()
    theirs.Load(str(pieces_folder / "tokenizer.model"))
    vocabulary = load_vocabulary(pieces_folder)
    lone = [token for token in range(theirs.GetPieceSize()) if theirs.IsByte(token)]
    assert [vocabulary.token_bytes(token) for token in lone] == [bytes([b]) for b in range(256)]


@pytest.mark.parametrize("text", STRINGS)
def test_tokens_are_those_of_transformers(folder: Path, text: str):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert load_vocabulary(folder).encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", STRINGS)
def test_spans_tell_where_each_token_begins(folder: Path, text: str):
    vocabulary = load_vocabulary(folder)
    ids, starts = vocabulary.encode_spans(text)
    assert ids.tolist() == vocabulary.encode(text)
    assert len(starts) == len(ids)
    assert (starts[1:] >= starts[:-1]).all()
    for token, start in zip(ids.tolist(), starts.tolist(), strict=True):
        spelled = vocabulary.token_bytes(token).lstrip(b" ")
        if spelled[:1].isascii():  # else it may begin inside a character
            assert text[start:].lstrip(" ").encode().startswith(spelled)


def test_encoding_adds_nothing_and_cuts_nothing(bytes_folder: Path, tmp_path: Path):
    plain = load_vocabulary(bytes_folder)
    changed = copied(
        bytes_folder,
        tmp_path / "changed",
        truncation={
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "</s>",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    )
    vocabulary = load_vocabulary(changed)
    assert vocabulary.encode(SENTENCES[0]) == plain.encode(SENTENCES[0])
    assert vocabulary.bos_id == 1
    assert vocabulary.adds_bos
    assert not plain.adds_bos


def test_a_stated_wish_about_the_first_token_beats_the_post_processor(
    bytes_folder: Path, pieces_folder: Path, tmp_path: Path
):
    assert load_vocabulary(pieces_folder).adds_bos
    unwanted = copied(pieces_folder, tmp_path / "unwanted")
    write_config(unwanted, "tokenizer_config.json", bos_token="<s>", add_bos_token=False)
    assert not load_vocabulary(unwanted).adds_bos
    wanted = copied(bytes_folder, tmp_path / "wanted")
    write_config(wanted, "tokenizer_config.json", bos_token="<s>", add_bos_token=True)
    assert load_vocabulary(wanted).adds_bos


def test_a_token_without_a_row_is_refused_when_it_is_met(bytes_folder: Path, tmp_path: Path):
    short = write_config(copied(bytes_folder, tmp_path / "short"), vocab_size=300)
    vocabulary = load_vocabulary(short)
    assert vocabulary.encode("a")
    with pytest.raises(VocabularyError, match=r"only 300 rows"):
        vocabulary.encode(" ".join(SENTENCES))
    with pytest.raises(VocabularyError, match=r"ids run from 0 to 299"):
        vocabulary.token_bytes(300)


# --- where replies end --------------------------------------------------------------------------


def test_replies_end_where_any_file_says_so_and_where_the_template_ends_a_turn(
    bytes_folder: Path, tmp_path: Path
):
    folder = copied(bytes_folder, tmp_path / "ends")
    write_config(folder, eos_token_id=0, vocab_size=384)
    write_config(folder, "generation_config.json", eos_token_id=[3, 99999])
    write_config(folder, "tokenizer_config.json", eos_token="</s>")
    assert load_vocabulary(folder).end_ids == (3, 0, 2, 4)


def test_the_end_of_a_turn_is_the_longest_mark_after_it(bytes_folder: Path, tmp_path: Path):
    definition = json.loads((bytes_folder / "tokenizer.json").read_text("utf-8"))
    [entry] = [item for item in definition["added_tokens"] if item["content"] == "<|im_end|>"]
    added = [{**entry, "id": 384, "content": "<|im"}, *definition["added_tokens"]]
    folder = copied(bytes_folder, tmp_path / "marks", added_tokens=added)
    write_config(folder, "tokenizer_config.json")
    assert load_vocabulary(folder).end_ids == (4,)
    made.put_template(folder, "{% for m in messages %}{{ m.content + ' <|im' }}{% endfor %}")
    assert load_vocabulary(folder).end_ids == (384,)


def test_without_a_template_the_files_decide(bytes_folder: Path, tmp_path: Path):
    folder = copied(bytes_folder, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    assert load_vocabulary(folder).end_ids == (4,)


# --- conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_are_written_as_transformers_writes_them(
    bytes_folder: Path, tmp_path: Path, template: str, conversation: str, prompted: bool
):
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    folder = made.put_template(copied(bytes_folder, tmp_path / "v"), TEMPLATES[template])
    messages = CONVERSATIONS[conversation]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = load_vocabulary(folder)
    refused = None
    try:
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompted
        )
    except TemplateError as error:
        refused = str(error)
    if refused is not None:
        with pytest.raises(TextError, match=re.escape(f"refuses this conversation: {refused}")):
            vocabulary.render(messages, prompted)
        return
    assert vocabulary.render(messages, prompted) == expected


def test_a_template_may_stand_in_the_tokenizers_settings(bytes_folder: Path, tmp_path: Path):
    folder = copied(bytes_folder, tmp_path / "v")
    (folder / "chat_template.jinja").unlink()
    for stated in (
        CHATML,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}],
    ):
        write_config(folder, "tokenizer_config.json", chat_template=stated)
        assert load_vocabulary(folder).render([{"role": "user", "content": "a"}]) == (
            "<|im_start|>user\na<|im_end|>\n"
        )


def test_special_tokens_may_be_objects_or_stand_in_the_older_file(
    bytes_folder: Path, tmp_path: Path
):
    folder = made.put_template(copied(bytes_folder, tmp_path / "v"), "{{bos_token}}|{{eos_token}}")
    write_config(folder, "tokenizer_config.json", bos_token={"content": "<s>", "lstrip": False})
    write_config(folder, "special_tokens_map.json", eos_token={"content": "</s>"})
    assert load_vocabulary(folder).render([]) == "<s>|</s>"
    # Where both name one, transformers believes the older file.
    write_config(folder, "special_tokens_map.json", bos_token="<unk>", eos_token="</s>")
    turns = [{"role": "user", "content": "?"}]
    assert load_vocabulary(folder).render(turns) == theirs(folder, turns) == "<unk>|</s>"


def test_a_folder_without_a_template_says_so(bytes_folder: Path, tmp_path: Path):
    folder = copied(bytes_folder, tmp_path / "v")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(VocabularyError, match=r"no chat template; use a chat model"):
        load_vocabulary(folder).render([])


def test_a_mistake_in_a_template_is_named_with_its_line(bytes_folder: Path, tmp_path: Path):
    folder = made.put_template(copied(bytes_folder, tmp_path / "v"), "\n\n{% for %}")
    with pytest.raises(VocabularyError, match=r"mistake in line 3"):
        load_vocabulary(folder).render([])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['role'] }}",
    ],
)
def test_a_template_cannot_reach_outside_or_crash_us(
    bytes_folder: Path, tmp_path: Path, template: str
):
    folder = made.put_template(copied(bytes_folder, tmp_path / "v"), template)
    with pytest.raises(TextError, match="refuses"):
        load_vocabulary(folder).render([{"role": "user", "content": "a"}])


# --- identity -----------------------------------------------------------------------------------


def test_a_vocabulary_is_the_same_as_itself_and_has_one_fingerprint(folder: Path, tmp_path: Path):
    copy = copied(folder, tmp_path / "copy")
    ours, theirs = load_vocabulary(folder), load_vocabulary(copy)
    assert same_vocabulary(ours, theirs) == []
    assert ours.fingerprint() == theirs.fingerprint()


def swapped(folder: Path, target: Path) -> Path:
    """The same size and the same tokens, but two ids exchanged."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    by_id = {token: text for text, token in model["vocab"].items()}
    model["vocab"] |= {by_id[70]: 71, by_id[71]: 70}
    return copied(folder, target, model=model)


def test_equal_size_does_not_make_two_vocabularies_equal(folder: Path, tmp_path: Path):
    ours, theirs = load_vocabulary(folder), load_vocabulary(swapped(folder, tmp_path / "other"))
    assert ours.size == theirs.size
    assert ours.fingerprint() != theirs.fingerprint()
    [difference] = same_vocabulary(ours, theirs)
    assert difference.startswith(f"2 of {ours.size} ids stand for different tokens, the first")
    assert f"70: {ours.spelling(70)} against {ours.spelling(71)}" in difference


def test_rows_that_only_fill_up_the_embedding_are_known_as_such(bytes_folder: Path, tmp_path: Path):
    padded = write_config(copied(bytes_folder, tmp_path / "padded"), vocab_size=448)
    ours, theirs = load_vocabulary(bytes_folder), load_vocabulary(padded)
    assert theirs.size == 448
    assert [theirs.is_padding(token) for token in (383, 384, 447)] == [False, True, True]
    assert theirs.token_bytes(447) == b""
    assert theirs.spelling(447) == "nothing"
    assert theirs.fingerprint() == ours.fingerprint()
    assert same_vocabulary(ours, theirs) == ["384 rows against 448"]


def test_a_fingerprint_knows_where_a_token_ends(bytes_folder: Path, tmp_path: Path):
    definition = json.loads((bytes_folder / "tokenizer.json").read_text("utf-8"))
    plain = {**definition["added_tokens"][0], "special": False}

    def with_tokens(name: str, *texts: str) -> Vocabulary:
        extra = [{**plain, "id": 384 + n, "content": text} for n, text in enumerate(texts)]
        added = [*definition["added_tokens"], *extra]
        return load_vocabulary(copied(bytes_folder, tmp_path / name, added_tokens=added))

    one, other = with_tokens("one", "qat", "b#"), with_tokens("other", "qa", "tb#")
    assert one.fingerprint() != other.fingerprint()


def test_a_mark_is_not_the_text_that_spells_it(bytes_folder: Path, tmp_path: Path):
    definition = json.loads((bytes_folder / "tokenizer.json").read_text("utf-8"))
    added = [
        {**entry, "special": entry["content"] != "<|im_end|>"}
        for entry in definition["added_tokens"]
    ]
    ours = load_vocabulary(bytes_folder)
    theirs = load_vocabulary(copied(bytes_folder, tmp_path / "other", added_tokens=added))
    assert ours.is_special(4)
    assert not theirs.is_special(4)
    assert ours.fingerprint() != theirs.fingerprint()
    assert "4: '<|im_end|>' (special) against '<|im_end|>'" in same_vocabulary(ours, theirs)[0]


# --- what is refused ----------------------------------------------------------------------------


def broken(content: str) -> Any:
    return lambda folder: (folder / "tokenizer.json").write_text(content, "utf-8")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"holds no tokenizer\.json"),
        (lambda folder: (folder / "tokenizer.model").touch(), r"mistill\.save_model makes"),
        (lambda folder: (folder / "tekken.json").touch(), r"only tekken\.json; put the tokenizer"),
        (broken("{}"), r"is not a tokenizer"),
        (broken('{"config": {}, "vocab": [{"rank": 0}]}'), r"is a tekken\.json under another name"),
        (broken('{"model": {"type": "Nothing"}}'), r"is not a tokenizer"),
    ],
)
def test_a_folder_without_a_readable_tokenizer_is_refused(
    tmp_path: Path, prepare: Any, message: str
):
    prepare(tmp_path)
    with pytest.raises(VocabularyError, match=message):
        load_vocabulary(tmp_path)


def test_a_folder_that_is_not_there_is_said_to_be(tmp_path: Path):
    with pytest.raises(VocabularyError, match="no such folder"):
        load_vocabulary(tmp_path / "nowhere")


def test_a_vocabulary_of_another_kind_is_refused(bytes_folder: Path, tmp_path: Path):
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    folder = copied(bytes_folder, tmp_path / "v", decoder=wordpiece)
    with pytest.raises(VocabularyError, match=r"decodes with WordPiece"):
        load_vocabulary(folder)


def test_a_vocabulary_needs_neither_transformers_nor_torch(bytes_folder: Path):
    code = (
        "import sys; from mistill.text.vocabulary import load_vocabulary\n"
        f"v = load_vocabulary({str(bytes_folder)!r})\n"
        "v.encode(v.render([{'role': 'user', 'content': 'a'}])); v.end_ids; v.fingerprint()\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_its_name_tells_where_it_came_from(bytes_folder: Path):
    vocabulary = load_vocabulary(bytes_folder)
    assert isinstance(vocabulary, Vocabulary)
    assert repr(vocabulary) == f"Vocabulary({str(bytes_folder)!r}, size=384)"
