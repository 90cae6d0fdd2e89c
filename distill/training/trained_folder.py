"""Distillation from folder to folder.

Everything that can be wrong with the settings, the folders, the vocabularies and the text is found
before a weight is read. Then the loop of ``mistill.training.loop`` runs in a hidden folder
beside the target, where it keeps its checkpoints, so that the same call resumes what was
interrupted. The target appears when there is a student that got better, and not before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from distill.settings import TrainSettings
from distill.training.starts import with_learning_rate
from distill.training.teacher_source import (
    CachedSource,
    LiveSource,
    day_of_the_text,
    open_cached,
)
from mistill.errors import FolderError, SettingsError, TrainingError, VocabularyError
from mistill.folders.folder import FolderInfo, copy_companions, open_folder
from mistill.folders.lineage import add_lineage, file_name, fingerprint
from mistill.folders.publishing import publish, refuse_existing
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import open_weights, resolve_model
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts, sources_of
from mistill.text.vocabulary import Vocabulary, load_vocabulary, same_vocabulary
from mistill.training.together import keeping_the_best, working_together
from mistill.training.training_text import read_blocks

if TYPE_CHECKING:
    from accelerate import PartialState

    from distill.options import TrainOptions
    from distill.training.evaluation import Evaluation
    from mistill.training.metrics import Watch
    from mistill.training.progress import TrainingProgress

_log = logging.getLogger(__name__)

# Settings that may change while a run is interrupted: they decide how long a step takes, how much
# memory it needs and what is noted on the way, not what is learned.
_SAME_RESULT = (
    "checkpoint_every",
    "divide_teacher",
    "evaluate_every",
    "gradient_checkpointing",
    "loss_memory_mib",
    "micro_batch_size",
    "teacher_device_map",
    "trackers",
    "twin",
)


def train(
    student: str | Path,
    target: str | Path,
    *,
    teacher: str | Path | None = None,
    targets: str | Path | None = None,
    texts: Texts,
    held_out: Texts | None = None,
    settings: TrainSettings | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
    **options: Unpack[TrainOptions],
) -> Path:
    """Teach a student to predict what its teacher predicts.

    The loss is by default KL(teacher || student) at every token to be predicted. The student is
    judged on held-out text before, during and after; the best one found is what the target holds,
    in float32. An interrupted call resumes from its last checkpoint when it is made again, and ends
    with the same weights, bit for bit on a CPU, as if it had not been interrupted.

    The teacher is a model that runs beside the student, or a folder of what one said about the
    same texts, made by ``distill.cache_targets``: exactly one of the two.

    Under ``accelerate launch`` or torchrun every process makes the same call; one of them writes.

    A student that never got better than it came is a failure: nothing is published, and the
    state of the run is removed, since the same call would end the same way.

    Args:
        student: The folder of the student, with float weights.
        target: The folder to make: the trained student, ``metrics.jsonl``, its fidelity card
            ``fidelity.json`` and, if asked for, ``tensorboard/``.
        teacher: The model to imitate, in any form that PyTorch runs; the same vocabulary.
        targets: What it said about the texts and the held-out texts.
        texts: Text or conversations to learn from.
        held_out: Text to judge the student on; part of ``texts``, by document, if not given.
        settings: How to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        watch: Called with the numbers of every step and every judgement, as ``metrics.jsonl`` holds
            them: to draw them, or to end the run by an exception, from where the same call resumes.
        **options: Fields of ``TrainSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or a block does not fit the models' context.
        FolderError: If a folder is missing or broken, or two of the three are the same.
        VocabularyError: If student and teacher do not share every token.
        TextError: If there is too little text, or text that the targets do not know.
        TrainingError: If the student got no better, or the loss was not a number.
        MissingExtraError: If a library is asked for that is not installed.
    """
    settings = settings_from(TrainSettings, settings, options)
    sources = [path for path in (student, teacher, targets) if path is not None]
    target = refuse_existing(target, overwrite, sources)
    _require_one_teacher(teacher, targets, settings)
    _require_libraries(settings)
    for some_texts in (texts, held_out):
        if some_texts is not None:
            check_texts(some_texts, skip_bad_rows=settings.skip_bad_rows)
    student_info = _student_folder(student)
    settings = with_learning_rate(settings, student_info.path)
    vocabulary = load_vocabulary(student_info.path, today=day_of_the_text(target, targets))
    longest = student_info.context_length
    teacher_info = None
    if teacher is not None:
        teacher_info = _teacher_folder(teacher, settings)
        _refuse_same_model(student, student_info, teacher, teacher_info)
        _require_shared(vocabulary, student_info, teacher_info)
        longest = min(longest, teacher_info.context_length)
    require(
        settings.block_length <= longest,
        f"a block_length of {settings.block_length} does not fit the models' context of {longest}; "
        "lower it",
    )
    training, judged = read_blocks(
        texts, held_out, vocabulary, settings, kept_back=settings.kept_back_share
    )
    if settings.epochs is not None:
        tokens = max(1, round(settings.epochs * training.tokens))
        settings = replace(settings, tokens=tokens, epochs=None)
    source: LiveSource | CachedSource
    if teacher_info is not None:
        source = LiveSource(teacher_info)
    else:
        assert targets is not None, "one of the two is given"
        source = open_cached(targets, vocabulary, training, judged, settings)

    from mistill.training.metrics import watched_by
    from mistill.training.processes import this_process

    state = this_process()
    key = {
        "settings": result_settings(settings, *_SAME_RESULT),
        "student": fingerprint(student_info.path),
        "teacher": source.fingerprint,
        "texts": training.digest,
        "held_out": judged.digest,
        "processes": state.num_processes,
        **vocabulary.date_key,
    }
    with working_together(target, key, state, overwrite) as work, source.closing():
        with keeping_the_best(work, student_info.path, state):
            with watched_by(watch):
                progress = _train_in(work, student_info, source, training, judged, settings, work)
            if progress.best_step == 0:
                raise TrainingError(_complaint(progress, settings))
            twins = (
                _train_twins(work, student_info, source, training, judged, settings, progress)
                if settings.twin
                else (None, None)
            )
        if state.is_main_process:
            text_names = {"texts": _named(texts), "held_out": _named(held_out)}
            _finish(work, progress, twins, student_info, source, settings, state, text_names)
            publish(work, target, overwrite)
        state.wait_for_everyone()
    return target


# --- before -------------------------------------------------------------------------------------


def _student_folder(student: str | Path) -> FolderInfo:
    info = open_folder(resolve_model(student))
    if info.form != "model":
        raise FolderError(
            f"{student} holds {info.form} weights, which cannot be trained; give the float "
            "student that they were made from"
        )
    return info


def _teacher_folder(teacher: str | Path, settings: TrainSettings) -> FolderInfo:
    info = open_weights(teacher)
    if (
        settings.teacher_precision == "nf4"
        or settings.teacher_device_map is not None
        or settings.divide_teacher
    ):
        from distill.teacher.live_teacher import require_teacher

        require_teacher(info, settings)
    return info


def _require_one_teacher(
    teacher: str | Path | None, targets: str | Path | None, settings: TrainSettings
) -> None:
    if (teacher is None) == (targets is None):
        count = "neither is" if teacher is None else "both are"
        raise SettingsError(
            "give either teacher, a model that runs, or targets, a folder of what one said; "
            f"{count} given"
        )
    if targets is None:
        return
    wrong = {
        "divergence": (settings.divergence, "forward_kl"),
        "on_policy": (settings.on_policy, 0.0),
        "teacher_precision": (settings.teacher_precision, "auto"),
        "teacher_device_map": (settings.teacher_device_map, None),
        "divide_teacher": (settings.divide_teacher, False),
    }
    for name, (value, default) in wrong.items():
        require(
            value == default,
            f"{name} = {value} needs the teacher itself, and targets hold a part of what it said "
            f"about given texts; leave {name} at {default} or give the teacher",
        )


def _require_libraries(settings: TrainSettings) -> None:
    from mistill.training.metrics import require_trackers

    require_trackers(settings.trackers)
    if settings.optimizer != "adamw":
        from mistill.training.optimizers import require_optimizer

        require_optimizer(settings.optimizer)
    if settings.lora_rank:
        from mistill.training.adapters import require_peft

        require_peft()


def _require_one_process(settings: TrainSettings, processes: int) -> None:
    """Refuse a device map, with which one process uses all GPUs, in several processes."""
    require(
        settings.teacher_device_map is None or processes == 1,
        f"teacher_device_map lets one process use all GPUs, and there are {processes} processes; "
        "start one process, or set divide_teacher",
    )


def _refuse_same_model(
    student: str | Path, student_info: FolderInfo, teacher: str | Path, teacher_info: FolderInfo
) -> None:
    if fingerprint(student_info.path) == fingerprint(teacher_info.path):
        raise FolderError(
            f"{student} and {teacher} are the same model, which has nothing to learn from itself; "
            "make a student with distill.new_student"
        )
    if student_info.parameters > teacher_info.parameters:
        _log.warning(
            "the student %s has %.1f million parameters and its teacher %s only %.1f; are they "
            "swapped?",
            student,
            student_info.parameters / 1e6,
            teacher,
            teacher_info.parameters / 1e6,
        )


def _require_shared(ours: Vocabulary, student: FolderInfo, teacher: FolderInfo) -> None:
    differences = same_vocabulary(ours, load_vocabulary(teacher.path))
    if student.vocabulary_size != teacher.vocabulary_size and not differences:
        differences = [f"{student.vocabulary_size} rows against {teacher.vocabulary_size}"]
    if differences:
        raise VocabularyError(
            f"student and teacher have different vocabularies: {'; '.join(differences)}; make "
            "the student with distill.new_student so that both share one tokenizer"
        )


# --- during and after ---------------------------------------------------------------------------


def _train_in(
    work: Path,
    student_info: FolderInfo,
    source: LiveSource | CachedSource,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
    home: Path,
) -> TrainingProgress[Evaluation]:
    """Train to the end, in a folder of its own inside that of the whole call."""
    import torch

    from distill.training.evaluation import Evaluation
    from distill.training.trainer import train_student
    from mistill.pytorch.loading import load_pytorch
    from mistill.training.checkpoints import run_once
    from mistill.training.processes import accelerating, loading_whole

    with accelerating(settings, logs=work) as accelerator:
        _require_one_process(settings, accelerator.num_processes)
        if accelerator.is_main_process:
            work.mkdir(exist_ok=True)

        def run() -> TrainingProgress[Evaluation]:
            with loading_whole(accelerator):
                teacher = source.open(home, judged, settings, accelerator)
                student = load_pytorch(student_info.path, dtype=torch.float32)
            return train_student(
                student,
                teacher,
                training,
                judged,
                settings,
                accelerator=accelerator,
                work=work,
            )

        return run_once(work, accelerator, Evaluation, run)


def _train_twins(
    work: Path,
    student_info: FolderInfo,
    source: LiveSource | CachedSource,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
    student: TrainingProgress[Evaluation],
) -> tuple[TrainingProgress[Evaluation] | None, TrainingProgress[Evaluation] | None]:
    """Train the same student from the text alone, for equal tokens and for equal time.

    A twin that comes to nothing takes nothing from the student: it is None, and so is the one
    whose length would have followed from it.
    """
    from distill.training.fidelity import twin_settings

    def train_twin(name: str, settings: TrainSettings) -> TrainingProgress[Evaluation] | None:
        try:
            return _train_in(work / name, student_info, source, training, judged, settings, work)
        except TrainingError as error:
            _log.warning("the fidelity card will lack a twin, which learnt from text: %s", error)
            return None

    equal_tokens = train_twin("twin-of-equal-tokens", twin_settings(settings, student, None))
    if equal_tokens is None:
        return None, None
    longer = twin_settings(settings, student, equal_tokens)
    return equal_tokens, train_twin("twin-of-equal-time", longer)


def _complaint(progress: TrainingProgress[Evaluation], settings: TrainSettings) -> str:
    """Why there is no student to publish."""
    return (
        f"the student got no better: its held-out KL was {progress.before.kl:.4f} nats before "
        f"and {progress.last.kl:.4f} after {progress.tokens} tokens; lower learning_rate "
        f"(now {settings.peak_learning_rate:g}) or train on more tokens"
    )


def _named(texts: Texts | None) -> list[str]:
    """Text as it was given."""
    return [] if texts is None else list(sources_of(texts))


def _finish(
    work: Path,
    progress: TrainingProgress[Evaluation],
    twins: Sequence[TrainingProgress[Evaluation] | None],
    student: FolderInfo,
    source: LiveSource | CachedSource,
    settings: TrainSettings,
    state: PartialState,
    text_names: Mapping[str, list[str]],
) -> None:
    """Gather in ``work/result`` what the target will hold."""
    from distill.training.fidelity import FidelityCard, trained
    from mistill.training.loop import best_model
    from mistill.training.metrics import copy_metrics

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(best_model(work, progress.best_step), result)
    copy_companions(student.path, result)
    copy_metrics(work, result)
    facts = source.facts(work)
    equal_tokens, equal_time = (None if twin is None else trained(twin) for twin in twins)
    card = FidelityCard(
        teacher=str(file_name(facts["teacher"])),
        before=progress.before,
        student=trained(progress),
        twin_of_equal_tokens=equal_tokens,
        twin_of_equal_time=equal_time,
    )
    card.save(result)
    add_lineage(
        result,
        step="distill",
        settings=settings,
        source=student.path,
        **facts,
        **text_names,
        before=asdict(progress.before),
        after=asdict(progress.best),
        steps=progress.step,
        kept_step=progress.best_step,
        tokens=progress.tokens,
        kept_positions=progress.positions,
        seconds=round(progress.seconds, 1),
        processes=state.num_processes,
        distributed=state.distributed_type.value,
    )
