"""Several prompts at once against the same prompts one by one."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import export
from mistill.engine import onnx_model as engine
from mistill.engine.language_model import greedy
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import ContextError, SettingsError
from tests.tiny import tiny_model


@pytest.fixture(scope="module", params=["full attention", "sliding window"])
def chatbot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    window = 16 if request.param == "sliding window" else None
    source = tiny_model(folder / "model", seed=2, sliding_window=window)
    return export.to_onnx(source, folder / "chatbot", parity_positions=0)


def some_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 300, count).tolist()
    return ids


def test_prompts_of_every_length_are_answered_as_they_are_alone(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 13)
    start = some_ids(20, 1)
    prompts = [
        some_ids(1, 2),
        start,
        some_ids(57, 3),
        start + some_ids(7, 4),
        start[:12],
        start[:12],
    ]
    model = OnnxModel(chatbot, threads=1)
    alone = [list(islice(model.stream(prompt), 40)) for prompt in prompts]
    before = list(model._cache.ids)
    assert model.write_batch(prompts, max_new_tokens=40) == alone
    assert model._cache.ids == before
    assert model.write_batch(prompts[:1], max_new_tokens=40) == alone[:1]
    assert model.write_batch([], max_new_tokens=40) == []
    assert len({tuple(reply) for reply in alone}) == 5


def test_each_position_has_the_scores_that_it_has_alone(chatbot: Path) -> None:
    prompts = [some_ids(30, 1), some_ids(9, 2), some_ids(50, 3)]
    model = OnnxModel(chatbot, threads=1)
    seen: list[list[NDArray[np.float32]]] = [[] for _ in prompts]

    def noting(which: int):
        def choose(logits: NDArray[np.float32]) -> int:
            seen[which].append(logits.copy())
            return greedy(logits)

        return choose

    replies = model.write_batch(
        prompts, max_new_tokens=12, choose=[noting(which) for which in range(3)]
    )
    for prompt, reply, scores in zip(prompts, replies, seen, strict=True):
        expected = model.logits(np.array([prompt + reply]))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(np.stack(scores), expected, atol=1e-4)


def test_a_reply_ends_by_itself_and_the_others_go_on(chatbot: Path) -> None:
    prompts = [some_ids(15, seed) for seed in range(5)]
    model = OnnxModel(chatbot, threads=1)
    alone = [list(islice(model.stream(prompt), 30)) for prompt in prompts]
    ends = {alone[1][4], alone[3][9]}

    def cut(reply: list[int]) -> list[int]:
        places = [place for place, token in enumerate(reply) if token in ends]
        return reply[: places[0] + 1] if places else reply

    expected = [cut(reply) for reply in alone]
    assert len({len(reply) for reply in expected}) >= 3, "choose other prompts"
    assert model.write_batch(prompts, max_new_tokens=30, end_ids=ends) == expected


def test_the_context_ends_a_reply(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1, context=40)
    replies = model.write_batch(
        [some_ids(35, 1), some_ids(40, 2), some_ids(10, 3)], max_new_tokens=20
    )
    assert [len(reply) for reply in replies] == [5, 0, 20]
    assert replies[0] == list(model.stream(some_ids(35, 1)))
    with pytest.raises(ContextError):
        model.write_batch([[5], some_ids(41, 1)], max_new_tokens=1)
    with pytest.raises(ValueError, match="empty"):
        model.write_batch([[5], []], max_new_tokens=1)
    with pytest.raises(SettingsError, match="max_new_tokens"):
        model.write_batch([[5]], max_new_tokens=0)
    with pytest.raises(SettingsError, match="one function for each"):
        model.write_batch([[5], [6]], max_new_tokens=1, choose=[greedy])


def test_samplers_draw_what_they_draw_alone(chatbot: Path) -> None:
    prompts = [some_ids(15, seed) for seed in range(3)]
    model = OnnxModel(chatbot, threads=1)

    def samplers() -> list[Sampler]:
        settings = SamplingSettings(temperature=1.5, repetition_penalty=1.2)
        return [Sampler(settings, np.random.default_rng(seed)) for seed in range(3)]

    alone = [
        list(islice(model.stream(prompt, sampler), 20))
        for prompt, sampler in zip(prompts, samplers(), strict=True)
    ]
    assert model.write_batch(prompts, max_new_tokens=20, choose=samplers()) == alone
