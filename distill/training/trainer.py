"""Distillation as a task of the training loop: a student learns what its teacher predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from distill.training.evaluation import Evaluation
from distill.training.held_out import HeldOutPart, ask_about, judge
from distill.training.on_policy import is_on_policy
from distill.training.step import DistillationStep, accumulate_gradients
from mistill.errors import TrainingError
from mistill.loss.batches import make_batch
from mistill.training.adapters import add_adapters
from mistill.training.checkpoints import leave_out_frozen, own_randomness
from mistill.training.loop import LoopOptions, StepSums, TrainingLoop, shares
from mistill.training.progress import TrainingProgress
from mistill.training.schedule import step_count
from mistill.training.step_module import model_weights, prepare_step, save_plain

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel

    from distill.settings import TrainSettings
    from distill.teacher.teacher import Teacher
    from mistill.text.blocks import TokenBlocks


def train_student(
    student: PreTrainedModel,
    teacher: Teacher,
    training: TokenBlocks,
    held_out: TokenBlocks,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    work: Path,
) -> TrainingProgress[Evaluation]:
    """Train a student and leave the best one found in a folder.

    Args:
        student: The model to train, in float32; changed in place, and not left at its best.
        teacher: The model to imitate; a live one on the accelerator's device.
        training: Blocks to learn from, each with at least one kept position.
        held_out: Blocks to judge the student on.
        settings: How to train.
        accelerator: Device, precision, processes and accumulation steps, from
            ``accelerating``.
        work: A folder that holds the state of this run; empty, or as an interruption left it. All
            processes see it.

    Returns:
        The end of the run; ``best_model(work, step)`` is the folder of the best student, unless
        ``best_step`` is 0: then none was better than the one that came.

    Raises:
        TrainingError: If the loss is not a number.
    """
    with own_randomness(settings.seed):
        parts = ask_about(teacher, held_out, settings.micro_batch_size, accelerator)
        if settings.lora_rank:
            add_adapters(student, settings.lora_rank)
            leave_out_frozen(accelerator)
        module, optimizer = prepare_step(
            DistillationStep(student, settings),
            accelerator,
            optimizer=settings.optimizer,
            learning_rate=settings.peak_learning_rate,
            weight_decay=settings.weight_decay,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        loop = TrainingLoop(
            Distillation(module, student, teacher, parts, settings, accelerator),
            module,
            optimizer,
            training,
            LoopOptions(
                steps=step_count(training, settings.tokens, settings.batch_size),
                batch_size=settings.batch_size,
                seed=settings.seed,
                learning_rate=settings.peak_learning_rate,
                warmup=settings.warmup,
                max_gradient_norm=settings.max_gradient_norm,
                evaluate_every=settings.evaluate_every,
                checkpoint_every=settings.checkpoint_every,
            ),
            accelerator=accelerator,
            work=work,
            settings=settings,
        )
        return loop.to_the_end()


class Distillation:
    """What a student learns from its teacher in a step, and how the two are compared."""

    measure = "held-out KL"
    evaluation_class = Evaluation

    def __init__(
        self,
        module: nn.Module,
        student: PreTrainedModel,
        teacher: Teacher,
        held_out: list[HeldOutPart],
        settings: TrainSettings,
        accelerator: Accelerator,
    ) -> None:
        """Gather what a step needs.

        Args:
            module: A ``DistillationStep``, prepared by the accelerator.
            student: The model in it.
            teacher: The model to imitate.
            held_out: Text to judge on, with what the teacher says about it.
            settings: How to train.
            accelerator: The one that prepared the module.
        """
        self.module, self.student, self.teacher = module, student, teacher
        self.held_out, self.settings, self.accelerator = held_out, settings, accelerator
        text_alone = settings.cross_entropy == 1
        self.doing = "learning from text alone" if text_alone else "distilling"

    def announce(self, step: int, blocks: TokenBlocks) -> None:
        """Tell the teacher what it will be asked about; see ``Task.announce``."""
        if self.settings.cross_entropy < 1 and not self.writes_in(step):
            for _, part in shares(blocks, self.settings.micro_batch_size, self.accelerator):
                self.teacher.expect(part)

    def writes_in(self, step: int) -> bool:
        """Whether the student writes the text of a step."""
        return is_on_policy(step, self.settings.on_policy)

    def gradients(self, step: int, blocks: TokenBlocks) -> StepSums:
        """The gradient of a step; see ``Task.gradients``."""
        written_in = step if self.writes_in(step) else None
        return accumulate_gradients(
            self.module, self.teacher, blocks, self.settings, self.accelerator, written_in
        )

    def explain(self, step: int, steps: int, blocks: TokenBlocks) -> None:
        """Say so where it is the teacher whose predictions are not finite."""
        if self.settings.cross_entropy == 1 or self.writes_in(step):
            return
        for _, part in shares(blocks, self.settings.micro_batch_size, self.accelerator):
            batch = make_batch(part, self.accelerator.device)
            with self.accelerator.autocast():
                finite = self.teacher.targets(part, batch).finite().cpu().numpy()
            if not finite.all():
                row, column = np.argwhere(part.kept)[int(np.argmin(finite))]
                raise TrainingError(
                    f"the teacher's logits are not finite at {int((~finite).sum())} positions of "
                    f"step {step + 1} of {steps}, the first in document "
                    f"{part.documents[row, column] + 1} of the texts; leave that document out, or "
                    "run the teacher in float32"
                )

    def evaluate(self) -> Evaluation:
        """Compare the student with its teacher; see ``Task.evaluate``."""
        return judge(self.module, self.held_out, self.accelerator)

    def height(self, evaluation: Evaluation) -> float:
        """KL(teacher || student)."""
        return evaluation.kl

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Save the student's weights, in the plain architecture."""
        save_plain(self.student, model_weights(weights), folder)
