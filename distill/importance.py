"""Which layers of a teacher matter: block influence (ShortGPT), and even spacing.

A layer whose output points where its input pointed has changed little, and a model without it
changes little. Block influence is one minus the cosine between the two, averaged over positions
of text:

    BI_l = 1 - E[ cos(x_l, x_{l+1}) ]

(Men et al., 2024, section 3.1, https://arxiv.org/abs/2403.03853). As in the paper the layers with
the least influence go, wherever they stand: the first and the last are not protected, and need no
protection, because the measure itself keeps them.

N is blocks, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.progress import Tracker, track
from mistill.pytorch import empty_model, plain_config, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mistill.text import TokenBlocks

Layer = Callable[[Tensor, slice], Tensor]

_BLOCKS_AT_ONCE = 4


# --- choosing -----------------------------------------------------------------------------------


def most_influential(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """The layers to keep so that those with the least influence go.

    Args:
        influence: Influence of each layer.
        count: How many to keep.

    Returns:
        Their places in ascending order; of layers that tie, the first ones.
    """
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])
    return tuple(sorted(ranked[:count]))


def evenly_spaced(total: int, count: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them.

    Args:
        total: Layers there are.
        count: How many to keep, from 1 to ``total``.

    Returns:
        Their places in ascending order, rounded up where two are equally near.
    """
    if count == 1:
        return (0,)
    steps = count - 1
    return tuple((2 * step * (total - 1) + steps) // (2 * steps) for step in range(count))


# --- mathematics --------------------------------------------------------------------------------


def block_influence(layers: Iterable[Layer], hidden: Tensor, kept: Tensor) -> list[float]:
    """How far each layer turns the hidden state, on average over positions of text.

    Args:
        layers: Each takes the hidden states of some blocks, shape (n, T, D), and the places of
            those blocks, and returns their hidden states behind it. Asked for one at a time, so
            that they need not be in memory together.
        hidden: Hidden states before the first layer, shape (N, T, D), float32 or better;
            overwritten.
        kept: True where a position counts, shape (N, T).

    Returns:
        One number from 0 (turns nothing) to 2 for each layer.
    """
    influence = []
    for layer in layers:
        turned = 0.0
        for start in range(0, len(hidden), _BLOCKS_AT_ONCE):
            rows = slice(start, start + _BLOCKS_AT_ONCE)
            after = layer(hidden[rows], rows)
            cosine = torch.cosine_similarity(hidden[rows], after, dim=-1)
            turned += (1 - cosine)[kept[rows]].sum(dtype=torch.float64).item()
            hidden[rows] = after
        influence.append(turned / int(kept.sum()))
    return influence


def attention_mask(documents: Tensor, window: int | None) -> Tensor:
    """Which earlier positions each position may look at.

    Args:
        documents: The document of each position, shape (N, T).
        window: Most positions back, its own included; None for no limit.

    Returns:
        Boolean, shape (N, 1, T, T): True where the row's position sees the column's.
    """
    places = torch.arange(documents.shape[1], device=documents.device)
    back = places[:, None] - places[None, :]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    same = documents[:, :, None] == documents[:, None, :]
    return (seen & same)[:, None]


# --- a teacher's layers -------------------------------------------------------------------------


def measure_influence(
    teacher: Path, blocks: TokenBlocks, device: torch.device | None = None
) -> list[float]:
    """Measure the block influence of every layer of a teacher on text.

    One layer is in memory at a time, in float32, with the hidden states of all the text: a
    teacher of 7B is measured in about 2 GiB.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text; positions of padding do not count.
        device: Where to compute; the accelerator if there is one, else the CPU.

    Returns:
        One number per layer.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    device = device or torch.accelerator.current_accelerator(check_available=True)
    device = device or torch.device("cpu")
    documents = torch.from_numpy(blocks.documents).to(device)
    config = plain_config(teacher)
    total = int(config.num_hidden_layers)
    with torch.inference_mode(), track("block influence", total, "layers") as bar:
        table = read_tensors(teacher, "model.embed_tokens.")["weight"]
        hidden = table[torch.from_numpy(blocks.ids)].float().to(device)
        del table
        positions = torch.from_numpy(blocks.position_ids).to(device)
        layers = _each_layer(teacher, config, documents, positions, bar)
        influence = block_influence(layers, hidden, documents >= 0)
    for layer, value in enumerate(influence):
        if not math.isfinite(value):
            raise FolderError(
                f"layer {layer} of {teacher} computes values that are not numbers; its weights "
                "are damaged"
            )
    return influence


def _each_layer(
    teacher: Path,
    config: PreTrainedConfig,
    documents: Tensor,
    positions: Tensor,
    bar: Tracker,
) -> Iterator[Layer]:
    """Load one layer after the other, each freed when the next is asked for."""
    skeleton = empty_model(config).eval().get_decoder()
    rotary = type(skeleton.rotary_emb)(config).to(documents.device)
    window = getattr(config, "sliding_window", None)
    for index, layer in enumerate(skeleton.layers):
        weights = read_tensors(teacher, f"model.layers.{index}.")
        wanted = layer.state_dict().keys()
        ready = {name: weights[name].to(documents.device, torch.float32) for name in wanted}
        layer.load_state_dict(ready, assign=True)
        del weights, ready

        def run(hidden: Tensor, rows: slice, layer: torch.nn.Module = layer) -> Tensor:
            after: Tensor = layer(
                hidden,
                attention_mask=attention_mask(documents[rows], window),
                position_ids=positions[rows],
                position_embeddings=rotary(hidden, position_ids=positions[rows]),
            )
            return after

        yield run
        layer.to_empty(device="meta")
        bar.advance()
