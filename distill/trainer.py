"""The training loop: blocks of text in, a better student out.

Each optimizer step is a pure function of the step's number and of the state that checkpoints
hold, so that a run that was killed and resumed ends with the same bits as one that was not. Which
blocks a step reads and how fast it learns follow from its number alone; nothing has to be
rewound.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.batches import Batch, make_batch
from distill.evaluation import Evaluation, HeldOut, ask_teacher, evaluate
from distill.losses import HeadLoss, head_loss
from distill.heads import read_head
from distill.teacher import Teacher, TeacherTargets, last_hidden_states
from mistill.errors import SettingsError, TrainingError
from mistill.folder import write_atomically
from mistill.progress import track
from mistill.pytorch import quiet_transformers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from distill.train_settings import TrainSettings
    from mistill.text import TokenBlocks

METRICS_FILE = "metrics.jsonl"

_BETAS = (0.9, 0.95)
_PROGRESS_FILE = "progress.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        tokens: Text tokens trained on, padding not counted.
        positions: Kept positions among them, which the loss is a mean over.
        seconds: Time spent, evaluations and checkpoints included, interruptions not.
        before: The student as it came.
        best: The best student so far; as it came, if none was better.
        best_step: The step after which it was.
    """

    step: int
    tokens: int
    positions: int
    seconds: float
    before: Evaluation
    best: Evaluation
    best_step: int


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
        teacher: The model to imitate, on the accelerator's device.
        training: Blocks to learn from, each with at least one kept position.
        held_out: Blocks to judge the student on.
        settings: How to train.
        accelerator: Device, precision, processes and accumulation steps, from
            ``accelerating``.
        work: A folder that holds the state of this run; empty, or as an interruption left it.

    Returns:
        The end of the run; ``best_student(work, step)`` is the folder of the best student.

    Raises:
        TrainingError: If the loss is not a number, or if the student never got better.
    """
    run = _Run(student, teacher, training, held_out, settings, accelerator, work)
    with _own_randomness(settings.seed):
        return run.to_the_end()


@contextmanager
def accelerating(settings: TrainSettings, logs: Path) -> Iterator[Accelerator]:
    """Choose device and precision, and count the micro-batches of a step.

    accelerate fixes the precision once for the whole process; that is undone at the end, unless
    the caller had fixed it before.

    Args:
        settings: How to train.
        logs: Where TensorBoard's files go, if they are asked for.

    Yields:
        An accelerator.

    Raises:
        SettingsError: If the step's blocks cannot be shared evenly among the processes.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    micro_batches, left_over = divmod(
        settings.batch_size, settings.micro_batch_size * state.num_processes
    )
    if left_over:
        raise SettingsError(
            f"{state.num_processes} processes with micro-batches of {settings.micro_batch_size} "
            f"blocks cannot share a batch_size of {settings.batch_size}; make it a multiple of "
            f"{settings.micro_batch_size * state.num_processes}"
        )
    precision = settings.precision
    if precision == "auto":
        precision = "float32" if state.device.type == "cpu" else "bfloat16"
    fixed_before = bool(AcceleratorState._shared_state)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "float32" else "bf16",
        gradient_accumulation_steps=micro_batches,
        log_with="tensorboard" if settings.tensorboard else None,
        project_dir=logs if settings.tensorboard else None,
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if not fixed_before:
            AcceleratorState._reset_state()


def best_student(work: Path, step: int) -> Path:
    """Where the weights of a student are kept while they are the best.

    Args:
        work: The folder of the run.
        step: The step after which the student was saved.

    Returns:
        A folder with config.json and safetensors.
    """
    return work / f"best-{step}"


# --- what a step is made of ---------------------------------------------------------------------


def step_count(blocks: TokenBlocks, settings: TrainSettings) -> int:
    """Optimizer steps that read about ``settings.tokens`` text tokens.

    Args:
        blocks: Blocks to learn from.
        settings: How to train.

    Returns:
        At least 1.
    """
    tokens_per_step = blocks.tokens / len(blocks) * settings.batch_size
    return max(1, round(settings.tokens / tokens_per_step))


def blocks_of_step(step: int, blocks: int, batch_size: int, seed: int) -> list[int]:
    """Which blocks an optimizer step reads.

    Every epoch reads all blocks once, in an order of its own; a step may span two epochs.

    Args:
        step: Counted from 0.
        blocks: How many there are.
        batch_size: How many a step reads.
        seed: Decides the orders.

    Returns:
        ``batch_size`` indices.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(blocks, place // blocks, seed)[place % blocks]) for place in wanted]


@lru_cache(maxsize=4)
def _order(blocks: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def learning_rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """A straight rise over the warm-up, then half a cosine down to 0.

    Args:
        step: Counted from 0.
        steps: How many there will be.
        settings: How to train.

    Returns:
        The learning rate of this step.
    """
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(student: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    Norms and biases are scales and shifts that have no reason to be small. Embedding and head
    rows of tokens that a text never holds would decay towards 0 without being trained.

    Args:
        student: The model to train.
        settings: How to train.

    Returns:
        The optimizer, in PyTorch's fused form.
    """
    tables = {
        id(module.weight)
        for name, module in student.named_modules()
        if isinstance(module, nn.Embedding) or name.endswith("lm_head")
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in student.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in tables
            (decayed if is_matrix else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=_BETAS, fused=True)


class DistillationStep(nn.Module):
    """A student that answers with its loss.

    The head and the loss run inside the wrapped forward pass, where the wrappers of DDP and FSDP
    see every use of a parameter.

    Args:
        student: The model to train.
        settings: Temperature, share of the cross-entropy, and room for logits.
    """

    def __init__(self, student: PreTrainedModel, settings: TrainSettings) -> None:
        super().__init__()
        self.student = student
        self.settings = settings

    def forward(self, batch: Batch, targets: TeacherTargets, positions_in_step: int) -> HeadLoss:
        """The loss of one micro-batch.

        Args:
            batch: Some blocks.
            targets: What the teacher says at their kept positions.
            positions_in_step: Kept positions of the whole optimizer step.

        Returns:
            The micro-batch's share of the step's loss.
        """
        hidden = last_hidden_states(self.student, batch.ids, batch.positions)
        return head_loss(
            hidden[batch.kept],
            read_head(self.student),
            targets,
            batch.next_ids,
            positions_in_step=positions_in_step,
            temperature=self.settings.temperature,
            cross_entropy=self.settings.cross_entropy,
            memory_mib=self.settings.loss_memory_mib,
        )


def accumulate_gradients(
    module: nn.Module,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> Tensor:
    """Add up the gradient of one optimizer step, micro-batch by micro-batch.

    Args:
        module: A ``DistillationStep``, prepared by the accelerator.
        teacher: The model to imitate.
        blocks: The blocks of this step, for all processes; at least one position is kept.
        settings: How to train.
        accelerator: The one that prepared the module.

    Returns:
        The step's loss, KL and cross-entropy per kept position, over all processes; float64,
        shape (3,).
    """
    kept = int(blocks.kept.sum())
    size, processes = settings.micro_batch_size, accelerator.num_processes
    # accelerate divides the loss by the accumulation steps and DDP by the processes; the loss
    # has its share of the whole step already, so both divisions are undone.
    share = accelerator.gradient_accumulation_steps * processes
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for start in range(accelerator.process_index * size, len(blocks), size * processes):
        mine = blocks[start : start + size]
        batch = make_batch(mine, accelerator.device)
        with accelerator.autocast():
            targets = teacher.targets(mine, batch)
        with accelerator.accumulate(module):
            result: HeadLoss = module(batch, targets, kept)
            accelerator.backward(result.loss * share)
        sums += torch.stack(
            (result.loss.detach().double() * kept, result.divergence, result.cross_entropy)
        )
    total: Tensor = accelerator.reduce(sums, reduction="sum")
    return total / kept


# --- the run ------------------------------------------------------------------------------------


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
        self.steps = step_count(training, settings)
        student.train()
        optimizer = make_optimizer(student, settings)
        self.module, self.optimizer = accelerator.prepare(
            DistillationStep(student, settings), optimizer
        )
        size = settings.micro_batch_size
        parts = [held_out[start : start + size] for start in range(0, len(held_out), size)]
        with accelerator.autocast():
            self.held_out: HeldOut = ask_teacher(
                teacher, ((part, make_batch(part, accelerator.device)) for part in parts)
            )
        self.metrics = _Metrics(work, accelerator, settings)

    def to_the_end(self) -> TrainingProgress:
        """Train from the last checkpoint, or from the start, to the last step."""
        started = time.perf_counter()
        progress = load_checkpoint(self.work, self.accelerator)
        if progress is None:
            self.metrics.keep_until(-1)
            before = self.evaluate()
            self.metrics.write(0, held_out=asdict(before))
            progress = TrainingProgress(
                step=0, tokens=0, positions=0, seconds=0, before=before, best=before, best_step=0
            )
        else:
            logger.info("resuming after step %d of %d", progress.step, self.steps)
            self.metrics.keep_until(progress.step)
        clock = started - progress.seconds

        tokens_per_step = self.training.tokens / len(self.training) * self.settings.batch_size
        total = round(self.steps * tokens_per_step)
        with track("distilling", total, "tokens", progress.tokens) as bar:
            for step in range(progress.step, self.steps):
                tokens_before = progress.tokens
                progress, note = self.take(step, progress, clock)
                bar.advance(progress.tokens - tokens_before, note)
                self.keep(progress)
        self.metrics.close()
        if progress.best_step == 0:
            raise TrainingError(self.complaint(progress))
        return progress

    def take(
        self, step: int, progress: TrainingProgress, clock: float
    ) -> tuple[TrainingProgress, str]:
        """One optimizer step."""
        began = time.perf_counter()
        blocks = self.blocks_of(step)
        rate = learning_rate_at(step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = accumulate_gradients(
            self.module, self.teacher, blocks, self.settings, self.accelerator
        )
        norm = self.accelerator.clip_grad_norm_(
            self.module.parameters(), self.settings.max_gradient_norm
        )
        loss, kl, cross_entropy, norm = (*sums.tolist(), float(norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss became {loss} with a gradient of length {norm} in step {step + 1} of "
                f"{self.steps}; lower learning_rate (now {self.settings.learning_rate:g}) or "
                f"raise warmup (now {self.settings.warmup:g})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()

        now = time.perf_counter()
        progress = replace(
            progress,
            step=step + 1,
            tokens=progress.tokens + blocks.tokens,
            positions=progress.positions + int(blocks.kept.sum()),
            seconds=now - clock,
        )
        with_text = {"cross_entropy": cross_entropy} if self.settings.cross_entropy > 0 else {}
        self.metrics.write(
            step + 1,
            tokens=progress.tokens,
            positions=progress.positions,
            loss=loss,
            kl=kl,
            **with_text,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=blocks.tokens / (now - began),
            seconds=progress.seconds,
        )
        if self.is_due(self.settings.evaluate_every, step + 1) or step + 1 == self.steps:
            progress = self.judge(progress)
            progress = replace(progress, seconds=time.perf_counter() - clock)
        return progress, f"loss {loss:.3f} · held-out KL {progress.best.kl:.3f}"

    def judge(self, progress: TrainingProgress) -> TrainingProgress:
        """Evaluate the student and save it if it is the best so far."""
        found = self.evaluate()
        self.metrics.write(progress.step, held_out=asdict(found))
        logger.info("step %d: held-out KL %.4f nats", progress.step, found.kl)
        if not found.kl < progress.best.kl:
            return progress
        self.save_best(progress.step)
        return replace(progress, best=found, best_step=progress.step)

    def evaluate(self) -> Evaluation:
        """Judge the student as it is now."""
        with self.accelerator.autocast():
            return evaluate(self.student, self.held_out, self.settings.loss_memory_mib)

    def save_best(self, step: int) -> None:
        """Save the student's weights."""
        weights = self.accelerator.get_state_dict(self.module)
        if not self.accelerator.is_main_process:
            return
        folder = best_student(self.work, step)
        partial = folder.with_name(f"{folder.name}.partial")
        for stale in (folder, partial):
            shutil.rmtree(stale, ignore_errors=True)
        weights = {name.removeprefix("student."): tensor for name, tensor in weights.items()}
        with quiet_transformers():
            self.student.save_pretrained(partial, state_dict=weights)
        partial.rename(folder)

    def keep(self, progress: TrainingProgress) -> None:
        """Write a checkpoint if one is due, and remove what it replaces."""
        last = progress.step == self.steps
        if not last and self.is_due(self.settings.checkpoint_every, progress.step):
            save_checkpoint(self.work, self.accelerator, progress)
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

    def complaint(self, progress: TrainingProgress) -> str:
        """Why there is no student to publish."""
        return (
            f"the student got no better: its held-out KL was {progress.before.kl:.4f} nats before "
            f"and {self.metrics.last_kl:.4f} after {progress.tokens} tokens; lower learning_rate "
            f"(now {self.settings.learning_rate:g}) or train on more tokens"
        )


# --- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(work: Path, accelerator: Accelerator, progress: TrainingProgress) -> None:
    """Write the whole state of a run, so that it appears whole or not at all.

    Args:
        work: The folder of the run; older checkpoints in it are removed.
        accelerator: Holds model, optimizer and random number generators.
        progress: How far the run has come.
    """
    folder = work / f"checkpoint-{progress.step}"
    partial = work / f"{folder.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomically(partial / _PROGRESS_FILE, json.dumps(asdict(progress)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        remove_others(work, "checkpoint-", str(progress.step))


def load_checkpoint(work: Path, accelerator: Accelerator) -> TrainingProgress | None:
    """Go back to the newest checkpoint of a run.

    Args:
        work: The folder of the run.
        accelerator: Its model, optimizer and random number generators are set.

    Returns:
        How far the run had come; None if there is no checkpoint.
    """
    found = [
        int(folder.name.removeprefix("checkpoint-"))
        for folder in work.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    ]
    if not found:
        return None
    folder = work / f"checkpoint-{max(found)}"
    values: dict[str, Any] = json.loads((folder / _PROGRESS_FILE).read_text("utf-8"))
    for name in ("before", "best"):
        values[name] = Evaluation(**values[name])
    accelerator.load_state(str(folder))
    return TrainingProgress(**values)


def remove_others(work: Path, prefix: str, wanted: str) -> None:
    """Remove folders of a kind, except one.

    Args:
        work: Where they are.
        prefix: What their names begin with.
        wanted: The rest of the name of the one to keep.
    """
    for folder in work.glob(f"{prefix}*"):
        if folder.name != f"{prefix}{wanted}":
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch's generators inside, and leave all generators of the process as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


# --- metrics ------------------------------------------------------------------------------------


class _Metrics:
    """Numbers of every step, one JSON object a line, and in TensorBoard if asked for."""

    def __init__(self, work: Path, accelerator: Accelerator, settings: TrainSettings) -> None:
        self.file, self.accelerator = work / METRICS_FILE, accelerator
        self.last_kl = math.nan
        if settings.tensorboard:
            accelerator.init_trackers("tensorboard")

    def keep_until(self, step: int) -> None:
        """Drop the lines that a resumed run will write again."""
        if not self.accelerator.is_main_process:
            return
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # cut short by a kill; all that follows is newer than the checkpoint
            if entry["step"] <= step:
                kept.append(line + "\n")
        write_atomically(self.file, "".join(kept))

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        if "held_out" in values:
            self.last_kl = values["held_out"]["kl"]
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(_finite({"step": step, **values})) + "\n")
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat.update({f"{name}/{part}": number for part, number in value.items()})
            else:
                flat[f"train/{name}"] = value
        self.accelerator.log(flat, step=step)

    def close(self) -> None:
        """Let go of TensorBoard's files."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _finite(value: Any) -> Any:
    """A value without NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
