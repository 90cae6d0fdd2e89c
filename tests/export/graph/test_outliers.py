"""Columns in float32 beside the codes: the same product, and finer rounding of the others."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export import to_onnx
from export.checks.code_check import check_outliers
from export.checks.parity import text_runner
from export.graph.decoder import write_decoder
from export.graph.outliers import FACTOR, guarded_norms, worst_columns
from export.graph.writer import GraphWriter
from export.settings import GraphOptions, OnnxSettings
from export.weights.architecture import read_architecture
from export.weights.blocks import blocks_of_codes
from export.weights.folder_weights import FolderWeights
from mistill.errors import ExportError, SettingsError
from mistill.folders.folder import read_json
from tests.export.checks.test_lint import flip, shown
from tests.export.sources import gptq_folder, nf4_folder, quantized_weight
from tests.tiny import tiny_model

IDS = np.random.default_rng(5).integers(5, 384, 40)
LOUD = [3, 40]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model two of whose hidden channels come out of every norm much larger than the rest."""
    folder = tiny_model(tmp_path_factory.mktemp("loud") / "model", seed=4)
    tensors = dict(load_file(folder / "model.safetensors"))
    for name in tensors:
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            tensors[name] = tensors[name].copy()
            tensors[name][LOUD] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(
    source: Path, target: Path, *, outliers: dict[str, NDArray[np.int64]], head_bits: int = 8
) -> NDArray[np.float32]:
    """Logits of a graph that rounds no activation."""
    architecture = read_architecture(read_json(source / "config.json"))
    options = GraphOptions(
        context_length=64, accuracy_level=0, head_bits=head_bits, embedding_bits=8
    )
    target.mkdir()
    with (
        FolderWeights(source, architecture, OnnxSettings()) as weights,
        GraphWriter(target) as writer,
    ):
        write_decoder(architecture, weights, writer, options, outliers)
    return text_runner(target, architecture)(IDS, None)[0]


SOURCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric": {"bits": 8, "symmetric": False},
    "act-order": {"act_order": True, "symmetric": False},
    "orders apart": {"act_order": True, "shared_order": False},
    "some float": {"skip": ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")},
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_product_is_the_same(name: str, model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq", **SOURCES[name])
    architecture = read_architecture(read_json(source / "config.json"))
    generator = np.random.default_rng(1)
    outliers = {
        norm: np.sort(generator.choice(64, 5, replace=False))
        for norm in guarded_norms(architecture, 8)
    }
    assert len(outliers) == 5
    plain = written(source, tmp_path / "plain", outliers={})
    beside = written(source, tmp_path / "beside", outliers=outliers)
    np.testing.assert_allclose(beside, plain, rtol=0, atol=2e-5)
    check_outliers(tmp_path / "beside", source)


def test_a_head_of_its_own_is_served_too(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    outliers = {"model.norm": np.array([1, 63])}
    plain = written(source, tmp_path / "plain", outliers={})
    beside = written(source, tmp_path / "beside", outliers=outliers)
    np.testing.assert_allclose(beside, plain, rtol=0, atol=2e-5)
    assert b"logits.outliers" in (tmp_path / "beside" / "model.onnx").read_bytes()


def test_columns_are_decoded_as_the_whole_is() -> None:
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((6, 96)).astype(np.float32)
    for bits, symmetric, order in product((2, 4, 8), (True, False), (False, True)):
        walk = generator.permutation(96) if order else None
        weight = quantized_weight(floats, bits=bits, group_size=32, symmetric=symmetric, order=walk)
        blocks = blocks_of_codes(weight, 16)
        columns = generator.choice(96, 9, replace=False)
        np.testing.assert_array_equal(
            blocks.dequantize_columns(columns), blocks.dequantize()[:, columns]
        )


def test_the_worst_columns_are_those_of_a_plain_search() -> None:
    generator = np.random.default_rng(2)
    activations = generator.standard_t(2, (30, 40)).astype(np.float32)
    for block in (16, 32):
        left, expected = activations.astype(np.float64), []
        for _ in range(5):
            costs = []
            for column in range(40):
                tried = left.copy()
                tried[:, column] = 0
                starts = range(0, 40, block)
                parts = [np.abs(tried[:, start : start + block]).max(1) ** 2 for start in starts]
                costs.append(sum(part.sum() for part in parts))
            expected.append(int(np.argmin(costs)))
            left[:, expected[-1]] = 0
        assert worst_columns(activations, 5, block).tolist() == expected


def test_what_stands_out_is_found_and_the_distance_shrinks(
    loud: Path, chats: Path, tmp_path: Path
) -> None:
    source, _ = gptq_folder(loud, tmp_path / "gptq")
    manifests = [
        read_json(
            to_onnx(source, tmp_path / str(count), float_columns=count, cache_texts=(str(chats),))
            / "manifest.json"
        )
        for count in (0, 2)
    ]
    assert [one["float_columns"] for one in manifests] == [0, 2]
    assert "outliers" not in manifests[0]
    assert manifests[1]["outliers"] == dict.fromkeys(
        [
            *(
                f"model.layers.{layer}.{part}_layernorm"
                for layer in range(2)
                for part in ("input", "post_attention")
            ),
            "model.norm",
        ],
        LOUD,
    )
    assert manifests[0]["codes"] == manifests[1]["codes"]
    assert manifests[0]["slow_kernels"] == manifests[1]["slow_kernels"] == []
    assert "2 outlier columns behind each norm" in shown(tmp_path / "2")
    kls = [one["parity"]["mean_kl"] for one in manifests]
    assert 0 < kls[1] < 0.2 * kls[0], kls
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == sorted(
        path.name for path in (tmp_path / "0").iterdir()
    )


def test_other_forms_have_them_too(loud: Path, chats: Path, tmp_path: Path) -> None:
    texts = (str(chats),)
    nf4 = nf4_folder(loud, tmp_path / "nf4")
    options: dict[str, Any] = {"float_columns": 2, "cache_texts": texts}
    exported = to_onnx(nf4, tmp_path / "a", **options)
    assert read_json(exported / "manifest.json")["outliers"]["model.norm"] == LOUD
    exported = to_onnx(
        loud, tmp_path / "b", precision="int8", head_bits=32, cache="int8", **options
    )
    assert "model.norm" not in read_json(exported / "manifest.json")["outliers"]


@pytest.mark.parametrize(
    ("initializer", "what"),
    [
        ("layers.1.qkv.outliers.weight", "the columns in float32 of layers.1.qkv"),
        ("model.layers.1.post_attention_layernorm.weight", "the gains before the codes of layers"),
        ("logits.outliers.weight", "the columns in float32 of logits"),
    ],
)
def test_one_changed_bit_is_found(
    initializer: str, what: str, loud: Path, chats: Path, tmp_path: Path
) -> None:
    source, _ = gptq_folder(loud, tmp_path / "gptq")
    options: dict[str, Any] = {"float_columns": 2, "cache_texts": (str(chats),)}
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0, **options)
    flip(exported, initializer, 5)
    with pytest.raises(ExportError, match=what):
        check_outliers(exported, source)


def test_gains_that_are_divided_for_nothing_are_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq")
    real = FolderWeights.floats

    def floats(self: FolderWeights, name: str) -> Any:
        values = real(self, name)
        return values / FACTOR if name == "model.layers.0.input_layernorm.weight" else values

    monkeypatch.setattr(FolderWeights, "floats", floats)
    with pytest.raises(ExportError, match=r"the gains before the codes of layers\.0\.qkv"):
        to_onnx(source, tmp_path / "onnx", parity_positions=0)
    assert not (tmp_path / "onnx").exists()


def test_the_default_follows_width_and_form(model: Path, chats: Path, tmp_path: Path) -> None:
    shapes: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 64}
    wide = tiny_model(tmp_path / "wide", hidden_size=512, **shapes)
    options: dict[str, Any] = {"parity_positions": 0, "cache_texts": (str(chats),)}

    def count(source: Path, name: str, **more: Any) -> int:
        exported = to_onnx(source, tmp_path / name, **options, **more)
        value: int = read_json(exported / "manifest.json")["float_columns"]
        return value

    assert count(wide, "a", precision="int8") == 8
    assert count(wide, "b", precision="int8", float_columns=0) == 0
    assert count(wide, "c") == 0
    assert count(wide, "d", precision="int4") == 0
    assert count(wide, "e", precision="int4", float_columns=8) == 8
    assert count(wide, "f", precision="int8", layout="transformersjs") == 0
    assert count(model, "g", precision="int8") == 0
    nf4 = nf4_folder(wide, tmp_path / "nf4")
    assert count(nf4, "h") == 0
    assert count(nf4, "i", block_size=32) == 0

    def layer_blocks(name: str) -> set[int]:
        nodes = ir.load(tmp_path / name / "model.onnx").graph
        return {
            node.attributes.get_int("block_size", 0)
            for node in nodes
            if node.op_type == "MatMulNBits" and "layers" in str(node.outputs[0].name)
        }

    assert (layer_blocks("a"), layer_blocks("h"), layer_blocks("i")) == ({32}, {64}, {32})


def test_nonsense_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="float_columns must be at least 0, not -1"):
        OnnxSettings(float_columns=-1)
    for options in ({"portable": True}, {"accuracy_level": 0}):
        with pytest.raises(SettingsError, match="needs activations that are rounded"):
            OnnxSettings(float_columns=1, **options)
    with pytest.raises(SettingsError, match="a float32 graph has none"):
        to_onnx(model, tmp_path / "onnx", float_columns=8)
    with pytest.raises(SettingsError, match="float_columns is 17, and the model is 64 wide"):
        to_onnx(model, tmp_path / "onnx", precision="int4", float_columns=17)


def test_a_model_without_a_chat_template_reads_conversations_as_paragraphs(
    loud: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(loud, base)
    (base / "chat_template.jinja").unlink()
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    text = tmp_path / "text.txt"
    text.write_text("one two\n\nthree\n\n")
    options: dict[str, Any] = {"precision": "int8", "float_columns": 2, "parity_positions": 0}
    for name, texts in (("a", chats), ("b", text)):
        to_onnx(base, tmp_path / name, cache_texts=(str(texts),), cache="int8", **options)
    a, b = ((tmp_path / name / "model.onnx").read_bytes() for name in ("a", "b"))
    assert a == b
