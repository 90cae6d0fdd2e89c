"""The commands that change between formats: parsed, run, and said in words and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mistill.cli.app import main
from tests.gptq_matrix import Way, simple_folder
from tests.quantize.conversions.test_merging import make_adapter

WAY = Way(4, False, 32, "none", "float16")
SMALL = ("--group-size", "32", "--samples", "4", "--block-length", "32")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_convert_dequantize_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = simple_folder(tmp_path / "source", WAY, "gptq_v2")
    v1, plain = tmp_path / "v1", tmp_path / "plain"
    command = ["quantize", "convert", str(source), str(v1), "--to", "gptq", "--json"]
    assert main(command) == 0
    assert last_line(capsys)["form"] == "gptq"
    assert main(["inspect", str(v1), "--json"]) == 0
    told = last_line(capsys)["gptq"]
    assert isinstance(told, dict)
    assert (told["checkpoint_format"], told["symmetric"]) == ("gptq", False)
    assert told["borrowed"] > 0
    command = ["quantize", "dequantize", str(v1), str(plain), "--dtype", "bfloat16", "--json"]
    assert main(command) == 0
    said = last_line(capsys)
    assert (said["form"], said["bits_per_weight"]) == ("model", pytest.approx(16, abs=0.2))
    assert main(["quantize", "convert", str(plain), str(tmp_path / "no"), "--to", "gptq"]) == 2
    assert "only GPTQ folders have two formats" in capsys.readouterr().err


def test_a_folder_that_lies_is_shown_and_counts_as_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = simple_folder(tmp_path / "source", WAY, "gptq_v2", intermediate_size=512)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (source / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(source), "--json"]) == 1
    problems = str(last_line(capsys)["problems"])
    assert "says checkpoint_format gptq, but the data is gptq_v2" in problems


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merge_shows_both_orders(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", ("q_proj",))
    command = ["quantize", "merge", str(model), str(adapter)]
    assert main([*command, str(tmp_path / "float"), "--json"]) == 0
    assert last_line(capsys)["form"] == "model"
    small = [*command, str(tmp_path / "small"), "--texts", str(chats), *SMALL, "--json"]
    assert main(small) == 0
    learnt, *words, _path, json_line = capsys.readouterr().out.strip().splitlines()
    said = json.loads(json_line)
    assert learnt.startswith(f"held-out cross-entropy: {said['cross_entropy']['base']:.4f} before")
    assert [line.partition(":")[0] for line in words] == [
        "merge then quantize",
        "quantize then merge",
    ]
    assert [line.endswith("(kept)") for line in words] == [
        said["chosen"] == name for name in said["orders"]
    ]
    for line, one in zip(words, said["orders"].values(), strict=True):
        assert f"KL {one['kl']:.5f}" in line


def test_gptq_takes_a_quantize_config(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quantize_config.json"
    file.write_text(json.dumps({"bits": 8, "group_size": 32, "sym": False, "desc_act": False}))
    command = ["quantize", "gptq", str(model), str(tmp_path / "small"), "--texts", str(chats)]
    command += ["--quantize-config", str(file), "--samples", "3", "--block-length", "32"]
    assert main([*command, "--order", "group"]) == 2
    assert "give either order or desc_act" in capsys.readouterr().err
    assert main(command) == 0
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["sym"]) == (8, 32, False)
    report = json.loads((tmp_path / "small" / "quantize_report.json").read_text())
    assert (report["settings"]["samples"], report["settings"]["order"]) == (3, "none")
    assert main([*command[:3], str(tmp_path / "b"), *command[4:], "--backend", "auto_gptq"]) == 2
    assert "auto_gptq is not installed" in capsys.readouterr().err
