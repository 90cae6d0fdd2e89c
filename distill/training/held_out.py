"""How close a student is to its teacher on held-out text, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.teacher.live_teacher import load_teacher
from distill.teacher.teacher import Teacher
from distill.training.evaluation import Evaluation, TokenScores, score_positions, summarize
from mistill.loss.batches import Batch, make_batch
from mistill.loss.targets import DenseTargets, TeacherTargets
from mistill.training.loop import equal_shares

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distill.settings import TrainSettings
    from mistill.folders.folder import FolderInfo
    from mistill.text.blocks import TokenBlocks


@dataclass(frozen=True)
class HeldOutPart:
    """Some held-out text, with the teacher's predictions.

    Attributes:
        batch: The text.
        targets: The teacher's predictions.
        counts: False where another process evaluates the same text, and this one repeats it so
            that all processes make the same number of calls.
    """

    batch: Batch
    targets: TeacherTargets
    counts: bool


def ask_about(
    teacher: Teacher, held_out: TokenBlocks, size: int, accelerator: Accelerator
) -> list[HeldOutPart]:
    """Ask the teacher once about this process's share of the held-out text.

    Args:
        teacher: The model to imitate.
        held_out: Blocks to judge the student on, for all processes.
        size: Blocks in a batch.
        accelerator: Knows the processes.

    Returns:
        Equally many parts in every process.
    """
    own_blocks = equal_shares(held_out, size, accelerator)
    for part, _ in own_blocks:
        teacher.expect(part)
    parts = []
    for part, counts in own_blocks:
        batch = make_batch(part, accelerator.device)
        with accelerator.autocast():
            answer = teacher.targets(part, batch)
        parts.append(HeldOutPart(batch, answer, counts=counts))
    return parts


def judge(
    module: nn.Module, held_out: Sequence[HeldOutPart], accelerator: Accelerator
) -> Evaluation:
    """Judge the student as it is now.

    Args:
        module: A ``DistillationStep``, prepared by the accelerator.
        held_out: From ``ask_about``.
        accelerator: The one that prepared the module.

    Returns:
        Means over the held-out text of all processes; the same in every process.
    """
    was_training = module.training
    module.eval()
    scores: list[TokenScores] = []
    for part in held_out:
        with torch.no_grad(), accelerator.autocast():
            part_scores = module("scores", part.batch, part.targets)
        if part.counts:
            scores.extend(part_scores)
    module.train(was_training)
    return summarize_all(scores, accelerator)


def summarize_all(scores: list[TokenScores], accelerator: Accelerator) -> Evaluation:
    """Means over what all processes have scored.

    Args:
        scores: Of this process.
        accelerator: Knows the processes.

    Returns:
        The same in every process.
    """
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        scores = gather_object([_on_cpu(score) for score in scores])
    return summarize(scores)


def _on_cpu(scores: Any) -> Any:
    """The same scores with every tensor on the CPU."""
    if scores is None or isinstance(scores, Tensor):
        return None if scores is None else scores.cpu()
    return replace(
        scores, **{field.name: _on_cpu(getattr(scores, field.name)) for field in fields(scores)}
    )


def lost_in_four_bits(
    info: FolderInfo,
    teacher: Teacher,
    held_out: TokenBlocks,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> float:
    """What a teacher loses by being held in four bits: KL(float teacher || NF4 teacher).

    Args:
        info: The float teacher's folder.
        teacher: The same teacher in NF4.
        held_out: Text to measure on, for all processes.
        settings: How to train.
        accelerator: Knows the device and the processes.

    Returns:
        Nats, mean per kept position.
    """
    size = settings.micro_batch_size
    floats = load_teacher(info, settings, accelerator, quantized=False)
    float_parts = ask_about(floats, held_out, size, accelerator)
    del floats
    nf4_parts = ask_about(teacher, held_out, size, accelerator)
    scores = []
    for before, after in zip(float_parts, nf4_parts, strict=True):
        if before.counts:
            scores.extend(_compare(before, after, settings.loss_memory_mib))
    return summarize_all(scores, accelerator).kl


def _compare(before: HeldOutPart, after: HeldOutPart, memory_mib: float) -> Any:
    targets = after.targets
    assert isinstance(targets, DenseTargets), "a running teacher knows its whole distribution"
    return score_positions(
        targets.hidden, targets.head, before.targets, before.batch.next_ids, memory_mib
    )
