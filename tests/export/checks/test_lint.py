"""A folder is declared done only if its graph is fast and its codes are the source's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import export.graph.decoder
import export.graph.writer
import export.weights.blocks
import export.weights.folder_weights
from export.checks.code_check import check_codes
from export.onnx_folder import to_onnx
from export.settings import DATA_FILE, MODEL_FILE
from export.weights.architecture import read_architecture
from mistill.cli.inspection import inspect_folder
from mistill.cost_model.onnx_cost import constant_array
from mistill.errors import ExportError
from mistill.folders.folder import read_json
from tests.export.sources import gptq_folder, nf4_folder
from tests.tiny import tiny_model


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def change_nodes(monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, Any]]) -> None:
    """Let the writer change the attributes of every product."""
    real = export.graph.writer.GraphWriter.nodes

    def nodes(self: Any, operator: str, *args: Any, **attributes: Any) -> Sequence[ir.Value]:
        return real(
            self,
            operator,
            *args,
            **(change(attributes) if operator == "MatMulNBits" else attributes),
        )

    monkeypatch.setattr(export.graph.writer.GraphWriter, "nodes", nodes)


# --- slow kernels -------------------------------------------------------------------------------


def test_a_slow_kernel_that_nobody_asked_for_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_nodes(monkeypatch, lambda attributes: {**attributes, "accuracy_level": 1})
    with pytest.raises(ExportError, match=r"accuracy-level \(about 100 times slower\).*and 8 more"):
        to_onnx(model, tmp_path / "onnx", precision="int8", parity_positions=0)
    assert not (tmp_path / "onnx").exists()


def test_a_slow_kernel_that_was_asked_for_is_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"precision": "int4", "parity_positions": 0}
    exported = to_onnx(model, tmp_path / "onnx", accuracy_level=0, head_bits=32, **options)
    named = manifest_of(exported)["slow_kernels"]
    assert [words.partition(" ")[0].rstrip(":") for words in named] == [
        "accuracy-level",
        "float-head",
    ]
    assert "the requested settings are slow: accuracy-level" in caplog.text
    fast = to_onnx(model, tmp_path / "fast", **options)
    assert manifest_of(fast)["slow_kernels"] == []


# --- the ceiling --------------------------------------------------------------------------------


def test_the_ceiling_follows_from_the_speed_that_was_given(model: Path, tmp_path: Path) -> None:
    exported = to_onnx(
        model, tmp_path / "onnx", precision="int8", memory_speed=20, parity_positions=0
    )
    manifest = manifest_of(exported)
    assert manifest["memory_bytes_per_second"] == 20e9
    packed = manifest["packed_bytes_per_token"]
    assert manifest["ceiling_tokens_per_second"] == pytest.approx(20e9 / packed, rel=1e-4)
    assert manifest["cache_bytes_per_position"] == 2 * 2 * 2 * 16 * 4


# --- codes --------------------------------------------------------------------------------------

SOURCES: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "2 bits as 4": {"bits": 2, "group_size": 16, "symmetric": False},
    "3 bits": {"bits": 3},
    "4 bits": {"bits": 4, "symmetric": False},
    "8 bits": {"bits": 8},
    "rows": {"bits": 4, "group_size": -1},
    "act-order": {"bits": 4, "act_order": True, "symmetric": False},
    "act-order apart": {"bits": 8, "act_order": True, "shared_order": False},
    "3 bits act-order": {"bits": 3, "act_order": True, "symmetric": False},
    "some float": {"skip": ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")},
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_code_is_compared_with_the_source(name: str, model: Path, tmp_path: Path) -> None:
    source, weights = gptq_folder(model, tmp_path / "gptq", **SOURCES[name])
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    assert manifest_of(exported)["codes"] == {
        "matrices": len(weights),
        "codes": sum(weight.codes.size for weight in weights.values()),
        "scales": sum(weight.scales.size for weight in weights.values()),
        "decoded": 0,
    }


def flip(folder: Path, initializer: str, byte: int, mask: int = 16) -> None:
    """Change a bit of a tensor in the data file."""
    value = ir.load(folder / MODEL_FILE).graph.initializers[initializer].const_value
    assert isinstance(value, ir.ExternalTensor)
    assert value.offset is not None
    with (folder / DATA_FILE).open("r+b") as opened:
        opened.seek(value.offset + byte)
        (old,) = opened.read(1)
        opened.seek(value.offset + byte)
        opened.write(bytes([old ^ mask]))


@pytest.mark.parametrize("name", ["4 bits", "8 bits", "3 bits", "act-order", "act-order apart"])
@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("layers.1.qkv", "layers.1.self_attn.q_proj"),
        ("layers.0.gate_up", "layers.0.mlp.gate_proj"),
        ("layers.0.down", "layers.0.mlp.down_proj"),
    ],
)
def test_one_changed_bit_is_found(
    name: str, node: str, module: str, model: Path, tmp_path: Path
) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq", **SOURCES[name])
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    architecture = read_architecture(read_json(exported / "config.json"))
    assert check_codes(exported, source, architecture) is not None
    names = ir.load(exported / MODEL_FILE).graph.initializers
    node = node if f"{node}.codes" in names else f"{node}.0"
    for part in ("codes", "scales", "zeros"):
        if f"{node}.{part}" not in names:
            continue
        flip(exported, f"{node}.{part}", 1)
        with pytest.raises(ExportError, match=f"the {part} of model.{module} in the graph"):
            check_codes(exported, source, architecture)
        flip(exported, f"{node}.{part}", 1)


def test_a_source_with_other_codes_is_another(model: Path, tmp_path: Path) -> None:
    first, _ = gptq_folder(model, tmp_path / "first")
    other = tiny_model(tmp_path / "other", seed=9)
    second, _ = gptq_folder(other, tmp_path / "second")
    exported = to_onnx(first, tmp_path / "onnx", parity_positions=0)
    architecture = read_architecture(read_json(exported / "config.json"))
    with pytest.raises(ExportError, match=r"codes of model\.layers\.0\.self_attn\.q_proj"):
        check_codes(exported, second, architecture)


def shift_rows(weight: Any, order: NDArray[np.int64]) -> Any:
    return replace(weight, codes=weight.codes[np.roll(order, 1)])


def test_rows_in_a_wrong_order_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq", act_order=True)
    monkeypatch.setattr(export.weights.blocks.BlockWeight, "take_rows", shift_rows)
    with pytest.raises(ExportError, match=r"codes of model\.layers\.0\.mlp\.gate_proj"):
        to_onnx(source, tmp_path / "onnx", parity_positions=0)
    assert not (tmp_path / "onnx").exists()


def test_nf4_levels_are_compared_with_the_source(model: Path, tmp_path: Path) -> None:
    source = nf4_folder(model, tmp_path / "nf4")
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    codes = sum(
        int(np.prod(shape))
        for name, shape in read_architecture(read_json(exported / "config.json")).shapes().items()
        if name.endswith("_proj")
    )
    assert manifest_of(exported)["codes"] == {
        "matrices": 14,
        "codes": codes,
        "scales": 0,
        "decoded": 0,
    }
    flip(exported, "layers.1.o.codes", 77, mask=64)
    with pytest.raises(ExportError, match=r"levels of model\.layers\.1\.self_attn\.o_proj"):
        check_codes(exported, source, read_architecture(read_json(exported / "config.json")))


def test_floats_have_no_codes_to_compare(model: Path, tmp_path: Path) -> None:
    exported = to_onnx(model, tmp_path / "onnx", precision="int4", parity_positions=0)
    assert manifest_of(exported)["codes"] is None
    source, _ = gptq_folder(model, tmp_path / "gptq")
    exported = to_onnx(source, tmp_path / "floats", precision="float32", parity_positions=0)
    assert manifest_of(exported)["codes"] == {"matrices": 0, "codes": 0, "scales": 0, "decoded": 14}
    assert "14 matrices are stored as floats, as requested" in shown(exported)


def rename(folder: Path, name: str, new: str) -> None:
    graph = ir.load(folder / MODEL_FILE)
    for node in graph.graph:
        node.name = new if node.name == name else node.name
    ir.save(graph, folder / MODEL_FILE)


@pytest.mark.parametrize(
    ("skip", "node", "module"),
    [
        ((), "layers.0.qkv", "layers.0.self_attn.q_proj"),
        ((), "layers.1.down", "layers.1.mlp.down_proj"),
        (SOURCES["some float"]["skip"], "layers.0.qkv.2", "layers.0.self_attn.v_proj"),
    ],
)
def test_codes_that_the_graph_lacks_are_missed(
    skip: tuple[str, ...], node: str, module: str, model: Path, tmp_path: Path
) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq", skip=skip)
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    rename(exported, node, "elsewhere")
    architecture = read_architecture(read_json(exported / "config.json"))
    expected = rf"no node {node}, where the codes of model\.{module} belong"
    with pytest.raises(ExportError, match=expected):
        check_codes(exported, source, architecture)


def test_codes_that_became_floats_unasked_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq")
    real = export.weights.folder_weights.FolderWeights.linear

    def linear(self: Any, module: str) -> Any:
        if module != "model.layers.1.self_attn.o_proj":
            return real(self, module)
        return export.weights.folder_weights.Linear(self.exact(module), None)

    monkeypatch.setattr(export.weights.folder_weights.FolderWeights, "linear", linear)
    expected = r"floats where the source holds codes: model\.layers\.1\.self_attn\.o_proj;"
    with pytest.raises(ExportError, match=expected):
        to_onnx(source, tmp_path / "onnx", parity_positions=0)
    assert not (tmp_path / "onnx").exists()


def test_rows_that_no_matrix_has_are_refused(model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq")
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    graph = ir.load(exported / MODEL_FILE)
    (node,) = [one for one in graph.graph if one.name == "layers.0.o"]
    for position, value in enumerate(node.inputs[1:3], start=1):
        array = constant_array(value)
        assert array is not None
        longer = ir.tensor(np.concatenate([array, array[:1]]), name=f"longer.{position}")
        initializer = ir.Value(name=longer.name, const_value=longer)
        node.replace_input_with(position, initializer)
        graph.graph.register_initializer(initializer)
    ir.save(graph, exported / MODEL_FILE)
    architecture = read_architecture(read_json(exported / "config.json"))
    with pytest.raises(ExportError, match=r"rows of model\.layers\.0\.self_attn\.o_proj"):
        check_codes(exported, source, architecture)


# --- what inspect shows -------------------------------------------------------------------------


def shown(folder: Path) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspect_folder(folder).panel())
    return capture.get()


def test_inspect_shows_codes_bytes_and_parity(model: Path, tmp_path: Path) -> None:
    source, weights = gptq_folder(model, tmp_path / "gptq")
    exported = to_onnx(source, tmp_path / "onnx", memory_speed=20)
    words = shown(exported)
    count = sum(weight.codes.size for weight in weights.values())
    assert f"{count:,} in 14 matrices, the same bytes as the source" in words
    assert "mean KL" in words
    assert "at a memory bandwidth of 20.0 GB/s" in words
    assert "none known" in words
    found = inspect_folder(exported).to_dict()
    assert found["manifest"]["codes"]["codes"] == count
    graph = found["graphs"][MODEL_FILE]
    assert graph["findings"] == []
    assert graph["bytes_per_token"] == manifest_of(exported)["bytes_per_token"]


def test_inspect_names_what_is_slow_in_a_folder_of_another_tool(
    model: Path, tmp_path: Path
) -> None:
    exported = to_onnx(model, tmp_path / "onnx", precision="int8", parity_positions=0)
    graph = ir.load(exported / MODEL_FILE)
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.pop("accuracy_level")
    (tmp_path / "other" / "onnx").mkdir(parents=True)
    ir.save(graph, tmp_path / "other" / "onnx" / "model_q8.onnx")
    (tmp_path / "other" / "broken.onnx").write_bytes(b"\x00 not a graph")
    found = inspect_folder(tmp_path / "other")
    (finding,) = found.graphs["onnx/model_q8.onnx"].findings
    assert (finding.rule, len(finding.nodes), finding.slower) == ("accuracy-level", 9, 100.0)
    assert "100 times slower" in shown(tmp_path / "other")
    assert any(note.startswith("broken.onnx cannot be read as a graph") for note in found.notes)
