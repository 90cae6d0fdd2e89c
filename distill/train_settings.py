"""What a user decides about distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistill.settings import require


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is taught.

    Attributes:
        tokens: Text tokens to train on, padding not counted; texts that hold fewer are repeated
            in another order.
        block_length: Tokens of a block, T; longer documents are split, shorter ones share one.
        batch_size: Blocks of one optimizer step, over all processes.
        micro_batch_size: Blocks that one process computes at once; it divides batch_size and
            changes memory and speed, not the result.
        learning_rate: The highest, reached after the warm-up; it then falls to 0 along a cosine.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Of AdamW, on matrices; norms, biases, embedding and head have none.
        max_gradient_norm: Longer gradients are scaled down to this length.
        temperature: Softens both distributions of the KL; its square scales the loss.
        cross_entropy: Share of the loss that comes from the text itself, 0 to 1.
        held_out_share: Share of the documents that is kept from training to judge the student,
            where no held-out texts are given.
        held_out_tokens: The most tokens to judge it on; taken evenly from all held-out blocks.
        evaluate_every: Optimizer steps between two judgements; 0 for only before and after. The
            best student of all judgements is kept.
        checkpoint_every: Optimizer steps between two checkpoints; 0 for none, so that an
            interrupted run begins again.
        loss_memory_mib: Room for logits, which are made a few rows at a time.
        precision: float32, bfloat16 (weights and sums stay float32), or auto: bfloat16 on a GPU.
        tensorboard: Also write the metrics for TensorBoard.
        seed: Decides the order of the texts and which are held out.
    """

    tokens: int = 1_000_000
    block_length: int = 512
    batch_size: int = 2
    micro_batch_size: int = 1
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    temperature: float = 1.0
    cross_entropy: float = 0.0
    held_out_share: float = 0.05
    held_out_tokens: int = 16_384
    evaluate_every: int = 100
    checkpoint_every: int = 100
    loss_memory_mib: float = 128.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("tokens", "batch_size", "micro_batch_size", "held_out_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"{name} should be at least 1, not {value}")
        require(
            self.block_length >= 2,
            f"block_length should be at least 2, a token and the one it predicts, not "
            f"{self.block_length}",
        )
        require(
            self.batch_size % self.micro_batch_size == 0,
            f"micro_batch_size should divide batch_size, but {self.micro_batch_size} does not "
            f"divide {self.batch_size}",
        )
        for name in ("learning_rate", "max_gradient_norm", "temperature", "loss_memory_mib"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} should be above 0, not {value}")
        require(
            0 <= self.weight_decay < float("inf"),
            f"weight_decay should be 0 or more, not {self.weight_decay}",
        )
        for name in ("warmup", "cross_entropy"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} should be between 0 and 1, not {value}")
        require(
            0 < self.held_out_share < 1,
            f"held_out_share should be above 0 and below 1, not {self.held_out_share}",
        )
        for name in ("evaluate_every", "checkpoint_every", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"{name} should be 0 or more, not {value}")
        require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"precision should be auto, float32 or bfloat16, not {self.precision!r}",
        )
