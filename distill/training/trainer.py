"""The training loop: blocks of text in, a better student out.

Each optimizer step is a pure function of the step's number and of the state that checkpoints
hold, so that a run that was killed and resumed ends with the same bits as one that was not. Which
blocks a step reads, how fast it learns and who wrote its text follow from its number alone;
nothing has to be rewound.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from distill.training.held_out import ask_about, judge, shares
from distill.training.on_policy import is_on_policy
from distill.training.progress import TrainingProgress
from distill.training.step import DistillationStep, accumulate_gradients
from mistill.errors import TrainingError
from mistill.folders.renaming import rename_synced
from mistill.loss.batches import make_batch
from mistill.progress import track
from mistill.pytorch.loading import quiet_transformers
from mistill.settings import settings_dict
from mistill.training.adapters import add_adapters, merged
from mistill.training.checkpoints import (
    load_checkpoint,
    own_randomness,
    remove_others,
    save_checkpoint,
)
from mistill.training.lean import remember_less
from mistill.training.memory import unmap_when_freed
from mistill.training.metrics import Metrics
from mistill.training.optimizers import make_optimizer
from mistill.training.schedule import blocks_of_step, learning_rate_at, step_count

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from distill.settings import TrainSettings
    from distill.teacher.teacher import Teacher
    from mistill.text.blocks import TokenBlocks

logger = logging.getLogger(__name__)


def train_student(
    student: PreTrainedModel,
    teacher: Teacher,
    training: TokenBlocks,
    held_out: TokenBlocks,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    work: Path,
) -> TrainingProgress:
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
        The end of the run; ``best_student(work, step)`` is the folder of the best student, unless
        ``best_step`` is 0: then none was better than the one that came.

    Raises:
        TrainingError: If the loss is not a number.
    """
    with own_randomness(settings.seed):
        run = _Run(student, teacher, training, held_out, settings, accelerator, work)
        return run.to_the_end()


def best_student(work: Path, step: int) -> Path:
    """Where the weights of a student are kept while they are the best.

    Args:
        work: The folder of the run.
        step: The step after which the student was saved.

    Returns:
        A folder with config.json and safetensors.
    """
    return work / f"best-{step}"


class _Run:
    """One training run: what it needs, and how far it has come."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        training: TokenBlocks,
        held_out: TokenBlocks,
        settings: TrainSettings,
        accelerator: Accelerator,
        work: Path,
    ) -> None:
        self.student, self.teacher, self.training = student, teacher, training
        self.settings, self.accelerator, self.work = settings, accelerator, work
        self.steps = step_count(training, settings.tokens, settings.batch_size)
        self.held_out = ask_about(teacher, held_out, settings.micro_batch_size, accelerator)
        if settings.lora_rank:
            add_adapters(student, settings.lora_rank)
        if settings.gradient_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        remember_less(student)
        if accelerator.device.type == "cpu":
            unmap_when_freed()
        student.train()
        self.module, self.optimizer = accelerator.prepare(
            DistillationStep(student, settings),
            make_optimizer(
                student,
                name=settings.optimizer,
                learning_rate=settings.peak_learning_rate,
                weight_decay=settings.weight_decay,
            ),
        )
        self.metrics = Metrics(work, accelerator, settings_dict(settings))

    def to_the_end(self) -> TrainingProgress:
        """Train from the last checkpoint, or from the start, to the last step."""
        started = time.perf_counter()
        saved = load_checkpoint(self.work, self.accelerator)
        if saved is None:
            self.metrics.keep_until(-1)
            before = self.evaluate(0)
            progress = TrainingProgress(
                step=0,
                tokens=0,
                positions=0,
                seconds=0,
                before=before,
                best=before,
                best_step=0,
                last=before,
            )
        else:
            progress = TrainingProgress.from_dict(saved)
            logger.info("resuming after step %d of %d", progress.step, self.steps)
            self.metrics.keep_until(progress.step)
        clock = started - progress.seconds

        tokens_per_step = self.training.tokens / len(self.training) * self.settings.batch_size
        total = round(self.steps * tokens_per_step)
        self.announce(progress.step)
        with self.bar(total, progress.tokens) as bar:
            for step in range(progress.step, self.steps):
                tokens_before = progress.tokens
                self.announce(step + 1)
                progress, note = self.take(step, progress, clock)
                if bar is not None:
                    bar.advance(progress.tokens - tokens_before, note)
                self.keep(progress)
        self.metrics.close()
        return progress

    def bar(self, total: int, done: int) -> Any:
        """A progress bar, in one process of all."""
        if not self.accelerator.is_main_process:
            return nullcontext()
        doing = "distilling" if self.settings.cross_entropy < 1 else "learning from text alone"
        return track(doing, total, "tokens", done)

    def announce(self, step: int) -> None:
        """Tell the teacher what it will be asked about in a step."""
        settings = self.settings
        if step < self.steps and settings.cross_entropy < 1 and not self.writes_in(step):
            size = settings.micro_batch_size
            for _, part in shares(self.blocks_of(step), size, self.accelerator):
                self.teacher.expect(part)

    def writes_in(self, step: int) -> bool:
        """Whether the student writes the text of a step."""
        return is_on_policy(step, self.settings.on_policy)

    def take(
        self, step: int, progress: TrainingProgress, clock: float
    ) -> tuple[TrainingProgress, str]:
        """One optimizer step."""
        began = time.perf_counter()
        rate = learning_rate_at(
            step, self.steps, peak=self.settings.peak_learning_rate, warmup=self.settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = accumulate_gradients(
            self.module,
            self.teacher,
            self.blocks_of(step),
            self.settings,
            self.accelerator,
            step if self.writes_in(step) else None,
        )
        norm = self.clip()
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            self.refuse_teacher_without_numbers(step)
            raise TrainingError(
                f"the loss became {sums.loss} with a gradient of length {norm} in step {step + 1} "
                f"of {self.steps}; lower learning_rate (now "
                f"{self.settings.peak_learning_rate:g}) or raise warmup "
                f"(now {self.settings.warmup:g})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()

        now = time.perf_counter()
        progress = replace(
            progress,
            step=step + 1,
            tokens=progress.tokens + sums.tokens,
            positions=progress.positions + sums.positions,
            seconds=now - clock,
        )
        settings = self.settings
        parts: dict[str, float] = {}
        if settings.cross_entropy < 1:
            parts["kl" if settings.divergence == "forward_kl" else settings.divergence] = (
                sums.divergence
            )
        if settings.cross_entropy > 0 and not self.writes_in(step):
            parts["cross_entropy"] = sums.cross_entropy
        if settings.on_policy > 0:
            parts["on_policy"] = float(self.writes_in(step))
        self.metrics.write(
            step + 1,
            tokens=progress.tokens,
            positions=progress.positions,
            loss=sums.loss,
            **parts,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=sums.tokens / (now - began),
            seconds=progress.seconds,
        )
        if self.is_due(self.settings.evaluate_every, step + 1) or step + 1 == self.steps:
            progress = self.judge(progress)
            progress = replace(progress, seconds=time.perf_counter() - clock)
        return progress, f"loss {sums.loss:.3f} · held-out KL {progress.best.kl:.3f}"

    def refuse_teacher_without_numbers(self, step: int) -> None:
        """Say so where it is the teacher whose predictions are not finite."""
        if self.settings.cross_entropy == 1 or self.writes_in(step):
            return
        size = self.settings.micro_batch_size
        for _, part in shares(self.blocks_of(step), size, self.accelerator):
            batch = make_batch(part, self.accelerator.device)
            with self.accelerator.autocast():
                finite = self.teacher.targets(part, batch).finite().cpu().numpy()
            if not finite.all():
                row, column = np.argwhere(part.kept)[int(np.argmin(finite))]
                raise TrainingError(
                    f"the teacher's logits are not finite at {int((~finite).sum())} positions of "
                    f"step {step + 1} of {self.steps}, the first in document "
                    f"{part.documents[row, column] + 1} of the texts; leave that document out, or "
                    "run the teacher in float32"
                )

    def clip(self) -> float:
        """Shorten the gradient if it is too long; its length before."""
        norm: Any = self.accelerator.clip_grad_norm_(
            self.module.parameters(), self.settings.max_gradient_norm
        )
        if norm is None:  # DeepSpeed has stepped already, and knows no length at its first step
            return 0.0
        if isinstance(norm, Tensor) and hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        return float(norm)

    def judge(self, progress: TrainingProgress) -> TrainingProgress:
        """Evaluate the student and save it if it is the best so far."""
        evaluation = self.evaluate(progress.step)
        logger.info("step %d: held-out KL %.4f nats", progress.step, evaluation.kl)
        progress = replace(progress, last=evaluation)
        if not evaluation.kl < progress.best.kl:
            return progress
        self.save_best(progress.step)
        return replace(progress, best=evaluation, best_step=progress.step)

    def evaluate(self, step: int) -> Any:
        """Judge the student as it is now."""
        evaluation = judge(self.module, self.held_out, self.accelerator)
        self.metrics.write(step, held_out=asdict(evaluation))
        return evaluation

    def save_best(self, step: int) -> None:
        """Save the student's weights, in the plain architecture."""
        weights = self.accelerator.get_state_dict(self.module)
        if not self.accelerator.is_main_process:
            return
        folder = best_student(self.work, step)
        partial = folder.with_name(f"{folder.name}.partial")
        for stale in (folder, partial):
            shutil.rmtree(stale, ignore_errors=True)
        # DeepSpeed computes with, and has judged, weights of the precision that was asked for.
        plain = {
            name: value.float()
            for name, value in merged(
                {name.removeprefix("student."): value for name, value in weights.items()}
            ).items()
        }
        if self.student.config.tie_word_embeddings:
            plain.pop("lm_head.weight", None)
        with quiet_transformers():
            self.student.save_pretrained(partial, state_dict=plain)
        rename_synced(partial, folder)

    def keep(self, progress: TrainingProgress) -> None:
        """Write a checkpoint if one is due, and remove what it replaces."""
        last = progress.step == self.steps
        if not last and self.is_due(self.settings.checkpoint_every, progress.step):
            save_checkpoint(self.work, self.accelerator, progress.step, progress.to_dict())
            if self.accelerator.is_main_process:
                remove_others(self.work, "best-", str(progress.best_step))

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps is to be done after this one."""
        return every > 0 and step % every == 0

    def blocks_of(self, step: int) -> TokenBlocks:
        """The blocks that a step reads."""
        rows = blocks_of_step(
            step, len(self.training), self.settings.batch_size, self.settings.seed
        )
        return self.training[rows]
