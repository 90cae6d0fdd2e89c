"""Distillation from folder to folder.

Everything that can be wrong with the settings, the folders, the vocabularies and the text is
found before a weight is read. Then the loop of ``distill.trainer`` runs in a hidden folder beside
the target, where it keeps its checkpoints, so that the same call resumes what was interrupted.
The target appears when there is a student that got better, and not before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.train_settings import TrainSettings
from mistill.errors import FolderError, SettingsError, TextError, TrainingError, VocabularyError
from mistill.folder import (
    FolderInfo,
    add_lineage,
    copy_companions,
    fingerprint,
    open_folder,
    publish,
    refuse_existing,
    working,
    write_atomically,
)
from mistill.settings import require, settings_dict, settings_from
from mistill.source import resolve_model
from mistill.text import Document, Texts, TokenBlocks, check_texts, pack, read_documents
from mistill.vocabulary import Vocabulary, load_vocabulary, same_vocabulary

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from distill.cached_teacher import CachedTeacher
    from distill.checkpoints import TrainingProgress
    from distill.teacher import Teacher

_FOUR_BITS = "teacher-in-four-bits.json"


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
    **options: Any,
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
    target = refuse_existing(target, overwrite)
    _require_one_teacher(teacher, targets, settings)
    _require_libraries(settings)
    for given in (texts, held_out):
        if given is not None:
            check_texts(given)
    student_info = _student_folder(student)
    _refuse_same_place(target, student_info, "student")
    vocabulary = load_vocabulary(student_info.path)
    longest = student_info.context_length
    teacher_info = None
    if teacher is not None:
        teacher_info = _teacher_folder(teacher, settings)
        _refuse_same_place(target, teacher_info, "teacher")
        _refuse_same_model(student, student_info, teacher, teacher_info)
        _require_shared(vocabulary, student_info, teacher_info)
        longest = min(longest, teacher_info.context_length)
    require(
        settings.block_length <= longest,
        f"a block_length of {settings.block_length} does not fit the models' context of {longest}; "
        "lower it",
    )
    training, judged = read_blocks(texts, held_out, vocabulary, settings)
    source: _Live | _Cached
    if teacher_info is not None:
        source = _Live(teacher_info)
    else:
        assert targets is not None, "one of the two is given"
        source = _open_cached(targets, vocabulary, training, judged, settings)

    from distill.processes import this_process

    state = this_process()
    key = {
        "settings": settings_dict(settings),
        "student": fingerprint(student_info.path),
        "teacher": source.fingerprint,
        "texts": _digest(training),
        "held_out": _digest(judged),
        "processes": state.num_processes,
    }
    with _working_together(target, key, state) as work, source.closing():
        try:
            progress = _train_in(work, student_info, source, training, judged, settings, work)
            if progress.best_step == 0:
                raise TrainingError(_complaint(progress, settings))
            twins = (
                _train_twins(work, student_info, source, training, judged, settings, progress)
                if settings.twin
                else ()
            )
        except TrainingError:
            if state.is_main_process:
                shutil.rmtree(work)
            raise
        if state.is_main_process:
            _finish(work, progress, twins, student_info, source, settings, state)
            publish(work, target, overwrite)
        state.wait_for_everyone()
    return target


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
        documents, judged = split_documents(
            documents, settings.held_out_share, settings.seed, settings.block_length
        )
    else:
        judged = list(read_documents(held_out, vocabulary))
    training_blocks = _kept_blocks(documents, settings.block_length, "texts")
    judged_blocks = _kept_blocks(judged, settings.block_length, "held_out")
    wanted = max(1, settings.held_out_tokens // settings.block_length)
    return training_blocks, _evenly(judged_blocks, wanted)


def split_documents(
    documents: Sequence[Document], share: float, seed: int, block_length: int = 1
) -> tuple[list[Document], list[Document]]:
    """Keep some documents from training.

    Where every document is longer than the share, as where one file is all there is, the end of
    the longest is kept out.

    Args:
        documents: All documents.
        share: How much of them to keep out, by tokens, above 0 and below 1.
        seed: Decides which.
        block_length: Where longer documents are cut.

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
    cut = sizes[longest] - wanted
    # Where the document is cut anyway, so that its pieces are those that targets were cached for.
    cut = cut // block_length * block_length or cut
    begin, end = (
        replace(whole, ids=whole.ids[part], mask=whole.mask[part])
        for part in (slice(None, cut), slice(cut, None))
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


def _teacher_folder(teacher: str | Path, settings: TrainSettings) -> FolderInfo:
    info = open_folder(resolve_model(teacher))
    if info.form == "onnx":
        raise FolderError(
            f"{teacher} is an ONNX chatbot, which shows no hidden states; give the model folder "
            "that it was exported from"
        )
    if (
        settings.teacher_precision == "nf4"
        or settings.teacher_device_map is not None
        or settings.divide_teacher
    ):
        from distill.live_teacher import require_teacher

        require_teacher(info, settings)
    return info


def _require_one_teacher(
    teacher: str | Path | None, targets: str | Path | None, settings: TrainSettings
) -> None:
    if (teacher is None) == (targets is None):
        found = "neither is" if teacher is None else "both are"
        raise SettingsError(
            "give either teacher, a model that runs, or targets, a folder of what one said; "
            f"{found} given"
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
    for name, (value, wanted) in wrong.items():
        require(
            value == wanted,
            f"{name} = {value} needs the teacher itself, and targets hold a part of what it said "
            f"about given texts; leave {name} at {wanted} or give the teacher",
        )


def _require_libraries(settings: TrainSettings) -> None:
    from distill.metrics import require_trackers

    require_trackers(settings)
    if settings.optimizer != "adamw":
        from distill.optimizers import require_optimizer

        require_optimizer(settings)
    if settings.lora_rank:
        from distill.adapters import require_peft

        require_peft()


def _refuse_same_place(target: Path, info: FolderInfo, role: str) -> None:
    if info.path.resolve() == target.resolve():
        raise FolderError(f"the target {target} is the {role} itself; choose another target")


def _refuse_same_model(
    student: str | Path, student_info: FolderInfo, teacher: str | Path, teacher_info: FolderInfo
) -> None:
    if fingerprint(student_info.path) == fingerprint(teacher_info.path):
        raise FolderError(
            f"{student} and {teacher} are the same model, which has nothing to learn from itself; "
            "make a student with distill.new_student"
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


# --- who answers for the teacher ---------------------------------------------------------------


@dataclass(frozen=True)
class _Live:
    """A teacher that is to be loaded."""

    info: FolderInfo

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.info.path)

    @contextmanager
    def closing(self) -> Iterator[None]:
        yield

    def open(
        self, work: Path, judged: TokenBlocks, settings: TrainSettings, accelerator: Accelerator
    ) -> Teacher:
        """Load it; where it is turned into four bits, note once what that costs."""
        from distill.live_teacher import load_teacher, lost_in_four_bits

        if settings.teacher_precision == "nf4" and self.info.form == "model":
            note = work / _FOUR_BITS
            teacher = load_teacher(self.info, settings, accelerator)
            accelerator.wait_for_everyone()
            if not note.exists():
                lost = lost_in_four_bits(self.info, teacher, judged, settings, accelerator)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    write_atomically(note, json.dumps(lost))
            return teacher
        return load_teacher(self.info, settings, accelerator)

    def facts(self, work: Path) -> dict[str, Any]:
        found = {"teacher": str(self.info.path), "teacher_fingerprint": self.fingerprint}
        if (work / _FOUR_BITS).exists():
            lost = json.loads((work / _FOUR_BITS).read_text("utf-8"))
            return {**found, "teacher_kl_of_four_bits": lost}
        return found


@dataclass(frozen=True)
class _Cached:
    """What a teacher said, on disk."""

    path: str
    teacher: CachedTeacher

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    @contextmanager
    def closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.teacher.close()

    def open(self, *_: Any) -> Teacher:
        return self.teacher

    def facts(self, work: Path) -> dict[str, Any]:
        known = self.teacher.teacher
        return {
            "teacher": known["name"],
            "teacher_fingerprint": known["fingerprint"],
            "targets": self.path,
            "targets_fingerprint": self.fingerprint,
        }


def _open_cached(
    path: str | Path,
    vocabulary: Vocabulary,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
) -> _Cached:
    from distill.cached_teacher import open_targets

    texts = [("held_out", judged)]
    if settings.cross_entropy < 1:
        texts.insert(0, ("texts", training))
    opened = open_targets(path, vocabulary, temperature=settings.temperature, texts=texts)
    return _Cached(str(path), opened)


# --- during and after ---------------------------------------------------------------------------


@contextmanager
def _working_together(target: Path, key: dict[str, Any], state: PartialState) -> Iterator[Path]:
    """The hidden folder beside the target, which one process makes and all use."""
    if state.is_main_process:
        with working(target, key) as work:
            state.wait_for_everyone()
            yield work
    else:
        state.wait_for_everyone()
        yield target.parent / f".{target.name}.working"


def _train_in(
    work: Path,
    student_info: FolderInfo,
    source: _Live | _Cached,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
    home: Path,
) -> TrainingProgress:
    """Train to the end, in a folder of its own inside that of the whole call."""
    import torch

    from distill.checkpoints import record_end, recorded_end
    from distill.processes import accelerating, loading_whole
    from distill.trainer import train_student
    from mistill.pytorch import load_pytorch

    with accelerating(settings, logs=work) as accelerator:
        if accelerator.is_main_process:
            work.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        ended = recorded_end(work)
        if ended is not None:
            return ended
        with loading_whole(accelerator):
            teacher = source.open(home, judged, settings, accelerator)
            student = load_pytorch(student_info.path, dtype=torch.float32)
        progress = train_student(
            student,
            teacher,
            training,
            judged,
            settings,
            accelerator=accelerator,
            work=work,
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record_end(work, progress)
        accelerator.wait_for_everyone()
        return progress


def _train_twins(
    work: Path,
    student_info: FolderInfo,
    source: _Live | _Cached,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
    student: TrainingProgress,
) -> tuple[TrainingProgress, ...]:
    """Train the same student from the text alone, for equal tokens and for equal time."""
    from distill.fidelity import twin_settings

    equal_tokens = _train_in(
        work / "twin-of-equal-tokens",
        student_info,
        source,
        training,
        judged,
        twin_settings(settings, student, None),
        work,
    )
    equal_time = _train_in(
        work / "twin-of-equal-time",
        student_info,
        source,
        training,
        judged,
        twin_settings(settings, student, equal_tokens),
        work,
    )
    return equal_tokens, equal_time


def _complaint(progress: TrainingProgress, settings: TrainSettings) -> str:
    """Why there is no student to publish."""
    return (
        f"the student got no better: its held-out KL was {progress.before.kl:.4f} nats before "
        f"and {progress.last.kl:.4f} after {progress.tokens} tokens; lower learning_rate "
        f"(now {settings.learning_rate:g}) or train on more tokens"
    )


def _finish(
    work: Path,
    progress: TrainingProgress,
    twins: Sequence[TrainingProgress],
    student: FolderInfo,
    source: _Live | _Cached,
    settings: TrainSettings,
    state: PartialState,
) -> None:
    """Gather in ``work/result`` what the target will hold."""
    from distill.fidelity import FidelityCard, trained
    from distill.metrics import METRICS_FILE
    from distill.trainer import best_student

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(best_student(work, progress.best_step), result)
    copy_companions(student.path, result)
    shutil.copyfile(work / METRICS_FILE, result / METRICS_FILE)
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", result / "tensorboard")
    facts = source.facts(work)
    equal_tokens, equal_time = map(trained, twins) if twins else (None, None)
    card = FidelityCard(
        teacher=str(facts["teacher"]),
        before=progress.before,
        student=trained(progress),
        twin_of_equal_tokens=equal_tokens,
        twin_of_equal_time=equal_time,
    )
    card.save(result)
    add_lineage(
        result,
        step="distill",
        settings=settings_dict(settings),
        source=student.path,
        **facts,
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
