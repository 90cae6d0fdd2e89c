"""Who answers for the teacher: a model to be loaded, or what one said, on disk.

N is blocks, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.folders.folder import FolderInfo
from mistill.folders.lineage import fingerprint
from mistill.folders.location import location_of
from mistill.folders.publishing import begun_on, day_of, write_json
from mistill.folders.targets_folder import read_manifest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distill.settings import TrainSettings
    from distill.targets.cached_teacher import CachedTeacher
    from distill.teacher.teacher import Teacher
    from mistill.text.blocks import TokenBlocks
    from mistill.text.vocabulary import Vocabulary

_FOUR_BITS = "teacher-in-four-bits.json"


@dataclass(frozen=True)
class LiveSource:
    """A teacher that is to be loaded.

    Attributes:
        info: Its folder.
    """

    info: FolderInfo

    @property
    def fingerprint(self) -> str:
        """A name for what it is."""
        return fingerprint(self.info.path)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Nothing is left open.

        Yields:
            Nothing.
        """
        yield

    def open(
        self, work: Path, judged: TokenBlocks, settings: TrainSettings, accelerator: Accelerator
    ) -> Teacher:
        """Load it; where it is turned into four bits, note once what that costs.

        Args:
            work: The folder of the run, for the note.
            judged: Text to measure it on.
            settings: How to train.
            accelerator: Where to load it.

        Returns:
            The teacher.
        """
        from distill.teacher.live_teacher import load_teacher
        from distill.training.held_out import lost_in_four_bits

        if settings.teacher_precision == "nf4" and self.info.form == "model":
            note = work / _FOUR_BITS
            teacher = load_teacher(self.info, settings, accelerator)
            accelerator.wait_for_everyone()
            if not note.exists():
                lost = lost_in_four_bits(self.info, teacher, judged, settings, accelerator)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    write_json(note, lost)
            return teacher
        return load_teacher(self.info, settings, accelerator)

    def facts(self, work: Path) -> dict[str, Any]:
        """What the lineage should say of it.

        Args:
            work: The folder of the run.

        Returns:
            JSON values.
        """
        facts = {"teacher": str(self.info.path), "teacher_fingerprint": self.fingerprint}
        if (work / _FOUR_BITS).exists():
            lost = json.loads((work / _FOUR_BITS).read_text("utf-8"))
            return {**facts, "teacher_kl_of_four_bits": lost}
        return facts


@dataclass(frozen=True)
class CachedSource:
    """What a teacher said, on disk.

    Attributes:
        path: Where.
        teacher: The open folder.
    """

    path: str
    teacher: CachedTeacher

    @property
    def fingerprint(self) -> str:
        """A name for what it is."""
        return self.teacher.fingerprint

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let go of the files in the end.

        Yields:
            Nothing.
        """
        try:
            yield
        finally:
            self.teacher.close()

    def open(self, *_: Any) -> Teacher:
        """The teacher itself: nothing has to be loaded."""
        return self.teacher

    def facts(self, work: Path) -> dict[str, Any]:
        """What the lineage should say of it.

        Args:
            work: Not used.

        Returns:
            JSON values.
        """
        known = self.teacher.teacher
        return {
            "teacher": known["name"],
            "teacher_fingerprint": known["fingerprint"],
            "targets": self.path,
            "targets_fingerprint": self.fingerprint,
        }


def open_cached(
    path: str | Path,
    vocabulary: Vocabulary,
    training: TokenBlocks,
    judged: TokenBlocks,
    settings: TrainSettings,
) -> CachedSource:
    """Open targets, and refuse them where they cannot teach what they are to teach.

    Args:
        path: The folder of targets.
        vocabulary: That of the student.
        training: Text to learn from.
        judged: Text to judge on.
        settings: How to train.

    Returns:
        Who answers for the teacher.
    """
    from distill.targets.cached_teacher import open_targets

    texts = [("held_out", judged)]
    if settings.cross_entropy < 1:
        texts.insert(0, ("texts", training))
    opened = open_targets(path, vocabulary, temperature=settings.temperature, texts=texts)
    return CachedSource(str(path), opened)


def day_of_the_text(target: Path, targets: str | Path | None) -> date:
    """The day that a chat template writes: that of the targets, or of the run's first start.

    Args:
        target: The folder that is made.
        targets: The folder of targets; None where the teacher itself answers.

    Returns:
        The day.

    Raises:
        FolderError: If the targets are broken.
    """
    if targets is None:
        return begun_on(target)
    return day_of(read_manifest(location_of(targets)).get("date"))
