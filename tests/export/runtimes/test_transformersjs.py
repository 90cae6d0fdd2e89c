"""transformers.js finds its files in the folder, and writes the text that PyTorch writes.

The last needs Node and a project with transformers.js, which the variable MISTILL_TRANSFORMERSJS
names (``npm install --ignore-scripts @huggingface/transformers`` in an empty folder).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import export.runtimes.transformersjs
from export.onnx_folder import to_onnx
from mistill.engine.sampling import FOR_SMALL_MODELS
from mistill.folders.folder import read_json
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary
from tests.export.sources import gptq_folder, nf4_folder
from tests.tiny import tiny_model

SCRIPT = """
import { readFileSync } from 'node:fs';
import { AutoTokenizer, AutoModelForCausalLM, env } from '@huggingface/transformers';
const asked = JSON.parse(readFileSync(0));
env.allowRemoteModels = false;
env.localModelPath = asked.parent + '/';
const tokenizer = await AutoTokenizer.from_pretrained(asked.name);
const model = await AutoModelForCausalLM.from_pretrained(asked.name);
const inputs = tokenizer(asked.text, { add_special_tokens: false });
const chat = tokenizer.apply_chat_template(
  asked.chat, { tokenize: false, add_generation_prompt: true });
const written = await model.generate({
  ...inputs, max_new_tokens: asked.count, min_new_tokens: asked.count, do_sample: false,
});
console.log(JSON.stringify({
  text: Array.from(inputs.input_ids.data, Number), chat, ids: Array.from(written.data, Number),
}));
"""
TEXT = "The mistral is a strong, cold wind"


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options)


def last_logits(file: Path, ids: Any) -> Any:
    graph = session(file)
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for entry in graph.get_inputs()[2:]:
        feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    return graph.run(["logits"], feeds)[0][:, -1]


def test_files_are_where_transformers_js_looks_for_them(model: Path, tmp_path: Path):
    plain = to_onnx(model, tmp_path / "plain", precision="int4")
    exported = to_onnx(model, tmp_path / "made", precision="int4", layout="transformersjs")
    assert sorted(
        str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()
    ) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lineage.json",
        "manifest.json",
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = read_json(exported / "config.json")
    assert config["transformers.js_config"] == {
        "dtype": "q4",
        "use_external_data_format": {"model_q4.onnx": 1},
        "kv_cache_dtype": "float32",
    }
    assert config["head_dim"] == 16
    template = read_json(exported / "tokenizer_config.json")["chat_template"]
    assert template == load_vocabulary(model).chat_template
    # The graph and its weights are those of the other layout.
    data = (exported / "onnx" / "model_q4.onnx_data").read_bytes()
    assert data == (plain / "model.onnx.data").read_bytes()
    ids = np.random.default_rng(0).integers(5, 380, (1, 12))
    np.testing.assert_array_equal(
        last_logits(exported / "onnx" / "model_q4.onnx", ids),
        last_logits(plain / "model.onnx", ids),
    )
    manifest = read_json(exported / "manifest.json")
    assert manifest["parity"]["same_top"] > 0.8
    assert {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"} <= manifest["files"].keys()
    assert read_lineage(exported)[-1]["settings"]["layout"] == "transformersjs"


@pytest.mark.parametrize("stated", [{"eos_token_id": 2, "top_k": 7}, None])
def test_every_token_that_ends_a_reply_is_named(
    stated: dict[str, Any] | None, model: Path, tmp_path: Path
):
    """The template alone may show the end of a turn, and the browser reads no template for it."""
    source = tmp_path / "source"
    shutil.copytree(model, source)
    for name, changed in (("config.json", 2), ("tokenizer_config.json", "</s>")):
        file = source / name
        key = "eos_token" if isinstance(changed, str) else "eos_token_id"
        file.write_text(json.dumps(read_json(file) | {key: changed}))
    (source / "generation_config.json").unlink()
    if stated is not None:
        (source / "generation_config.json").write_text(json.dumps(stated))
    exported = to_onnx(source, tmp_path / "made", precision="int4", layout="transformersjs")
    generation = read_json(exported / "generation_config.json")
    assert generation == {**(stated or FOR_SMALL_MODELS), "eos_token_id": [2, 4]}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("float", "model"),
        ("gptq 3", "model_q4"),
        ("gptq 8", "model_quantized"),
        ("nf4", "model_quantized"),
    ],
)
def test_the_name_of_the_graph_says_its_type(kind: str, name: str, model: Path, tmp_path: Path):
    source = model
    if kind == "nf4":
        source = nf4_folder(model, tmp_path / "nf4")
    elif kind != "float":
        source, _ = gptq_folder(model, tmp_path / "gptq", bits=int(kind[-1]))
    exported = to_onnx(source, tmp_path / "made", layout="transformersjs", parity_positions=0)
    assert [file.stem for file in sorted((exported / "onnx").glob("*.onnx"))] == [name]
    assert "quantization_config" not in read_json(exported / "config.json")


def test_large_weights_lie_in_several_pieces(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = to_onnx(model, tmp_path / "plain", parity_positions=0)
    monkeypatch.setattr(export.runtimes.transformersjs, "DATA_FILE_BYTES", 100_000)
    exported = to_onnx(model, tmp_path / "made", layout="transformersjs", parity_positions=0)
    count = read_json(exported / "config.json")["transformers.js_config"][
        "use_external_data_format"
    ]
    pieces = sorted(file.name for file in (exported / "onnx").glob("*_data*"))
    assert pieces == ["model.onnx_data", *(f"model.onnx_data_{n}" for n in range(1, len(pieces)))]
    assert count == {"model.onnx": len(pieces)}
    assert len(pieces) > 3
    ids = np.random.default_rng(0).integers(5, 380, (1, 12))
    np.testing.assert_array_equal(
        last_logits(exported / "onnx" / "model.onnx", ids), last_logits(plain / "model.onnx", ids)
    )


def test_a_table_that_embedding_and_head_share_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    plain = to_onnx(source, tmp_path / "plain", parity_positions=0)
    monkeypatch.setattr(export.runtimes.transformersjs, "DATA_FILE_BYTES", 100_000)
    exported = to_onnx(source, tmp_path / "made", layout="transformersjs", parity_positions=0)
    size = sum(file.stat().st_size for file in (exported / "onnx").glob("*_data*"))
    assert size <= (plain / "model.onnx.data").stat().st_size
    ids = np.random.default_rng(0).integers(5, 380, (1, 12))
    np.testing.assert_array_equal(
        last_logits(exported / "onnx" / "model.onnx", ids), last_logits(plain / "model.onnx", ids)
    )


def test_the_command_says_what_it_made(model: Path, tmp_path: Path, capsys: Any):
    from mistill.cli.app import main

    target = tmp_path / "made"
    words = ["export", str(model), str(target), "--layout", "transformersjs", "--portable"]
    assert main([*words, "--parity-positions", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    size = sum(file.stat().st_size for file in (target / "onnx").iterdir())
    assert said == {"path": str(target), "form": "transformersjs", "weight_bytes": size}


@pytest.mark.skipif(
    "MISTILL_TRANSFORMERSJS" not in os.environ, reason="MISTILL_TRANSFORMERSJS is not set"
)
@pytest.mark.parametrize("kind", ["mistral", "llama", "portable", "gptq", "qwen2", "qwen3"])
def test_transformers_js_writes_what_pytorch_writes(kind: str, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    types = {kind: kind for kind in ("mistral", "llama", "qwen2", "qwen3")}
    shape = {"head_dim": 32} if kind != "qwen2" else {}
    source = tiny_model(
        tmp_path / "model", model_type=types.get(kind, "llama"), num_attention_heads=2, **shape
    )
    if kind == "gptq":
        source, _ = gptq_folder(source, tmp_path / "gptq")
    exported = to_onnx(
        source,
        tmp_path / "made",
        layout="transformersjs",
        portable=kind == "portable",
        head_bits=32,
        embedding_bits=32,
        parity_positions=0,
    )
    chat = [{"role": "user", "content": "What is the mistral?"}]
    asked = {"parent": str(exported.parent), "name": "made", "text": TEXT, "chat": chat, "count": 8}
    done = subprocess.run(
        ["node", "--input-type=module", "-e", SCRIPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=os.environ["MISTILL_TRANSFORMERSJS"],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    vocabulary = load_vocabulary(source)
    assert found["text"] == vocabulary.encode(TEXT)
    assert found["chat"] == vocabulary.render(chat, add_generation_prompt=True)
    own = kind in ("qwen2", "qwen3")
    model: Any = AutoModelForCausalLM.from_pretrained(source) if own else load_pytorch(source)
    ids = list(found["text"])
    for token in found["ids"][len(ids) :]:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].clone()
        scores[[2, 4]] = -torch.inf  # neither end may come yet
        # 8-bit activations may turn a near tie.
        assert scores.max() - scores[token] < (0.3 if kind == "gptq" else 1e-4)
        ids.append(token)
    assert len(ids) == len(found["text"]) + 8
