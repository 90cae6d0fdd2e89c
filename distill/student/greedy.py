"""Which layers can go, by what their absence costs: greedy KL.

Layers are dropped one at a time. Each time every remaining layer is left out in turn, and the one
whose absence leaves the least KL(teacher || student) on text is dropped for good. It is the
measure that distillation then lowers, so what it costs is known beforehand; it sees that of two
layers with one job either can go and not both. The same idea with perplexity is in Song et al.,
2024 ("SLEB", section 3, https://arxiv.org/abs/2402.09025).

The cost of dropping k of L layers is about k L / 2 readings of the text by the whole model, where
block influence costs one. What is saved of it, without ever changing the outcome:

- Below the layer that is left out nothing changes, so all trials share the states there.
- KL is a sum of terms that are never below zero. The text is read part by part, and a trial
  whose sum exceeds that of a trial that is finished cannot win and is stopped.

Layers are read when they are needed, and stay only if all of them fit into 1 GiB; all trials go
through a layer while it is there. Beside it, the hidden states of one part of the text are in
memory for each trial, and the teacher's output head.

n is positions of a chunk, N kept positions, V vocabulary, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.loss.divergences import Divergence
from mistill.loss.heads import as_head, soften
from mistill.loss.losses import chunks
from mistill.loss.targets import DenseTargets
from mistill.progress import Tracker, track
from mistill.pytorch.layers import Batch, LayeredModel, accelerator_or_cpu
from mistill.weights.gptq_layout import HEAD

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks

logger = logging.getLogger(__name__)

_HOLD_BYTES = 1 << 30
_MOST_PARTS = 16
_MEMORY_MIB = 64.0


class Drop(NamedTuple):
    """A layer that was dropped.

    Attributes:
        layer: Its place in the teacher.
        kl: KL(teacher || student) per kept position, in nats, once it is gone too.
    """

    layer: int
    kl: float


@dataclass(frozen=True)
class _Part:
    """Some of the text, and what the whole teacher makes of it.

    Attributes:
        blocks: A few blocks.
        kept: Positions that count, shape (B, T).
        teacher: The teacher's last hidden states there, shape (N, D).
    """

    blocks: TokenBlocks
    kept: Tensor
    teacher: DenseTargets


def greedy_drops(
    teacher: Path,
    blocks: TokenBlocks,
    count: int,
    known: Sequence[Drop] = (),
) -> list[Drop]:
    """Drop layers one at a time, each time the one whose absence costs least.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text; one position at least is kept.
        count: How many layers to drop, fewer than there are.
        known: The first drops, where an earlier search on the same text found them.

    Returns:
        What was dropped, in order, ``known`` first.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    drops = list(known[:count])
    if len(drops) == count:
        return drops
    search = _Search(LayeredModel(teacher, accelerator_or_cpu(), _HOLD_BYTES), blocks)
    remaining = [
        layer for layer in range(len(search.model)) if layer not in {d.layer for d in drops}
    ]
    trials = sum(len(remaining) - number for number in range(count - len(drops)))
    with torch.inference_mode(), track("greedy KL", trials, "layers") as bar:
        search.ask_teacher()
        while len(drops) < count:
            drops.append(search.cheapest(remaining, bar))
            remaining.remove(drops[-1].layer)
            logger.info("without layer %d the KL is %.4f nats", *drops[-1])
    logger.info(
        "greedy KL tried %d layers in the time of %.1f readings of the text by the whole model",
        trials,
        search.passes / (len(search.model) * search.parts),
    )
    return drops


class _Search:
    """The teacher, the text, and what it cost so far."""

    def __init__(self, model: LayeredModel, blocks: TokenBlocks) -> None:
        self.model = model
        self.passes = 0
        blocks = blocks[np.flatnonzero(blocks.kept.any(axis=1))]
        self.positions = int(blocks.kept.sum())
        self.parts = min(_MOST_PARTS, len(blocks))
        self._blocks = [blocks[rows] for rows in np.array_split(range(len(blocks)), self.parts)]
        self._parts: list[_Part] = []

    def ask_teacher(self) -> None:
        """Run the whole teacher over the text, once."""
        self._norm = self.model.final_norm()
        self._head = as_head(self.model.table(HEAD))
        for blocks in self._blocks:
            batch = self._embedded(blocks)
            kept = torch.from_numpy(blocks.kept).to(self.model.device)
            hidden = batch.hidden
            for layer in range(len(self.model)):
                hidden = self._through(layer, [hidden], batch)[0]
            last = self._norm(hidden[kept])
            if not last.isfinite().all():
                raise FolderError(
                    f"{self.model.folder} computes values that are not numbers; its weights are "
                    "damaged"
                )
            self._parts.append(_Part(blocks, kept, DenseTargets(last, self._head)))

    def cheapest(self, remaining: Sequence[int], bar: Tracker) -> Drop:
        """Try every remaining layer and find the one whose absence leaves the least KL.

        Args:
            remaining: Layers that were not dropped, ascending.
            bar: Advanced by one for each layer that is decided on.

        Returns:
            The layer, the first of those that tie.
        """
        sums = dict.fromkeys(remaining, 0.0)
        first, *others = self._parts
        self._add(first, remaining, remaining, sums, math.inf)
        favourite = min(remaining, key=sums.__getitem__)
        for part in others:
            self._add(part, remaining, [favourite], sums, math.inf)
        bound = sums[favourite]
        alive = [layer for layer in remaining if layer != favourite]
        for part in others:
            alive = self._within(alive, sums, bound, bar)
            self._add(part, remaining, alive, sums, bound)
        alive = self._within(alive, sums, bound, bar)
        bar.advance(len(alive) + 1)
        best = min([favourite, *alive], key=lambda layer: (sums[layer], layer))
        return Drop(best, sums[best] / self.positions)

    def _within(
        self, alive: Sequence[int], sums: dict[int, float], bound: float, bar: Tracker
    ) -> list[int]:
        """The trials that can still win."""
        within = [layer for layer in alive if sums[layer] <= bound]
        bar.advance(len(alive) - len(within))
        return within

    def _add(
        self,
        part: _Part,
        remaining: Sequence[int],
        trials: Sequence[int],
        sums: dict[int, float],
        bound: float,
    ) -> None:
        """Add the KL on some text without each of some layers; stop a trial beyond the bound."""
        if not trials:
            return
        last = self._without_each(part, remaining, trials)
        V = self._head.vocabulary_size
        device = self.model.device
        forward = Divergence()
        walk = chunks(len(part.teacher), V, torch.float32, device, _MEMORY_MIB, 4)
        for rows, (log_p, target, log_q, scratch) in walk:
            part.teacher.log_probabilities(rows, 1.0, out=log_p, scratch=scratch)
            for layer in trials:
                if sums[layer] > bound:
                    continue
                soften(self._head.logits(last[layer][rows], out=scratch), 1.0, out=log_q)
                target.copy_(log_p)
                kl = forward.rows(target, log_q, (scratch,), gradient=False)
                sums[layer] += kl.sum(dtype=torch.float64).item()

    def _without_each(
        self, part: _Part, remaining: Sequence[int], trials: Sequence[int]
    ) -> dict[int, Tensor]:
        """Last hidden states at kept positions without each of some layers, shape (N, D) each."""
        batch = self._embedded(part.blocks)
        hidden = batch.hidden
        states: dict[int, Tensor] = {}
        for index in remaining:
            shared = index < max(trials)
            after = self._through(index, [*states.values(), *[hidden] * shared], batch)
            states = dict(zip(states, after, strict=False))
            if index in trials:
                states[index] = hidden
            if shared:
                hidden = after[-1]
        return {layer: self._norm(state[part.kept]) for layer, state in states.items()}

    def _embedded(self, blocks: TokenBlocks) -> Batch:
        return self.model.batches(blocks, at_once=len(blocks))[0]

    def _through(self, index: int, states: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """Send the states of several trials through a layer."""
        if not states:
            return []
        self.passes += len(states)
        with self.model.layer(index) as layer:
            return [batch.through(layer, state) for state in states]
