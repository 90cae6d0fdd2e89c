"""A run of one of TRL's trainers, from its arguments to the weights that are kept.

A run writes its checkpoints into a scratch folder. A checkpoint counts once it is whole, and a run
that was killed goes on from the newest one. What its steps and evaluations found is noted in
``metrics.jsonl``, from which the steps that are done again are cut off. Of all evaluations the best
weights are kept, or the last.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from mistill.errors import TrainingError
from mistill.folders.publishing import replacing, write_json
from mistill.folders.renaming import remove
from mistill.progress import Tracker, track
from mistill.pytorch.products import fast_products
from mistill.training.metrics import Metrics
from mistill.training.processes import this_process
from tune.trainers.library import quiet_trl

_log = logging.getLogger(__name__)

_WHOLE = "whole"
# What a trainer logs and a resumed one counts from 0 again, or means of the means of micro-batches.
_UNTOLD = ("epoch", "num_tokens", "mean_token_accuracy", "entropy", "step_time")
_END_FILE = "end.json"

Evaluate = Callable[[int], Mapping[str, float]]
"""Evaluates the model after a number of steps; its figures hold ``loss``, lower being better."""


@dataclass(frozen=True)
class Run:
    """How a run went.

    Attributes:
        steps: Optimizer steps.
        kept_step: The step whose weights are kept.
        again: Steps that were done a second time, because the run was interrupted.
        judged: Figures of every evaluation, by step.
        stopped: Why the run ended before its time; None if it did not.
    """

    steps: int
    kept_step: int
    again: int
    judged: dict[int, dict[str, float]]
    stopped: str | None = None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are trained, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def in_float32(model: nn.Module) -> None:
    """Store what is trained in float32, in place.

    TRL casts adapters beside a quantized model to bfloat16, in which a number moves only by steps
    of more than a 512th of itself: at the learning rates of preferences nearly none does.

    Args:
        model: Any model; what is frozen is left as it is.
    """
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()


class Watch(TrainerCallback):
    """Notes, evaluates and keeps while a trainer runs."""

    def __init__(
        self,
        work: Path,
        *,
        steps: int,
        metrics: Metrics,
        progress: Tracker,
        evaluate: Evaluate | None,
        every: int,
        keep: str,
        stop: Callable[[Mapping[str, float]], str | None] = lambda logs: None,
    ) -> None:
        """Begin to watch.

        Args:
            work: The folder of the run.
            steps: Optimizer steps of the run.
            metrics: Where numbers are noted.
            progress: Shows how far the run is.
            evaluate: Evaluates the model; None if it is not evaluated.
            every: Optimizer steps between two evaluations.
            keep: ``best`` or ``last``.
            stop: Says from what a step logged why the run should end now; None lets it go on.
        """
        self.steps, self.every, self.keep = steps, every, keep
        self.judged: dict[int, dict[str, float]] = {}
        self.why_stopped: str | None = None
        self._work, self._metrics, self._progress = work, metrics, progress
        self._evaluate, self._stop = evaluate, stop

    @property
    def kept_step(self) -> int:
        """The step whose weights are kept: the best evaluation's, or the last one's."""
        if not self.judged:
            return 0
        if self.keep == "last":
            return max(self.judged)
        return min(self.judged, key=lambda step: (self.judged[step]["loss"], step))

    def judge(self, step: int, model: nn.Module) -> None:
        """Evaluate the model, and store its weights if they are the ones to keep so far.

        Args:
            step: Optimizer steps done.
            model: The model that is trained.
        """
        figures = {} if self._evaluate is None else dict(self._evaluate(step))
        if not math.isfinite(figures.get("loss", 0.0)):
            raise TrainingError(
                f"the held-out loss is {figures['loss']} after {step} steps; lower learning_rate"
            )
        self.judged[step] = figures
        self._metrics.write(step, held_out=figures)
        if self.kept_step == step and this_process().is_main_process:
            weights = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in trained_parameters(model).items()
            }
            with replacing(kept_file(self._work, step)) as partial:
                save_file(weights, partial)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show and evaluate a step."""
        step = state.global_step
        self._progress.advance(1)
        if step % self.every == 0 or step == self.steps:
            self.judge(step, given["model"])

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note what a step logged, and refuse a loss that is not a number."""
        logs = {
            name: float(value)
            for name, value in given["logs"].items()
            if isinstance(value, int | float) and name not in _UNTOLD
        }
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise TrainingError(
                f"the loss is {logs['loss']} and the gradient's norm {logs.get('grad_norm')} after "
                f"{state.global_step} steps; lower learning_rate (now {args.learning_rate:g})"
            )
        self._metrics.write(state.global_step, **logs)
        self._progress.advance(0, note=f"loss {logs['loss']:.4f}")
        self.why_stopped = self._stop(logs)
        if self.why_stopped is not None and state.global_step not in self.judged:
            self.judge(state.global_step, given["model"])
        if self.why_stopped is not None:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Mark a checkpoint as whole, and remove weights that are not to be kept."""
        processes = this_process()
        processes.wait_for_everyone()  # each writes a file of its own
        if not processes.is_main_process:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _WHOLE).touch()
        best = kept_file(self._work, self.kept_step)
        for file in self._work.glob("kept-*.safetensors"):
            if file != best:
                file.unlink()


def kept_file(work: Path, step: int) -> Path:
    """The file of the weights that were trained for a number of steps."""
    return work / f"kept-{step}.safetensors"


def run_trainer(
    trainer: Any,
    work: Path,
    *,
    steps: int,
    what: str,
    evaluate: Evaluate | None,
    every: int,
    keep: str = "best",
    stop: Callable[[Mapping[str, float]], str | None] = lambda logs: None,
) -> Run:
    """Train to the end, from the newest whole checkpoint, and load the weights that are kept.

    Args:
        trainer: A trainer of TRL, whose model is in float32 where it is trained.
        work: The folder of the run.
        steps: Optimizer steps.
        what: Name of the work, for its progress.
        evaluate: Evaluates the model; None if it is not evaluated.
        every: Optimizer steps between two evaluations.
        keep: Which weights are kept: ``best`` or ``last``.
        stop: Says from what a step logged why the run should end now; None lets it go on.

    Returns:
        How the run went; the trainer's model holds the weights that are kept.

    Raises:
        TrainingError: If the loss is not a number.
    """
    from transformers.trainer_callback import PrinterCallback

    ended, processes = work / _END_FILE, this_process()
    if not ended.is_file():
        metrics = Metrics(work, trainer.accelerator, {})
        lost = again = 0
        if processes.is_main_process:
            lost, again = _prepared(work, metrics)
        processes.wait_for_everyone()
        checkpoint = _newest(work / "trainer")
        trainer.remove_callback(PrinterCallback)
        with track(what, steps, "steps", done=_step_of(checkpoint)) as progress:
            watch = Watch(
                work,
                steps=steps,
                metrics=metrics,
                progress=progress,
                evaluate=evaluate,
                every=every,
                keep=keep,
                stop=stop,
            )
            watch.judged = _judged(metrics.file)
            if checkpoint is None:
                watch.judge(0, trainer.model)
            trainer.add_callback(watch)
            with quiet_trl(), fast_products():
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
        if watch.why_stopped is not None and processes.is_main_process:
            _log.warning("%s stopped: %s", what, watch.why_stopped)
        document = {
            "steps": trainer.state.global_step,
            "kept_step": watch.kept_step,
            "again": again + lost,
            "stopped": watch.why_stopped,
            "judged": {str(step): figures for step, figures in watch.judged.items()},
        }
        if processes.is_main_process:
            write_json(ended, document)
            shutil.rmtree(work / "trainer", ignore_errors=True)
        processes.wait_for_everyone()
    document = json.loads(ended.read_text("utf-8"))
    judged = {int(step): figures for step, figures in document["judged"].items()}
    run = Run(
        document["steps"], document["kept_step"], document["again"], judged, document["stopped"]
    )
    load_kept(trainer.model, work, run.kept_step)
    if run.again and processes.is_main_process:
        _log.info(
            "%s: %d steps, and %d of them were done again after an interruption",
            what,
            run.steps,
            run.again,
        )
    return run


def _prepared(work: Path, metrics: Metrics) -> tuple[int, int]:
    """Take back what a killed run did after its newest whole checkpoint.

    It says how many steps those were, and how many earlier kills had cost.
    """
    checkpoint = _newest(work / "trainer")
    start = _step_of(checkpoint)
    lost, again = _steps_after(metrics.file, start), _again(work)
    metrics.keep_until(start if checkpoint else -1)
    if lost:
        write_json(work / "again.json", again + lost)
    return lost, again


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def emptied(work: Path) -> None:
    """Remove the state of a run that came to nothing: the same call would end the same way.

    Args:
        work: The folder of the run.
    """
    if not this_process().is_main_process:
        return
    for item in work.iterdir():
        if item.name != "lock":
            remove(item)


def load_kept(model: nn.Module, work: Path, step: int) -> None:
    """Give a model the weights that were kept, in place.

    Args:
        model: The model that was trained.
        work: The folder of the run.
        step: The step whose weights are kept.
    """
    weights = load_file(kept_file(work, step))
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(weights[name])


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; what a killed process left half written is removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _WHOLE).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=_step_of, default=None)


def _entries(file: Path) -> list[dict[str, Any]]:
    """The lines of the metrics, up to one that a kill cut short."""
    entries = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def metric_means(file: Path) -> dict[str, float]:
    """Means over all steps of what was noted at each, and the last of each as ``last NAME``.

    Args:
        file: The metrics of a run.

    Returns:
        Numbers by name.
    """
    values: dict[str, list[float]] = {}
    for entry in _entries(file):
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "step":
                values.setdefault(name, []).append(float(value))
    means = {name: sum(some) / len(some) for name, some in values.items()}
    return means | {f"last {name}": some[-1] for name, some in values.items()}


def _steps_after(file: Path, start: int) -> int:
    """How many steps were done after a checkpoint, as far as they were noted."""
    return len({entry["step"] for entry in _entries(file) if entry["step"] > start})


def _again(work: Path) -> int:
    """Steps that earlier interruptions made this run do again."""
    file = work / "again.json"
    return int(json.loads(file.read_text("utf-8"))) if file.is_file() else 0


def _judged(file: Path) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry["held_out"] for entry in _entries(file) if "held_out" in entry}
