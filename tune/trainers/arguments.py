"""What a trainer of TRL is told, and how many steps it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mistill.training.processes import micro_batches, this_process
from tune.settings import TrainerSettings


def step_total(settings: TrainerSettings, rows: int) -> int:
    """Optimizer steps of a run.

    Args:
        settings: Asks for steps, or for epochs.
        rows: Rows to learn from.

    Returns:
        At least 1.
    """
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(rows / settings.batch_size * settings.epochs - 1e-9))


def between_evaluations(every: int | None, steps: int) -> int:
    """Optimizer steps between two evaluations: as asked for, or a fifth of the run."""
    return every or max(1, math.ceil(steps / 5))


def arguments(
    settings: TrainerSettings,
    work: Path,
    *,
    rate: float,
    steps: int,
    checkpoint_every: int,
    in_order: bool = True,
) -> dict[str, Any]:
    """What every trainer is told, whatever it trains.

    Args:
        settings: How to train.
        work: The folder for its checkpoints.
        rate: The highest learning rate.
        steps: Optimizer steps.
        checkpoint_every: Optimizer steps between two checkpoints.
        in_order: Whether it reads the rows as they come; else in an order of its own.

    Returns:
        Keywords of transformers' ``TrainingArguments``.
    """
    on_gpu = torch.cuda.is_available()
    wanted, processes = settings.precision, this_process().num_processes
    given = {
        "output_dir": str(work / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": micro_batches(
            settings.batch_size, settings.micro_batch_size, processes
        ),
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(settings.warmup * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_gradient_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": not on_gpu,
        "bf16": wanted == "bfloat16" or (wanted == "auto" and on_gpu),
        "ddp_find_unused_parameters": False,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": checkpoint_every,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
    }
    return {**given, "train_sampling_strategy": "sequential"} if in_order else given
