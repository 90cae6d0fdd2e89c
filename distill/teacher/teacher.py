"""What a teacher says, in a form that the loss can use a few rows at a time.

The loss asks for the divergence between what the teacher says at some kept positions and what
the student says there, and never for all of it at once, so that whoever answers may be a running
model or something read from disk. A live teacher answers from its last hidden states and its
output head: D numbers a position instead of V. A cached one answers from a few tokens and their
weights.

B is batch, T positions, N kept positions, n rows of one chunk, V vocabulary, D width, K tokens
that are stored of a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mistill.loss.batches import last_hidden_states
from mistill.loss.heads import compute_dtype, read_head
from mistill.loss.targets import DenseTargets, TeacherTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mistill.loss.batches import Batch
    from mistill.text.blocks import TokenBlocks


class Teacher(Protocol):
    """Whoever answers for the teacher."""

    def targets(self, blocks: TokenBlocks, batch: Batch) -> TeacherTargets:
        """What the teacher says about some blocks.

        Args:
            blocks: The blocks.
            batch: The same blocks, on the device.

        Returns:
            Its answer at the kept positions, in row-major order, on the batch's device.
        """

    def expect(self, blocks: TokenBlocks) -> None:
        """Hear which blocks will be asked for next, so that they can be fetched meanwhile.

        Args:
            blocks: The blocks.
        """


@dataclass(frozen=True)
class LiveTeacher:
    """A running model that answers with dense targets.

    Attributes:
        model: A Llama or Mistral with its head, in eval mode.
    """

    model: PreTrainedModel

    def targets(self, blocks: TokenBlocks, batch: Batch) -> DenseTargets:
        """Run the teacher over some blocks."""
        with torch.inference_mode():
            hidden = last_hidden_states(self.model, batch.ids, batch.positions)[batch.kept]
            head = read_head(self.model)
            dtype = compute_dtype(hidden, head)
            return DenseTargets(hidden.to(dtype), head.frozen(dtype))

    def expect(self, blocks: TokenBlocks) -> None:
        """Do nothing: a running model answers when it is asked."""
