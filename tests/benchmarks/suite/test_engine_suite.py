"""The programs that measure later turns and guesses: they run, and compare what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from benchmarks.suite import later_turn, reply_loops, speculation
from mistill.engine.onnx_model import OnnxModel
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    source = tiny_model(folder / "model", seed=2, max_position_embeddings=2048)
    return export.to_onnx(source, folder / "chatbot", parity_positions=0, context_length=2048)


def test_a_conversation_has_the_tokens_asked_for(chatbot: Path) -> None:
    vocabulary = load_vocabulary(chatbot)
    messages = later_turn.conversation(vocabulary, 700)
    assert len(vocabulary.encode(vocabulary.render(messages))) >= 700
    assert len(vocabulary.encode(vocabulary.render(messages[:-2]))) < 700
    assert messages[-1]["role"] == "assistant"


def test_a_later_turn_is_measured_warm_restored_and_cold(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    run = OnnxModel._read

    def noted(self: OnnxModel, tokens: list[int], scores: object) -> None:
        read.append(len(tokens))
        run(self, tokens, scores)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxModel, "_read", noted)
    found = later_turn.measure(chatbot, 700, 1, 2)
    json.dumps(found)
    assert found["prompt_tokens"] > 700
    assert [len(samples) for samples in found["samples"].values()] == [2, 2, 2]
    # Of nine later turns, the three cold ones read it all in chunks; so did the turn before them.
    chunks = found["prompt_tokens"] // 128
    assert 3 * chunks < sum(count == 128 for count in read) <= 4 * chunks
    assert found["warm_to_cold"]["median"] > 0


def test_replies_with_guesses_are_measured_beside_plain_ones(chatbot: Path) -> None:
    found = speculation.measure(chatbot, chatbot, exact=True, tokens=40, threads=1, rounds=1)
    json.dumps(found)
    assert found["rounding"] < 1e-4
    assert set(found["replies"]) == {
        f"{question}, {name}"
        for question in ("repeats", "tells")
        for name in ("lookup", "wrong", "model")
    }
    for name, reply in found["replies"].items():
        assert reply["same_tokens"] == 40
        assert reply["tried"] >= reply["right"]
        if name.endswith("wrong"):  # tried as long as the clock says that it may pay
            assert reply["right"] == 0
        if name.endswith("model"):  # it is its own draft
            assert reply["right"] == reply["tried"]


def test_loops_of_replies_are_counted_and_judged(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = {"drawn": {"temperature": 1.0}, "greedy": {"temperature": 0.0}}
    monkeypatch.setattr(reply_loops, "WAYS", sampled)
    found = reply_loops.measure(chatbot, chatbot, ["Hi", "What is wind?"], 6, 1)["ways"]
    assert found.keys() == sampled.keys()
    for way in found.values():
        assert 0 < way["tokens"] <= 6
        assert 0 <= way["loops"] <= 1
    # What the judge itself finds most probable surprises it least.
    assert found["greedy"]["judge_nats"] < found["drawn"]["judge_nats"]


def test_nats_per_token_are_those_of_the_logits(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    logits = torch.tensor(model.logits(np.array([[5, 6, 7, 8]])))[0, 1:3]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8])).item()
    assert abs(reply_loops.nats_per_token(model, [5, 6], [7, 8]) - expected) < 1e-5
