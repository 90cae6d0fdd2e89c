"""What a folder of any form predicts on some text, with one layer of it in memory.

Codes are turned back into the weights that they stand for when their layer's turn comes, so that a
model is measured in the memory in which it was quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mistill.errors import FolderError
from mistill.folders.folder import open_folder
from mistill.measures.kl import Closeness, Predictions, compare
from mistill.pytorch.loading import check_weights, plain_config, require_readable
from mistill.text.blocks import TokenBlocks
from mistill.weights.gptq_layout import EMBEDDING, HEAD
from mistill.weights.plain_weights import PlainWeights
from quantize.gptq.calibration import TOKENS_AT_ONCE, Batch, LayeredModel, layer_stages


class StreamedModel(LayeredModel):
    """A float, GPTQ or NF4 folder whose layers are read one by one, as floats."""

    def __init__(self, folder: str | Path) -> None:
        """Look at a folder.

        Args:
            folder: A sound model folder.

        Raises:
            FolderError: If it is broken, or holds an ONNX graph.
            ArchitectureError: If it is neither Llama nor Mistral.
        """
        info = open_folder(folder)
        if info.form == "onnx":
            raise FolderError(f"{folder} is an ONNX folder; give the folder it was exported from")
        require_readable(info)
        config = plain_config(info.path)
        check_weights(info.path, config)
        super().__init__(info.path, config)
        self._weights = PlainWeights(info.path)

    def layer(self, index: int) -> nn.Module:
        """Read a decoder layer.

        Args:
            index: From 0.

        Returns:
            The layer in float32 and eval mode; it belongs to the caller.
        """
        return self._filled(self._layers[index], f"model.layers.{index}.").eval()

    def final_norm(self) -> nn.Module:
        """Read the norm between the last layer and the head.

        Returns:
            The norm in float32; it belongs to the caller.
        """
        return self._filled(self._norm, "model.norm.")

    def table(self, module: str) -> Tensor:
        """Read the embedding or the head.

        Args:
            module: Which; a head that is the embedding is read from there.

        Returns:
            Shape (V, D), float32.
        """
        if module == HEAD and self.config.tie_word_embeddings:
            module = EMBEDDING
        return self._read(f"{module}.")["weight"]

    def batches(self, blocks: TokenBlocks) -> list[Batch]:
        """Turn blocks of text into what enters the first layer.

        Args:
            blocks: N blocks of T tokens.

        Returns:
            The blocks in batches of about two thousand tokens.
        """
        table = self.table(EMBEDDING)
        step = max(1, TOKENS_AT_ONCE // blocks.block_length)
        parts = [blocks[start : start + step] for start in range(0, len(blocks), step)]
        return [self._batch(part, table[torch.from_numpy(part.ids)]) for part in parts]

    def _filled(self, empty: nn.Module, prefix: str) -> nn.Module:
        module = copy.deepcopy(empty)
        wanted = module.state_dict().keys()
        found = self._read(prefix)
        module.load_state_dict({name: found[name] for name in wanted}, assign=True)
        return module.requires_grad_(False)

    def _read(self, prefix: str) -> Mapping[str, Tensor]:
        """Float32 weights by the rest of their names."""
        return {
            name.removeprefix(prefix): torch.from_numpy(self._weights.read(name)).float()
            for name in self._weights
            if name.startswith(prefix)
        }


@torch.inference_mode()
def predictions(folder: str | Path, blocks: TokenBlocks) -> Predictions:
    """What a folder predicts at the positions of a text that count.

    Args:
        folder: A float, GPTQ or NF4 folder.
        blocks: The text.

    Returns:
        Its predictions, in the order of the blocks.
    """
    model = StreamedModel(folder)
    batches = model.batches(blocks)
    for index in range(len(model)):
        *_, outputs = layer_stages(model.layer(index), batches)
        for batch, hidden in zip(batches, outputs, strict=True):
            batch.hidden = hidden
    norm = model.final_norm()
    kept = torch.from_numpy(blocks.kept).split([len(batch.hidden) for batch in batches])
    rows = [norm(batch.hidden)[mask] for batch, mask in zip(batches, kept, strict=True)]
    return Predictions(torch.cat(rows), model.table(HEAD))


def measure(
    folder: str | Path, references: Mapping[str, Predictions], blocks: TokenBlocks
) -> dict[str, Closeness]:
    """How close a folder is to its source, to a teacher, and the like.

    Args:
        folder: A float, GPTQ or NF4 folder.
        references: What each of them predicts, by name.
        blocks: The text that they predict.

    Returns:
        Closeness by name of the reference.
    """
    return compare(references, {"model": predictions(folder, blocks)}, blocks)["model"]
