"""What every matrix of a model would cost in KL at other precisions, from one backward pass.

A change d of a model's weights changes its predictions p by KL(p || p') = 1/2 d^T F d to second
order, with F the Fisher information of its own predictions: the mean of G G^T, where G is the
gradient of log p(y) and the token y is drawn from p (drawn, not read from the text; Kunstner et
al., 2019, https://arxiv.org/abs/1905.12558). With tokens drawn at every position of a block of
text, one gradient of their sum serves the whole block: tokens drawn apart have nothing to do with
one another. What rounding does to one weight has nothing to do with what it does to another, so
the diagonal of F is enough,

    KL per token = 1/2 sum over n, k of dW[n, k]^2 F[n, k]     F = sum of G^2 over blocks / tokens

and one pass serves every candidate of every matrix.

The pass is made a layer at a time. Hidden states between all layers are kept, 4 bytes for each
token, layer and column of width; beside them one layer is in memory, with the inputs and gradients
of its matrices: about 2 GB for 2,048 tokens of Mistral 7B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mistill.measures.kl import Predictions, compare
from mistill.progress import Tracker, track
from mistill.pytorch.layers import Batch, LayeredModel, per_batch
from mistill.pytorch.stages import MATRICES, matrices
from mistill.text.blocks import TokenBlocks
from mistill.weights.gptq_layout import EMBEDDING, HEAD, ModuleFormat
from quantize.folders.float_model import FloatModel
from quantize.folders.plan import read_table, round_table
from quantize.gptq.rounding import round_weight
from quantize.settings import GptqSettings

# Logits that exist at once.
_LOGITS_AT_ONCE = 1 << 22

# What a matrix costs in KL per token, in nats, by its name and its format.
Costs = dict[str, dict[ModuleFormat, float]]


def estimate_costs(
    model: FloatModel,
    blocks: TokenBlocks,
    candidates: Mapping[str, Sequence[ModuleFormat]],
    settings: GptqSettings,
    generator: torch.Generator,
) -> Costs:
    """Estimate the KL that rounding each matrix to each of its candidates costs.

    Matrices are rounded to the nearest code, without GPTQ, which lowers all costs alike. Tables
    are rounded too: of the head the KL is measured, not estimated.

    Args:
        model: The float model.
        blocks: The text to look at; a few thousand tokens are enough.
        candidates: Formats of each matrix and table, by name; a table that embedding and head share
            goes by the embedding's.
        settings: How scales are stored.
        generator: Draws the next tokens.

    Returns:
        The mean KL per token, for every candidate.
    """
    layers = LayeredModel(model.folder)
    batches = layers.batches(blocks)
    masks = per_batch(torch.from_numpy(blocks.kept), batches)
    count = sum(int(mask.sum()) for mask in masks)
    costs: Costs = {name: {} for name in candidates}
    with track("Estimating", total=2 * len(layers), unit="layers") as progress:
        states = _forward(layers, batches, progress)
        head = EMBEDDING if model.config.tie_word_embeddings else HEAD
        table, norm = read_table(model, head), layers.final_norm()
        if head in candidates:
            rows = torch.cat([norm(x)[mask] for x, mask in zip(states[-1], masks, strict=True)])
            costs[head] = _head_costs(rows, table, candidates[head], settings, blocks)
        gradients = _through_head(states.pop(), norm, table, masks, generator)
        for index in reversed(range(len(layers))):
            with layers.layer(index) as layer:
                pairs, gradients = _backward(layer, states.pop(), batches, gradients)
                for name, module in zip(MATRICES, matrices(layer, MATRICES), strict=True):
                    own = pairs.pop(name)
                    matrix = f"model.layers.{index}.{name}"
                    if matrix in candidates:
                        fisher = _fisher(own)
                        for form in candidates[matrix]:
                            change = _rounding_error(module.weight, settings.with_format(form))
                            costs[matrix][form] = _cost(fisher, change, count)
            progress.advance(1)
    if EMBEDDING in candidates:
        ids = torch.from_numpy(blocks.ids)
        fisher = _embedding_fisher(ids, torch.cat(gradients), model.config.vocab_size)
        table = read_table(model, EMBEDDING)
        for form in candidates[EMBEDDING]:
            change = torch.from_numpy(round_table(table, settings, form).dequantize()).sub_(table)
            # What the same table costs as a head comes on top.
            cost = _cost(fisher, change, count)
            costs[EMBEDDING][form] = costs[EMBEDDING].get(form, 0.0) + cost
    return costs


def _forward(
    layers: LayeredModel, batches: Sequence[Batch], progress: Tracker
) -> list[list[Tensor]]:
    """The hidden states before each layer, and after the last."""
    states = [[batch.hidden for batch in batches]]
    for index in range(len(layers)):
        with layers.layer(index) as layer, torch.no_grad():
            for batch in batches:
                batch.hidden = batch.through(layer)
        states.append([batch.hidden for batch in batches])
        progress.advance(1)
    return states


def _head_costs(
    rows: Tensor,
    table: Tensor,
    forms: Sequence[ModuleFormat],
    settings: GptqSettings,
    blocks: TokenBlocks,
) -> dict[ModuleFormat, float]:
    """KL of a rounded head: nothing comes after it, so it is measured."""
    reference = {"float": Predictions(rows, table.float())}
    costs = {}
    for form in forms:
        rounded = torch.from_numpy(round_table(table, settings, form).dequantize())
        fidelity = compare(reference, {"rounded": Predictions(rows, rounded)}, blocks)
        costs[form] = fidelity["rounded"]["float"].kl
    return costs


def _through_head(
    last: Sequence[Tensor],
    norm: nn.Module,
    table: Tensor,
    masks: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    """Gradients of log p(y) at the hidden states after the last layer, y drawn from p."""
    step = max(1, _LOGITS_AT_ONCE // len(table))
    head = table.float()
    gradients = []
    for hidden, mask in zip(last, masks, strict=True):
        entering = hidden.detach().requires_grad_()
        normed = norm(entering)
        rows = normed.detach()[mask]
        upward = torch.empty_like(rows)
        for start in range(0, len(rows), step):
            p = (rows[start : start + step] @ head.T).softmax(dim=1)
            tokens = p.multinomial(1, generator=generator)
            upward[start : start + step] = head[tokens[:, 0]] - p @ head
        at_norm = torch.zeros_like(normed)
        at_norm[mask] = upward
        normed.backward(at_norm)
        gradients.append(cast(Tensor, entering.grad))
    return gradients


def _backward(
    layer: nn.Module,
    states: Sequence[Tensor],
    batches: Sequence[Batch],
    gradients: Sequence[Tensor],
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], list[Tensor]]:
    """Inputs of every matrix with the gradients at its outputs; and those at the layer's input."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in MATRICES}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: pairs[name].append((x, gradient)))

        return record

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in zip(MATRICES, matrices(layer, MATRICES), strict=True)
    ]
    before = []
    for hidden, batch, gradient in zip(states, batches, gradients, strict=True):
        entering = hidden.detach().requires_grad_()
        batch.through(layer, entering).backward(gradient)
        before.append(cast(Tensor, entering.grad))
    for hook in hooks:
        hook.remove()
    return pairs, before


def _fisher(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Squares of the gradient of a weight, summed over blocks; shape (N, K)."""
    first, gradient = pairs[0]
    fisher = torch.zeros(gradient.shape[-1], first.shape[-1])
    for x, gradient in pairs:
        for inputs, upward in zip(x, gradient, strict=True):
            G = upward.T @ inputs
            fisher.addcmul_(G, G)
    return fisher


def _embedding_fisher(ids: Tensor, gradients: Tensor, size: int) -> Tensor:
    """The same of the embedding, (V, D): a token that comes twice in a block has one row."""
    fisher = torch.zeros(size, gradients.shape[-1])
    for row, upward in zip(ids, gradients, strict=True):
        tokens, indices = row.unique(return_inverse=True)
        G = torch.zeros(len(tokens), upward.shape[-1]).index_add_(0, indices, upward)
        fisher[tokens] += G.square()
    return fisher


def _rounding_error(weight: Tensor, settings: GptqSettings) -> Tensor:
    return torch.from_numpy(round_weight(weight, settings).dequantize()).sub_(weight)


def _cost(fisher: Tensor, change: Tensor, count: int) -> float:
    """The KL per token that a change of a weight makes."""
    return float(change.square_().mul_(fisher).sum(dtype=torch.float64)) / (2 * count)
