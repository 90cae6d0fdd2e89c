"""Train the scales and norms of a quantized model, whose codes stay as they are.

Trained are one factor for each scale and the weights of the norms, a few per cent of the bytes, by
lowering KL(teacher || quantized) on text for some tens of steps (compare norm tuning, Li et al.,
2023, https://arxiv.org/abs/2309.02784, and learned scales, Chen et al., 2024, section 3.2,
https://arxiv.org/abs/2407.11062). Scales are rounded to the type they are stored in before KL is
measured, and the model is published only if its KL on held-out text is lower.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from mistill.errors import FolderError, TextError, TrainingError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import add_lineage, fingerprint, installed_versions, read_lineage
from mistill.folders.publishing import begun_on, publish, refuse_existing
from mistill.measures.kl import Fidelity
from mistill.pytorch.loading import require_finite_weights
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts
from mistill.text.vocabulary import load_vocabulary
from mistill.training.checkpoints import run_once
from mistill.training.kept_back import share_not_seen
from mistill.training.loop import best_model
from mistill.training.metrics import copy_metrics, require_trackers
from mistill.training.processes import accelerating, require_copies, this_process
from mistill.training.progress import TrainingProgress
from mistill.training.together import keeping_the_best, working_together
from quantize.calibration_text import draw_up_to
from quantize.measuring.fidelity import open_teacher
from quantize.scales.scale_training import ScaledModel, train_scales
from quantize.settings import TuningSettings

if TYPE_CHECKING:
    from quantize.options import TuningOptions

# What a run may do otherwise and end with the same scales.
_SAME_RESULT = (
    *("checkpoint_every", "evaluate_every", "gradient_checkpointing", "loss_memory_mib"),
    *("micro_batch_size", "trackers"),
)


def tune(
    source: str | Path,
    target: str | Path,
    *,
    teacher: str | Path,
    texts: Texts,
    held_out: Texts | None = None,
    settings: TuningSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[TuningOptions],
) -> Path:
    """Train the scales and norms of a GPTQ folder against a teacher.

    The teacher reads the texts first, one of its layers in memory at a time; its last hidden
    states wait on disk while the quantized model, as its codes, is trained alone. KL on held-out
    text is measured before and after, and in between where that is asked for; the best model
    found is kept. The same call resumes after an interruption. Under ``accelerate launch`` or
    torchrun every process makes the same call; one of them writes.

    Args:
        source: A GPTQ folder; its codes and zero points are copied byte by byte.
        target: The folder to make, in the same layout, with ``metrics.jsonl`` and, if asked
            for, ``tensorboard/``.
        teacher: The model to imitate: the float one that was quantized, or that one's teacher.
        texts: Text to train on; of several texts, as much of each as far as they go. Best is text
            that neither the model nor its calibration has seen.
        held_out: Text to measure KL on; some of ``texts`` if not given.
        settings: How to tune; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``TuningSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the source is not a GPTQ folder, or one of the two is broken.
        VocabularyError: If the two do not share every token.
        TextError: If there is too little text.
        TrainingError: If the tuned model is no closer to the teacher; nothing is published.
    """
    settings = settings_from(TuningSettings, settings, options)
    require_copies()
    require_trackers(settings.trackers)
    target = refuse_existing(target, overwrite, [source, teacher])
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
    if held_out is not None:
        check_texts(held_out, skip_bad_rows=settings.skip_bad_rows)
    info = open_folder(resolve_model(source))
    if info.form != "gptq":
        raise FolderError(f"{source} is {info.kind}; give a GPTQ folder to tune")
    teacher_info = open_teacher(teacher, info.path)
    longest = min(info.context_length, teacher_info.context_length)
    require(
        settings.block_length <= longest,
        f"a block_length of {settings.block_length} does not fit the models' context of {longest} "
        "tokens; lower it",
    )
    for folder in (info.path, teacher_info.path):
        require_finite_weights(folder)
    today = begun_on(target)
    vocabulary = load_vocabulary(info.path, today=today)
    training, judging = _read_blocks(info.path, texts, held_out, settings, today)
    key = {
        "step": "tune",
        "source": fingerprint(info.path),
        "teacher": fingerprint(teacher_info.path),
        "settings": result_settings(settings, *_SAME_RESULT),
        "processes": this_process().num_processes,
        "versions": installed_versions(),
        "texts": training.digest,
        "held_out": judging.digest,
        **vocabulary.date_key,
    }
    state = this_process()
    with working_together(target, key, state, overwrite) as work:
        with keeping_the_best(work, info.path, state):
            progress = _train(work, info.path, teacher_info.path, training, judging, settings)
            if progress.best_step == 0:
                raise TrainingError(
                    f"tuning changed the KL to {teacher} from {progress.before.kl:.5f} to "
                    f"{progress.last.kl:.5f} nats; the tuned model is not published; lower "
                    f"learning_rate (now {settings.learning_rate:g}) or use the model as it is"
                )
        if state.is_main_process:
            result = work / "result"
            shutil.rmtree(result, ignore_errors=True)
            shutil.copytree(best_model(work, progress.best_step), result)
            copy_metrics(work, result)
            add_lineage(
                result,
                step="tune",
                settings=settings,
                source=info.path,
                teacher=str(teacher_info.path),
                before=asdict(progress.before),
                after=asdict(progress.best),
                kept_step=progress.best_step,
                processes=state.num_processes,
            )
            publish(work, target, overwrite)
        state.wait_for_everyone()
    return target


def _read_blocks(
    folder: Path, texts: Texts, held_out: Texts | None, settings: TuningSettings, today: date
) -> tuple[TokenBlocks, TokenBlocks]:
    """Blocks to train on and blocks to measure on, all with something to predict.

    They are drawn of every text alike, and from more than is needed, as those of a calibration are,
    so that few blocks serve both. Of a text that the model was distilled on, only the documents
    that were kept back then are read.
    """
    lineage = read_lineage(folder)

    def read_blocks(some_texts: Texts, count: int) -> TokenBlocks:
        blocks = draw_up_to(
            count,
            settings.block_length,
            some_texts,
            folder,
            settings.seed,
            skip_bad_rows=settings.skip_bad_rows,
            today=today,
            share_of=lambda name: 1.0 if settings.seen_text else share_not_seen(name, lineage),
        )
        return blocks[np.flatnonzero(blocks.kept.any(axis=1))]

    most, apart = settings.steps * settings.batch_size, settings.held_out_blocks
    if held_out is not None:
        training, judging = read_blocks(texts, most), read_blocks(held_out, apart)
    else:
        blocks = read_blocks(texts, most + apart)
        apart = min(apart, len(blocks) // 2)
        held_out_places = np.linspace(0, len(blocks) - 1, apart).round().astype(np.int64)
        judging = blocks[held_out_places]
        training = blocks[np.setdiff1d(np.arange(len(blocks)), held_out_places)]
    for name, blocks in (("texts", training), ("held_out", judging)):
        if not len(blocks):
            raise TextError(f"{name} fill no block of {settings.block_length} tokens; give more")
    return training, judging


def _train(
    work: Path,
    folder: Path,
    teacher: Path,
    training: TokenBlocks,
    judging: TokenBlocks,
    settings: TuningSettings,
) -> TrainingProgress[Fidelity]:
    """Train to the end; a run that has ended is not run again."""
    with accelerating(settings, logs=work) as accelerator:

        def run() -> TrainingProgress[Fidelity]:
            return train_scales(
                ScaledModel(folder, norms=settings.norms),
                teacher,
                training,
                judging,
                settings,
                accelerator=accelerator,
                work=work,
            )

        return run_once(work, accelerator, Fidelity, run)
