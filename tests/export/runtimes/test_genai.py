"""onnxruntime-genai opens the folder and writes the same text.

Needs an environment with onnxruntime-genai 0.18: this one, or the one that the variable
MISTILL_GENAI_VENV names (``python -m venv DIR && DIR/bin/pip install onnxruntime-genai==0.18.0``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from export.onnx_folder import to_onnx
from export.runtimes.genai import genai_config
from export.weights.architecture import ARCHITECTURES, read_architecture
from mistill.text.vocabulary import load_vocabulary
from tests.export.sources import gptq_folder
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import tiny_model

SCRIPT = """
import json, sys
import onnxruntime_genai as genai

asked = json.loads(sys.stdin.read())
model = genai.Model(asked["folder"])
tokenizer = genai.Tokenizer(model)
found = {
    "text": tokenizer.encode(asked["text"]).tolist(),
    "chat": tokenizer.apply_chat_template(json.dumps(asked["chat"]), add_generation_prompt=True),
}
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=len(asked["ids"]) + asked["count"], do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens(asked["ids"])
while not generator.is_done():
    generator.generate_next_token()
found["ids"] = generator.get_sequence(0).tolist()[len(asked["ids"]):]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def genai_python() -> str:
    environment = os.environ.get("MISTILL_GENAI_VENV")
    if environment:
        return str(Path(environment) / "bin" / "python")
    if find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed, and MISTILL_GENAI_VENV is not set")
    return sys.executable


@pytest.mark.parametrize("kind", ["float", "tied window", "gptq", "qwen2", "qwen3", "smollm3"])
def test_genai_writes_the_same_text(kind: str, genai_python: str, tmp_path: Path) -> None:
    tied = kind == "tied window"
    options: dict[str, Any] = {"tie_word_embeddings": True, "sliding_window": 9} if tied else {}
    if kind in ARCHITECTURES:
        options = {"model_type": kind, "num_hidden_layers": 4}
    source = tiny_model(tmp_path / "model", **options)
    if kind == "gptq":
        source, _ = gptq_folder(source, tmp_path / "gptq", act_order=True)
    folder = to_onnx(source, tmp_path / "onnx", precision="int8" if tied else "auto")
    vocabulary = load_vocabulary(folder)
    chat = [{"role": "user", "content": "What is the weather like today?"}]
    asked: dict[str, Any] = {
        "folder": str(folder),
        "text": "A teacher knows more than its student.",
        "chat": chat,
        "ids": vocabulary.encode(vocabulary.render(chat, add_generation_prompt=True)),
        "count": 40,
    }
    ran = subprocess.run(
        [genai_python, "-c", SCRIPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={"ORT_DISABLE_TELEMETRY": "1", "PATH": os.environ["PATH"]},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["text"] == vocabulary.encode(asked["text"])
    assert found["chat"] == vocabulary.render(chat, add_generation_prompt=True)
    expected = OnnxRunner(folder).greedy(asked["ids"], 40)
    ends = [place for place, token in enumerate(expected) if token in vocabulary.end_ids]
    if ends:
        expected = expected[: ends[0]]
    assert len(expected) > 5
    assert found["ids"][: len(expected)] == expected


def test_the_document_says_what_the_folder_is(model: Path) -> None:
    architecture = read_architecture(json.loads((model / "config.json").read_text()))
    vocabulary = load_vocabulary(model)
    document = genai_config(architecture, vocabulary, 100, None)
    assert document["model"]["type"] == "mistral"
    assert document["model"]["vocab_size"] == architecture.vocabulary_size
    assert document["model"]["bos_token_id"] == vocabulary.bos_id
    assert document["model"]["eos_token_id"] == list(vocabulary.end_ids)
    assert document["model"]["pad_token_id"] == vocabulary.end_ids[0]
    assert genai_config(architecture, vocabulary, 100, 2)["model"]["pad_token_id"] == 2
    decoder = document["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["head_size"]) == (2, 16)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert document["search"] == {
        "do_sample": False,
        "max_length": 100,
        "past_present_share_buffer": True,
    }
