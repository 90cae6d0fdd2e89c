"""A cache of the size of the sliding window: exact, and no larger however long the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mistill.engine.key_value_cache as key_value_cache
from export import to_onnx
from export.checks.parity import text_runner
from export.weights.architecture import read_architecture
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.scheduler import write_all
from mistill.errors import SettingsError
from mistill.folders.folder import read_json
from tests.tiny import tiny_model

WINDOW, SLACK = 24, 8
IDS = np.random.default_rng(6).integers(5, 384, 200)


def pytorch_logits(source: Path, ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral that sees 24 positions; read only."""
    return tiny_model(tmp_path_factory.mktemp("window") / "model", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def chatbot(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(source, tmp_path_factory.mktemp("ring") / "onnx", ring=True)


@pytest.fixture
def engine(chatbot: Path, monkeypatch: pytest.MonkeyPatch) -> OnnxModel:
    """An engine whose buffers are often full."""
    monkeypatch.setattr(key_value_cache, "WINDOW_SLACK", SLACK)
    return OnnxModel(chatbot, threads=1)


def test_logits_far_beyond_the_window_are_those_of_pytorch(engine: OnnxModel, source: Path) -> None:
    expected = pytorch_logits(source, IDS[None])
    found = engine.logits(IDS[None])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    # Seen from the start, the text's end would look different.
    apart = pytorch_logits(source, IDS[None, 100:])[0, -1]
    np.testing.assert_allclose(found[0, -1], apart, rtol=0, atol=1e-3)


def test_memory_stops_growing_at_the_window(engine: OnnxModel) -> None:
    engine.read(IDS[:10].tolist())
    small = engine._cache.size_bytes
    engine.read(IDS.tolist())
    assert engine._cache.size_bytes == small == (WINDOW + SLACK) * 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    "chunks", [[200], [1] * 200, [30, 1, 1, 60, 1, 107], [7] * 28 + [4]], ids=len
)
def test_every_way_to_cut_the_text_gives_the_same(chunks: list[int], chatbot: Path) -> None:
    run = text_runner(chatbot, read_architecture(read_json(chatbot / "config.json")))
    whole, _ = run(IDS, None)
    cache, parts, start = None, [], 0
    for length in chunks:
        logits, cache = run(IDS[start : start + length], cache)
        parts.append(logits)
        start += length
    assert start == len(IDS)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("back", [1, 3, 7, 20, 60])
def test_going_back_is_exact_however_far(back: int, engine: OnnxModel) -> None:
    other = (IDS + 1) % 384
    for length in range(20, 120, 3):
        text = IDS[:length].tolist()
        engine.read(text)
        turned = [*text[:-back], *other[: back + 2].tolist()]
        found = engine.read(turned)[0]
        expected = engine.logits(np.array([turned]))[0, -1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_is_still_there_is_not_read_again(engine: OnnxModel) -> None:
    engine.read(IDS[:100].tolist())
    cache, kept = engine._cache, []
    for count in range(99, 80, -1):
        cache.ids[:] = IDS[:100].tolist()
        cache.rewind(count)
        kept.append(len(cache.ids))
    capacity = WINDOW + SLACK

    def rows(tokens: int) -> int:
        """GroupQueryAttention's own words, in the order in which they are said."""
        if tokens <= capacity:
            return tokens
        G = capacity - WINDOW + 1
        return tokens - G * math.ceil((tokens - capacity) / G)

    expected = [
        count if rows(count) == rows(100) - (100 - count) else 0 for count in range(99, 80, -1)
    ]
    assert kept == expected
    assert 0 < sum(map(bool, kept)) < len(kept)


def test_a_saved_cache_is_taken_up_again(engine: OnnxModel, tmp_path: Path) -> None:
    text = IDS[:150].tolist()
    expected = engine.read(text)[0]
    engine.read(text[:-1])
    file = engine.save_cache(tmp_path / "cache.safetensors")
    other = OnnxModel(engine.folder, threads=1)
    other.restore_cache(file)
    assert len(other._cache.ids) == 149
    np.testing.assert_allclose(other.read(text)[0], expected, rtol=0, atol=1e-4)
    assert len(other._cache.ids) == 150


def test_a_batch_is_answered_as_each_prompt_alone(engine: OnnxModel) -> None:
    prompts = [IDS[:60].tolist(), IDS[:75].tolist(), IDS[90:95].tolist()]

    def alone(prompt: list[int]) -> list[int]:
        stream = engine.stream(list(prompt))
        return [next(stream) for _ in range(8)]

    expected = [alone(prompt) for prompt in prompts]
    assert write_all(engine, prompts, max_new_tokens=8) == expected


def test_an_int8_cache_may_be_a_ring(source: Path, chats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": "int8", "cache_texts": (str(chats),)}
    ring = to_onnx(source, tmp_path / "ring", ring=True, **options)
    plain = to_onnx(source, tmp_path / "plain", **options)
    logits = [OnnxModel(folder, threads=1).logits(IDS[None]) for folder in (ring, plain)]
    assert np.abs(logits[0] - logits[1]).max() < 0.05
    assert read_json(ring / "manifest.json")["cache"]["kl_to_float"] < 2e-3


@pytest.mark.parametrize(
    ("window", "options"), [(None, {}), (24, {"context_length": 24}), (600, {})], ids=str
)
def test_a_ring_that_would_change_nothing_is_refused(
    window: int | None, options: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", sliding_window=window)
    with pytest.raises(
        SettingsError, match="ring needs a sliding window that is shorter than the context"
    ):
        to_onnx(source, tmp_path / "onnx", ring=True, **options)


def test_a_portable_graph_has_no_ring(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ring"):
        to_onnx(source, tmp_path / "onnx", ring=True, portable=True)
