"""Replies written side by side, beside the same written one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.writing import write_replies

PROMPTS = [[7, 30, 41], [9], [100 + n for n in range(20)], *([n, 2 * n] for n in range(20, 36))]
MOST = 12


@pytest.fixture(scope="module")
def model(teacher: Path) -> Any:
    return load_pytorch(teacher)


@torch.no_grad()
def likeliest(model: Any, prompt: list[int], ends: list[int]) -> list[int]:
    reply: list[int] = []
    while len(reply) < MOST and not (reply and reply[-1] in ends):
        reply.append(int(model(torch.tensor([prompt + reply])).logits[0, -1].argmax()))
    return reply


def test_replies_are_the_likeliest_tokens_up_to_an_end(model: Any) -> None:
    free = [likeliest(model, prompt, []) for prompt in PROMPTS]
    ends = [free[0][2], free[1][-1]]
    expected = [likeliest(model, prompt, ends) for prompt in PROMPTS]
    assert len({len(reply) for reply in expected}) > 1
    assert write_replies(model, PROMPTS, ends, MOST) == expected


def test_a_penalty_of_the_folder_changes_no_reply(model: Any) -> None:
    expected = write_replies(model, PROMPTS, [3], MOST)
    model.generation_config.repetition_penalty = 5.0
    try:
        assert write_replies(model, PROMPTS, [3], MOST) == expected
    finally:
        model.generation_config.repetition_penalty = None


def test_drawn_tokens_are_as_frequent_as_the_model_holds_likely(model: Any) -> None:
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).double()
    torch.manual_seed(0)
    draws = [write_replies(model, PROMPTS[:1] * 512, [3], 1, sampled=True) for _ in range(2)]
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=len(probabilities))
    likely = probabilities > 0.02
    spread = (probabilities * (1 - probabilities) / 1024).sqrt()
    assert bool(((counts / 1024 - probabilities).abs() < 5 * spread)[likely].all())
    assert draws[0] != draws[1]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(model: Any, training: bool) -> None:
    model.train(training)
    write_replies(model, PROMPTS[:2], [3], 2)
    assert model.training is training
    model.eval()
