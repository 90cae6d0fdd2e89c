"""The training loop: blocks of text in, a better model out.

Each optimizer step is a pure function of the step's number and of the state that checkpoints
hold, so that a run that was killed and resumed ends with the same bits as one that was not. Which
blocks a step reads and how fast it learns follow from its number alone; nothing has to be rewound.

What a step computes, and how the model is judged, is the task's: to predict what a teacher
predicts, or to write what a text says.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mistill.errors import TrainingError
from mistill.folders.renaming import rename_synced
from mistill.progress import track
from mistill.pytorch.products import fast_products
from mistill.settings import settings_dict
from mistill.training.checkpoints import load_checkpoint, remove_others, save_checkpoint
from mistill.training.metrics import Metrics
from mistill.training.progress import EvaluationT, TrainingProgress
from mistill.training.schedule import blocks_of_step, learning_rate_at

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mistill.text.blocks import TokenBlocks

logger = logging.getLogger(__name__)

PartT = TypeVar("PartT")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What the loop itself has to know of the settings.

    Attributes:
        steps: Optimizer steps of the whole run, at least 1.
        batch_size: Blocks of one step, over all processes.
        seed: Decides the order of the blocks.
        learning_rate: The highest one.
        warmup: Share of the steps in which it rises, 0 to 1.
        max_gradient_norm: Longer gradients are scaled down to this length.
        evaluate_every: Steps between two evaluations; 0 for one before and one at the end.
        checkpoint_every: Steps between two checkpoints; 0 for none.
        patience: Evaluations without a better model after which the run ends; 0 for never.
    """

    steps: int
    batch_size: int
    seed: int
    learning_rate: float
    warmup: float
    max_gradient_norm: float
    evaluate_every: int
    checkpoint_every: int
    patience: int = 0


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What one optimizer step was about.

    Attributes:
        loss: Per kept position, over all processes.
        tokens: Tokens of text, padding not counted.
        positions: Kept positions among them.
        parts: What the loss was made of, by the names that the metrics have.
    """

    loss: float
    tokens: int
    positions: int
    parts: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol[EvaluationT]):
    """What is learnt in a step, and how the model is judged; all processes call alike."""

    doing: str
    """What the progress bar says."""

    measure: str
    """What the model is judged by, such as ``held-out KL``, in nats."""

    evaluation_class: type[EvaluationT]
    """The dataclass of an evaluation."""

    def announce(self, step: int, blocks: TokenBlocks) -> None:
        """Hear which blocks a step will read, one step ahead.

        Args:
            step: Its number, from 0.
            blocks: For all processes.
        """

    def gradients(self, step: int, blocks: TokenBlocks) -> StepSums:
        """Add up the gradient of one optimizer step.

        Args:
            step: Its number, from 0.
            blocks: For all processes.

        Returns:
            The sums of the step, over all processes.
        """

    def explain(self, step: int, steps: int, blocks: TokenBlocks) -> None:
        """Raise where something else than the learning rate made the loss no number.

        Args:
            step: The number of the step, from 0.
            steps: How many there are.
            blocks: What it read.
        """

    def evaluate(self) -> EvaluationT:
        """Judge the model as it is now.

        Returns:
            The evaluation; the same in every process.
        """

    def height(self, evaluation: EvaluationT) -> float:
        """What training is to lower.

        Args:
            evaluation: Of the model.

        Returns:
            A number; the model with the lowest is the best.
        """

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Save the model, in one process of all.

        Args:
            weights: The state dict of the module, brought together.
            folder: The folder to write.
        """


class TrainingLoop(Generic[EvaluationT]):
    """One training run: what it needs, and how far it has come."""

    def __init__(
        self,
        task: Task[EvaluationT],
        module: nn.Module,
        optimizer: Any,
        training: TokenBlocks,
        options: LoopOptions,
        *,
        accelerator: Accelerator,
        work: Path,
        settings: object,
    ) -> None:
        """Begin, or get ready to resume.

        Args:
            task: What is learnt.
            module: The model in its ``StepModule``, prepared by the accelerator.
            optimizer: Prepared by the accelerator.
            training: Blocks to learn from, each with at least one kept position.
            options: How.
            accelerator: Device, precision, processes and accumulation steps.
            work: A folder that holds the state of this run; empty, or as an interruption left it.
                All processes see it.
            settings: What trackers show beside the run: an object of a settings class.
        """
        self.task, self.module, self.optimizer = task, module, optimizer
        self.training, self.options = training, options
        self.accelerator, self.work = accelerator, work
        self.metrics = Metrics(work, accelerator, settings_dict(settings))

    @fast_products()
    def to_the_end(self) -> TrainingProgress[EvaluationT]:
        """Train from the last checkpoint, or from the start, to the last step.

        Returns:
            The end of the run; ``best_model(work, step)`` is the folder of the best model, unless
            ``best_step`` is 0: then none was better than the one that came.

        Raises:
            TrainingError: If the loss is not a number.
        """
        started = time.perf_counter()
        steps = self.options.steps
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
            progress = TrainingProgress.from_dict(saved, self.task.evaluation_class)
            logger.info("resuming after step %d of %d", progress.step, steps)
            self.metrics.keep_until(progress.step)
        clock = started - progress.seconds

        tokens_per_step = self.training.tokens / len(self.training) * self.options.batch_size
        total = round(steps * tokens_per_step)
        self.announce(progress.step)
        with self.bar(total, progress.tokens) as bar:
            for step in range(progress.step, steps):
                if self.gave_up(progress):
                    logger.info(
                        "step %d of %d: no better since %d", step, steps, progress.best_step
                    )
                    break
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
        return track(self.task.doing, total, "tokens", done)

    def announce(self, step: int) -> None:
        """Tell the task what a step will read."""
        if step < self.options.steps:
            self.task.announce(step, self.blocks_of(step))

    def take(
        self, step: int, progress: TrainingProgress[EvaluationT], clock: float
    ) -> tuple[TrainingProgress[EvaluationT], str]:
        """One optimizer step."""
        began = time.perf_counter()
        options = self.options
        rate = learning_rate_at(
            step, options.steps, peak=options.learning_rate, warmup=options.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self.task.gradients(step, self.blocks_of(step))
        norm = self.clip()
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            self.task.explain(step, options.steps, self.blocks_of(step))
            raise TrainingError(
                f"the loss became {sums.loss} with a gradient of length {norm} in step {step + 1} "
                f"of {options.steps}; lower learning_rate (now {options.learning_rate:g}) or raise "
                f"warmup (now {options.warmup:g})"
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
        self.metrics.write(
            step + 1,
            tokens=progress.tokens,
            positions=progress.positions,
            loss=sums.loss,
            **sums.parts,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=sums.tokens / (now - began),
            seconds=progress.seconds,
        )
        if self.is_due(options.evaluate_every, step + 1) or step + 1 == options.steps:
            progress = self.judge(progress)
            progress = replace(progress, seconds=time.perf_counter() - clock)
        height = self.task.height(progress.best)
        return progress, f"loss {sums.loss:.3f} · {self.task.measure} {height:.3f}"

    def clip(self) -> float:
        """Shorten the gradient if it is too long; its length before."""
        norm: Any = self.accelerator.clip_grad_norm_(
            self.module.parameters(), self.options.max_gradient_norm
        )
        if norm is None:  # DeepSpeed has stepped already, and knows no length at its first step
            return 0.0
        if isinstance(norm, Tensor) and hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        return float(norm)

    def judge(self, progress: TrainingProgress[EvaluationT]) -> TrainingProgress[EvaluationT]:
        """Evaluate the model and save it if it is the best so far."""
        evaluation = self.evaluate(progress.step)
        height = self.task.height(evaluation)
        logger.info("step %d: %s %.4f nats", progress.step, self.task.measure, height)
        progress = replace(progress, last=evaluation)
        if not height < self.task.height(progress.best):
            return progress
        self.save_best(progress.step)
        return replace(progress, best=evaluation, best_step=progress.step)

    def gave_up(self, progress: TrainingProgress[EvaluationT]) -> bool:
        """Whether as many evaluations as patience allows have brought nothing better."""
        options = self.options
        waited = progress.step - progress.best_step
        return bool(options.patience and options.evaluate_every) and (
            waited >= options.patience * options.evaluate_every
        )

    def evaluate(self, step: int) -> EvaluationT:
        """Judge the model as it is now."""
        evaluation = self.task.evaluate()
        self.metrics.write(step, held_out=asdict(evaluation))  # type: ignore[call-overload]
        return evaluation

    def save_best(self, step: int) -> None:
        """Save the model as the best so far."""
        weights = self.accelerator.get_state_dict(self.module)
        if not self.accelerator.is_main_process:
            return
        folder = best_model(self.work, step)
        partial = folder.with_name(f"{folder.name}.partial")
        for stale in (folder, partial):
            shutil.rmtree(stale, ignore_errors=True)
        self.task.save(weights, partial)
        rename_synced(partial, folder)

    def keep(self, progress: TrainingProgress[EvaluationT]) -> None:
        """Write a checkpoint if one is due, and remove what it replaces."""
        last = progress.step == self.options.steps
        if not last and self.is_due(self.options.checkpoint_every, progress.step):
            save_checkpoint(self.work, self.accelerator, progress.step, progress.to_dict())
            if self.accelerator.is_main_process:
                remove_others(self.work, "best-", str(progress.best_step))

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps is to be done after this one."""
        return every > 0 and step % every == 0

    def blocks_of(self, step: int) -> TokenBlocks:
        """The blocks that a step reads."""
        options = self.options
        rows = blocks_of_step(step, len(self.training), options.batch_size, options.seed)
        return self.training[rows]


def best_model(work: Path, step: int) -> Path:
    """Where a model is kept while it is the best.

    Args:
        work: The folder of the run.
        step: The step after which the model was saved.

    Returns:
        The folder that the task saved it in.
    """
    return work / f"best-{step}"


# --- what a process computes --------------------------------------------------------------------


def shares(
    blocks: Sequence[PartT] | TokenBlocks, size: int, accelerator: Accelerator
) -> Iterator[tuple[int, Any]]:
    """What this process computes of the blocks of all, a micro-batch at a time.

    Args:
        blocks: For all processes.
        size: Blocks in a micro-batch.
        accelerator: Knows the processes.

    Yields:
        Number of the first block, and the blocks.
    """
    stride = size * accelerator.num_processes
    for start in range(accelerator.process_index * size, len(blocks), stride):
        yield start, blocks[start : start + size]


def equal_shares(
    blocks: TokenBlocks, size: int, accelerator: Accelerator
) -> list[tuple[TokenBlocks, bool]]:
    """Equally many parts in every process, for what all have to call equally often.

    Args:
        blocks: For all processes.
        size: Blocks in a part.
        accelerator: Knows the processes.

    Returns:
        Parts, and whether each counts: False where another process computes the same text, and
        this one repeats it to keep step.
    """
    mine = [part for _, part in shares(blocks, size, accelerator)]
    rounds = -(-len(blocks) // (size * accelerator.num_processes))
    repeated = [blocks[:size]] * (rounds - len(mine))
    return [*((part, True) for part in mine), *((part, False) for part in repeated)]


def undo_divisions(accelerator: Accelerator) -> int:
    """The factor of a micro-batch's loss that has its share of the whole step already.

    accelerate divides every loss by the accumulation steps, and DDP gradients by the processes.

    Args:
        accelerator: Knows both.

    Returns:
        Their product.
    """
    return int(accelerator.gradient_accumulation_steps * accelerator.num_processes)


def summed(values: Sequence[float] | Tensor, accelerator: Accelerator) -> list[float]:
    """Sums over all processes.

    Args:
        values: Of this process.
        accelerator: Knows the processes.

    Returns:
        The sums, the same in every process.
    """
    here = torch.as_tensor(values, dtype=torch.float64, device=accelerator.device)
    total: list[float] = accelerator.reduce(here, reduction="sum").tolist()
    return total
