"""What a teacher computes of the text that scales learn from: asked for once, and kept on disk.

A distribution over V tokens is a last hidden state of D numbers and the head, exactly. So the
teacher reads the text before the training begins, one of its layers in memory at a time, and is
gone when the training runs: a step computes one model, and not two. Hidden states are written a
portion of the text at a time, so that a run that was killed goes on behind the last one.

Least work: one forward pass of the teacher. Least memory: one layer and the hidden states of a
portion; on disk D numbers a kept position, which a step reads once.

N is kept positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mistill.errors import FolderError
from mistill.folders.publishing import replacing
from mistill.loss.heads import Head, PlainWeight, as_head, compute_dtype
from mistill.loss.targets import DenseTargets
from mistill.measures.kl import Predictions
from mistill.progress import track
from mistill.pytorch.layers import LayeredModel
from mistill.weights.gptq_layout import HEAD
from quantize.measuring.fidelity import last_hidden_states

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mistill.text.blocks import TokenBlocks

# Tokens of text in a file.
_PORTION = 1 << 15
_STATES = "states"


class TeacherStates:
    """A teacher that is not there: its last hidden states on disk, and its head.

    ``ask_teacher`` makes one.

    Attributes:
        head: The teacher's.
        table: Its matrix, shape (V, D).
    """

    head: Head
    table: Tensor

    def __init__(self, files: Sequence[Path], portions: Sequence[TokenBlocks], head: Head) -> None:
        """Find out where the states of each block are; none is read yet.

        Args:
            files: One for each portion.
            portions: The text, in the order of the files.
            head: The teacher's, as numbers to compute with: one matrix.
        """
        plain = head.plain
        assert plain is not None, "the head of a layered model is one matrix"
        self.head, self.table = head, plain
        self._files = [safe_open(file, framework="pt") for file in files]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, portion in enumerate(portions):
            ends = np.cumsum(portion.kept.sum(axis=1)).tolist()
            for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                self._places[portion[row : row + 1].digest] = number, start, end

    def targets(self, blocks: TokenBlocks) -> DenseTargets:
        """What the teacher says about some blocks.

        Args:
            blocks: Blocks of the text that it was asked about, in any order.

        Returns:
            Its whole distributions at their N kept positions, in row-major order, on the head's
            device.

        Raises:
            KeyError: If it was not asked about one of them.
        """
        states = []
        for row in range(len(blocks)):
            number, start, end = self._places[blocks[row : row + 1].digest]
            states.append(self._files[number].get_slice(_STATES)[start:end])
        return DenseTargets(torch.cat(states).to(self.table.device), self.head)

    def predictions(self) -> Predictions:
        """What it says about the whole text, in its order; read anew with every call."""
        states = torch.cat([file.get_tensor(_STATES) for file in self._files])
        return Predictions(states.to(self.table.device), self.table)


def ask_teacher(
    teacher: Path,
    training: TokenBlocks,
    judged: TokenBlocks,
    accelerator: Accelerator,
    work: Path,
) -> tuple[TeacherStates, TeacherStates]:
    """Let a teacher read the texts of a run, or read what it said before an interruption.

    Each process asks about its share, and waits for the others.

    Args:
        teacher: A float, GPTQ or NF4 folder.
        training: Text to learn from; asked about in the precision that is trained in.
        judged: Text to judge on; asked about in float32.
        accelerator: Device, precision and processes.
        work: A folder that holds the state of this run; all processes see it.

    Returns:
        What it says about each of them.

    Raises:
        FolderError: If it computes hidden states that are not finite.
    """
    model = LayeredModel(teacher, accelerator.device)
    head = Head(PlainWeight(model.table(HEAD)))
    learnt = _Reading(training, work, "training", accelerator.autocast)
    exact = _Reading(judged, work, "judged", nullcontext)
    pairs = [(reading, number) for reading in (learnt, exact) for number in reading.numbers]
    own = pairs[accelerator.process_index :: accelerator.num_processes]
    missing = [(reading, number) for reading, number in own if not reading.files[number].exists()]
    if missing:
        total, left = (sum(each.portions[n].tokens for each, n in some) for some in (own, missing))
        with track("asking the teacher", total, "tok", done=total - left) as bar:
            for reading, number in missing:
                reading.ask(model, number)
                bar.advance(reading.portions[number].tokens)
    accelerator.wait_for_everyone()
    return learnt.states(head), exact.states(head)


class _Reading:
    """A text in portions, and the files of what a teacher says about each."""

    def __init__(
        self,
        blocks: TokenBlocks,
        work: Path,
        name: str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        size = max(1, _PORTION // blocks.block_length)
        self.portions = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        self.numbers = range(len(self.portions))
        self.files = [work / f"teacher-{name}-{number:05}.safetensors" for number in self.numbers]
        self._precision = precision

    def ask(self, model: LayeredModel, number: int) -> None:
        """Write the file of a portion, in the type that its products are computed in."""
        with self._precision():
            states = last_hidden_states(model, self.portions[number])
            states = states.to("cpu", compute_dtype(states, as_head(states[:0])))
        if not states.isfinite().all():
            raise FolderError(
                f"{model.folder} computes hidden states that are not numbers, so that nothing can "
                "be learnt from it; its weights are damaged, or too large for the precision"
            )
        with replacing(self.files[number]) as partial:
            save_file({_STATES: states.contiguous()}, partial)

    def states(self, head: Head) -> TeacherStates:
        plain = head.plain
        assert plain is not None, "the head of a layered model is one matrix"
        with self._precision():
            dtype = compute_dtype(plain, head)
        return TeacherStates(self.files, self.portions, head.frozen(dtype))
