"""Which layers can go, by what is left of their absence once the student is healed.

Healing (``distill/healing/walk.py``) refits the output matrices of every layer that is kept, so the
layers that can best go are not those that change the text least, but those whose work the others
can take over. How well they can falls out of the fit: with the factor of one matrix of inputs, the
change of ``down_proj`` that jumps over no, one, two ... layers behind it is one solution each, and
what it misses of the teacher's hidden states is known before anything is cut.

The choice is a shortest path. A state (d, k) is the student's hidden states in front of the
teacher's layer d, with k of the layers before it gone and all that are kept healed one after
another. From there layer d is kept and healed, and g layers behind it go:

    (d, k) -> (d + 1 + g, k + g)

Of all ways into a state the one stays whose hidden states miss least of the teacher's at that
depth, on text that was left out of the fits; all of them are at the same depth and have dropped as
many, so that nothing else need be weighed. What is missed counts as the next layer sees it, through
the gains of its norm: without them a few channels with massive activations decide. At the end,
where the head reads, it is KL(teacher || student) that counts. The way that is left there has
dropped as many as asked for, and those that have dropped fewer are found beside it. What is kept of
a state depends on the way that led there, so this is dynamic programming on an approximation: a way
that is worse at one depth and would have been better in the end is lost. The first layer stays.

Least work: for dropping n of L layers about L (n + 1) layers healed, where one student has L - n.
Least memory: n + 2 hidden states of the teacher on all the text, and one for each state that can
still be reached, (n + 1)(n + 2) / 2 at most; one layer of the teacher, and its head.

D is width, K inputs of a matrix, t tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distill.healing.least_squares import Equations
from distill.healing.walk import ATTENTION, MLP
from mistill.errors import FolderError
from mistill.progress import track
from mistill.pytorch.layers import Batch, LayeredModel, accelerator_or_cpu, per_batch
from mistill.pytorch.stages import attended_inputs, gated_inputs
from mistill.weights.gptq_layout import HEAD

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks

# One ridge for all fits of the search: of those that healing chooses from, as good as the chosen
# ones together.
RIDGE = 0.3

# Positions whose logits are held at once.
_ROWS = 256

# Of this many blocks one judges, and is not fitted.
_JUDGES = 4


class HealedChoice(NamedTuple):
    """The layers that stay where as many go as asked for.

    Attributes:
        keep: Their places in the teacher, ascending.
        kl: KL(teacher || student) per position in nats, on text left out of the fits; positions
            that the loss keeps, where the text has any.
    """

    keep: tuple[int, ...]
    kl: float


@dataclass(frozen=True)
class _State:
    """The best way so far to a depth.

    Attributes:
        keep: The layers that were kept.
        missed: What its hidden states miss, as the next layer or the head sees it.
        hidden: The hidden states of every batch, shape (B, T, D).
    """

    keep: tuple[int, ...]
    missed: float
    hidden: list[Tensor]


def healed_choices(teacher: Path, blocks: TokenBlocks, count: int) -> list[HealedChoice]:
    """Choose the layers to keep for every number that goes, up to one.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: Calibration text of two blocks or more; positions of padding do not count.
        count: The most layers to drop, fewer than there are.

    Returns:
        The choice without 0, 1, ... ``count`` layers.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    search = _Search(LayeredModel(teacher, accelerator_or_cpu()), blocks, count)
    with torch.inference_mode(), track("healed choice", len(search), "layers") as bar:
        search.read_gains()
        for depth in range(len(search)):
            search.pass_layer(depth)
            bar.advance()
    return search.choices()


class _Search:
    """All ways through the teacher, depth by depth."""

    def __init__(self, model: LayeredModel, blocks: TokenBlocks, count: int) -> None:
        self._model, self._count = model, count
        self._batches = model.batches(blocks)
        start = [batch.hidden for batch in self._batches]
        # The teacher's hidden states in front of layers d, d + 1, ... as far as they were computed.
        self._theirs: deque[list[Tensor]] = deque([start])
        self._computed = 0
        self._states: dict[tuple[int, int], _State] = {(0, 0): _State((), 0.0, start)}
        number = torch.arange(len(blocks))
        judging = number % _JUDGES == _JUDGES - 1 if len(blocks) >= _JUDGES else number == 0
        parts = per_batch(judging, self._batches)
        divided = list(zip(self._batches, parts, strict=True))
        self._fitted = [_rows(batch, ~part) for batch, part in divided]
        self._judged = [_rows(batch, part) for batch, part in divided]
        kept = per_batch(torch.from_numpy(blocks.kept), self._batches)
        counted = [rows & one.to(rows.device) for rows, one in zip(self._judged, kept, strict=True)]
        self._counted = counted if any(rows.any() for rows in counted) else self._judged
        self._gains: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._model)

    def choices(self) -> list[HealedChoice]:
        """The ways that have reached the end."""
        ends = [self._states[len(self), dropped] for dropped in range(self._count + 1)]
        return [HealedChoice(state.keep, state.missed) for state in ends]

    def read_gains(self) -> None:
        """Read how strongly the first norm of every layer lets each channel through."""
        for depth in range(len(self)):
            with self._model.layer(depth) as layer:
                self._gains.append(layer.input_layernorm.weight.detach().clone())
        self._norm = self._model.final_norm()
        self._head = self._model.table(HEAD)

    def pass_layer(self, depth: int) -> None:
        """Heal a layer in every state in front of it, and jump from there."""
        self._look_ahead(depth)
        with self._model.layer(depth) as layer:
            middle = [
                hidden + layer.self_attn.o_proj(attended_inputs(layer, batch, hidden))
                for batch, hidden in zip(self._batches, self._theirs[0], strict=True)
            ]
            weights = {
                name: layer.get_submodule(name).weight.detach().clone() for name in (ATTENTION, MLP)
            }
            for dropped in range(self._count + 1):
                state = self._states.pop((depth, dropped), None)
                if state is not None:
                    for name, weight in weights.items():
                        layer.get_submodule(name).weight.copy_(weight)
                    self._heal_and_drop(depth, dropped, state, layer, middle)
        self._theirs.popleft()

    def _look_ahead(self, depth: int) -> None:
        """Run the teacher as far as a jump from this depth can go."""
        while self._computed < min(depth + 1 + self._count, len(self)):
            with self._model.layer(self._computed) as layer:
                pairs = zip(self._batches, self._theirs[-1], strict=True)
                self._theirs.append([batch.through(layer, hidden) for batch, hidden in pairs])
            if not all(hidden.isfinite().all() for hidden in self._theirs[-1]):
                raise FolderError(
                    f"layer {self._computed} of {self._model.folder} computes values that are not "
                    "numbers; its weights are damaged"
                )
            self._computed += 1

    def _heal_and_drop(
        self, depth: int, dropped: int, state: _State, layer: Any, middle: Sequence[Tensor]
    ) -> None:
        """Keep and heal a layer, and drop none, one, two ... of those behind it."""
        o_proj, down = layer.self_attn.o_proj, layer.mlp.down_proj
        pairs = zip(self._batches, state.hidden, strict=True)
        attended = [attended_inputs(layer, batch, hidden) for batch, hidden in pairs]
        stream = [h + o_proj(x) for h, x in zip(state.hidden, attended, strict=True)]
        (change,) = self._changes(attended, stream, [middle])
        stream = [h + x @ change.T for h, x in zip(stream, attended, strict=True)]
        del attended
        gated = [gated_inputs(layer, hidden) for hidden in stream]
        stream = [hidden + down(x) for hidden, x in zip(stream, gated, strict=True)]
        most = min(self._count - dropped, len(self) - depth - 1)
        targets = [self._theirs[1 + gap] for gap in range(most + 1)]
        keep = (*state.keep, depth)
        for gap, change in enumerate(self._changes(gated, stream, targets)):
            place = depth + 1 + gap, dropped + gap
            judge = self._missed if place[0] < len(self) else self._kl
            missed = judge(gated, stream, targets[gap], change, place[0])
            best = self._states.get(place)
            if best is None or missed < best.missed:
                hidden = [h + x @ change.T for h, x in zip(stream, gated, strict=True)]
                self._states[place] = _State(keep, missed, hidden)

    def _changes(
        self, x: Sequence[Tensor], stream: Sequence[Tensor], targets: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """The changes of a matrix that take a stream nearest to each of several targets."""
        width = stream[0].shape[-1]
        equations = Equations(x[0].shape[-1], width * len(targets), x[0].device)
        for number, rows in enumerate(self._fitted):
            if rows.any():
                missed = [target[number][rows] - stream[number][rows] for target in targets]
                weights = _weights(targets[0][number][rows])
                equations.add(x[number][rows], torch.cat(missed, dim=-1), weights)
        try:
            change = equations.change(RIDGE)
        except ValueError as error:
            raise FolderError(
                f"{self._model.folder} computes values that are not numbers; its weights are "
                "damaged"
            ) from error
        return list(change.split(width))

    def _missed(
        self,
        x: Sequence[Tensor],
        stream: Sequence[Tensor],
        targets: Sequence[Tensor],
        change: Tensor,
        depth: int,
    ) -> float:
        """What a changed matrix misses of a target on the text that judges, as a layer sees it."""
        squares, numbers = 0.0, 0
        for number, rows in enumerate(self._judged):
            target = targets[number][rows]
            missed = target - stream[number][rows] - x[number][rows] @ change.T
            target, missed = target * self._gains[depth], missed * self._gains[depth]
            shares = missed.square().mean(dim=-1) * _weights(target)
            squares += shares.sum(dtype=torch.float64).item()
            numbers += len(target)
        return squares / max(numbers, 1)

    def _kl(
        self,
        x: Sequence[Tensor],
        stream: Sequence[Tensor],
        targets: Sequence[Tensor],
        change: Tensor,
        _: int,
    ) -> float:
        """KL(teacher || student) with a changed last matrix, on the text that judges."""
        nats, numbers = 0.0, 0
        for number, rows in enumerate(self._counted):
            theirs = self._norm(targets[number][rows]).split(_ROWS)
            ours = self._norm(stream[number][rows] + x[number][rows] @ change.T).split(_ROWS)
            for teacher, student in zip(theirs, ours, strict=True):
                log_p, log_q = (
                    (states @ self._head.T).log_softmax(dim=-1) for states in (teacher, student)
                )
                rows_kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
                nats += rows_kl.sum(dtype=torch.float64).item()
            numbers += int(rows.sum())
        return nats / max(numbers, 1)


def _rows(batch: Batch, blocks: Tensor) -> Tensor:
    """The positions of some blocks of a batch that hold text, shape (B, T)."""
    return batch.present & blocks[:, None].to(batch.present.device)


def _weights(target: Tensor) -> Tensor:
    """The weight of each token: one over the mean square of the teacher's hidden states."""
    return 1 / target.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
