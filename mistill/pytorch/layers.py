"""A teacher with one layer in memory at a time, and text running through it.

To measure what the layers of a model do, all of its hidden states are needed once and each of its
layers once. So the text waits in front of a layer, as hidden states, while the layer is read, and
the layer is freed when the text is behind it: a teacher of 7B is measured in about 2 GiB.

N is blocks, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistill.pytorch.loading import empty_model, plain_config, read_tensors

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks

_BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class PackedText:
    """Blocks of text as the layers of a model need them.

    Attributes:
        ids: Token ids, shape (N, T).
        documents: Number of the document at each position, -1 for none, shape (N, T).
        positions: Position of each token in its own document, shape (N, T).
    """

    ids: Tensor
    documents: Tensor
    positions: Tensor

    @classmethod
    def on(cls, device: torch.device, blocks: TokenBlocks) -> PackedText:
        """Bring blocks onto a device.

        Args:
            device: Where to compute.
            blocks: The text.

        Returns:
            The same text.
        """
        arrays = (blocks.ids, blocks.documents, blocks.position_ids)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> PackedText:
        return PackedText(self.ids[rows], self.documents[rows], self.positions[rows])

    @property
    def present(self) -> Tensor:
        """True where there is a token, shape (N, T)."""
        return self.documents >= 0

    def few_at_once(self) -> Iterator[slice]:
        """Rows to compute together, so that what lies inside a layer stays small.

        Yields:
            Slices that cover all rows, in order.
        """
        for start in range(0, len(self), _BLOCKS_AT_ONCE):
            yield slice(start, start + _BLOCKS_AT_ONCE)


class LayerwiseModel:
    """A model folder whose parts are read when they are needed, in float32."""

    def __init__(
        self, folder: Path, device: torch.device | None = None, hold_bytes: int = 0
    ) -> None:
        """Read the config; no weight is read yet.

        Args:
            folder: A float folder of a readable architecture.
            device: Where to compute; the accelerator if there is one, else the CPU.
            hold_bytes: Layers stay in memory once they are read if all of them together take no
                more than this; 0 frees each when it has been used.
        """
        device = device or torch.accelerator.current_accelerator(check_available=True)
        self.device = device or torch.device("cpu")
        self.folder = folder
        self.config = plain_config(folder)
        self._decoder: Any = empty_model(self.config).eval().get_decoder()
        self._rotary = type(self._decoder.rotary_emb)(self.config).to(self.device)
        self._window: int | None = getattr(self.config, "sliding_window", None)
        elements = sum(weight.numel() for weight in self._decoder.layers.parameters())
        self._holds = 4 * elements <= hold_bytes

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._decoder.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before the first layer.

        Args:
            ids: Token ids, shape (N, T).

        Returns:
            Shape (N, T, D).
        """
        table = read_tensors(self.folder, "model.embed_tokens.")["weight"]
        return table[ids.cpu()].float().to(self.device)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Hold one layer in memory while the body runs.

        Args:
            index: Its place.

        Yields:
            The decoder layer.
        """
        layer = self._decoder.layers[index]
        self._fill(layer, f"model.layers.{index}.")
        try:
            yield layer
        finally:
            if not self._holds:
                layer.to_empty(device="meta")

    def run(self, layer: nn.Module, hidden: Tensor, text: PackedText) -> Tensor:
        """Send some blocks through a layer.

        Args:
            layer: From ``layer``.
            hidden: Hidden states before it, shape (N, T, D).
            text: The same blocks.

        Returns:
            Hidden states behind it, shape (N, T, D).
        """
        after: Tensor = layer(
            hidden,
            attention_mask=attention_mask(text.documents, self._window),
            position_ids=text.positions,
            position_embeddings=self._rotary(hidden, position_ids=text.positions),
        )
        return after

    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head.

        Returns:
            The module, with its weights.
        """
        norm: nn.Module = self._decoder.norm
        self._fill(norm, "model.norm.")
        return norm

    def head(self) -> Tensor:
        """The matrix that turns last hidden states into logits.

        Returns:
            Shape (V, D), the embedding where the two are tied.
        """
        name = "model.embed_tokens." if self.config.tie_word_embeddings else "lm_head."
        return read_tensors(self.folder, name)["weight"].to(self.device, torch.float32)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Read the weights of a module that has none yet."""
        if not any(weight.is_meta for weight in module.parameters()):
            return
        weights = read_tensors(self.folder, prefix)
        wanted = module.state_dict().keys()
        ready = {name: weights[name].to(self.device, torch.float32) for name in wanted}
        module.load_state_dict(ready, assign=True)


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
