"""How probable a model holds given answers to be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mistill.judging import likelihood
from mistill.judging.likelihood import answer_log_probabilities
from mistill.preferences.tokens import Answer
from mistill.pytorch.loading import load_pytorch
from tests.reference.preferences import log_probability
from tune.pairwise import log_probabilities
from tune.pairwise.log_probabilities import recorded_log_probabilities


@pytest.fixture(scope="module")
def loaded(model):
    return load_pytorch(model)


def answers(count=9):
    generator = np.random.default_rng(3)
    sizes = generator.integers(3, 14, count)
    return [
        Answer(tuple(generator.integers(5, 300, size).tolist()), int(generator.integers(1, size)))
        for size in sizes
    ]


def test_they_are_those_of_one_token_after_another(loaded, monkeypatch):
    monkeypatch.setattr(likelihood, "_TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(likelihood, "_LOGITS_AT_ONCE", 1500)
    ours = answer_log_probabilities(loaded, answers())
    theirs = [log_probability(loaded, answer.ids, answer.start) for answer in answers()]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_an_answer_has_the_same_bits_whenever_it_is_asked_about(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(likelihood, "GROUP", 4)
    monkeypatch.setattr(log_probabilities, "GROUP", 4)
    first = answer_log_probabilities(loaded, answers())
    recorded = recorded_log_probabilities(loaded, answers(), tmp_path / "record.jsonl", "key")
    assert first.tolist() == recorded.tolist()
    loaded.train()  # what is trained is in train mode, and stays there
    assert answer_log_probabilities(loaded, answers()).tolist() == first.tolist()
    assert loaded.training
    loaded.eval()


def test_a_record_resumes_and_belongs_to_one_model_and_text(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(likelihood, "GROUP", 4)
    monkeypatch.setattr(log_probabilities, "GROUP", 4)
    record = tmp_path / "record.jsonl"
    whole = recorded_log_probabilities(loaded, answers(), record, "key").tolist()
    asked: list[int] = []
    compute = answer_log_probabilities

    def counting(model, some, **options):
        asked.append(len(some))
        return compute(model, some, **options)

    monkeypatch.setattr(log_probabilities, "answer_log_probabilities", counting)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:7]) + lines[7][:5])  # a kill in the second group
    assert recorded_log_probabilities(loaded, answers(), record, "key").tolist() == whole
    assert asked == [4, 1]
    assert record.read_text() == "".join(lines)

    asked.clear()
    recorded_log_probabilities(loaded, answers(), record, "another key")
    assert asked == [4, 4, 1]
    assert json.loads(record.read_text().splitlines()[0]) == {"fingerprint": "another key"}
