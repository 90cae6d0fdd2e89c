"""The state of a run on disk: whole or not there, and all that the next bits depend on."""

from __future__ import annotations

import json
import logging
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mistill.folders.publishing import write_json
from mistill.folders.renaming import rename_synced
from mistill.training.progress import EvaluationT, TrainingProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

_READ_AT_ONCE = 1 << 20
_END_FILE = "end.json"
_PROGRESS_FILE = "progress.json"
_TRAINED_FILE = "trained-{}.safetensors"


def leave_out_frozen(accelerator: Accelerator) -> None:
    """Let checkpoints hold of a model what is trained, where most of it is frozen.

    A model with adapters has its frozen weights on disk already, and a checkpoint of them would
    take seconds and gigabytes. Where FSDP or DeepSpeed divide a model they write it whole, in
    their own form.

    Args:
        accelerator: Its checkpoints; models are prepared by it afterwards or before.
    """
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        return
    accelerator.register_save_state_pre_hook(_save_trained)
    accelerator.register_load_state_pre_hook(_load_trained)


def _save_trained(models: list[Any], weights: list[Any], folder: str) -> None:
    """Save the parameters that are trained in place of whole state dicts."""
    from accelerate import PartialState
    from safetensors.torch import save_file

    weights.clear()  # accelerate writes what is left in the list
    if PartialState().is_main_process:
        for number, model in enumerate(models):
            tensors = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
            save_file(tensors, Path(folder) / _TRAINED_FILE.format(number), {"format": "pt"})


def _load_trained(models: list[Any], folder: str) -> None:
    from safetensors.torch import load_file

    for number, model in enumerate(models):
        tensors = load_file(Path(folder) / _TRAINED_FILE.format(number))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[name])
    models.clear()


def save_checkpoint(
    work: Path, accelerator: Accelerator, step: int, progress: Mapping[str, Any]
) -> None:
    """Write the whole state of a run, so that it appears whole or not at all.

    Args:
        work: The folder of the run; older checkpoints in it are removed.
        accelerator: Holds model, optimizer and random number generators.
        step: Optimizer steps done.
        progress: How far the run has come, as a JSON document.
    """
    folder = work / f"checkpoint-{step}"
    partial = work / f"{folder.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {file.name: _checksum(file) for file in partial.iterdir() if file.is_file()}
        document = {"progress": progress, "files": files}
        write_json(partial / _PROGRESS_FILE, document)
        shutil.rmtree(folder, ignore_errors=True)
        rename_synced(partial, folder)
        remove_others(work, "checkpoint-", str(step))


def load_checkpoint(work: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Go back to the newest checkpoint of a run that is whole.

    One that is damaged, as a power cut may leave it, is passed over with a warning.

    Args:
        work: The folder of the run.
        accelerator: Its model, optimizer and random number generators are set.

    Returns:
        How far the run had come, as it was saved; None if there is no checkpoint.
    """
    accelerator.wait_for_everyone()
    steps = [
        int(folder.name.removeprefix("checkpoint-"))
        for folder in work.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    ]
    for step in sorted(steps, reverse=True):
        folder = work / f"checkpoint-{step}"
        progress = _read_whole(folder)
        if progress is not None:
            accelerator.load_state(str(folder))
            return progress
        _log.warning("the checkpoint of step %d in %s is damaged and is passed over", step, work)
    return None


def _read_whole(folder: Path) -> dict[str, Any] | None:
    """The progress in a checkpoint; None if a file of it is missing or was cut short."""
    try:
        document = json.loads((folder / _PROGRESS_FILE).read_text("utf-8"))
        progress, files = document["progress"], document["files"]
        is_whole = all(_checksum(folder / name) == checksum for name, checksum in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return progress if is_whole and isinstance(progress, dict) else None


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(_READ_AT_ONCE):
            checksum = zlib.crc32(part, checksum)
    return checksum


def run_once(
    work: Path,
    accelerator: Accelerator,
    evaluation: type[EvaluationT],
    run: Callable[[], TrainingProgress[EvaluationT]],
) -> TrainingProgress[EvaluationT]:
    """Run to the end and note it; a run that has ended before is not run again.

    Args:
        work: The folder of the run, which all processes see.
        accelerator: Knows the processes.
        evaluation: The dataclass of an evaluation.
        run: Trains, in every process.

    Returns:
        The end of the run.
    """
    accelerator.wait_for_everyone()
    end = work / _END_FILE
    if end.exists():
        return TrainingProgress.from_dict(json.loads(end.read_text("utf-8")), evaluation)
    progress = run()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(end, progress.to_dict())
    accelerator.wait_for_everyone()
    return progress


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
def own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch's generators inside, and leave all generators of the process as they were.

    Args:
        seed: Of PyTorch's generators.

    Yields:
        Nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
