"""Which parts of a teacher's layers matter, by the size of their activations, and cutting them out.

A part that stays quiet on text is missed least. The score of a feed-forward neuron is the size of
what it hands to the down projection; that of a key/value group the length of what its query heads
hand to the output projection; that of a channel of the hidden state the size of what all norms
make of it. Each is the mean over the positions of a block, and the root of the sum of squares
over blocks (Muralidharan et al., 2024, "Minitron", section 2.2 and the aggregation of its section
4, https://arxiv.org/abs/2407.14679). Neurons and groups are chosen in each layer by itself,
channels once, since all layers write into the same hidden state. What is kept stays as it was,
so that the result is a plain, smaller model of the same architecture.

The root mean square of a norm is taken over all channels. Where D' of D channels stay and the
others were silent, it grows by sqrt(D / D') although the hidden state is what it was. The norms'
weights make that up, so that silent channels are not missed, and quiet ones less (figures are in
docs/experiments.md). Minitron leaves it to training.

N is blocks, T positions, L layers, F neurons, G groups, D channels.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WidthScores:
    """How much each part of a teacher is used on some text.

    Attributes:
        neurons: Of feed-forward neurons, shape (L, F).
        groups: Of key/value groups, shape (L, G).
        channels: Of channels of the hidden state, shape (D,).
    """

    neurons: Tensor
    groups: Tensor
    channels: Tensor


class WidthGauge:
    """Collects activations while text runs through a teacher, layer by layer."""

    def __init__(self, groups: int) -> None:
        """Begin with nothing collected.

        Args:
            groups: Key/value groups of the teacher, G.
        """
        self._groups = groups
        self._kept = torch.empty(0)
        self._neuron_squares: list[Tensor] = []
        self._group_squares: list[Tensor] = []
        self._channel_squares: list[Tensor] = []

    @contextmanager
    def watching(self, layer: Any) -> Iterator[None]:
        """Collect what one layer does while the body runs.

        Args:
            layer: A decoder layer.

        Yields:
            Nothing.
        """
        with ExitStack() as hooks:
            neurons, groups = _Total(self._neuron_squares), _Total(self._group_squares)
            down, out = layer.mlp.down_proj, layer.self_attn.o_proj
            for module, total, parts in ((down, neurons, None), (out, groups, self._groups)):
                hooks.enter_context(self._watch_input(module, total, parts))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                hooks.enter_context(self.watching_norm(norm))
            yield

    @contextmanager
    def watching_norm(self, norm: nn.Module) -> Iterator[None]:
        """Collect what one norm does while the body runs.

        Args:
            norm: The norm, of a layer or the last one.

        Yields:
            Nothing.
        """
        squares = _Total(self._channel_squares)

        def collect(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            squares(_block_means(output.abs(), self._kept).square().sum(dim=0))

        handle = norm.register_forward_hook(collect)
        try:
            yield
        finally:
            handle.remove()

    def look_at(self, kept: Tensor) -> None:
        """Say which positions of the blocks that come next count.

        Args:
            kept: Shape (n, T); one at least in every block.
        """
        self._kept = kept

    def scores(self) -> WidthScores:
        """What was collected.

        Returns:
            Scores of the layers watched.
        """
        channels = torch.stack([squares.sqrt() for squares in self._channel_squares]).sum(dim=0)
        return WidthScores(
            neurons=torch.stack(self._neuron_squares).sqrt().float().cpu(),
            groups=torch.stack(self._group_squares).sqrt().float().cpu(),
            channels=channels.float().cpu(),
        )

    @contextmanager
    def _watch_input(self, module: nn.Module, total: _Total, parts: int | None) -> Iterator[None]:
        """Collect the sizes of a module's inputs, or the lengths of some equal parts of them."""

        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0]
            if parts is None:
                sizes = values.abs()
            else:
                sizes = values.reshape(*values.shape[:-1], parts, -1).norm(dim=-1)
            total(_block_means(sizes, self._kept).square().sum(dim=0))

        handle = module.register_forward_pre_hook(collect)
        try:
            yield
        finally:
            handle.remove()


class _Total:
    """A new total at the end of a list; called with what to add to it."""

    def __init__(self, totals: list[Tensor]) -> None:
        self._totals, self._place = totals, len(totals)
        totals.append(torch.zeros(()))

    def __call__(self, amount: Tensor) -> None:
        self._totals[self._place] = self._totals[self._place].to(amount.device) + amount


def _block_means(sizes: Tensor, kept: Tensor) -> Tensor:
    """Means over the kept positions of each block: (n, T, C) to float64 (n, C)."""
    weights = kept / kept.sum(dim=1, keepdim=True)
    return torch.einsum("ntc,nt->nc", sizes, weights.to(sizes.dtype)).double()


# --- choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptWidth:
    """What is kept of every layer; None where all is.

    Attributes:
        neurons: Feed-forward neurons of each teacher layer, ascending, shape (L, F').
        groups: Key/value groups of each teacher layer, ascending, shape (L, G').
        channels: Channels of the hidden state, ascending, shape (D',).
        head_dim: Width of a head.
        queries_per_group: Query heads that share a key/value head.
        hidden_size: Channels of the teacher, D.
    """

    neurons: Tensor | None
    groups: Tensor | None
    channels: Tensor | None
    head_dim: int
    queries_per_group: int
    hidden_size: int

    @property
    def digest(self) -> str:
        """A hash of what is kept, in hexadecimal."""
        digest = hashlib.sha256()
        for places in (self.neurons, self.groups, self.channels):
            digest.update(b"all;" if places is None else places.cpu().numpy().tobytes() + b";")
        return digest.hexdigest()


def strongest(scores: Tensor, count: int) -> Tensor:
    """The parts with the largest scores.

    Args:
        scores: Shape (..., C).
        count: How many to keep.

    Returns:
        Their places in ascending order, shape (..., count); of parts that tie, the first ones.
    """
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    return ranked[..., :count].sort(dim=-1).values


def keep_strongest(
    scores: WidthScores,
    config: Mapping[str, Any],
    *,
    intermediate_size: int | None,
    key_value_heads: int | None,
    hidden_size: int | None,
) -> KeptWidth:
    """Choose what is kept of a teacher.

    Args:
        scores: Measured on text.
        config: The teacher's config.json.
        intermediate_size: Neurons to keep in each layer, F'; None keeps all.
        key_value_heads: Groups to keep in each layer, G'; None keeps all.
        hidden_size: Channels to keep, D'; None keeps all.

    Returns:
        The parts with the largest scores.
    """
    groups = scores.groups.shape[1]
    heads = int(config["num_attention_heads"])
    width = int(config["hidden_size"])
    neurons = kept_groups = channels = None
    if hidden_size is not None and hidden_size < width:
        channels = strongest(scores.channels, hidden_size)
    if intermediate_size is not None and intermediate_size < scores.neurons.shape[1]:
        neurons = strongest(scores.neurons, intermediate_size)
    if key_value_heads is not None and key_value_heads < groups:
        kept_groups = strongest(scores.groups, key_value_heads)
    return KeptWidth(
        neurons=neurons,
        groups=kept_groups,
        channels=channels,
        head_dim=int(config.get("head_dim") or width // heads),
        queries_per_group=heads // groups,
        hidden_size=width,
    )


# --- cutting ------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """What is kept of one tensor.

    Attributes:
        rows: Places along the first axis; None for all.
        columns: Places along the second axis; None for all.
        factor: What the values are multiplied by.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    factor: float = 1.0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing changes."""
        return self.rows is None and self.columns is None and self.factor == 1.0


_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")
_NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
_ROWS = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "keys",
    "self_attn.o_proj": "channels",
    "mlp.gate_proj": "neurons",
    "mlp.up_proj": "neurons",
    "mlp.down_proj": "channels",
    "input_layernorm": "channels",
    "post_attention_layernorm": "channels",
    "model.norm": "channels",
}
_COLUMNS = {
    "self_attn.q_proj": "channels",
    "self_attn.k_proj": "channels",
    "self_attn.v_proj": "channels",
    "self_attn.o_proj": "queries",
    "mlp.gate_proj": "channels",
    "mlp.up_proj": "channels",
    "mlp.down_proj": "neurons",
    "model.embed_tokens": "channels",
    "lm_head": "channels",
}


def cut_of(name: str, width: KeptWidth) -> Cut:
    """What is kept of one of the teacher's tensors.

    Args:
        name: Its name in the teacher.
        width: What is kept of every layer.

    Returns:
        The cut; one that changes nothing for a tensor that is kept whole.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return Cut()
    layer = None if match[1] is None else int(match[1])
    module, kind = match[2], match[3]

    def places(axis: str | None) -> Tensor | None:
        if axis == "channels":
            return width.channels
        if axis == "neurons":
            return None if width.neurons is None else width.neurons[layer]
        if axis is None or width.groups is None:
            return None
        size = width.head_dim * (width.queries_per_group if axis == "queries" else 1)
        return (width.groups[layer][:, None] * size + torch.arange(size)).flatten()

    factor = 1.0
    if width.channels is not None and module in _NORMS:
        factor = math.sqrt(width.hidden_size / len(width.channels))
    columns = _COLUMNS.get(module) if kind == "weight" else None
    return Cut(places(_ROWS.get(module)), places(columns), factor)


def narrowed_config(config: Mapping[str, Any], width: KeptWidth) -> dict[str, Any]:
    """The config of a model of which some width is kept.

    The width of a head is written out, since it is no longer hidden_size / heads. The epsilon
    that keeps a norm's root mean square away from 0 grows as the mean of squares does.

    Args:
        config: config.json of the whole model.
        width: What is kept.

    Returns:
        config.json of the narrower model.
    """
    changed = dict(config)
    if width.neurons is not None:
        changed["intermediate_size"] = width.neurons.shape[1]
    if width.groups is not None:
        kept = width.groups.shape[1]
        changed["num_key_value_heads"] = kept
        changed["num_attention_heads"] = kept * width.queries_per_group
    if width.channels is not None:
        kept = len(width.channels)
        changed["hidden_size"] = kept
        epsilon = float(config.get("rms_norm_eps", 1e-6))
        changed["rms_norm_eps"] = epsilon * width.hidden_size / kept
    changed["head_dim"] = width.head_dim
    return changed


def apply_cut(tensor: Tensor, cut: Cut) -> Tensor:
    """Keep some of a tensor.

    Args:
        tensor: Of any float type, with one axis or two.
        cut: What to keep.

    Returns:
        A new tensor of the same type; products are computed in float32.
    """
    if cut.rows is not None:
        tensor = tensor.index_select(0, cut.rows)
    if cut.columns is not None:
        tensor = tensor.index_select(1, cut.columns)
    if cut.factor != 1.0:
        tensor = (tensor.float() * cut.factor).to(tensor.dtype)
    return tensor
