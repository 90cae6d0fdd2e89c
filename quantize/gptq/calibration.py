"""Run calibration text through a model one layer at a time, quantizing each layer on the way.

GPTQ needs, for every matrix, the mean of x x^T over its inputs x. A layer of Llama or Mistral has
four different inputs: of q, k and v; of o; of gate and up; of down. ``walk_layer`` computes a layer
in these four stages and hands each stage's inputs to a visitor before its matrices are used. A
visitor that quantizes them in place is GPTQ's "true sequential" order, and costs no second forward
pass: every stage computes with the quantized matrices of the stages before it.

Only one layer is in memory, with the hidden states of the text between two layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mistill.pytorch.loading import empty_model, read_tensors
from mistill.text.blocks import TokenBlocks
from quantize.gptq.factor import mirror_lower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Matrices that share their inputs, in the order in which a layer uses them.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MATRICES = tuple(name for stage in STAGES for name in stage)

# Rows of H that are summed at once.
_STRIP = 256

# Tokens that pass through a layer at once.
TOKENS_AT_ONCE = 2048


@dataclass
class Batch:
    """Some blocks of text on their way through the layers.

    Attributes:
        hidden: Shape (B, T, D), float32: the hidden states before the next layer.
        mask: Bool, shape (B, 1, T, T), True where a position (row) sees another (column).
        rotary: Cosines and sines of the positions, each (B, T, head width).
        kept: Bool, shape (B, T), True where there is text and not padding.
    """

    hidden: Tensor
    mask: Tensor
    rotary: tuple[Tensor, Tensor]
    kept: Tensor


# Called with the names of the matrices of a stage and the inputs (tokens, K) of every batch.
Visit = Callable[[Sequence[str], list[Tensor]], None]


class LayeredModel:
    """A float model folder whose layers are read one by one."""

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        """Look at a folder; nothing is read yet.

        Args:
            folder: A sound float folder.
            config: Its config, from ``mistill.pytorch.loading.plain_config``.
        """
        self.folder = folder
        self.config = config
        # A module of the library for each layer, without memory for its weights.
        empty = cast(Any, empty_model(config)).model
        self._layers, self._norm = empty.layers, empty.norm
        self._rotary = type(empty.rotary_emb)(config)

    def __len__(self) -> int:
        return len(self._layers)

    def layer(self, index: int) -> nn.Module:
        """Read a decoder layer.

        Args:
            index: From 0.

        Returns:
            The layer in float32 and eval mode; it belongs to the caller.
        """
        layer = copy.deepcopy(self._layers[index])
        tensors = read_tensors(self.folder, f"model.layers.{index}.")
        layer.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return cast(nn.Module, layer.eval().requires_grad_(False))

    def final_norm(self) -> nn.Module:
        """Read the norm between the last layer and the head.

        Returns:
            The norm in float32; it belongs to the caller.
        """
        norm = copy.deepcopy(self._norm)
        tensors = read_tensors(self.folder, "model.norm.")
        norm.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return cast(nn.Module, norm.requires_grad_(False))

    def embed(
        self, blocks: TokenBlocks, change: Callable[[Tensor], Tensor] | None = None
    ) -> list[Batch]:
        """Turn blocks of text into what enters the first layer.

        Args:
            blocks: N blocks of T tokens.
            change: What becomes of rows (n, D) of the embedding when it is quantized; None if it
                is not.

        Returns:
            The blocks in batches of about two thousand tokens.
        """
        table = read_tensors(self.folder, "model.embed_tokens.")["weight"]
        ids, places = torch.from_numpy(blocks.ids).unique(return_inverse=True)
        rows = table[ids].float()
        del table
        rows = rows if change is None else change(rows)
        step = max(1, TOKENS_AT_ONCE // blocks.block_length)
        return [
            self._batch(blocks[start : start + step], rows[places[start : start + step]])
            for start in range(0, len(blocks), step)
        ]

    def _batch(self, blocks: TokenBlocks, hidden: Tensor) -> Batch:
        documents = torch.from_numpy(blocks.documents)
        rotary = self._rotary(hidden, torch.from_numpy(blocks.position_ids))
        window = getattr(self.config, "sliding_window", None)
        return Batch(hidden, visible(documents, window), rotary, documents >= 0)


def visible(documents: Tensor, sliding_window: int | None = None) -> Tensor:
    """Which positions see which: those of the same document, up to themselves.

    Args:
        documents: Shape (B, T), the document of each position.
        sliding_window: How many positions one sees, itself among them; None for all.

    Returns:
        Bool, shape (B, 1, T, T).
    """
    places = torch.arange(documents.shape[1])
    distance = places[:, None] - places[None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    return ((documents[:, :, None] == documents[:, None, :]) & seen)[:, None]


@torch.no_grad()
def layer_stages(layer: nn.Module, batches: Sequence[Batch]) -> Iterator[list[Tensor]]:
    """Compute a layer of Llama or Mistral in four stages, stopping before each.

    Args:
        layer: A decoder layer in float32. A stage computes with the weights that its matrices have
            when it goes on.
        batches: What enters it.

    Yields:
        The inputs (B, T, K) of every batch to the matrices of each of ``STAGES`` in turn; and at
        last the hidden states (B, T, D) after the layer.
    """
    parts = cast(Any, layer)
    attention, mlp = parts.self_attn, parts.mlp
    o_proj = attention.o_proj

    normed = [parts.input_layernorm(batch.hidden) for batch in batches]
    yield normed
    attention.o_proj = nn.Identity()
    attended = [
        attention(x, position_embeddings=batch.rotary, attention_mask=batch.mask)[0]
        for x, batch in zip(normed, batches, strict=True)
    ]
    attention.o_proj = o_proj
    del normed
    yield attended
    hidden = [batch.hidden + o_proj(x) for x, batch in zip(attended, batches, strict=True)]
    del attended
    normed = [parts.post_attention_layernorm(x) for x in hidden]
    yield normed
    gated = [mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)) for x in normed]
    del normed
    yield gated
    yield [x + mlp.down_proj(y) for x, y in zip(hidden, gated, strict=True)]


def walk_layer(layer: nn.Module, batches: Sequence[Batch], visit: Visit) -> list[Tensor]:
    """Compute a layer, showing the inputs of each stage.

    Args:
        layer: A decoder layer in float32.
        batches: What enters it.
        visit: Called before a stage's matrices are used; it may change their weights.

    Returns:
        The hidden states after the layer, one tensor (B, T, D) per batch.
    """
    flow = layer_stages(layer, batches)
    for names in STAGES:
        visit(names, kept_rows(next(flow), batches))
    return next(flow)


def kept_rows(inputs: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """The inputs at positions that hold text.

    Args:
        inputs: Tensors (B, T, K), one per batch.
        batches: Where there is text.

    Returns:
        Tensors (tokens, K); views of the inputs where there is no padding.
    """
    return [
        x.reshape(-1, x.shape[-1]) if batch.kept.all() else x[batch.kept]
        for x, batch in zip(inputs, batches, strict=True)
    ]


def mean_outer_product(inputs: Sequence[Tensor]) -> Tensor:
    """The mean of x x^T over all inputs: the Hessian of GPTQ, but for a factor of two.

    Args:
        inputs: Tensors (tokens, K).

    Returns:
        Shape (K, K), float32.
    """
    tokens = sum(len(x) for x in inputs)
    width = inputs[0].shape[1]
    H = torch.zeros(width, width)
    for x in inputs:
        # H is symmetric: a strip need not go past its own diagonal block.
        for start in range(0, width, _STRIP):
            end = min(start + _STRIP, width)
            H[start:end, :end].addmm_(x[:, start:end].T, x[:, :end], alpha=1 / tokens)
    mirror_lower(H)
    return H


def mean_drift(inputs: Sequence[Tensor], floats: Sequence[Tensor]) -> Tensor:
    """The mean of (y - x) x^T, with x the inputs and y those of the float model.

    Args:
        inputs: Tensors (tokens, K).
        floats: What the float model has in their place.

    Returns:
        Shape (K, K), float32.
    """
    tokens = sum(len(x) for x in inputs)
    width = inputs[0].shape[1]
    C = torch.zeros(width, width)
    for x, y in zip(inputs, floats, strict=True):
        C.addmm_((y - x).T, x, alpha=1 / tokens)
    return C


def matrices(layer: nn.Module, names: Sequence[str]) -> Iterator[nn.Linear]:
    """The linear modules of a layer.

    Args:
        layer: A decoder layer.
        names: Names from ``MATRICES``.

    Yields:
        The modules, in the order of the names.
    """
    for name in names:
        yield cast(nn.Linear, layer.get_submodule(name))
