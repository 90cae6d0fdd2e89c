"""What a run of one of TRL's trainers ends in, and how it is measured and written.

Beside float weights the model that was trained is the model that is published. Beside weights in 4
bits it is not: the adapter is merged in two ways, and each is measured as it would be published,
against the model that came.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mistill.folders.folder import FolderInfo, open_folder
from mistill.pytorch.loading import load_pytorch
from mistill.training.metrics import copy_metrics
from mistill.training.processes import this_process
from tune.settings import Base, Keep
from tune.trainers.merged_folder import best_merge, merged_folders, require_better
from tune.trainers.placing import place_for
from tune.trainers.running import Run
from tune.trainers.tuned_folder import ADAPTER_FOLDER, write_adapter, write_merged


class EndSettings(Protocol):
    """What the end of a run depends on; the settings of every trainer have these."""

    @property
    def base(self) -> Base:
        """How frozen weights were held."""

    @property
    def keep(self) -> Keep:
        """Which of the evaluated models is kept."""

    @property
    def lora_rank(self) -> int:
        """Rank of the adapters; 0 for none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class End:
    """The model that a run ends in.

    Attributes:
        before: Figures of the model that came.
        after: The same figures of the model that is published.
        model: That model, or the one of peft that it is; to be looked at.
        folder: Its folder, where it was made by merging; None where ``model`` is written.
        merging: What a report says of the ways to merge; empty where there is one alone.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    model: Any
    folder: Path | None
    merging: Mapping[str, Any]

    @property
    def told(self) -> dict[str, Any]:
        """What reports and the lineage say of it."""
        return {"before": self.before, "after": self.after, **self.merging}


def end_as_trained(run: Run, model: Any) -> End:
    """The end of a run whose trained model is published as it is.

    Args:
        run: The run.
        model: The trainer's model, with the weights that are kept.

    Returns:
        Its end.
    """
    before, after = run.judged[0], run.judged[run.kept_step]
    return End(before=before, after=after, model=model, folder=None, merging={})


def merged_end(
    work: Path,
    info: FolderInfo,
    run: Run,
    model: Any,
    base: str,
    settings: EndSettings,
    dtype: torch.dtype,
    *,
    before: Mapping[str, Any],
    measure: Callable[[Any], Mapping[str, Any]],
) -> End:
    """The end of a run over weights in 4 bits: the better one of its merges.

    Args:
        work: The folder of the run.
        info: The model that came.
        run: The run.
        model: The trainer's model, with the weights that are kept.
        base: The name of the model that came.
        settings: How it was trained.
        dtype: The type in which its weights were quantized.
        before: Figures of the model that came, with a ``loss``.
        measure: The same figures of any model.

    Returns:
        Its end.

    Raises:
        TrainingError: If the best evaluation was to be kept, and no merged model is better than the
            model that came.
    """
    adapter = work / ADAPTER_FOLDER
    shutil.rmtree(adapter, ignore_errors=True)
    write_adapter(model, adapter, base)
    device = next(model.parameters()).device
    folders = merged_folders(work, info, adapter, settings.base, dtype)
    merge = best_merge(folders, lambda folder: measure(load_to_look_at(folder, device)))
    trained = [run.judged[step]["loss"] for step in (0, run.kept_step)]
    if settings.keep == "best":
        require_better(before["loss"], merge.figures["loss"], *trained, measure="of held-out loss")
    return End(
        before=before,
        after=merge.figures,
        model=load_to_look_at(merge.folder, device),
        folder=merge.folder,
        merging={
            "trained_before": run.judged[0],
            "trained_after": run.judged[run.kept_step],
            "merges": merge.losses,
            "merged_into": merge.into,
        },
    )


def load_to_look_at(folder: Path, device: torch.device) -> Any:
    """A model in float32, where it fits.

    Args:
        folder: A folder of a language model.
        device: The device that trains.

    Returns:
        The model, in eval mode.
    """
    parameters = open_folder(folder).parameters
    model: Any = load_pytorch(folder, torch.float32)
    return model.to(place_for(parameters * torch.float32.itemsize, device))


def write_end(work: Path, info: FolderInfo, base: str, end: End, settings: EndSettings) -> None:
    """Gather in ``work/result`` the published model, its adapter and the numbers of the run.

    Args:
        work: The folder of the run.
        info: The model that came.
        base: Its name.
        end: What the run ended in.
        settings: How it was trained.
    """
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    if end.folder is not None:
        shutil.move(end.folder, result)
    else:
        result.mkdir()
        if settings.lora_rank:
            write_adapter(end.model, result / ADAPTER_FOLDER, base)
        write_merged(end.model, info.path, result)
    copy_metrics(work, result)


def facts_of(run: Run) -> dict[str, Any]:
    """What a report says of a run.

    Args:
        run: The run.

    Returns:
        Its steps, the one that is kept, those that were done twice, the processes, and every
        evaluation.
    """
    return {
        "steps": run.steps,
        "kept_step": run.kept_step,
        "steps_done_again": run.again,
        "processes": this_process().num_processes,
        "evaluations": {str(step): figures for step, figures in run.judged.items()},
    }
