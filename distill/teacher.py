"""What a teacher says, in a form that the loss can use a few rows at a time.

The loss asks for the teacher's log-probabilities of some kept positions and never for all of
them, so that whoever answers may be a running model or something read from disk. A live teacher
answers from its last hidden states and its output head: D numbers a position instead of V.

B is batch, T positions, N kept positions, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mistill.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TeacherTargets(Protocol):
    """What the teacher says at N kept positions."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the distributions are over, V."""

    def __len__(self) -> int:
        """Number of kept positions, N."""

    def log_probabilities(
        self, rows: slice, temperature: float, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """The teacher's softened distribution at some of the kept positions.

        Args:
            rows: Which of the N positions; n of them.
            temperature: Above 0; logits are divided by it.
            out: Shape (n, V), float32 or better; filled with the answer.
            scratch: Shape and dtype of ``out``; free to be overwritten.

        Returns:
            ``out``.
        """


@dataclass(frozen=True)
class DenseTargets:
    """Full distributions, made when they are asked for.

    Attributes:
        hidden: The teacher's last hidden states at the kept positions, shape (N, D).
        head: Its output head, shape (V, D).
    """

    hidden: Tensor
    head: Tensor

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the distributions are over, V."""
        return self.head.shape[0]

    def __len__(self) -> int:
        """Number of kept positions, N."""
        return self.hidden.shape[0]

    def log_probabilities(
        self, rows: slice, temperature: float, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """Project some hidden states through the head and normalise.

        Args:
            rows: Which of the N positions; n of them.
            temperature: Above 0; logits are divided by it.
            out: Shape (n, V), float32 or better; filled with the answer.
            scratch: Shape and dtype of ``out``; free to be overwritten.

        Returns:
            ``out``.
        """
        multiply(self.hidden[rows], self.head.t(), out=scratch)
        return soften(scratch, temperature, out=out)


@dataclass(frozen=True)
class LiveTeacher:
    """A running model that answers with dense targets.

    Attributes:
        model: A Llama or Mistral with its head, in eval mode.
    """

    model: PreTrainedModel

    def targets(self, ids: Tensor, positions: Tensor, kept: Tensor) -> DenseTargets:
        """Run the teacher over a batch of packed blocks.

        Args:
            ids: Token ids, shape (B, T).
            positions: Position of each token in its own document, shape (B, T).
            kept: True where the position counts, shape (B, T); N of them.

        Returns:
            Its answer at the kept positions, in row-major order.
        """
        with torch.inference_mode():
            hidden = last_hidden_states(self.model, ids, positions)
            return DenseTargets(hidden[kept], head_weight(self.model))


def last_hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Run a model's body, not its head, over packed blocks.

    Without an attention mask, transformers takes a position that does not follow its
    predecessor for the start of another document, and lets attention cross no such border.

    Args:
        model: A Llama or Mistral with its head.
        ids: Token ids, shape (B, T).
        positions: Position of each token in its own document, shape (B, T).

    Returns:
        Shape (B, T, D), after the last norm.
    """
    hidden: Tensor = model.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def head_weight(model: PreTrainedModel) -> Tensor:
    """The matrix that turns a hidden state into logits.

    Args:
        model: A model with an output head.

    Returns:
        Shape (V, D); the model's own parameter, so that gradients reach it.

    Raises:
        ArchitectureError: If the head is more than one float matrix.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not head.weight.is_floating_point():
        raise ArchitectureError(
            f"the head of {model.config.model_type} is a {type(head).__name__}; distillation "
            "needs a plain float matrix there"
        )
    if head.bias is not None:
        raise ArchitectureError(
            f"the head of {model.config.model_type} has a bias; distillation reads the heads of "
            "Llama and Mistral, which have none"
        )
    return head.weight


def soften(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Log-probabilities of softened logits.

    Args:
        logits: Shape (n, V), float32 or better; divided in place.
        temperature: Above 0.
        out: Shape (n, V); filled with the answer.

    Returns:
        ``out``.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, dim=-1, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Matrix product whose sums and result are float32 or better, whatever the factors are.

    Args:
        a: Shape (n, k).
        b: Shape (k, m), of the same dtype.
        out: Shape (n, m), float32 or float64; filled with the product.

    Returns:
        ``out``.
    """
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype == b.dtype and a.is_cuda:
        return out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
