from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistill.pytorch.layers import Batch, LayeredModel
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.stages import (
    STAGES,
    kept_rows,
    layer_stages,
    mean_drift,
    mean_outer_product,
)
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from quantize.gptq.gptq import GptqResult
from quantize.gptq.layers import quantize_layer
from quantize.settings import GptqSettings
from tests.tiny import tiny_model


def packed(folder: Path, chats: Path, block_length: int = 48) -> TokenBlocks:
    """Several documents to a block, some cut in two, the last block padded."""
    documents = list(read_documents(chats, load_vocabulary(folder), limit=600))
    blocks = pack(documents, block_length)
    assert blocks.tokens < blocks.ids.size
    assert any(len(set(row)) > 2 for row in blocks.documents.tolist())
    return blocks


def separately(folder: Path, blocks: TokenBlocks) -> list[tuple[int, slice, Tensor]]:
    """Block, place and ids of every document in the blocks."""
    found = []
    for number, row in enumerate(blocks.documents.tolist()):
        start = 0
        for document, run in itertools.groupby(row):
            length = len(list(run))
            place = slice(start, start + length)
            if document >= 0:
                found.append((number, place, torch.from_numpy(blocks.ids[number, place])[None]))
            start += length
    return found


@pytest.fixture(scope="module", params=["mistral", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = (
        {"sliding_window": 9, "head_dim": 24}
        if request.param == "mistral"
        else {"tie_word_embeddings": True, "rope_parameters": rope()}
    )
    return tiny_model(
        tmp_path_factory.mktemp("calibration") / request.param,
        model_type=request.param,
        seed=5,
        **options,
    )


def rope() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def walk_layer(
    layers: LayeredModel,
    index: int,
    batches: Sequence[Batch],
    look: Callable[[Sequence[str], list[Tensor]], None],
    weights: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Show the inputs of each stage of a layer, some weights of which may be replaced."""
    with layers.layer(index) as layer:
        for name, weight in (weights or {}).items():
            layer.get_submodule(name).weight.data = weight
        stages = layer_stages(layer, batches)
        for names in STAGES:
            look(names, kept_rows(next(stages), batches))
        return next(stages)


def nothing(names: Sequence[str], inputs: list[Tensor]) -> None:
    """A visitor that looks at nothing."""


def test_hidden_states_are_those_of_the_whole_model_on_each_document_alone(
    folder: Path, chats: Path
) -> None:
    blocks = packed(folder, chats)
    layers = LayeredModel(folder)
    batches = layers.batches(blocks)
    for index in range(len(layers)):
        for batch, hidden in zip(batches, walk_layer(layers, index, batches, nothing), strict=True):
            with layers.layer(index) as layer:
                torch.testing.assert_close(batch.through(layer), hidden)
            batch.hidden = hidden
    ours = torch.cat([batch.hidden for batch in batches])
    model = load_pytorch(folder)
    with torch.no_grad():
        for number, place, ids in separately(folder, blocks):
            states = model.model(ids, output_hidden_states=True).hidden_states
            # The last of them has passed the final norm.
            last = model.model.norm(ours[number, place])
            torch.testing.assert_close(last, states[-1][0], rtol=1e-4, atol=1e-5)


def test_the_inputs_shown_are_those_that_every_matrix_gets(folder: Path, chats: Path) -> None:
    blocks = packed(folder, chats)
    layers = LayeredModel(folder)
    batches = layers.batches(blocks)
    shown: dict[str, Tensor] = {}

    def look(names: Sequence[str], inputs: list[Tensor]) -> None:
        H = mean_outer_product(inputs)
        shown.update(dict.fromkeys(names, H))

    walk_layer(layers, 0, batches, look)

    model = load_pytorch(folder)
    sums = {name: torch.zeros_like(H) for name, H in shown.items()}
    for name in sums:

        def add(module: Any, arguments: tuple[Tensor], name: str = name) -> None:
            x = arguments[0][0]
            sums[name] += x.T @ x

        model.model.layers[0].get_submodule(name).register_forward_pre_hook(add)
    with torch.no_grad():
        for _, _, ids in separately(folder, blocks):
            model(ids)
    assert shown.keys() == {name for stage in STAGES for name in stage}
    for name, H in shown.items():
        torch.testing.assert_close(H, sums[name] / blocks.tokens, rtol=1e-4, atol=1e-5)


def collect(
    folder: Path, blocks: TokenBlocks, settings: GptqSettings, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Batch]]:
    """Quantize the first layer; the Hessians that were used, its new weights, what leaves it."""
    used: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    stages = iter(STAGES)

    def look(inputs: list[Tensor]) -> Tensor:
        H = mean_outer_product(inputs)
        used.update(dict.fromkeys(next(stages), H))
        return H

    def store(module: str, result: GptqResult, seconds: float) -> None:
        name = module.removeprefix("model.layers.0.")
        written[name] = torch.from_numpy(result.weight.dequantize())

    monkeypatch.setattr("quantize.gptq.layers.mean_outer_product", look)
    layers = LayeredModel(folder)
    batches = layers.batches(blocks)
    with torch.inference_mode(), layers.layer(0) as layer:
        quantize_layer(layer, 0, batches, settings, store)
    return used, written, batches


@pytest.mark.parametrize("true_sequential", [True, False])
def test_true_sequential_means_that_inputs_come_through_quantized_matrices(
    true_sequential: bool, model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = packed(model, chats)
    settings = GptqSettings(group_size=16, true_sequential=true_sequential)
    used, written, after = collect(model, blocks, settings, monkeypatch)

    def hessians(quantized: Sequence[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Of the layer with some matrices quantized; and what leaves it."""
        layers = LayeredModel(model)
        seen: dict[str, Tensor] = {}
        out = walk_layer(
            layers,
            0,
            layers.batches(blocks),
            lambda names, x: seen.update(dict.fromkeys(names, mean_outer_product(x))),
            {name: written[name] for name in quantized},
        )
        return seen, out

    before: list[str] = []
    for stage in STAGES:
        expected, _ = hessians(before if true_sequential else [])
        other, _ = hessians([] if true_sequential else before)
        for name in stage:
            torch.testing.assert_close(used[name], expected[name])
            if before:
                assert not torch.allclose(used[name], other[name], rtol=1e-3)
        before += stage
    _, out = hessians(before)
    for batch, hidden in zip(after, out, strict=True):
        torch.testing.assert_close(batch.hidden, hidden)


def test_padding_is_not_counted(model: Path) -> None:
    document = Document(torch.arange(5, 15).numpy(), torch.ones(10, dtype=torch.bool).numpy())
    layers = LayeredModel(model)
    seen = []
    for block_length in (10, 40):
        batches = layers.batches(pack([document], block_length))
        first: list[Tensor] = []

        def look(names: Sequence[str], inputs: list[Tensor], first: list[Tensor] = first) -> None:
            first.append(mean_outer_product(inputs))

        walk_layer(layers, 0, batches, look)
        seen.append(first)
    for alone, padded in zip(*seen, strict=True):
        torch.testing.assert_close(alone, padded)


def test_the_mean_of_outer_products_is_what_it_says() -> None:
    inputs = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0]])]
    expected = torch.tensor([[10.0, 2.0], [2.0, 5.0]]) / 3
    torch.testing.assert_close(mean_outer_product(inputs), expected)


def test_the_mean_does_not_depend_on_how_it_is_summed() -> None:
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(0))
    H = mean_outer_product([x[:20], x[20:]])
    torch.testing.assert_close(H, x.T @ x / 50)
    assert torch.equal(H, H.T)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_gptaq_is_given_what_the_float_layer_computes(
    true_sequential: bool, model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = packed(model, chats)
    layers = LayeredModel(model)
    settings = GptqSettings(group_size=16, bits=3, method="gptaq", true_sequential=true_sequential)
    seen: list[list[Tensor]] = []

    def look(inputs: Sequence[Tensor], floats: Sequence[Tensor]) -> Tensor:
        seen.append(list(floats))
        return mean_drift(inputs, floats)

    monkeypatch.setattr("quantize.gptq.layers.mean_drift", look)
    batches, floats = layers.batches(blocks), layers.batches(blocks)
    expected: list[list[Tensor]] = []
    before = layers.batches(blocks)
    for index in range(2):
        with torch.inference_mode(), layers.layer(index) as layer:
            quantize_layer(layer, index, batches, settings, lambda *_: None, floats)
        hidden = walk_layer(layers, index, before, lambda _, x: expected.append(x))
        for batch, one, other in zip(before, hidden, floats, strict=True):
            torch.testing.assert_close(other.hidden, one)
            batch.hidden = one
    assert len(seen) == len(expected) == 8
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(batches[0].hidden, floats[0].hidden, rtol=0.01)


def test_the_drift_is_the_mean_of_what_is_missing_times_what_is_there() -> None:
    x, y = [torch.tensor([[1.0, 2.0], [0.0, 1.0]])], [torch.tensor([[2.0, 2.0], [0.0, 4.0]])]
    assert mean_drift(x, y).tolist() == [[0.5, 1.0], [0.0, 1.5]]
