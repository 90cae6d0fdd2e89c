"""How large is a student, and how many layers fit?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import export
import quantize
from distill import new_student
from distill.student.sizing import Sizes, most_layers
from mistill.folders.folder import describe
from mistill.folders.lineage import read_lineage
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "tied mistral with wide heads": {"head_dim": 32, "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with blocks that do not fit": {
        "model_type": "llama",
        "hidden_size": 80,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 176,
    },
}


def sizes_of(folder: Path) -> Sizes:
    return Sizes.of(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_that_the_folder_holds(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3, **KINDS[kind])

    assert sizes_of(folder).parameters == describe(folder).parameters


@pytest.mark.parametrize("kind", ["mistral", "tied mistral with wide heads"])
@pytest.mark.parametrize("through_gptq", [True, False])
def test_megabytes_are_those_of_the_exported_weights(
    tmp_path: Path, kind: str, through_gptq: bool, chats: Path
) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3, **KINDS[kind])
    source = folder
    if through_gptq:
        source = quantize.to_rounding(folder, tmp_path / "rounded", bits=4, group_size=64)
    options: dict[str, Any] = {} if through_gptq else {"precision": "int4", "head_bits": 8}
    if not through_gptq:
        options["embedding_bits"] = 8

    chatbot = export.to_onnx(source, tmp_path / "chatbot", parity_positions=0, **options)

    # What initializers hold; the file has gaps between them, a large share of so small a model.
    import onnx_ir

    graph = onnx_ir.load(chatbot / "model.onnx").graph
    # Two tensors over the same bytes, as those of a tied table, count once.
    tensors = [value.const_value for value in graph.initializers.values()]
    held = {
        getattr(tensor, "offset", tensor.name): tensor.nbytes
        for tensor in tensors
        if tensor is not None and tensor.nbytes > 64
    }
    assert sizes_of(folder).megabytes_at_4_bits * 1e6 == sum(held.values())


@pytest.mark.parametrize("measure", ["parameters", "megabytes_at_4_bits"])
def test_the_most_layers_that_fit_are_found(tmp_path: Path, measure: str) -> None:
    sizes = sizes_of(tiny_model(tmp_path / "model"))
    for layers in (1, 2, 7, 30, 61):
        exact = getattr(replace(sizes, layers=layers), measure)
        assert most_layers(sizes, measure, exact) == layers
        assert most_layers(sizes, measure, exact * 0.999999) == layers - 1
        more = getattr(replace(sizes, layers=layers + 1), measure)
        assert most_layers(sizes, measure, more * 0.999999) == layers


def test_the_largest_student_that_fits_is_made(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    one = (197_184 - 49_216) // 4  # of the fixture's four layers

    student = new_student(teacher, tmp_path / "a", choose="even", parameters=49_216 + 4 * one - 1)
    assert describe(student).layers == 3

    limit = replace(sizes_of(teacher), layers=4).megabytes_at_4_bits
    student = new_student(teacher, tmp_path / "b", choose="even", megabytes_at_4_bits=limit)
    assert describe(student).layers == 4
    assert read_lineage(student)[-1]["megabytes_at_4_bits"] == pytest.approx(limit, abs=1e-3)


def test_a_narrower_student_keeps_all_layers_where_they_fit(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)

    student = new_student(
        teacher, tmp_path / "a", parameters=10**9, intermediate_size=64, texts=chats
    )
    assert describe(student).layers == 3

    layer = (describe(student).parameters - 49_216) // 3
    smaller = new_student(
        teacher,
        tmp_path / "b",
        parameters=49_216 + 2 * layer,
        intermediate_size=64,
        texts=chats,
    )
    assert describe(smaller).layers == 2
    assert describe(smaller).parameters == 49_216 + 2 * layer
