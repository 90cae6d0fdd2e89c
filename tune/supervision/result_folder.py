"""What a run of supervised tuning leaves: a plain model folder, and what it is worth.

The adapter is merged in every way there is, each is measured on the held-out text as it would be
published, and the one that the text costs least is taken.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.folders.folder import FolderInfo, copy_companions
from tune.settings import SupervisedSettings
from tune.supervision.reading import Reading
from tune.trainers.other_text import OtherText
from tune.trainers.placing import place_for
from tune.trainers.tuned_folder import write_report

if TYPE_CHECKING:
    from accelerate import PartialState

    from mistill.text.vocabulary import Vocabulary
    from mistill.training.progress import TrainingProgress
    from tune.supervision.report import Look
    from tune.supervision.trainer import HeldOut

_log = logging.getLogger(__name__)


def gather_result(
    work: Path,
    progress: TrainingProgress[HeldOut],
    info: FolderInfo,
    reading: Reading,
    other: OtherText | None,
    vocabulary: Vocabulary,
    settings: SupervisedSettings,
    state: PartialState,
) -> dict[str, Any]:
    """Gather in ``work/result`` what the target will hold, and say what tuning did.

    Args:
        work: The folder of the run.
        progress: Its end.
        info: The model that came.
        reading: The text.
        other: Text that the model is not tuned on; None for none.
        vocabulary: The model's.
        settings: How it was tuned.
        state: Knows the processes and the device.

    Returns:
        Facts for the lineage.

    Raises:
        TrainingError: If what was trained got better and the merged model did not.
    """
    import torch

    from mistill.training.adapters import load_adapters
    from mistill.training.loop import best_model
    from mistill.training.metrics import copy_metrics
    from tune.supervision.report import TuningReport, look_at
    from tune.trainers.merged_folder import merged_folders, moved_entries, require_better
    from tune.trainers.moved import comparison, on_other_text

    result, best = work / "result", best_model(work, progress.best_step)
    on_gpu = state.device.type != "cpu" and settings.precision != "float32"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    device = place_for(info.parameters * dtype.itemsize, state.device)

    def look(folder: Path) -> Look:
        return look_at(
            folder,
            reading.judged,
            None if other is None else other.blocks,
            reading.prompts,
            vocabulary,
            reply_tokens=settings.reply_tokens,
            device=device,
            dtype=dtype,
        )

    base = look(info.path)
    adapters = load_adapters(best) if settings.lora_rank else None
    if adapters is None:
        candidates = {"whole": _whole(work, info, best)}
    else:
        candidates = merged_folders(work, info, best, settings.base, dtype)
    looks = {name: look(folder) for name, folder in candidates.items()}
    chosen = min(looks, key=lambda name: looks[name].cross_entropy)
    for name, one in looks.items():
        _log.info("merged into the %s weights: cross-entropy %.4f", name, one.cross_entropy)
    require_better(
        base.cross_entropy,
        looks[chosen].cross_entropy,
        progress.before.cross_entropy,
        progress.best.cross_entropy,
        measure="nats of held-out cross-entropy",
    )
    shutil.rmtree(result, ignore_errors=True)
    shutil.move(candidates[chosen], result)
    copy_metrics(work, result)
    names = None if adapters is None else {f"{name}.weight" for name in adapters}
    moved, entries = moved_entries(info, result, names)
    merges = {name: one.cross_entropy for name, one in looks.items()} if adapters else {}
    tuned = looks[chosen]
    other_text = None
    if other is not None and base.other is not None and tuned.other is not None:
        other_text = on_other_text(base.other, tuned.other, other)
    report = TuningReport(
        **comparison(base.held_out, tuned.held_out, reading.judged),
        other_text=other_text,
        trained_before=progress.before.cross_entropy,
        trained_after=progress.best.cross_entropy,
        merges=merges,
        merged_into=chosen if adapters else None,
        entries=entries,
        entries_moved=moved / entries,
        rows=reading.rows,
        rows_passed_over=reading.passed_over,
        rows_left_out=reading.left_out,
        replies=[
            {"prompt": vocabulary.decode(prompt), "before": before, "after": after}
            for prompt, before, after in zip(
                reading.prompts, base.replies, tuned.replies, strict=True
            )
        ],
    )
    write_report(result, asdict(report))
    return {
        "before": report.before,
        "after": report.after,
        "merges": merges,
        "merged_into": report.merged_into,
        "kl": report.kl,
        "other_text": other_text,
        "steps": progress.step,
        "kept_step": progress.best_step,
        "tokens": progress.tokens,
        "kept_positions": progress.positions,
        "seconds": round(progress.seconds, 1),
        "processes": state.num_processes,
        "distributed": state.distributed_type.value,
    }


def _whole(work: Path, info: FolderInfo, best: Path) -> Path:
    """The folder of a model whose weights were all trained."""
    from tune.trainers.merged_folder import write_plain_config

    whole = work / "merged-whole"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(best, whole)
    if not (info.path / "generation_config.json").is_file():
        (whole / "generation_config.json").unlink(missing_ok=True)
    write_plain_config(info, whole, "float32")
    copy_companions(info.path, whole)
    return whole
