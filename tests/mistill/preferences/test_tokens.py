"""Prompts and answers as token ids."""

from __future__ import annotations

import json

import pytest

from mistill.errors import TextError
from mistill.preferences.reading import read_labelled, read_pairs
from mistill.preferences.tokens import digest_of, labelled_tokens, pair_tokens
from mistill.text.answers import prompt_ids
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_tokenizer

# Mistral's template of v0.1 writes no space before an answer.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return load_vocabulary(tiny_tokenizer(tmp_path_factory.mktemp("vocabulary")))


def pairs_in(tmp_path, *rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(file)


ANSWERS = ("A cold wind.", "[1] A wind.", ") odd", " spaced", "\nnext line", "7 winds")


@pytest.mark.parametrize("template", [None, MISTRAL], ids=["chatml", "mistral"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_its_text_and_the_token_that_ends_it(
    template, answer, vocabulary, tmp_path, tmp_path_factory
):
    if template is not None:
        folder = tiny_tokenizer(tmp_path_factory.mktemp("mistral"))
        (folder / "chat_template.jinja").write_text(template)
        vocabulary = load_vocabulary(folder)
    pairs = pairs_in(tmp_path, {"prompt": "What?", "chosen": answer, "rejected": "No."})
    (tokens,) = pair_tokens(pairs, vocabulary, 100, name="pairs")
    chosen = tokens.chosen
    end = vocabulary.token_bytes(chosen.ids[-1]).decode()
    assert end == "<|im_end|>"
    spelled = vocabulary.decode(list(chosen.ids[chosen.start : -1]))
    prompt = prompt_ids(pairs[0].prompt, vocabulary)
    # A token that begins in the prompt is the prompt's, even if it reaches into the answer.
    assert answer.strip().endswith(spelled.strip())
    assert len(spelled.strip()) >= len(answer.strip()) - 1
    assert tuple(prompt[:-1]) == chosen.ids[: len(prompt) - 1]
    assert vocabulary.decode(list(chosen.ids)).count("<s>") == (template is not None)


def test_only_the_last_answer_is_learned_and_earlier_ones_are_its_prompt(vocabulary, tmp_path):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = {"role": "user", "content": "Why?"}
    row = {"prompt": [*before, asked], "chosen": "Because.", "rejected": "No."}
    (tokens,) = pair_tokens(pairs_in(tmp_path, row), vocabulary, 100, name="pairs")
    chosen = tokens.chosen
    assert vocabulary.decode(list(chosen.ids[chosen.start :])) == "Because.<|im_end|>"
    assert "Hello<|im_end|>" in vocabulary.decode(list(chosen.ids[: chosen.start]))
    assert tokens.chosen.ids[: chosen.start] == tokens.rejected.ids[: tokens.rejected.start]


def test_long_rows_are_left_out_with_a_word(vocabulary, tmp_path, caplog):
    rows = [
        {"prompt": "What?", "chosen": "A cold wind.", "rejected": "wind " * 200},
        {"prompt": "What?", "chosen": "A cold wind.", "rejected": "No."},
    ]
    pairs = pairs_in(tmp_path, *rows)
    assert len(pair_tokens(pairs, vocabulary, 60, name="pairs")) == 1
    assert "1 of 2 rows of pairs are left out: they are longer than 60 tokens" in caplog.text
    with pytest.raises(TextError, match="none of the 2 rows of pairs has at most 8 tokens"):
        pair_tokens(pairs, vocabulary, 8, name="pairs")


def test_the_digest_depends_on_all_that_is_learned(vocabulary, tmp_path):
    row = {"prompt": "What?", "chosen": "A cold wind.", "rejected": "No."}
    others = [
        row,
        {**row, "prompt": "Why?"},
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]},
        {**row, "margin": 2},
    ]
    digests = {
        digest_of(pair_tokens(pairs_in(tmp_path, other), vocabulary, 100, name="p"))
        for other in others
    }
    file = tmp_path / "labels.jsonl"
    for label in (True, False):
        file.write_text(json.dumps({"prompt": "Q", "completion": "A", "label": label}))
        digests.add(digest_of(labelled_tokens(read_labelled(file), vocabulary, 50, name="labels")))
    assert len(digests) == 6
