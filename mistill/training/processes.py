"""One process or many: what accelerate decides, and what must agree with it.

How many processes there are and whether weights are copied (DDP) or divided (FSDP, DeepSpeed)
comes from ``accelerate launch`` and its config, or from torchrun. What a step is made of comes from
the settings alone, so that the same settings give the same student however it is computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from mistill.errors import SettingsError
from mistill.settings import environment_number, require

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


OptimizerName = Literal["adamw", "adamw_8bit"]
Precision = Literal["auto", "float32", "bfloat16"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]


class StepSettings(Protocol):
    """What one optimizer step is made of; the settings of whatever trains have these fields."""

    @property
    def batch_size(self) -> int:
        """Sequences of one optimizer step, over all processes."""

    @property
    def micro_batch_size(self) -> int:
        """Sequences that one process computes at once."""

    @property
    def precision(self) -> Precision:
        """float32, bfloat16, or auto: bfloat16 on a GPU."""

    @property
    def optimizer(self) -> OptimizerName:
        """Which optimizer moves the weights."""

    @property
    def max_gradient_norm(self) -> float:
        """Longer gradients are scaled down to this length."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where metrics are sent to beside the file."""


def require_known_trackers(trackers: object) -> None:
    """Refuse trackers that are not some of those there are, each once.

    Args:
        trackers: The setting.

    Raises:
        SettingsError: If they are not.
    """
    names = get_args(TrackerName)
    require(
        isinstance(trackers, list | tuple)
        and set(trackers) <= set(names)
        and len(set(trackers)) == len(trackers),
        f"trackers should be some of {', '.join(names)}, each once, not {trackers!r}",
    )


def this_process(patience: timedelta | None = None) -> PartialState:
    """Which process this is, of how many.

    Args:
        patience: How long processes wait for one another before they give up, decided when they
            first meet; accelerate's own by default.

    Returns:
        accelerate's state; the processes have found one another when it is there.

    Raises:
        SettingsError: If the environment holds what no launcher writes.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        environment_number(name, least, least)  # accelerate reads them without asking
    # Without this word processes that torchrun starts on CPUs would not look for one another.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    options = {} if patience is None else {"timeout": patience}
    return PartialState(cpu=on_cpu, **options)


def require_copies() -> None:
    """Refuse FSDP and DeepSpeed where every process has to hold the whole model.

    Raises:
        SettingsError: If accelerate's config asks for one of them and there are several processes.
    """
    processes = environment_number("WORLD_SIZE", 1, 1)
    for name in ("FSDP", "DEEPSPEED"):
        require(
            processes == 1 or os.environ.get(f"ACCELERATE_USE_{name}", "false") != "true",
            f"accelerate's config asks for {name}, and here every process holds the whole model; "
            "use a config without it, such as examples/accelerate/ddp.yaml",
        )


@contextmanager
def precision_of_its_own() -> Iterator[None]:
    """Let what runs inside choose a precision, and leave the process free to choose another.

    accelerate fixes the precision once for the whole process; that is undone at the end, unless
    the caller had fixed it before.

    Yields:
        Nothing.
    """
    from accelerate.state import AcceleratorState

    fixed_before = bool(AcceleratorState._shared_state)
    try:
        yield
    finally:
        if not fixed_before:
            AcceleratorState._reset_state()


@contextmanager
def accelerating(batch: StepSettings, logs: Path) -> Iterator[Accelerator]:
    """Choose device and precision, and count the micro-batches of a step.

    At the end the process is free to choose another precision; see ``precision_of_its_own``.

    Args:
        batch: What a step is made of.
        logs: Where TensorBoard's files go, if they are asked for.

    Yields:
        An accelerator.

    Raises:
        SettingsError: If the step's blocks cannot be shared evenly among the processes, the
            optimizer cannot be divided among them, or the process computes in another precision.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    state = this_process()
    steps = micro_batches(batch.batch_size, batch.micro_batch_size, state.num_processes)
    precision = batch.precision
    if precision == "auto":
        precision = "float32" if state.device.type == "cpu" else "bfloat16"
    mixed_precision = "no" if precision == "float32" else "bf16"
    with precision_of_its_own():
        _require_free_precision(mixed_precision)
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # As a plugin: a bare number would give way to one in the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=steps, sync_with_dataloader=False
            ),
            log_with=list(batch.trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(logs), logging_dir=str(logs / "tensorboard")
            ),
        )
        try:
            _configure(accelerator, batch, steps)
            yield accelerator
        finally:
            accelerator.free_memory()


def micro_batches(batch_size: int, micro_batch_size: int, processes: int) -> int:
    """How many micro-batches each process has in a step.

    Args:
        batch_size: Rows, or blocks, of an optimizer step.
        micro_batch_size: Those that one process computes at once.
        processes: How many there are.

    Returns:
        At least 1.

    Raises:
        SettingsError: If the processes cannot share a step evenly.
    """
    count, left_over = divmod(batch_size, micro_batch_size * processes)
    if left_over:
        raise SettingsError(
            f"{processes} processes with micro-batches of {micro_batch_size} cannot share a "
            f"batch_size of {batch_size}; make it a multiple of {micro_batch_size * processes}"
        )
    return count


def _require_free_precision(mixed_precision: str) -> None:
    """Refuse another precision than the one that the caller's own accelerator has fixed."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        fixed = AcceleratorState()
        require(
            fixed.mixed_precision == mixed_precision
            or fixed.distributed_type is DistributedType.DEEPSPEED,
            f"an Accelerator of yours has fixed mixed_precision={fixed.mixed_precision!r} for this "
            f"process, and training would be in {mixed_precision!r}; choose the same precision, "
            "or train in a process of its own",
        )


def _configure(accelerator: Accelerator, batch: StepSettings, steps: int) -> None:
    """Tell DeepSpeed what it cannot see; refuse what FSDP cannot do."""
    from accelerate.utils import parse_flag_from_env

    kind = accelerator.distributed_type.value
    for asked in ("FSDP", "DEEPSPEED"):
        wanted = parse_flag_from_env(f"ACCELERATE_USE_{asked}")
        if wanted and accelerator.num_processes > 1 and kind != asked:
            raise SettingsError(
                f"accelerate's config asks for {asked} and accelerate has chosen {kind}, as it "
                "does on CPUs; use a config for several CPUs there, or GPUs"
            )
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise SettingsError(
            "FSDP is asked for in its first version, which wraps parameters in flat ones; set "
            "fsdp_version: 2 in accelerate's config"
        )
    if kind in ("FSDP", "DEEPSPEED") and batch.optimizer != "adamw":
        raise SettingsError(
            f"the optimizer {batch.optimizer} cannot be divided by {kind}; choose adamw"
        )
    if kind != "DEEPSPEED":
        return
    plugin: Any = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = batch.micro_batch_size
    config["gradient_accumulation_steps"] = steps
    # DeepSpeed clips by itself, between the last backward pass and its own step.
    config["gradient_clipping"] = batch.max_gradient_norm
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


@contextmanager
def loading_whole(accelerator: Accelerator) -> Iterator[None]:
    """Let every process load whole models while the body runs.

    Under FSDP and ZeRO-3 transformers would load some weights on one process only, or in pieces,
    for a model that is then divided; a teacher is not, and a student is divided afterwards.

    Args:
        accelerator: Knows whether DeepSpeed is at work.

    Yields:
        Nothing.
    """
    names = ("FSDP_CPU_RAM_EFFICIENT_LOADING",)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        os.environ.update(before)
        if plugin is not None:
            plugin.set_deepspeed_weakref()
