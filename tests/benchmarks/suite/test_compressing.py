"""KL of a chatbot as it runs, against the same weights in PyTorch; and the program as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import export
import quantize
from benchmarks.suite import compressing, step_tables
from benchmarks.suite.healing import figures_of, held_out_blocks, predictions_of
from mistill.engine.onnx_model import OnnxModel
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "model", hidden_size=128, seed=3)


def test_a_chatbot_has_the_kl_of_its_weights_in_pytorch(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    rounded = quantize.to_rounding(source, tmp_path / "rounded", bits=4, group_size=64)
    chatbot = export.to_onnx(rounded, tmp_path / "chatbot", precision="float32")
    blocks = held_out_blocks([str(chats)], load_vocabulary(source), 600, 64)
    references = predictions_of(source, blocks)
    expected = figures_of(references, predictions_of(rounded, blocks), blocks)["chats.jsonl"]["kl"]
    model = OnnxModel(chatbot, threads=1)
    measured = compressing.onnx_kl(model, references["chats.jsonl"], blocks["chats.jsonl"])
    assert expected > 1e-4
    assert measured == pytest.approx(expected, rel=1e-3)


def test_the_program_prints_what_its_table_needs(
    source: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{source} --texts {chats} --held-out {chats} --tuning-steps 0 2 --threads 1"
    more = "--samples 4 --block-length 64 --bits-per-weight 12"
    compressing.main([*words.split(), *more.split()])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, tuned = document["models"]
    assert plain["name"] == "mistill, not tuned"
    assert plain["held_out"]["chats.jsonl"]["kl"] > 0
    assert tuned["held_out"] != plain["held_out"]
    lines = step_tables.compressing(document)
    assert any(line.startswith("| mistill, tuned for 2 steps |") for line in lines)
    assert str(chats.parent) not in json.dumps(document)
