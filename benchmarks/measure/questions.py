"""A small set of questions that ships with mistill and needs no network.

It is a smoke test: easy questions, few enough for a minute. A model that answers no better than
chance is broken or does not know the language; a difference of a few questions between two models
is not significant. ``benchmarks/data/README.md`` says where the
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
EVERYDAY_FILE = QUESTIONS_FILE.with_name("everyday-prompts.txt")


@dataclass(frozen=True)
class Question:
    """A question with several answers, one of which is right.

    Attributes:
        kind: ``cloze`` (which ending is the likely one), ``arithmetic``, ``fact``, or
            ``instruction`` (asked of a chat model as its user would).
        text: What comes before the answer.
        answers: What may follow.
        right: Index of the right one.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    right: int


def read_questions() -> list[Question]:
    """Read the questions that ship with mistill.

    Returns:
        The questions.
    """
    rows = map(json.loads, QUESTIONS_FILE.read_text("utf-8").splitlines())
    return [Question(row["kind"], row["text"], tuple(row["answers"]), row["right"]) for row in rows]


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of the questions.

    Args:
        questions: The questions.

    Returns:
        64 hexadecimal digits.
    """
    rows = [[one.kind, one.text, one.answers, one.right] for one in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_everyday_prompts() -> list[str]:
    """Read prompts as a chat model gets them every day.

    Returns:
        The prompts that ship with mistill.
    """
    return EVERYDAY_FILE.read_text("utf-8").splitlines()


def prompts_fingerprint(prompts: Sequence[str], max_new_tokens: int) -> str:
    """SHA-256 of what replies depend on besides the model.

    Args:
        prompts: The prompts.
        max_new_tokens: Most tokens of a reply.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps([list(prompts), max_new_tokens]).encode()).hexdigest()


def prompt_and_answers(question: Question, vocabulary: Vocabulary) -> tuple[str, list[str]]:
    """The prompt of a question and its possible answers, as text.

    An instruction is rendered with the chat template, where there is one.

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
    """Encode a prompt and its continuation together.

    Args:
        vocabulary: Of the model.
        before: The prompt.
        after: The continuation.

    Returns:
        All tokens, and how many of them belong to the prompt.
    """
    ids, first = vocabulary.encode(before + after), len(vocabulary.encode(before))
    if vocabulary.adds_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
        ids, first = [vocabulary.bos_id, *ids], first + 1
    return ids, min(max(first, 1), len(ids) - 1)


def answer_questions(
    scorer: Scorer,
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    done: Callable[[], None] = lambda: None,
) -> Answers:
    """Log-probabilities of every answer to every question.

    Args:
        scorer: The process that runs the model.
        questions: The questions.
        vocabulary: Of the model.
        done: Called after every question.

    Returns:
        The log-probabilities, with the right answers.
    """
    log_probabilities = []
    for question in questions:
        before, answers = prompt_and_answers(question, vocabulary)
        values = []
        for answer in answers:
            ids, first = encode_pair(vocabulary, before, answer)
            scored = np.arange(1, len(ids)) >= first
            losses = scorer.ask("score", ids=ids, kept=scored.tolist())["losses"]
            values.append(float(f"{-sum(losses):.8g}"))
        log_probabilities.append(tuple(values))
        done()
    return Answers(
        fingerprint=questions_fingerprint(questions),
        kinds=tuple(question.kind for question in questions),
        log_probabilities=tuple(log_probabilities),
        answer_bytes=tuple(
            tuple(len(answer.encode()) for answer in question.answers) for question in questions
        ),
        right=tuple(question.right for question in questions),
    )
