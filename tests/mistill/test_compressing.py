"""One call makes a chatbot that is closer to its source than plain GPTQ of the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
import mistill
import quantize
from mistill import compressing
from mistill.cli.inspection import inspect_folder
from mistill.errors import (
    FolderError,
    SettingsError,
    TargetExistsError,
    TextError,
    TrainingError,
)
from mistill.folders.folder import describe, read_json
from mistill.folders.lineage import read_lineage
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {"samples": 12, "block_length": 64, "tuning_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of widths that groups of 32, 64 and 128 divide."""
    return tiny_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, seed=3)


def kl_to(source: Path, chatbot: Path) -> float:
    """Mean KL(source || chatbot) over some tokens, each from the model as it runs."""
    ids = np.random.default_rng(0).integers(3, 380, (8, 48))
    scores = [
        torch.from_numpy(mistill.open_model(folder).logits(ids)).log_softmax(-1)
        for folder in (source, chatbot)
    ]
    return float((scores[0].exp() * (scores[0] - scores[1])).sum(-1).mean())


def test_the_chatbot_is_closer_to_its_source_than_plain_gptq_of_the_same_bytes(
    wide: Path, chats: Path, tmp_path: Path
) -> None:
    plain = quantize.to_gptq(
        wide, tmp_path / "plain", texts=chats, group_size=32, samples=12, block_length=64,
        head_bits=8, embedding_bits=8,
    )  # fmt: skip
    plain_chatbot = export.to_onnx(plain, tmp_path / "plain-chatbot")
    size_mb = describe(plain_chatbot).weight_bytes / 1e6
    chatbot = mistill.compress(
        wide, tmp_path / "chatbot", texts=chats, held_out=chats, size_mb=size_mb, **SMALL
    )
    assert describe(chatbot).weight_bytes <= describe(plain_chatbot).weight_bytes
    assert kl_to(wide, chatbot) < kl_to(wide, plain_chatbot)
    steps = [entry["step"] for entry in read_lineage(chatbot)]
    assert steps == ["gptq", "tune", "export"]
    assert "".join(mistill.ChatBot(chatbot, max_new_tokens=4, seed=0).reply("Hello"))
    assert {item.name for item in tmp_path.iterdir()} == {"plain", "plain-chatbot", "chatbot"}


def test_without_tuning_the_scales_are_those_of_gptaq(
    wide: Path, chats: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "tuning_steps": 0, "bits_per_weight": 12}
    chatbot = mistill.compress(wide, tmp_path / "chatbot", texts=chats, held_out=chats, **options)
    steps = read_lineage(chatbot)
    assert [entry["step"] for entry in steps] == ["gptq", "export"]
    assert steps[0]["settings"]["method"] == "gptaq"
    assert steps[0]["settings"]["symmetric"] is False
    assert steps[0]["settings"]["scale_type"] == "float16"
    assert steps[1]["settings"]["float_columns"] == 0
    assert describe(chatbot).context_length == describe(wide).context_length


def test_what_cannot_be_compressed_is_refused_before_anything_is_made(
    wide: Path, chats: Path, tmp_path: Path
) -> None:
    target = tmp_path / "chatbot"
    with pytest.raises(SettingsError, match="not both"):
        mistill.compress(wide, target, texts=chats, size_mb=1, bits_per_weight=4)
    with pytest.raises(SettingsError, match="tuning_steps must be at least 0"):
        mistill.compress(wide, target, texts=chats, tuning_steps=-1)
    with pytest.raises(SettingsError, match="context_length is 9999, and the model's own"):
        mistill.compress(wide, target, texts=chats, held_out=chats, context_length=9999)
    with pytest.raises(TextError, match=r"nowhere\.jsonl"):
        mistill.compress(wide, target, texts="nowhere.jsonl")
    with pytest.raises(FolderError, match="nowhere"):
        mistill.compress(tmp_path / "nowhere", target, texts=chats)
    with pytest.raises(SettingsError, match="takes at least"):
        mistill.compress(wide, target, texts=chats, held_out=chats, size_mb=0.01, **SMALL)
    with pytest.raises(SettingsError, match="not both size_mb and tokens_per_second"):
        mistill.compress(wide, target, texts=chats, size_mb=1, tokens_per_second=4)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    with pytest.raises(TargetExistsError, match="exists already"):
        mistill.compress(wide, target, texts=chats, held_out=chats, **SMALL)


def test_a_tuning_that_brings_nothing_is_said_and_left_out(
    wide: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def tune(*_: Any, **__: Any) -> None:
        raise TrainingError("no closer")

    monkeypatch.setattr("quantize.tune", tune, raising=False)
    options = {**SMALL, "bits_per_weight": 12}
    chatbot = mistill.compress(wide, tmp_path / "chatbot", texts=chats, held_out=chats, **options)
    assert [entry["step"] for entry in read_lineage(chatbot)] == ["gptq", "export"]
    assert "the chatbot is made without tuning: no closer" in caplog.text


def test_what_was_made_is_used_again_and_other_text_is_other_work(
    wide: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Path(shutil.copyfile(chats, tmp_path / "texts.jsonl"))
    options = {**SMALL, "bits_per_weight": 12, "held_out": chats, "tuning_steps": 0}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.to_onnx", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            mistill.compress(wide, tmp_path / "chatbot", texts=texts, **options)
    whole = texts.read_bytes()
    texts.write_bytes(whole + whole)
    with pytest.raises(SettingsError, match="texts"):
        mistill.compress(wide, tmp_path / "chatbot", texts=texts, **options)
    texts.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr("quantize.to_mixed", interrupted, raising=False)  # must not be called again
        mistill.compress(wide, tmp_path / "chatbot", texts=texts, **options)
    assert {item.name for item in tmp_path.iterdir()} == {"texts.jsonl", "chatbot"}


def test_a_speed_decides_the_size_and_the_manifest_tells_it(
    wide: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[float]] = []

    def timed(folders: Sequence[Path]) -> list[float]:
        sizes.append([describe(folder).weight_bytes / 1e6 for folder in folders])
        return [0.002, 0.004] if len(folders) == 2 else [0.0032]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "_time_chatbots", timed)
    options = {**SMALL, "tuning_steps": 0, "held_out": chats}
    with monkeypatch.context() as patched:
        patched.setattr("quantize.to_mixed", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            mistill.compress(
                wide, tmp_path / "chatbot", texts=chats, tokens_per_second=320, **options
            )
    chatbot = mistill.compress(
        wide, tmp_path / "chatbot", texts=chats, tokens_per_second=320, **options
    )
    # The two that are timed are not made and timed again; the result is.
    (small, large), (made,) = sizes
    wanted = 1 / 320 / 1.05
    predicted = small + (wanted - 0.002) / 0.002 * (large - small)
    assert small < made <= predicted + 0.01
    assert made > small + 0.5 * (predicted - small)
    speed = read_json(chatbot / "manifest.json")["speed"]
    assert speed == {"wanted": 320, "predicted": pytest.approx(336, abs=0.01), "measured": 312.5}
    inspection = inspect_folder(chatbot)
    assert inspection.problems == (), "a checksum is no longer that of its file"
    assert {item.name for item in tmp_path.iterdir()} == {"chatbot"}


def test_a_speed_that_is_not_reached_after_all_is_said(
    wide: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = iter([[0.002, 0.004], [0.005]])
    monkeypatch.setattr(compressing, "_time_chatbots", lambda _: next(steps))
    options = {**SMALL, "tuning_steps": 0, "held_out": chats, "tokens_per_second": 240.0}
    mistill.compress(wide, tmp_path / "chatbot", texts=chats, **options)
    assert "the chatbot writes 200 tokens a second, and not the 240" in caplog.text


def test_a_speed_out_of_reach_is_refused_and_leaves_nothing(
    wide: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "_time_chatbots", lambda _: [0.002, 0.004])
    options = {**SMALL, "held_out": chats, "tokens_per_second": 501}
    with pytest.raises(SettingsError, match=r"MB in 4 bits, writes 500 a second here"):
        mistill.compress(wide, tmp_path / "chatbot", texts=chats, **options)
    assert list(tmp_path.iterdir()) == []
