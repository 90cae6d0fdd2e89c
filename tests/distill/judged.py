"""A student judged on held-out text by what the training loop judges it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from distill.settings import TrainSettings
from distill.teacher.teacher import Teacher
from distill.training.evaluation import Evaluation
from distill.training.held_out import HeldOutPart, judge
from distill.training.step import DistillationStep
from mistill.loss.batches import Batch
from mistill.text.blocks import TokenBlocks
from mistill.training.processes import accelerating


def judged(
    student: PreTrainedModel,
    teacher: Teacher,
    parts: Sequence[tuple[TokenBlocks, Batch]],
    memory_mib: float = 128.0,
) -> Evaluation:
    """Means over all kept positions of some text, in one process on the CPU."""
    settings = TrainSettings(loss_memory_mib=memory_mib)
    held_out = [HeldOutPart(batch, teacher.targets(blocks, batch), True) for blocks, batch in parts]
    with accelerating(settings, logs=Path()) as accelerator:
        return judge(DistillationStep(student, settings), held_out, accelerator)
