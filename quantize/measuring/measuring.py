"""What a folder of any form predicts on some text, with one layer of it in memory.

Codes are turned back into the weights that they stand for when their layer's turn comes, so that a
model is measured in the memory in which it was quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mistill.errors import FolderError
from mistill.folders.folder import open_folder
from mistill.measures.kl import Closeness, Predictions, compare
from mistill.pytorch.layers import LayeredModel
from mistill.pytorch.loading import check_weights, require_readable
from mistill.text.blocks import TokenBlocks
from mistill.weights.gptq_layout import HEAD


@torch.inference_mode()
def predictions(folder: str | Path, blocks: TokenBlocks) -> Predictions:
    """What a folder predicts at the positions of a text that count.

    Args:
        folder: A float, GPTQ or NF4 folder.
        blocks: The text.

    Returns:
        Its predictions, in the order of the blocks.

    Raises:
        FolderError: If the folder is broken, or holds an ONNX graph.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    info = open_folder(folder)
    if info.form == "onnx":
        raise FolderError(f"{folder} is an ONNX folder; give the folder it was exported from")
    require_readable(info)
    check_weights(info.path)
    model = LayeredModel(info.path)
    batches = model.batches(blocks)
    for index in range(len(model)):
        with model.layer(index) as layer:
            for batch in batches:
                batch.hidden = batch.through(layer)
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
