"""One optimizer step: micro-batches of text in, a gradient and a few sums out.

All that touches the student's weights happens inside the ``forward`` of ``StepModule``. All
processes make the same number of calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from distill.teacher.teacher import Teacher
from distill.training.evaluation import TokenScores, score_positions
from distill.training.on_policy import Place, rewrite
from mistill.loss.batches import Batch, last_hidden_states, make_batch
from mistill.loss.divergences import Divergence
from mistill.loss.heads import read_head
from mistill.loss.losses import HeadLoss, head_loss
from mistill.loss.targets import TeacherTargets
from mistill.training.loop import StepSums, shares, undo_divisions
from mistill.training.step_module import StepModule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from distill.settings import TrainSettings
    from mistill.text.blocks import TokenBlocks


class DistillationStep(StepModule):
    """A student that answers with its loss, with its scores on a text, or with text of its own.

    Args:
        student: The model to train.
        settings: What the loss is made of, and how the student writes.
    """

    def __init__(self, student: PreTrainedModel, settings: TrainSettings) -> None:
        super().__init__(student)
        self.settings = settings

    def loss(
        self,
        batch: Batch,
        targets: TeacherTargets | None,
        positions_in_step: int,
        cross_entropy: float,
    ) -> HeadLoss:
        """The loss of one micro-batch.

        Args:
            batch: Some blocks.
            targets: What the teacher says at their kept positions; None where it is not asked.
            positions_in_step: Kept positions of the whole optimizer step.
            cross_entropy: Share of the loss that comes from the text itself.

        Returns:
            The micro-batch's share of the step's loss.
        """
        settings = self.settings
        hidden = last_hidden_states(self.model, batch.ids, batch.positions)
        return head_loss(
            hidden[batch.kept],
            read_head(self.model),
            targets,
            batch.next_ids,
            positions_in_step=positions_in_step,
            divergence=divergence_of(settings),
            temperature=settings.temperature,
            cross_entropy=cross_entropy,
            memory_mib=settings.loss_memory_mib,
        )

    def scores(self, batch: Batch, targets: TeacherTargets) -> list[TokenScores]:
        """How the student compares with its teacher at each kept position.

        Args:
            batch: Some blocks.
            targets: What the teacher says there.

        Returns:
            An entry per chunk of positions.
        """
        hidden = last_hidden_states(self.model, batch.ids, batch.positions)[batch.kept]
        head, memory = read_head(self.model), self.settings.loss_memory_mib
        return score_positions(hidden, head, targets, batch.next_ids, memory)

    def text(self, blocks: TokenBlocks, place: Place, together: bool) -> TokenBlocks:
        """The prompts of some blocks with what the student writes after them.

        Args:
            blocks: Where the prompts come from.
            place: Where the blocks stand in the run.
            together: Whether the weights are divided among processes.

        Returns:
            Blocks of the same shape.
        """
        return rewrite(
            self.model,
            blocks,
            place,
            temperature=self.settings.on_policy_temperature,
            prefix=self.settings.on_policy_prompt,
            together=together,
        )


def divergence_of(settings: TrainSettings) -> Divergence:
    """The divergence that settings ask for.

    Args:
        settings: How to train.

    Returns:
        The divergence.
    """
    return Divergence(settings.divergence, settings.mixture)


def accumulate_gradients(
    module: nn.Module,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: TrainSettings,
    accelerator: Accelerator,
    written_in: int | None = None,
) -> StepSums:
    """Add up the gradient of one optimizer step, micro-batch by micro-batch.

    The mean is over the kept positions of the whole step: the gradient does not depend on the
    size of micro-batches, on padding, or on the number of processes.

    Args:
        module: A ``DistillationStep``, prepared by the accelerator.
        teacher: The model to imitate.
        blocks: The blocks of this step, for all processes; at least one position is kept.
        settings: How to train.
        accelerator: The one that prepared the module.
        written_in: The number of the step, if the student writes its text.

    Returns:
        The sums of the step, over all processes.
    """
    own_parts = list(shares(blocks, settings.micro_batch_size, accelerator))
    cross_entropy = settings.cross_entropy
    counts = [blocks.tokens, int(blocks.kept.sum())]
    if written_in is not None:
        cross_entropy = 0.0
        own_parts = list(_written(module, own_parts, settings, accelerator, written_in))
        own_counts = [[part.tokens, int(part.kept.sum())] for _, part in own_parts]
        here = torch.tensor(own_counts, device=accelerator.device).sum(dim=0)
        counts = accelerator.reduce(here, reduction="sum").tolist()
    tokens, kept = counts
    share = undo_divisions(accelerator)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for _, part in own_parts:
        batch = make_batch(part, accelerator.device)
        targets = None
        if cross_entropy < 1:
            with accelerator.autocast():
                targets = teacher.targets(part, batch)
        with accelerator.accumulate(module):
            result: HeadLoss = module("loss", batch, targets, max(kept, 1), cross_entropy)
            accelerator.backward(result.loss * share)
        sums += torch.stack(
            (
                result.loss.detach().double() * max(kept, 1),
                result.divergence,
                result.cross_entropy,
            )
        )
    total = accelerator.reduce(sums, reduction="sum") / max(kept, 1)
    loss, divergence, nll = total.tolist()
    parts: dict[str, float] = {}
    if settings.cross_entropy < 1:
        name = "kl" if settings.divergence == "forward_kl" else settings.divergence
        parts[name] = divergence
    if settings.cross_entropy > 0 and written_in is None:
        parts["cross_entropy"] = nll
    if settings.on_policy > 0:
        parts["on_policy"] = float(written_in is not None)
    return StepSums(loss=loss, tokens=tokens, positions=kept, parts=parts)


def _written(
    module: nn.Module,
    own_parts: list[tuple[int, TokenBlocks]],
    settings: TrainSettings,
    accelerator: Accelerator,
    step: int,
) -> Iterator[tuple[int, TokenBlocks]]:
    divided = accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    module.eval()
    for start, part in own_parts:
        place = Place(settings.seed, step, start)
        with torch.no_grad(), accelerator.autocast():
            text = module("text", part, place, divided)
        yield start, text
    module.train()
