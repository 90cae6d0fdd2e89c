"""``mistill inspect`` says what it has looked at, and calls nothing sound that it has not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from export import to_onnx
from mistill.cli.app import main
from mistill.cli.inspection import inspect_folder


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An ONNX folder; read only."""
    return to_onnx(model, tmp_path_factory.mktemp("chatbot") / "bot", parity_positions=0)


def test_every_byte_of_a_chatbot_is_compared(chatbot, tmp_path):
    assert inspect_folder(chatbot).problems == ()
    assert inspect_folder(chatbot).looked_at.startswith("every byte was compared")
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        bot = Path(shutil.copytree(chatbot, tmp_path / name))
        content = bytearray((bot / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bot / name).write_bytes(content)
        assert main(["inspect", str(bot)]) == 1
        if name != "tokenizer.json":
            assert f"{name} is damaged: its checksum" in str(inspect_folder(bot).problems)


def test_a_graph_that_the_engine_would_refuse_is_a_problem(chatbot, tmp_path):
    bot = Path(shutil.copytree(chatbot, tmp_path / "bot"))
    config = json.loads((bot / "config.json").read_text())
    manifest = json.loads((bot / "manifest.json").read_text())
    for changes, problem in (
        ({"vocab_size": 500}, "logits where config.json has a vocab_size 500"),
        ({"num_hidden_layers": 3}, "the input past_key_values.2.key is missing"),
    ):
        content = json.dumps({**config, **changes}).encode()
        (bot / "config.json").write_bytes(content)
        manifest["files"]["config.json"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        (bot / "manifest.json").write_text(json.dumps(manifest))
        assert problem in str(inspect_folder(bot).problems)


def test_a_graph_of_which_the_manifest_has_no_checksum_is_a_problem(chatbot, tmp_path):
    bot = Path(shutil.copytree(chatbot, tmp_path / "bot"))
    manifest = json.loads((bot / "manifest.json").read_text())
    del manifest["files"]["model.onnx.data"]
    (bot / "manifest.json").write_text(json.dumps(manifest))
    assert "no checksum of model.onnx.data" in str(inspect_folder(bot).problems)


def test_of_other_forms_it_says_what_was_not_looked_at(model, tmp_path, capsys):
    assert "not looked at: the weights" in inspect_folder(model).looked_at
    rounded = ["quantize", "rounding", str(model), str(tmp_path / "gptq"), "--group-size", "32"]
    assert main(rounded) == 0
    assert "not looked at: the other codes" in inspect_folder(tmp_path / "gptq").looked_at
    assert main(["inspect", str(model), "--json"]) == 0
    out = capsys.readouterr().out
    assert "in what was looked at" in out
    assert "not looked at" in json.loads(out.splitlines()[-1])["looked_at"]


def test_a_folder_of_models_and_a_report_say_what_they_are(chatbot, model, tmp_path, capsys):
    road = tmp_path / "demo"
    for name, folder in {"teacher": model, "chatbot8": chatbot, "chatbot": chatbot}.items():
        shutil.copytree(folder, road / name)
    (road / "report").mkdir()
    (road / "report" / "report.json").write_text("{}")
    assert inspect_folder(road).problems == (
        "it is a folder of models, chatbot, chatbot8, teacher; give one of them, such as "
        f"{road / 'chatbot'}",
    )
    assert "it is a report, not a model; open report.html" in str(
        inspect_folder(road / "report").problems
    )
    assert main(["chat", str(road), "Hello"]) == 2
    assert f"such as {road / 'chatbot'}" in capsys.readouterr().err
