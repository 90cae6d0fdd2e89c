"""Distillation from folder to folder.

Everything that can be wrong with the settings, the folders, the vocabularies and the text is
found before a weight is read. Then the loop of ``distill.trainer`` runs in a hidden folder beside
the target, where it keeps its checkpoints, so that the same call resumes what was interrupted.
The target appears when there is a student that got better, and not before.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.train_settings import TrainSettings
from mistill.errors import FolderError, TextError, TrainingError, VocabularyError, missing_extra
from mistill.folder import (
    FolderInfo,
    add_lineage,
    copy_companions,
    fingerprint,
    open_folder,
    publish,
    refuse_existing,
    working,
)
from mistill.settings import require, settings_dict, settings_from
from mistill.source import resolve_model
from mistill.text import Document, Texts, TokenBlocks, check_texts, pack, read_documents
from mistill.vocabulary import Vocabulary, load_vocabulary, same_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.trainer import TrainingProgress


def train(
    student: str | Path,
    target: str | Path,
    *,
    teacher: str | Path,
    texts: Texts,
    held_out: Texts | None = None,
    settings: TrainSettings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Teach a student to predict what its teacher predicts.

    The loss is KL(teacher || student) at every token to be predicted. The student is judged on
    held-out text before, during and after; the best one found is what the target holds, in
    float32. An interrupted call resumes from its last checkpoint when it is made again, and ends
    with the same weights, bit for bit on a CPU, as if it had not been interrupted.

    A student that never got better than it came is a failure: nothing is published, and the
    state of the run is removed, since the same call would end the same way.

    Args:
        student: The folder of the student, with float weights.
        target: The folder to make: the trained student, ``metrics.jsonl`` and, if asked for,
            ``tensorboard/``.
        teacher: The model to imitate, in any form that PyTorch runs; the same vocabulary.
        texts: Text or conversations to learn from.
        held_out: Text to judge the student on; part of ``texts``, by document, if not given.
        settings: How to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``TrainSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or a block does not fit the models' context.
        FolderError: If a folder is missing or broken, or two of the three are the same.
        VocabularyError: If student and teacher do not share every token.
        TextError: If there is too little text.
        TrainingError: If the student got no better, or the loss was not a number.
        MissingExtraError: If TensorBoard is asked for and not installed.
    """
    settings = settings_from(TrainSettings, settings, options)
    target = refuse_existing(target, overwrite)
    if settings.tensorboard:
        _require_tensorboard()
    for given in (texts, held_out):
        if given is not None:
            check_texts(given)
    student_info = _student_folder(student)
    teacher_info = _teacher_folder(teacher)
    for info, role in ((student_info, "student"), (teacher_info, "teacher")):
        if info.path.resolve() == target.resolve():
            raise FolderError(f"the target {target} is the {role} itself; choose another target")
    if fingerprint(student_info.path) == fingerprint(teacher_info.path):
        raise FolderError(
            f"{student} and {teacher} are the same model, which has nothing to learn from itself; "
            "make a student with distill.new_student"
        )
    vocabulary = _shared_vocabulary(student_info, teacher_info)
    longest = min(student_info.context_length, teacher_info.context_length)
    require(
        settings.block_length <= longest,
        f"a block_length of {settings.block_length} does not fit the models' context of {longest}; "
        "lower it",
    )
    training, judged = read_blocks(texts, held_out, vocabulary, settings)

    key = {
        "settings": settings_dict(settings),
        "student": fingerprint(student_info.path),
        "teacher": fingerprint(teacher_info.path),
        "texts": _digest(training),
        "held_out": _digest(judged),
    }
    with working(target, key) as work:
        try:
            progress = _train_in(work, student_info, teacher_info, training, judged, settings)
        except TrainingError:
            shutil.rmtree(work)
            raise
        _finish(work, progress, student_info, teacher_info, settings)
        return publish(work, target, overwrite)


def read_blocks(
    texts: Texts, held_out: Texts | None, vocabulary: Vocabulary, settings: TrainSettings
) -> tuple[TokenBlocks, TokenBlocks]:
    """Read text into blocks to learn from and blocks to judge on.

    Args:
        texts: Text to learn from.
        held_out: Text to judge on; if None, ``held_out_share`` of the documents of ``texts``.
        vocabulary: The one that student and teacher share.
        settings: Block length, shares and seed.

    Returns:
        Training blocks and held-out blocks; every block has a kept position.

    Raises:
        TextError: If one of the two would be empty.
    """
    documents = list(read_documents(texts, vocabulary))
    if held_out is None:
        documents, judged = split_documents(documents, settings.held_out_share, settings.seed)
    else:
        judged = list(read_documents(held_out, vocabulary))
    training_blocks = _kept_blocks(documents, settings.block_length, "texts")
    judged_blocks = _kept_blocks(judged, settings.block_length, "held_out")
    wanted = max(1, settings.held_out_tokens // settings.block_length)
    return training_blocks, _evenly(judged_blocks, wanted)


def split_documents(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Keep some documents from training.

    Where every document is longer than the share, as where one file is all there is, the end of
    the longest is kept out.

    Args:
        documents: All documents.
        share: How much of them to keep out, by tokens, above 0 and below 1.
        seed: Decides which.

    Returns:
        Documents to learn from and documents to judge on.

    Raises:
        TextError: If there is too little text to share.
    """
    sizes = [len(document.ids) for document in documents]
    wanted = int(share * sum(sizes))
    chosen: set[int] = set()
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if taken + sizes[index] <= wanted:
            chosen.add(int(index))
            taken += sizes[index]
    if chosen:
        learnt = [document for index, document in enumerate(documents) if index not in chosen]
        return learnt, [documents[index] for index in sorted(chosen)]
    if wanted < 2:
        raise TextError(
            f"the texts hold {sum(sizes)} tokens, of which a share of {share} is too little to "
            "judge the student on; give held_out texts or more text"
        )
    longest = int(np.argmax(sizes))
    whole = documents[longest]
    begin, end = (
        replace(whole, ids=whole.ids[part], mask=whole.mask[part])
        for part in (slice(None, -wanted), slice(-wanted, None))
    )
    return [*documents[:longest], begin, *documents[longest + 1 :]], [end]


# --- before -------------------------------------------------------------------------------------


def _student_folder(student: str | Path) -> FolderInfo:
    info = open_folder(resolve_model(student))
    if info.form != "model":
        raise FolderError(
            f"{student} holds {info.form} weights, which cannot be trained; give the float "
            "student that they were made from"
        )
    return info


def _teacher_folder(teacher: str | Path) -> FolderInfo:
    info = open_folder(resolve_model(teacher))
    if info.form == "onnx":
        raise FolderError(
            f"{teacher} is an ONNX chatbot, which shows no hidden states; give the model folder "
            "that it was exported from"
        )
    return info


def _shared_vocabulary(student: FolderInfo, teacher: FolderInfo) -> Vocabulary:
    ours, theirs = load_vocabulary(student.path), load_vocabulary(teacher.path)
    differences = same_vocabulary(ours, theirs)
    if student.vocabulary_size != teacher.vocabulary_size and not differences:
        differences = [f"{student.vocabulary_size} rows against {teacher.vocabulary_size}"]
    if differences:
        raise VocabularyError(
            f"student and teacher have different vocabularies: {'; '.join(differences)}; make "
            "the student with distill.new_student so that both share one tokenizer"
        )
    return ours


def _require_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise missing_extra("tensorboard", "tensorboard") from error


def _kept_blocks(documents: Sequence[Document], block_length: int, name: str) -> TokenBlocks:
    """Pack documents and drop blocks that hold nothing to be predicted."""
    blocks = pack(documents, block_length)
    rows = np.flatnonzero(blocks.kept.any(axis=1))
    if len(rows) == 0:
        raise TextError(
            f"the {name} hold nothing to be predicted: {len(documents)} documents without a "
            "single token that follows another; give text, or conversations with replies"
        )
    return blocks[rows]


def _evenly(blocks: TokenBlocks, wanted: int) -> TokenBlocks:
    """Some of the blocks, evenly spaced from the first to the last."""
    if wanted >= len(blocks):
        return blocks
    return blocks[np.linspace(0, len(blocks) - 1, wanted).round().astype(np.int64)]


def _digest(blocks: TokenBlocks) -> str:
    digest = hashlib.sha256()
    for part in (blocks.ids, blocks.mask, blocks.documents):
        digest.update(f"{part.dtype} {part.shape}".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


# --- during and after ---------------------------------------------------------------------------


def _train_in(
    work: Path,
    student_info: FolderInfo,
    teacher_info: FolderInfo,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
) -> TrainingProgress:
    import torch

    from distill.teacher import LiveTeacher
    from distill.trainer import accelerating, train_student
    from mistill.pytorch import load_pytorch

    with accelerating(settings, logs=work) as accelerator:
        is_half = accelerator.mixed_precision == "bf16"
        teacher_dtype = torch.bfloat16 if is_half else torch.float32
        teacher = load_pytorch(teacher_info.path, dtype=teacher_dtype).requires_grad_(False)
        student = load_pytorch(student_info.path, dtype=torch.float32)
        return train_student(
            student,
            LiveTeacher(_on(teacher, accelerator.device)),
            training,
            judged,
            settings,
            accelerator=accelerator,
            work=work,
        )


def _on(model: PreTrainedModel, device: Any) -> PreTrainedModel:
    return model if model.device == device else model.to(device)


def _finish(
    work: Path,
    progress: TrainingProgress,
    student: FolderInfo,
    teacher: FolderInfo,
    settings: TrainSettings,
) -> None:
    """Gather in ``work/result`` what the target will hold."""
    from distill.trainer import METRICS_FILE, best_student

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(best_student(work, progress.best_step), result)
    copy_companions(student.path, result)
    shutil.copyfile(work / METRICS_FILE, result / METRICS_FILE)
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", result / "tensorboard")
    add_lineage(
        result,
        step="distill",
        settings=settings_dict(settings),
        source=student.path,
        teacher=str(teacher.path),
        teacher_fingerprint=fingerprint(teacher.path),
        before=asdict(progress.before),
        after=asdict(progress.best),
        steps=progress.step,
        kept_step=progress.best_step,
        tokens=progress.tokens,
        kept_positions=progress.positions,
        seconds=round(progress.seconds, 1),
    )
