"""Replies of random models under a constraint: whatever they would say, the form is kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import export
from mistill.chat.bot import ChatBot
from mistill.chat.stream_text import TextStream
from mistill.constraints import (
    ConstrainedChoice,
    Constraint,
    ConstraintTokens,
    json_schema,
    lark,
    regex,
)
from mistill.engine.drafts import PromptLookup
from mistill.engine.language_model import greedy
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.engine.speculation import SpeculativeModel
from mistill.errors import FolderError, MissingExtraError, SettingsError, VocabularyError
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.mistill.made import put_template, sentencepiece_folder
from tests.tiny import tiny_model, tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-[01][0-9](-é| ö)?"
SUM = """
start: term ("+" term)~1..3
term: NUMBER | "(" NUMBER "*" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "kind", "tags"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 12
        and 0 <= person["age"] <= 150
        and person["kind"] in ("cat", "dog")
        and len(person["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in person["tags"])
    )


def is_date(text: str) -> bool:
    return re.fullmatch(DATE, text) is not None


def is_sum(text: str) -> bool:
    term = r"([1-9][0-9]{0,2}|\([1-9][0-9]{0,2}\*[1-9][0-9]{0,2}\))"
    return re.fullmatch(rf"{term}(\+{term}){{1,3}}", text) is not None


FORMS: dict[str, tuple[Constraint, Callable[[str], bool]]] = {
    "schema": (json_schema(PERSON), is_person),
    "regex": (regex(DATE), is_date),
    "lark": (lark(SUM), is_sum),
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """With rows that stand for no token, and two tokens that end a reply."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("byte-level"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 416, "eos_token_id": [2, 4]}))
    return load_vocabulary(folder)


@pytest.fixture(scope="module")
def sentence_piece(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """As Llama 2 and Mistral v0.1 have: a space is dropped where a text begins."""
    from transformers import AutoTokenizer

    raw = sentencepiece_folder(tmp_path_factory.mktemp("raw"))
    folder = tmp_path_factory.mktemp("sentencepiece")
    AutoTokenizer.from_pretrained(raw).save_pretrained(folder)
    return load_vocabulary(folder)


def random_reply(
    vocabulary: Vocabulary, tokens: ConstraintTokens, form: Constraint, seed: int
) -> str:
    """What a model says whose every step is noise."""
    generator = np.random.default_rng(seed)
    sampler = Sampler(SamplingSettings(temperature=1, top_k=0, top_p=1, min_p=0), generator)
    choose = ConstrainedChoice(form, tokens, sampler)
    text = TextStream(vocabulary, every_byte=True)
    shown = ""
    for _ in range(300):
        logits = (3 * generator.standard_normal(vocabulary.size)).astype(np.float32)
        token = choose(logits)
        if token in vocabulary.end_ids:
            assert choose.complete
            return shown + text.finish()
        assert not vocabulary.is_special(token)
        assert not vocabulary.is_padding(token)
        shown += text.add(token)
    raise AssertionError(f"never ended: {shown}")


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("form", list(FORMS))
def test_noise_under_a_constraint_has_the_form(
    kind: str, form: str, request: pytest.FixtureRequest
) -> None:
    vocabulary = request.getfixturevalue(kind)
    tokens = ConstraintTokens(vocabulary)
    constraint, fits = FORMS[form]
    replies = {random_reply(vocabulary, tokens, constraint, seed) for seed in range(60)}
    assert len(replies) > 30
    for reply in replies:
        assert fits(reply), reply


def test_a_space_that_a_form_wants_first_is_shown(sentence_piece: Vocabulary) -> None:
    tokens = ConstraintTokens(sentence_piece)
    form = regex(" (the|a) [a-z]{1,3}")
    for seed in range(20):
        assert re.fullmatch(" (the|a) [a-z]{1,3}", random_reply(sentence_piece, tokens, form, seed))


def test_what_the_form_allows_is_left_to_the_choice(byte_level: Vocabulary) -> None:
    """The mask against trying every token: exactly those that go on towards the form."""
    tokens = ConstraintTokens(byte_level)
    seen: list[NDArray[np.float32]] = []

    def watch(logits: NDArray[np.float32]) -> int:
        seen.append(logits.copy())
        return greedy(logits)

    logits = np.arange(byte_level.size, dtype=np.float32)
    before = logits.copy()
    choose = ConstrainedChoice(regex("[ab]?[cd]"), tokens, watch)
    first = choose(logits)
    np.testing.assert_array_equal(logits, before)
    spelled = [byte_level.token_bytes(token) for token in range(byte_level.size)]
    fitting = [t for t, text in enumerate(spelled) if re.fullmatch(rb"[ab]?[cd]|[ab]", text)]
    assert np.flatnonzero(np.isfinite(seen[0])).tolist() == fitting
    np.testing.assert_array_equal(seen[0][fitting], logits[fitting])
    assert first == max(fitting)
    while not choose.complete:
        choose(logits)
    choose(logits)
    assert set(np.flatnonzero(np.isfinite(seen[-1]))) <= set(byte_level.end_ids)


# --- chatbots -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_reply_of_a_tiny_random_chatbot_has_the_form(chatbot: Path, form: str) -> None:
    constraint, fits = FORMS[form]
    bot = ChatBot(chatbot, constraint=constraint, temperature=2, top_k=0, seed=0, threads=1)
    for number in range(8):
        bot.reset()
        reply = "".join(bot.reply(f"question {number}"))
        assert bot.last_ending == "end of turn"
        assert fits(reply), reply


def test_one_reply_may_have_another_form(chatbot: Path) -> None:
    bot = ChatBot(chatbot, temperature=0, max_new_tokens=20, threads=1)
    free = "".join(bot.reply("Hello"))
    assert not is_date(free)
    assert is_date("".join(bot.reply("When?", constraint=regex(DATE))))
    bot.reset()
    assert "".join(bot.reply("Hello")) == free


def test_a_reply_that_is_cut_short_says_so(chatbot: Path) -> None:
    bot = ChatBot(chatbot, constraint=json_schema(PERSON), max_new_tokens=3, seed=0, threads=1)
    list(bot.reply("Who?"))
    assert bot.last_ending == "max_new_tokens"


def test_speculative_and_constrained_decoding_go_together(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    vocabulary = load_vocabulary(chatbot)
    tokens = ConstraintTokens(vocabulary)
    speculative = SpeculativeModel(model, PromptLookup())
    prompt = vocabulary.encode('{"name": "Bob", "age": 4, "kind": "cat", "tags": []} ' * 3)

    def written(by: Any) -> list[int]:
        choose = ConstrainedChoice(json_schema(PERSON), tokens, greedy)
        reply = []
        for token in islice(by.stream(prompt, choose), 200):
            reply.append(token)
            if token in vocabulary.end_ids:
                return reply
        raise AssertionError("never ended")

    assert written(speculative) == written(model)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: json_schema("{"), "the JSON schema is not valid JSON"),
        (lambda: json_schema("[1]"), "a JSON schema must be a JSON object"),
        (lambda: json_schema({"type": "nope"}), "JSON schema cannot be used .* Invalid type: nope"),
        (
            lambda: json_schema({"type": "string", "minLength": 5, "maxLength": 2}),
            "minLength \\(5\\) is greater",
        ),
        (lambda: regex("(a"), "regular expression cannot be used .* unclosed group"),
        (lambda: lark("start: foo"), 'grammar cannot be used .* unknown name: "foo"'),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_in_one_line(
    make: Callable[[], Constraint], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_forms_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    (tmp_path / "sum.lark").write_text(SUM)
    assert json_schema(tmp_path / "schema.json") == json_schema(PERSON)
    assert json_schema(json.dumps(PERSON)) == json_schema(PERSON)
    assert lark(tmp_path / "sum.lark") == lark(SUM)
    with pytest.raises(FolderError, match="cannot be read"):
        json_schema(tmp_path / "nothing.json")


def test_a_form_needs_a_token_that_ends_replies(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "endless")
    (folder / "tokenizer_config.json").write_text("{}")
    put_template(folder, "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(VocabularyError, match="no token that ends a reply"):
        ConstraintTokens(load_vocabulary(folder))


def test_without_llguidance_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"llguidance is not installed; .* pip install llg"):
        regex("a")


def test_tiny_models_of_other_sizes_need_no_more(tmp_path: Path) -> None:
    """A vocabulary whose rows are no multiple of 32, as the mask has them."""
    source = tiny_model(tmp_path / "model", vocab_size=391)
    made = export.to_onnx(source, tmp_path / "onnx", parity_positions=0)
    bot = ChatBot(made, constraint=regex(DATE), temperature=0, threads=1)
    assert is_date("".join(bot.reply("When?")))


@pytest.mark.parametrize(
    ("make", "text", "words"),
    [
        (
            lark,
            "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(50_000)),
            "cannot be used",
        ),
        (json_schema, '{"maximum": NaN}', "is not JSON"),
        (json_schema, '{"maximum": 1e999}', "is not JSON"),
    ],
)
def test_a_constraint_that_ends_its_library_is_refused_and_this_process_goes_on(make, text, words):
    with pytest.raises(SettingsError, match=words):
        make(text)
    assert regex("[0-9]+").grammar
