"""The programs that measure an export: they run, and compare what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

import export
import quantize
from benchmarks.suite import export_parity, rival_tools, step_time
from mistill.errors import FolderError
from mistill.folders.folder import read_json
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for groups of 128; read only."""
    folder = tmp_path_factory.mktemp("suite") / "model"
    return tiny_model(folder, hidden_size=128, intermediate_size=256)


def test_float_logits_are_compared_over_all_positions(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    chatbot = export.to_onnx(source, tmp_path / "onnx", parity_positions=0)
    found = export_parity.measure(chatbot, source, str(chats), 700, 128, 1)
    json.dumps(found)
    assert (found["positions"], found["exact"], found["met"]) == (700, True, True)
    assert found["max_difference"] < 1e-4
    assert found["other_top"] == 0
    # Against another model, nothing agrees.
    other = tiny_model(tmp_path / "other", hidden_size=128, intermediate_size=256, seed=5)
    apart = export_parity.measure(chatbot, other, str(chats), 300, 128, 1)
    assert not apart["met"]
    assert apart["max_difference"] > 1
    assert apart["same_top"] < 0.2


def test_codes_are_compared_with_pytorch_on_the_same_codes(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    codes = quantize.to_rounding(source, tmp_path / "gptq", group_size=64)
    chatbot = export.to_onnx(codes, tmp_path / "onnx", block_size=32, parity_positions=0)
    found = export_parity.measure(chatbot, codes, str(chats), 300, 128, 1)
    assert found["exact"] is False
    assert found["block_size"] == 32
    assert 0 < found["mean_kl"] < 5e-3
    assert found["met"] == (found["mean_kl"] <= 2e-3)
    assert found["codes"]["matrices"] == 14
    # The float parent has other weights: rounding to 4 bits shows, where the codes do not.
    settings = export_parity.settings_of(chatbot)
    assert settings.block_size == 32
    exact = export.to_onnx(
        codes,
        tmp_path / "exact",
        accuracy_level=0,
        head_bits=32,
        embedding_bits=32,
        parity_positions=0,
    )
    found = export_parity.measure(exact, codes, str(chats), 300, 128, 1)
    assert found["max_difference"] < 1e-4


def test_a_folder_of_no_export_is_refused(source: Path) -> None:
    with pytest.raises(FolderError, match="no export in its lineage"):
        export_parity.settings_of(source)


def test_harder_sources_are_timed_beside_a_plain_one(source: Path, tmp_path: Path) -> None:
    chatbots = step_time.prepare(source, tmp_path, 64)
    assert list(chatbots) == ["plain", "act-order", "per-channel", "nf4"]
    operators = {
        name: [node.op_type for node in ir.load(folder / "model.onnx").graph]
        for name, folder in chatbots.items()
    }
    # q, k and v share one gather of columns, as gate and up do; o has its own, and down none.
    extra = operators["act-order"].count("Gather") - operators["plain"].count("Gather")
    assert extra == 2 * 3
    index = load_file(tmp_path / "act-order" / "model.safetensors")
    groups = {name: array for name, array in index.items() if name.endswith("g_idx")}
    down = groups["model.layers.0.mlp.down_proj.g_idx"]
    assert sorted(down.tolist()) == sorted(list(range(4)) * 64)
    assert np.diff(down).min() < 0
    bytes_ = {
        name: read_json(folder / "manifest.json")["bytes_per_token"]
        for name, folder in chatbots.items()
    }
    assert bytes_["nf4"] > 1.5 * bytes_["plain"]
    again = step_time.prepare(source, tmp_path, 64)
    assert again == chatbots


@pytest.mark.slow
def test_steps_take_turns(source: Path, tmp_path: Path) -> None:
    chatbots = step_time.prepare(source, tmp_path, 64)
    found = step_time.measure(chatbots, 1, 8, 4, 2)
    json.dumps(found)
    assert set(found["to_plain"]) == {"act-order", "per-channel", "nf4"}
    assert all(len(samples) == 2 for samples in found["samples"].values())
    for sample in (sample for samples in found["samples"].values() for sample in samples):
        assert 0 < sample["around_us"] < 1e3 * sample["step_ms"]


def test_genai_is_told_of_threads_by_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "genai"
    folder.mkdir()
    decoder = {"session_options": {"log_id": "x"}}
    config = {"model": {"context_length": 64, "decoder": decoder}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "model.onnx").write_text("graph")
    same = rival_tools.with_threads(folder, tmp_path / "same", 3)
    told = json.loads((same / "genai_config.json").read_text())
    assert told["model"]["decoder"]["session_options"] == {"log_id": "x", "intra_op_num_threads": 3}
    assert (same / "model.onnx").read_text() == "graph"
    assert json.loads((folder / "genai_config.json").read_text()) == config
