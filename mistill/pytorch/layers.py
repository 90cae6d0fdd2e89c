"""A model with one layer in memory at a time, and text running through it.

To measure or quantize the layers of a model, all hidden states of some text are needed once and
each layer once. So the text waits in front of a layer, as hidden states, while the layer is read,
and the layer is freed when the text has passed it: a model of 7B runs in about 2 GiB. Weights that
are stored as GPTQ or NF4 codes are decoded when their layer's turn comes.

N is blocks, B blocks of one batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mistill.pytorch.loading import empty_model, plain_config
from mistill.pytorch.products import fast_products
from mistill.pytorch.reading import require_finite
from mistill.weights.gptq_layout import EMBEDDING, HEAD
from mistill.weights.plain_weights import PlainWeights

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks

# Tokens that pass through a layer at once.
TOKENS_AT_ONCE = 2048

_CPU = torch.device("cpu")


@dataclass
class Batch:
    """Some blocks of text on their way through the layers of a model.

    Attributes:
        hidden: Hidden states before the next layer, float32, shape (B, T, D).
        documents: Number of the document at each position, -1 for none, shape (B, T).
        rotary: Cosines and sines of the positions, each (B, T, head width).
        window: How many positions one attends to, itself among them; None for no limit.
    """

    hidden: Tensor
    documents: Tensor
    rotary: tuple[Tensor, Tensor]
    window: int | None

    @property
    def present(self) -> Tensor:
        """True where there is a token and not padding, shape (B, T)."""
        return self.documents >= 0

    @property
    def mask(self) -> Tensor:
        """Which positions attend to which, shape (B, 1, T, T)."""
        return attention_mask(self.documents, self.window)

    def through(self, layer: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Send hidden states through a layer.

        Args:
            layer: From ``LayeredModel.layer``.
            hidden: The states before it, shape (B, T, D); those of the batch if not given.

        Returns:
            The states after it, shape (B, T, D).
        """
        after: Tensor = layer(
            self.hidden if hidden is None else hidden,
            attention_mask=self.mask,
            position_embeddings=self.rotary,
        )
        return after


class LayeredModel:
    """A float, GPTQ or NF4 folder whose layers are read when they are needed, in float32."""

    def __init__(self, folder: Path, device: torch.device = _CPU, hold_bytes: int = 0) -> None:
        """Read the config and the headers of the files; no weight is read yet.

        Args:
            folder: A sound folder of a readable architecture.
            device: Where to compute.
            hold_bytes: Layers stay in memory once they are read if all of them together take no
                more than this; 0 frees each when it has been used.
        """
        self.folder = folder
        self.device = device
        self.config = plain_config(folder)
        self._weights = PlainWeights(folder)
        # Modules of transformers for every layer, without memory for their weights.
        empty = cast(Any, empty_model(self.config)).eval().requires_grad_(False).get_decoder()
        self._layers, self._norm = empty.layers, empty.norm
        self._rotary = type(empty.rotary_emb)(self.config).to(device)
        self._window: int | None = getattr(self.config, "sliding_window", None)
        elements = sum(weight.numel() for weight in self._layers.parameters())
        self._holds = 4 * elements <= hold_bytes

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Hold one layer in memory while the body runs.

        Args:
            index: Its place, from 0.

        Yields:
            The decoder layer in eval mode; its weights may be changed.
        """
        layer = self._layers[index]
        self._fill(layer, f"model.layers.{index}.")
        try:
            with fast_products():
                yield layer
        finally:
            if not self._holds:
                layer.to_empty(device="meta")

    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head.

        Returns:
            The module, with its weights.
        """
        norm: nn.Module = self._norm
        self._fill(norm, "model.norm.")
        return norm

    def table(self, module: str) -> Tensor:
        """Read the embedding or the head.

        Args:
            module: Which; a head that is the embedding is read from there.

        Returns:
            Shape (V, D), float32.
        """
        if module == HEAD and self.config.tie_word_embeddings:
            module = EMBEDDING
        return self._read(f"{module}.weight")

    def batches(
        self,
        blocks: TokenBlocks,
        change: Callable[[Tensor], Tensor] | None = None,
        *,
        at_once: int | None = None,
    ) -> list[Batch]:
        """Embed blocks of text.

        Args:
            blocks: N blocks of T tokens.
            change: Called with rows (n, D) of the embedding; returns what is to be used instead.
            at_once: Blocks in a batch; as many as make about two thousand tokens if not given.

        Returns:
            Batches of blocks, in order.
        """
        ids, places = torch.from_numpy(blocks.ids).unique(return_inverse=True)
        rows = self._read(f"{EMBEDDING}.weight", ids)
        rows = rows if change is None else change(rows)
        step = at_once or max(1, TOKENS_AT_ONCE // blocks.block_length)
        batches = []
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            hidden = rows[places[start : start + step].to(rows.device)]
            positions = torch.from_numpy(part.position_ids).to(self.device)
            documents = torch.from_numpy(part.documents).to(self.device)
            rotary = self._rotary(hidden, position_ids=positions)
            batches.append(Batch(hidden, documents, rotary, self._window))
        return batches

    def _read(self, name: str, rows: Tensor | None = None) -> Tensor:
        weight = self._weights.read(name, None if rows is None else rows.numpy())
        tensor = torch.from_numpy(weight)
        require_finite(name, tensor)
        return tensor.to(self.device, torch.float32)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Read the weights of a module that has none yet."""
        if any(weight.is_meta for weight in module.parameters()):
            weights = {name: self._read(prefix + name) for name in module.state_dict()}
            module.load_state_dict(weights, assign=True)


def per_batch(values: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    """Take apart what was stated of all blocks.

    Args:
        values: Shape (N, ...), in the order of the blocks.
        batches: From ``LayeredModel.batches``.

    Returns:
        Shape (B, ...) of each batch.
    """
    return list(values.split([len(batch.hidden) for batch in batches]))


def accelerator_or_cpu() -> torch.device:
    """The device to compute on.

    Returns:
        The accelerator if there is one, else the CPU.
    """
    return torch.accelerator.current_accelerator(check_available=True) or _CPU


def attention_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """Which positions attend to which: to those of their own document, up to themselves.

    Args:
        documents: The document of each position, shape (B, T).
        window: How many positions one attends to, itself among them; None for no limit.

    Returns:
        Boolean, shape (B, 1, T, T): True where the row's position attends to the column's.
    """
    places = torch.arange(documents.shape[1], device=documents.device)
    distance = places[:, None] - places[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = documents[:, :, None] == documents[:, None, :]
    return (near & same)[:, None]
