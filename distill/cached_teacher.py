"""A teacher that is not there: what it said is read from a folder of targets.

N is kept positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill.batches import Batch
    from distill.teacher import TeacherTargets
    from mistill.text import TokenBlocks
    from mistill.vocabulary import Vocabulary


class CachedTeacher:
    """A ``distill.teacher.Teacher`` that reads what ``distill.cache_targets`` has written.

    Attributes:
        fingerprint: A short name for the content of the folder, for the key of a resumable run.
        teacher: What is known of the model that spoke: ``name``, ``fingerprint``, ``form``,
            ``dtype``.
        temperature: At which the targets were drawn.
        block_length: At which long documents were cut.
        method: ``systematic``, ``multinomial`` or ``top_k``.
    """

    fingerprint: str
    teacher: dict[str, str]
    temperature: float
    block_length: int
    method: str

    def targets(self, blocks: TokenBlocks, batch: Batch) -> TeacherTargets:
        """What the teacher said about some blocks.

        Args:
            blocks: The blocks.
            batch: The same blocks, on the device.

        Returns:
            Its answer at the kept positions, in row-major order, on the batch's device.
        """
        raise NotImplementedError

    def expect(self, blocks: TokenBlocks) -> None:
        """Begin to read what will be asked for next, in another thread.

        Args:
            blocks: The blocks.
        """
        raise NotImplementedError

    def require(self, blocks: TokenBlocks, name: str = "texts") -> None:
        """Refuse text about which the teacher was not asked.

        Args:
            blocks: All blocks that will be asked for.
            name: What to call them in a message.

        Raises:
            TextError: If a piece of them is not in the folder.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop reading ahead."""
        raise NotImplementedError


def open_targets(
    path: str | Path,
    vocabulary: Vocabulary,
    *,
    temperature: float = 1.0,
    texts: Iterable[tuple[str, TokenBlocks]] = (),
) -> CachedTeacher:
    """Open a finished folder of targets for a student, or say why they do not fit together.

    Loads no weights; call it before anything large is read.

    Args:
        path: A folder of targets, on any location that fsspec knows.
        vocabulary: The student's.
        temperature: At which the student will be trained.
        texts: Blocks that will be asked for, by what to call them in a message, such as
            ``("texts", training), ("held_out", judged)``.

    Returns:
        The teacher, to be given to the trainer.

    Raises:
        FolderError: If the folder is missing, unfinished or damaged.
        VocabularyError: If the student has other tokens or another chat template.
        SettingsError: If the targets were drawn at another temperature.
        TextError: If a piece of the text is not in the folder.
    """
    raise NotImplementedError
