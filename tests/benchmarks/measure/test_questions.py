"""The small offline set of questions, and how answers are chosen."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.figures.answers import Answers
from benchmarks.measure.questions import (
    Question,
    answer_questions,
    encode_pair,
    prompt_and_answers,
    questions_fingerprint,
    read_everyday_prompts,
    read_questions,
)
from benchmarks.report.report import Report
from distill.reply_filter import without_spelling
from mistill.text.vocabulary import load_vocabulary


class Oracle:
    """Predicts what it is told to: the loss of a token is its place in a list, else 9."""

    def __init__(self, liked: list[int]) -> None:
        self.liked = liked
        self.asked: list[tuple[list[int], list[bool]]] = []

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert do == "score"
        ids, kept = arguments["ids"], arguments["kept"]
        self.asked.append((ids, kept))
        targets = [token for token, keep in zip(ids[1:], kept, strict=True) if keep]
        return {"losses": [float(self.liked.index(t)) if t in self.liked else 9.0 for t in targets]}


def answered(values: tuple[float, ...], lengths: tuple[int, ...], right: int) -> Answers:
    return Answers(
        fingerprint="",
        kinds=("fact",),
        log_probabilities=(values,),
        answer_bytes=(lengths,),
        right=(right,),
    )


def test_there_are_enough_questions_of_every_kind_and_no_place_is_favoured() -> None:
    questions = read_questions()
    kinds = Counter(question.kind for question in questions)
    assert kinds == {"fact": 40, "cloze": 30, "arithmetic": 30, "instruction": 20}
    assert Counter(question.right for question in questions) == dict.fromkeys(range(4), 30)
    assert all(len(set(question.answers)) == 4 for question in questions)
    assert len({question.text for question in questions}) == 120
    # A lower-case question ends without a space: the answer brings its own.
    assert all(question.text == question.text.strip() for question in questions)


def test_sums_are_right() -> None:
    sums = [question for question in read_questions() if question.text.endswith("=")]
    assert len(sums) == 26
    for question in sums:
        left, sign, other, _ = question.text.split()
        a, b = int(left), int(other)
        expected = {"+": a + b, "-": a - b, "x": a * b, "/": a // b if b else 0}[sign]
        assert question.answers[question.right] == str(expected)


def test_the_choice_is_the_most_probable_answer_for_each_byte() -> None:
    # Whole: the second; for each byte: -4/8 against -3/3.
    found = answered((-4.0, -3.0), (8, 3), 0)
    assert found.outcomes() == (True,)
    assert found.outcomes(normalized=False) == (False,)
    assert found.accuracy == 1.0


def test_no_student_has_seen_what_models_are_asked() -> None:
    prompts = read_everyday_prompts()
    assert len(set(prompts)) == 40
    learnt = {
        without_spelling(line)
        for line in (files("mistill") / "data" / "demo-prompts.txt").read_text("utf-8").splitlines()
    }
    asked = {without_spelling(text) for text in (*prompts, *(q.text for q in read_questions()))}
    assert not asked & learnt


def test_answers_are_counted_by_kind() -> None:
    found = Answers(
        fingerprint="",
        kinds=("fact", "cloze", "fact"),
        log_probabilities=((-1.0, -2.0),) * 3,
        answer_bytes=((1, 1),) * 3,
        right=(0, 0, 1),
    )
    assert found.by_kind() == {"fact": (1, 2), "cloze": (1, 1)}
    low, high = found.interval
    assert low < 2 / 3 < high


def test_only_the_answers_tokens_are_scored(model: Path) -> None:
    vocabulary = load_vocabulary(model)
    question = Question("fact", "The mistral is a", ("cold wind", "breeze"), 0)
    oracle = Oracle(vocabulary.encode(" cold wind"))
    found = answer_questions(oracle, [question], vocabulary)
    ids, kept = oracle.asked[0]
    assert ids == vocabulary.encode("The mistral is a cold wind")
    scored = [token for token, keep in zip(ids[1:], kept, strict=True) if keep]
    assert vocabulary.decode(scored) == " cold wind"
    count = len(scored)
    assert found.log_probabilities[0][0] == -sum(range(count))
    assert found.answer_bytes == ((9, 6),)
    assert found.accuracy == 1
    assert found.fingerprint == questions_fingerprint([question])


def test_an_instruction_is_asked_as_a_user_asks(model: Path) -> None:
    vocabulary = load_vocabulary(model)
    before, answers = prompt_and_answers(
        Question("instruction", "Say yes.", ("Yes",), 0), vocabulary
    )
    assert before.endswith("Say yes.<|im_end|>\n<|im_start|>assistant\n")
    assert answers == ["Yes"]
    vocabulary.chat_template = None
    before, answers = prompt_and_answers(
        Question("instruction", "Say yes.", ("Yes",), 0), vocabulary
    )
    assert (before, answers) == ("Question: Say yes.\nAnswer:", [" Yes"])


def test_a_token_for_the_beginning_is_not_scored(model: Path) -> None:
    vocabulary = load_vocabulary(model)
    vocabulary.adds_bos = True
    ids, first = encode_pair(vocabulary, "The wind", " is cold")
    assert ids[0] == vocabulary.bos_id
    assert vocabulary.decode(ids[first:]) == " is cold"
    # A template that writes the token itself gets no second one.
    ids, _ = encode_pair(vocabulary, "<s>The wind", " is cold")
    assert ids.count(vocabulary.bos_id or 0) == 1


def test_a_comparison_asks_every_model_and_keeps_its_answers(
    model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = read_questions()[::15]
    monkeypatch.setattr("benchmarks.measure.measuring.read_questions", lambda: few)
    found = compare(
        [model],
        texts=chats,
        scored_tokens=60,
        prompt_tokens=4,
        new_tokens=4,
        rounds=1,
        threads=1,
        tasks=True,
        perplexity=("llama.cpp",),
        perplexity_tokens=1100,
        transformers_generate=False,
    )
    answers = found.models[0].answers
    assert answers is not None
    assert len(answers.right) == len(few)
    assert all(value < 0 for values in answers.log_probabilities for value in values)
    # A model with random weights guesses.
    (quoted,) = found.models[0].quoted
    assert quoted.window_tokens == (255, 255)
    assert 0.3 < math.log(quoted.value) / math.log(found.models[0].perplexity.value) < 3
    assert Report.from_json(found.to_json()) == found
    document = json.loads(found.to_json())["models"][0]["summary"]
    assert document["smoke_accuracy"] == pytest.approx(answers.accuracy)
    assert document["smoke_accuracy_spread"] == pytest.approx(list(answers.interval))
    assert document["perplexity_llama_cpp"] == pytest.approx(quoted.value)
    losses = np.concatenate(found.models[0].perplexity.losses)
    bits = losses.sum() / math.log(2) / sum(found.models[0].perplexity.passage_bytes)
    assert document["bits_per_byte"] == pytest.approx(bits)
    assert "Smoke test" in found.to_markdown()
    assert "| Energy" not in found.to_markdown()
