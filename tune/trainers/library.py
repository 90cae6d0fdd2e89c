"""TRL as a library that trains and does nothing else.

Out of the box a trainer of TRL reports its construction to a server, writes a model card into each
checkpoint, warns of options that mistill does not touch, prints logs of its own and stores
adapters beside a quantized model in bfloat16, in which steps of DPO's size vanish. Here it does
none of that.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from mistill.errors import missing_extra
from mistill.settings import environment_number
from mistill.training.processes import micro_batches, require_copies
from mistill.training.schedule import learning_rate_at
from tune.settings import TrainerSettings

# What transformers says while TRL makes a trainer, about its own names.
_OWN_NAMES = r".*(gradient_checkpointing|is_gradient_checkpointing).*"


def require_trl(settings: TrainerSettings) -> None:
    """Refuse to train without the libraries for it, or in processes that cannot share the work.

    Args:
        settings: How to train.

    Raises:
        MissingExtraError: If TRL or peft is not installed.
        SettingsError: If a launcher has started several processes, and they cannot share the work.
    """
    for library in ("trl", "peft"):
        if find_spec(library) is None:
            raise missing_extra(library, "tune")
    processes = environment_number("WORLD_SIZE", 1, 1)
    require_copies()
    micro_batches(settings.batch_size, settings.micro_batch_size, processes)


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Keep TRL and transformers from warnings that concern their own code while the body runs.

    Yields:
        Nothing.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when the library is imported
    import datasets

    from mistill.pytorch.loading import quiet_transformers

    names = ("trl", "transformers", "peft", "accelerate", "bitsandbytes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with warnings.catch_warnings(), quiet_transformers():
        warnings.filterwarnings("ignore", _OWN_NAMES, FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


def quiet_class(trainer: Any, **methods: Any) -> Any:
    """A class of TRL that sends nothing and writes no model cards.

    Args:
        trainer: The class.
        **methods: Methods to replace.

    Returns:
        A class derived from it.
    """
    return type(
        trainer.__name__,
        (trainer,),
        {
            "_send_telemetry": _nothing,
            "create_model_card": _nothing,
            "create_scheduler": _own_schedule,
            **methods,
        },
    )


def _nothing(self: Any, *args: Any, **options: Any) -> None:
    """Send nothing, and write nothing."""


def _own_schedule(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    """The schedule of mistill's own training, whose first step has a rate above 0."""
    from torch.optim.lr_scheduler import LambdaLR

    warmup = self.args.warmup_steps / num_training_steps

    def share(step: int) -> float:
        last = min(step, num_training_steps - 1)
        return learning_rate_at(last, num_training_steps, peak=1.0, warmup=warmup)

    self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, share)
    return self.lr_scheduler


def as_given(self: Any, dataset: Any, *args: Any) -> Any:
    """Take rows whose tokens and reference log-probabilities mistill has computed already."""
    return dataset
