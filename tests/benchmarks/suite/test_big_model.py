"""What is read, quantized and written a matrix at a time fits in memory however many layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import random_mistral
from benchmarks.suite.random_mistral import random_text
from export import to_gguf
from mistill.text.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[3]


def run(name: str, *options: str) -> Any:
    command = [sys.executable, "-m", f"benchmarks.suite.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rounding", "nf4"])
def test_memory_does_not_grow_with_the_layers(method: str) -> None:
    few, many = (
        run("big_model", "--width", "1024", "--layers", str(layers), "--methods", method)
        for layers in (1, 7)
    )
    # Six layers are 164 MB of bfloat16 and 43 MB of codes.
    assert many["float_bytes"] - few["float_bytes"] > 160e6
    assert many[method]["weight_bytes"] - few[method]["weight_bytes"] > 42e6
    assert many[method]["peak_memory_bytes"] - few[method]["peak_memory_bytes"] < 80e6


@pytest.mark.slow
def test_layers_go_through_gptq_one_after_another() -> None:
    few, many = (
        run("big_layer", "--width", "512", "--tokens", "1024", "--layers", str(layers))
        for layers in (2, 14)
    )
    assert many["calibration_tokens"] == 1024
    assert len(many["seconds_of_matrices"]) == 14 * 7
    # Twelve layers of this width in float32 are 163 MB.
    assert many["peak_memory_bytes"] - few["peak_memory_bytes"] < 80e6


@pytest.mark.slow
def test_a_chatbot_is_exported_a_matrix_at_a_time() -> None:
    few, many = (
        run("big_chatbot", "--width", "1024", "--layers", str(layers), "--new-tokens", "4")
        for layers in (1, 7)
    )
    assert many["export"]["weight_bytes"] - few["export"]["weight_bytes"] > 42e6
    assert many["export"]["peak_memory_bytes"] - few["export"]["peak_memory_bytes"] < 80e6
    assert len(many["run"]["token_seconds"]) == 4
    # Codes of 4 bits, a scale and a sum for 64 of them: 5 bits a weight of six layers.
    assert many["step_bytes"]["packed_bytes"] - few["step_bytes"]["packed_bytes"] > 51e6
    assert many["roofline_share"] > 0


def test_a_random_model_is_one_that_llama_cpp_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    options = [str(folder), "--layers", "1", "--width", "512"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite.random_mistral", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(": 36,177,408 parameters\n")
    vocabulary = load_vocabulary(folder)
    text = random_text(100)
    assert len(vocabulary.encode(text)) == len(text) > 100
    for wrong, words in ([], "is there already"), (["--width", "700"], "a multiple of 512"):
        with pytest.raises(SystemExit), monkeypatch.context() as asked:
            asked.setattr(sys, "argv", ["random_mistral", str(folder), *wrong])
            random_mistral.main()
        assert words in capsys.readouterr().err
    # A vocabulary without merges is refused there.
    assert to_gguf(folder, tmp_path / "model.gguf", dtype="q4_0").is_file()
