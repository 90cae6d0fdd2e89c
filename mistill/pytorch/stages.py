"""The inputs of every matrix of a layer on calibration text, and their means.

GPTQ, and healing in closed form, need for a matrix the mean of x x^T over its inputs x. A layer of
Llama or Mistral has four different inputs: of q, k and v; of o; of gate and up; of down.
``layer_stages`` computes a layer in these four stages and stops before each. Changing the matrices
of a stage in place before going on is GPTQ's "true sequential" order, and costs no second forward
pass: every stage computes with the changed matrices of the stages before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mistill.pytorch.factor import mirror_lower
from mistill.pytorch.layers import Batch

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


@torch.no_grad()
def attended_inputs(layer: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
    """What attention hands to its output matrix.

    Args:
        layer: A decoder layer in float32.
        batch: Masks and positions of the text.
        hidden: The hidden states before the layer, shape (B, T, D).

    Returns:
        The input of ``o_proj``, shape (B, T, heads x head width).
    """
    stages = layer_stages(layer, [replace(batch, hidden=hidden)])
    next(stages)
    return next(stages)[0]


@torch.no_grad()
def gated_inputs(layer: nn.Module, middle: Tensor) -> Tensor:
    """What the feed-forward part hands to its output matrix.

    Args:
        layer: A decoder layer in float32.
        middle: The hidden states between attention and the feed-forward part, shape (..., D).

    Returns:
        The input of ``down_proj``, shape (..., I).
    """
    parts = cast(Any, layer)
    x = parts.post_attention_layernorm(middle)
    gated: Tensor = parts.mlp.act_fn(parts.mlp.gate_proj(x)).mul_(parts.mlp.up_proj(x))
    return gated


def kept_rows(inputs: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """The inputs at positions that hold text.

    Args:
        inputs: Tensors (B, T, K), one per batch.
        batches: Where there is text.

    Returns:
        Tensors (tokens, K); views of the inputs where there is no padding.
    """
    return [
        x.reshape(-1, x.shape[-1]) if batch.present.all() else x[batch.present]
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
