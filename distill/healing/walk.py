"""Heal a cut student in closed form, layer by layer, against its teacher's hidden states.

When layers, neurons, heads or channels are cut, what they added to the residual stream is missing
from there on. The matrices that write into the stream, ``o_proj`` and ``down_proj``, can add much
of it: they are linear, so that the best ones are a least-squares problem. Calibration text runs
through teacher and student together. At every layer of the student, in order,

- ``o_proj`` is refitted so that the stream behind attention is the teacher's behind the attention
  of the same layer;
- ``down_proj`` is refitted so that the stream behind the layer is the teacher's behind the last
  layer that it stands for: itself, or the last of the gap behind it.

The inputs are the student's own, with all earlier refits in them, so that later layers make up for
what earlier ones left (as GPTAQ does for rounding, Li et al., 2025, https://arxiv.org/abs/2504.02692).
One linear map for one gap, merged into the matrix before it, is ReplaceMe (Shopkhoev et al., 2025,
https://arxiv.org/abs/2505.02819); closed-form repair of cut widths is in SliceGPT (Ashkboos et al.,
2024) and FLAP (An et al., 2023, https://arxiv.org/abs/2312.11983). That every kept layer is
refitted, on the student's own stream, is where most of the gain comes from.

Whatever reads the stream reads it through RMSNorm, so an error counts as a share of the stream's
size: a token weighs one over the mean square of the teacher's stream there. Without it the few
tokens with massive activations (Sun et al., 2024, https://arxiv.org/abs/2402.17762) decide the fit.

Least work: the forward pass of both models, K^2 products a token and K^3 / 3 a solution, with K
the inputs of ``down_proj``. Least memory: three streams, one layer, and two matrices of K^2.

B is blocks of a batch, T positions, D width of the teacher, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.healing.least_squares import Equations, Fit
from mistill.errors import FolderError
from mistill.pytorch.layers import LayeredModel
from mistill.pytorch.stages import attended_inputs, gated_inputs
from mistill.text.blocks import TokenBlocks

# Of this many blocks one judges the ridge.
_LEFT_OUT = 8

# Inputs of down_proj that are held until it is refitted; what is beyond is computed twice.
_HELD_BYTES = 1 << 28

RIDGES = (0.03, 0.1, 0.3, 1.0)
ATTENTION = "self_attn.o_proj"
MLP = "mlp.down_proj"


@dataclass(frozen=True)
class Origin:
    """Which parts of the teacher a student consists of.

    Attributes:
        layers: The teacher's layers that it has, ascending.
        channels: The channels of the hidden state that it has, ascending, shape (D',); None for
            all.
    """

    layers: tuple[int, ...]
    channels: Tensor | None = None


@dataclass
class HealedLayer:
    """A layer of a student whose output matrices were refitted.

    Attributes:
        index: Its place in the student.
        weights: The new matrices by their names within the layer, in the type they are stored in.
        fits: What each fit found, by the same names: ``ridge``, and the mean squares that the
            stream missed before and after, as shares of the teacher's.
    """

    index: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    fits: dict[str, dict[str, float]] = field(default_factory=dict)


def heal_layers(
    teacher: LayeredModel,
    student: LayeredModel,
    origin: Origin,
    blocks: TokenBlocks,
    *,
    types: Mapping[str, torch.dtype],
    ridges: Sequence[float] = RIDGES,
    stored: Callable[[int], HealedLayer | None] = lambda _: None,
    at_once: int | None = None,
) -> Iterator[HealedLayer]:
    """Refit the output matrices of a student's layers, one layer after the other.

    Args:
        teacher: The model that the student was cut from.
        student: The student.
        origin: What it was cut from.
        blocks: Calibration text; positions of padding do not count.
        types: What the matrices are stored in, by their names within a layer.
        ridges: Ridges to choose from, ascending; a single one is used as it is.
        stored: Gives a layer that an earlier run healed, which is only passed; None for others.
        at_once: Blocks in a batch; as many as make about two thousand tokens if not given.

    Yields:
        Every layer of the student, in order, those that were stored among them.

    Raises:
        FolderError: If the teacher or the student computes values that are not finite.
    """
    walk = _Walk(teacher, student, origin, blocks, types, tuple(ridges), at_once)
    ends = [*(layer - 1 for layer in origin.layers[1:]), len(teacher) - 1]
    passed = 0
    for index, (layer, end) in enumerate(zip(origin.layers, ends, strict=True)):
        walk.pass_teacher(range(passed, layer))
        middle = walk.teacher_middle(layer)
        walk.pass_teacher(range(layer + 1, end + 1))
        passed = end + 1
        healed = stored(index)
        if healed is None:
            healed = walk.heal(index, middle)
        else:
            walk.pass_student(index, healed)
        yield healed


def judging_blocks(blocks: int) -> Tensor:
    """Which blocks are left out of the fits that choose a ridge, and judge them.

    They are whole blocks, since tokens of one document resemble one another, and drawn, since
    texts of several kinds take turns.

    Args:
        blocks: How many there are.

    Returns:
        Shape (blocks,), an eighth of them True, of two or more at least one.
    """
    count = max(blocks // _LEFT_OUT, int(blocks > 1))
    judges = torch.zeros(blocks, dtype=torch.bool)
    judges[torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[:count]] = True
    return judges


class _Walk:
    """Calibration text on its way through a teacher and its student."""

    def __init__(
        self,
        teacher: LayeredModel,
        student: LayeredModel,
        origin: Origin,
        blocks: TokenBlocks,
        types: Mapping[str, torch.dtype],
        ridges: tuple[float, ...],
        at_once: int | None,
    ) -> None:
        self._teacher, self._student, self._types, self._ridges = teacher, student, types, ridges
        self._channels = origin.channels
        self._theirs = teacher.batches(blocks, at_once=at_once)
        self._ours = student.batches(blocks, at_once=at_once)
        self._judges = judging_blocks(len(blocks))

    def pass_teacher(self, layers: range) -> None:
        """Move the text past some layers of the teacher."""
        for index in layers:
            with self._teacher.layer(index) as layer:
                for batch in self._theirs:
                    batch.hidden = batch.through(layer)

    def teacher_middle(self, index: int) -> list[Tensor]:
        """Move the text past a layer of the teacher; the stream behind its attention."""
        middle = []
        with self._teacher.layer(index) as layer:
            for batch in self._theirs:
                attended = attended_inputs(layer, batch, batch.hidden)
                middle.append(batch.hidden + layer.self_attn.o_proj(attended))
                batch.hidden = middle[-1] + layer.mlp(layer.post_attention_layernorm(middle[-1]))
        return middle

    def pass_student(self, index: int, healed: HealedLayer) -> None:
        """Move the text past a layer of the student that was healed before."""
        with self._student.layer(index) as layer:
            for name, weight in healed.weights.items():
                layer.get_submodule(name).weight.copy_(weight)
            for batch in self._ours:
                attended = attended_inputs(layer, batch, batch.hidden)
                middle = batch.hidden + layer.self_attn.o_proj(attended)
                batch.hidden = middle + layer.mlp(layer.post_attention_layernorm(middle))

    def heal(self, index: int, targets: Sequence[Tensor]) -> HealedLayer:
        """Refit a layer of the student, and move the text past it."""
        healed = HealedLayer(index)
        with self._student.layer(index) as layer:
            attention = layer.self_attn.o_proj
            attended = [attended_inputs(layer, batch, batch.hidden) for batch in self._ours]
            equations = self._equations(attention)
            for number, x in enumerate(attended):
                stream = self._ours[number].hidden + attention(x)
                self._add(equations, number, x, stream, targets[number])
            self._refit(healed, ATTENTION, attention, equations)
            for batch, x in zip(self._ours, attended, strict=True):
                batch.hidden = batch.hidden + attention(x)
            del attended, equations
            down = layer.mlp.down_proj
            equations = self._equations(down)
            inputs: dict[int, Tensor] = {}
            bytes_left = _HELD_BYTES
            for number, batch in enumerate(self._ours):
                x = gated_inputs(layer, batch.hidden)
                target = self._theirs[number].hidden
                self._add(equations, number, x, batch.hidden + down(x), target)
                bytes_left -= x.nbytes
                if bytes_left >= 0:
                    inputs[number] = x
            self._refit(healed, MLP, down, equations)
            for number, batch in enumerate(self._ours):
                x = inputs.pop(number) if number in inputs else gated_inputs(layer, batch.hidden)
                batch.hidden = batch.hidden + down(x)
        return healed

    def _equations(self, matrix: nn.Linear) -> Equations:
        return Equations(matrix.in_features, matrix.out_features, matrix.weight.device)

    def _add(
        self, equations: Equations, number: int, x: Tensor, stream: Tensor, target: Tensor
    ) -> None:
        """Add what a batch misses of its target."""
        batch = self._ours[number]
        if self._channels is not None:
            target = target[..., self._channels]
        weights = 1 / target.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        first = sum(len(earlier.hidden) for earlier in self._ours[:number])
        judges = self._judges[first : first + len(batch.hidden)]
        for left_out in (False, True):
            rows = batch.present & (judges == left_out)[:, None].to(batch.present.device)
            if rows.any():
                missed = target[rows] - stream[rows]
                equations.add(x[rows], missed, weights[rows], left_out=left_out)

    def _refit(
        self, healed: HealedLayer, name: str, matrix: nn.Linear, equations: Equations
    ) -> None:
        try:
            fit = equations.solve(self._ridges)
        except ValueError as error:
            raise FolderError(
                f"layer {healed.index} of {self._student.folder}, or its part of "
                f"{self._teacher.folder}, computes values that are not numbers; the weights are "
                "damaged"
            ) from error
        weight = (matrix.weight + fit.change).to(self._types[name])
        # What is stored is what the next layers see.
        matrix.weight.copy_(weight)
        healed.weights[name] = weight
        healed.fits[name] = _facts(fit)


def _facts(fit: Fit) -> dict[str, float]:
    return {
        "ridge": fit.ridge,
        "missed_before": round(fit.missed_before, 6),
        "missed_after": round(fit.missed_after, 6),
    }
