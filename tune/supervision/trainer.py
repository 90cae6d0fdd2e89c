"""Supervised tuning as a task of the training loop: a model learns to write what a text says."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistill.folders.renaming import rename_synced
from mistill.training.adapters import (
    Adapter,
    AdapterPlan,
    adapters_in,
    add_adapters,
    load_adapters,
    principal_starts,
    save_adapters,
    scales_of,
    start_at,
)
from mistill.training.checkpoints import leave_out_frozen, own_randomness
from mistill.training.loop import LoopOptions, StepSums, TrainingLoop
from mistill.training.schedule import step_count
from mistill.training.step_module import model_weights, prepare_step, save_plain
from tune.supervision.step import SupervisedStep, accumulate_gradients, held_out_cost

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mistill.text.blocks import TokenBlocks
    from mistill.training.progress import TrainingProgress
    from tune.settings import SupervisedSettings

# A fifth of the run lies between two evaluations, where nothing else is asked for.
_EVALUATIONS = 5


@dataclass(frozen=True)
class HeldOut:
    """A model judged on held-out text.

    Attributes:
        cross_entropy: Mean -log p(next token) over the kept positions, in nats.
        positions: How many those are.
    """

    cross_entropy: float
    positions: int


def loop_options(training: TokenBlocks, settings: SupervisedSettings) -> LoopOptions:
    """How long to train, and how often to judge.

    Args:
        training: Blocks to learn from.
        settings: How to tune.

    Returns:
        What the loop has to know.
    """
    tokens = settings.tokens_of(training.tokens)
    steps = step_count(training, tokens, settings.batch_size)
    fifth = max(1, round(steps / _EVALUATIONS))
    return LoopOptions(
        steps=steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        learning_rate=settings.peak_learning_rate,
        warmup=settings.warmup,
        max_gradient_norm=settings.max_gradient_norm,
        evaluate_every=fifth if settings.evaluate_every is None else settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        patience=settings.patience,
    )


def train_model(
    model: PreTrainedModel,
    training: TokenBlocks,
    held_out: TokenBlocks,
    settings: SupervisedSettings,
    *,
    accelerator: Accelerator,
    work: Path,
    base: str,
) -> TrainingProgress[HeldOut]:
    """Tune a model and leave the best one found in a folder.

    Args:
        model: The model to tune: in float32 where all of it is trained; changed in place.
        training: Blocks to learn from, each with at least one kept position.
        held_out: Blocks to judge on.
        settings: How to tune.
        accelerator: Device, precision, processes and accumulation steps, from ``accelerating``.
        work: A folder that holds the state of this run; empty, or as an interruption left it. All
            processes see it.
        base: The model's name, for the adapter.

    Returns:
        The end of the run; ``best_model(work, step)`` is the folder of the best model, or of the
        adapter that makes it, unless ``best_step`` is 0: then none was better than what came.

    Raises:
        TrainingError: If the loss is not a number.
    """
    with own_randomness(settings.seed):
        starts: dict[str, Adapter] = {}
        if settings.lora_rank:
            model.requires_grad_(False)
            add_adapters(model, settings.lora_rank, adapter_plan(settings))
            leave_out_frozen(accelerator)
            if settings.lora_start == "pissa":
                starts = _starts(model, work, accelerator)
                start_at(model, starts)
        module, optimizer = prepare_step(
            SupervisedStep(model, settings),
            accelerator,
            optimizer=settings.optimizer,
            learning_rate=settings.peak_learning_rate,
            weight_decay=settings.weight_decay,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        task = Supervised(module, model, starts, held_out, settings, accelerator, base)
        loop = TrainingLoop(
            task,
            module,
            optimizer,
            training,
            loop_options(training, settings),
            accelerator=accelerator,
            work=work,
            settings=settings,
        )
        return loop.to_the_end()


def adapter_plan(settings: SupervisedSettings) -> AdapterPlan:
    """Which adapters settings ask for.

    Args:
        settings: How to tune, with a rank above 0.

    Returns:
        The plan.
    """
    return AdapterPlan(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        ranks=settings.ranks,
        rslora=settings.rslora,
        dora=settings.dora,
        pissa=settings.lora_start == "pissa",
    )


def _starts(model: PreTrainedModel, work: Path, accelerator: Accelerator) -> dict[str, Adapter]:
    """Where PiSSA starts: worked out once, by one process, and read by all, also after a kill."""
    folder = work / "start"
    if accelerator.is_main_process and not folder.is_dir():
        partial = folder.with_name("start.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_adapters(principal_starts(model), partial, "", dora=False)
        rename_synced(partial, folder)
    accelerator.wait_for_everyone()
    return load_adapters(folder)


class Supervised:
    """What a model learns from a text in a step, and how it is judged."""

    doing = "tuning"
    measure = "held-out cross-entropy"
    evaluation_class = HeldOut

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        starts: dict[str, Adapter],
        held_out: TokenBlocks,
        settings: SupervisedSettings,
        accelerator: Accelerator,
        base: str,
    ) -> None:
        """Gather what a step needs.

        Args:
            module: A ``SupervisedStep``, prepared by the accelerator.
            model: The model in it.
            starts: Where its adapters started, if not at 0.
            held_out: Text to judge on.
            settings: How to tune.
            accelerator: The one that prepared the module.
            base: The model's name, for the adapter.
        """
        self.module, self.model, self.starts, self.base = module, model, starts, base
        self.held_out, self.settings, self.accelerator = held_out, settings, accelerator

    def announce(self, step: int, blocks: TokenBlocks) -> None:
        """Nothing has to be known ahead; see ``Task.announce``."""

    def gradients(self, step: int, blocks: TokenBlocks) -> StepSums:
        """The gradient of a step; see ``Task.gradients``."""
        return accumulate_gradients(self.module, blocks, self.settings, self.accelerator, step)

    def explain(self, step: int, steps: int, blocks: TokenBlocks) -> None:
        """Only the learning rate can be to blame; see ``Task.explain``."""

    def evaluate(self) -> HeldOut:
        """What held-out text costs the model; see ``Task.evaluate``."""
        return HeldOut(*held_out_cost(self.module, self.held_out, self.settings, self.accelerator))

    def height(self, evaluation: HeldOut) -> float:
        """The cross-entropy."""
        return evaluation.cross_entropy

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Save the adapter, for the model as it came; without one the whole model."""
        weights = model_weights(weights)
        if not self.settings.lora_rank:
            save_plain(self.model, weights, folder)
            return
        adapters = adapters_in(weights, scales_of(self.model))
        if self.starts:
            starts = {
                name: Adapter(
                    start.down.to(adapters[name].down.device),
                    start.up.to(adapters[name].up.device),
                    start.scale,
                )
                for name, start in self.starts.items()
            }
            adapters = {name: one.since(starts[name]) for name, one in adapters.items()}
        save_adapters(adapters, folder, self.base, dora=self.settings.dora)
