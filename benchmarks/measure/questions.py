"""A small set of questions that ships with mistill, so that a number appears without a network.

It is a smoke test: questions that a good chatbot answers without thinking, few enough for a minute.
A model that answers no better than chance is broken or does not know the language; two models that
differ by a few questions have not been told apart. ``benchmarks/data/README.md`` says where the
questions come from; published tasks are run by ``mistill eval``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.figures.answers import Answers
from benchmarks.measure.quoting import Scorer
from mistill.text.vocabulary import Vocabulary

QUESTIONS_FILE = Path(__file__).parent.parent / "data" / "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """A question with several answers, one of which is right.

    Attributes:
        kind: ``cloze`` (which ending is the likely one), ``arithmetic``, ``fact``, or
            ``instruction`` (asked of a chat model as its user would).
        text: What comes before the answer.
        answers: What may follow.
        right: Place of the right one.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    right: int


def read_questions(file: Path = QUESTIONS_FILE) -> list[Question]:
    """Read a set of questions.

    Args:
        file: JSON lines.

    Returns:
        The questions.
    """
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return [Question(row["kind"], row["text"], tuple(row["answers"]), row["right"]) for row in rows]


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """A name for the questions.

    Args:
        questions: The questions.

    Returns:
        64 hexadecimal digits.
    """
    rows = [[one.kind, one.text, one.answers, one.right] for one in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def written_out(question: Question, vocabulary: Vocabulary) -> tuple[str, list[str]]:
    """What a model reads, and what may follow, as text.

    An instruction is written by the chat template, where there is one.

    Args:
        question: The question.
        vocabulary: Of the model.

    Returns:
        The text before the answer, and each answer as it would follow.
    """
    answers = list(question.answers)
    if question.kind != "instruction":
        return question.text, [f" {answer}" for answer in answers]
    if vocabulary.chat_template is None:
        return f"Question: {question.text}\nAnswer:", [f" {answer}" for answer in answers]
    messages = [{"role": "user", "content": question.text}]
    return vocabulary.render(messages, add_generation_prompt=True), answers


def encode_pair(vocabulary: Vocabulary, before: str, after: str) -> tuple[list[int], int]:
    """Turn a text and what follows it into tokens, together, as the model would meet them.

    Args:
        vocabulary: Of the model.
        before: What comes first.
        after: What follows.

    Returns:
        All tokens, and how many of them are of the first text.
    """
    ids, first = vocabulary.encode(before + after), len(vocabulary.encode(before))
    if vocabulary.adds_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
        ids, first = [vocabulary.bos_id, *ids], first + 1
    return ids, min(max(first, 1), len(ids) - 1)


def ask(
    scorer: Scorer,
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    done: Callable[[], None] = lambda: None,
) -> Answers:
    """Let a model choose among the answers of every question.

    Args:
        scorer: The process that runs the model.
        questions: The questions.
        vocabulary: Of the model.
        done: Called after every question.

    Returns:
        What it holds of every answer.
    """
    found = []
    for question in questions:
        before, answers = written_out(question, vocabulary)
        values = []
        for answer in answers:
            ids, first = encode_pair(vocabulary, before, answer)
            kept = np.arange(1, len(ids)) >= first
            losses = scorer.ask("score", ids=ids, kept=kept.tolist())["losses"]
            values.append(float(f"{-sum(losses):.8g}"))
        found.append(tuple(values))
        done()
    return Answers(
        fingerprint=questions_fingerprint(questions),
        kinds=tuple(question.kind for question in questions),
        log_probabilities=tuple(found),
        answer_bytes=tuple(
            tuple(len(answer.encode()) for answer in question.answers) for question in questions
        ),
        right=tuple(question.right for question in questions),
    )
