"""A model one layer at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import quantize
from mistill.measures.kl import predict
from mistill.pytorch.layers import LayeredModel, attention_mask
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.weights.gptq_layout import EMBEDDING, HEAD
from tests.tiny import tiny_model


def some_text() -> TokenBlocks:
    rng = np.random.default_rng(3)
    lengths = (7, 16, 9, 37, 3)
    return pack([Document(rng.integers(0, 384, n), np.ones(n, bool)) for n in lengths], 16)


def test_a_position_attends_to_its_own_document_up_to_itself() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert attention_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert attention_mask(documents, window=2)[0, 0, 4].int().tolist() == [0, 0, 0, 1, 1, 0]


def test_attention_crosses_no_document_and_no_window() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 0, 1, 1, -1]]), window=2)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("form", ["float", "gptq", "nf4"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_every_form_computes_what_the_whole_model_does(
    form: str, tied: bool, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=tied, model_type="llama")
    if form == "gptq":
        folder = quantize.to_rounding(folder, tmp_path / "small", group_size=32, head_bits=8)
    elif form == "nf4":
        folder = quantize.to_nf4(folder, tmp_path / "small")
    blocks = some_text()
    model = LayeredModel(folder)
    batches = model.batches(blocks, at_once=2)
    with torch.inference_mode():
        for index in range(len(model)):
            with model.layer(index) as layer:
                for batch in batches:
                    batch.hidden = batch.through(layer)
        hidden = model.final_norm()(torch.cat([batch.hidden for batch in batches]))
        logits = hidden[torch.from_numpy(blocks.kept)] @ model.table(HEAD).T
    expected = predict(load_pytorch(folder), blocks).logits(slice(None))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def test_rows_of_the_embedding_can_be_changed_on_their_way(model: Path) -> None:
    blocks = some_text()
    layers = LayeredModel(model)
    rows: list[int] = []

    def halved(table: torch.Tensor) -> torch.Tensor:
        rows.append(len(table))
        return table / 2

    hidden = torch.cat([batch.hidden for batch in layers.batches(blocks, halved)])
    ids = torch.from_numpy(blocks.ids)
    torch.testing.assert_close(hidden, layers.table(EMBEDDING)[ids] / 2)
    assert rows == [len(ids.unique())]


def test_a_layer_leaves_memory_when_it_has_been_used(model: Path) -> None:
    layers = LayeredModel(model)
    for index in range(2):
        with layers.layer(index) as layer:
            assert not any(weight.is_meta for weight in layer.parameters())
        assert all(weight.is_meta for weight in layer.parameters())
