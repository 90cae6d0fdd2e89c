"""What a user decides about distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.settings import require

# Those of distill.loss.divergences, which imports PyTorch.
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Optimizer = Literal["adamw", "adamw_8bit"]
Precision = Literal["auto", "float32", "bfloat16"]
TeacherPrecision = Literal["auto", "float32", "bfloat16", "nf4"]
Tracker = Literal["tensorboard", "trackio", "wandb"]


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
        optimizer: adamw, or adamw_8bit, whose two moments take a byte each (bitsandbytes).
        gradient_checkpointing: Compute each layer twice rather than remember what it computed.
        lora_rank: Rank of the adapters to train in place of the weights, which they are added to
            in the end; 0 to train the weights themselves.
        divergence: What is lowered between teacher and student: forward_kl, reverse_kl, jsd,
            skew_kl, skew_reverse_kl or tvd; cached targets know forward_kl alone.
        mixture: Of jsd and the skewed two: the share of the first distribution in the mixture,
            above 0 and below 1.
        temperature: Softens both distributions of the divergence; its square scales the loss.
        cross_entropy: Share of the loss that comes from the text itself, 0 to 1; at 1 the teacher
            is asked only to judge.
        on_policy: Share of the steps whose text the student writes itself, from the prompts of the
            texts, for the teacher to score, 0 to 1; only the divergence counts in them.
        on_policy_temperature: At which the student draws its tokens.
        on_policy_prompt: Tokens of a text without a prompt of its own that the student is given to
            go on from.
        held_out_share: Share of the documents that is kept from training to judge the student,
            where no held-out texts are given.
        held_out_tokens: The most tokens to judge it on; taken evenly from all held-out blocks.
        evaluate_every: Optimizer steps between two judgements; 0 for only before and after. The
            best student of all judgements is kept.
        checkpoint_every: Optimizer steps between two checkpoints; 0 for none, so that an
            interrupted run begins again.
        loss_memory_mib: Room for logits, which are made a few rows at a time.
        precision: float32, bfloat16 (weights and sums stay float32), or auto: bfloat16 on a GPU.
        teacher_precision: Of the teacher's weights: float32, bfloat16, nf4 (4 bits, made on
            loading; what that costs is measured and recorded), or auto: as precision says.
        teacher_device_map: How to spread a teacher that one GPU cannot hold over all GPUs and the
            CPU's memory: auto, balanced, balanced_low_0 or sequential, as accelerate has them.
        divide_teacher: Hold one teacher on each machine, divided among its processes (FSDP), rather
            than one in each process.
        twin: Train the same student from the text alone as well, by plain cross-entropy, once for
            as many tokens and once for as much time, and put both on the fidelity card beside it:
            what the student is better at is the teacher's doing. Takes about twice as long again.
        trackers: Also send the metrics to these: tensorboard, trackio, wandb.
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
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    divergence: DivergenceName = "forward_kl"
    mixture: float = 0.5
    temperature: float = 1.0
    cross_entropy: float = 0.0
    on_policy: float = 0.0
    on_policy_temperature: float = 1.0
    on_policy_prompt: int = 16
    held_out_share: float = 0.05
    held_out_tokens: int = 16_384
    evaluate_every: int = 100
    checkpoint_every: int = 100
    loss_memory_mib: float = 128.0
    precision: Precision = "auto"
    teacher_precision: TeacherPrecision = "auto"
    teacher_device_map: DeviceMap | None = None
    divide_teacher: bool = False
    twin: bool = False
    trackers: tuple[Tracker, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in (
            "tokens",
            "batch_size",
            "micro_batch_size",
            "held_out_tokens",
            "on_policy_prompt",
        ):
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
        for name in (
            "learning_rate",
            "max_gradient_norm",
            "temperature",
            "on_policy_temperature",
            "loss_memory_mib",
        ):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} should be above 0, not {value}")
        require(
            0 <= self.weight_decay < float("inf"),
            f"weight_decay should be 0 or more, not {self.weight_decay}",
        )
        for name in ("warmup", "cross_entropy", "on_policy"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} should be between 0 and 1, not {value}")
        for name in ("mixture", "held_out_share"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} should be above 0 and below 1, not {value}")
        for name in ("evaluate_every", "checkpoint_every", "lora_rank", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"{name} should be 0 or more, not {value}")
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            known = get_args(kind)
            require(value in known, f"{name} should be {_or(known)}, not {value!r}")
        require(
            self.teacher_device_map in (None, *get_args(DeviceMap)),
            f"teacher_device_map should be {_or(get_args(DeviceMap))}, not "
            f"{self.teacher_device_map!r}",
        )
        known = get_args(Tracker)
        require(
            not isinstance(self.trackers, str)
            and set(self.trackers) <= set(known)
            and len(set(self.trackers)) == len(self.trackers),
            f"trackers should be some of {', '.join(known)}, each once, not {self.trackers!r}",
        )
        require(
            not self.divide_teacher
            or (self.teacher_precision != "nf4" and self.teacher_device_map is None),
            "divide_teacher should be left out where the teacher is in nf4 or has a device map",
        )
        require(
            self.on_policy == 0 or self.cross_entropy < 1,
            "on_policy should be 0 where cross_entropy is 1: what the student writes is scored by "
            "its teacher",
        )
        require(
            not self.twin or self.cross_entropy < 1,
            "a twin learns from the text alone, and with cross_entropy at 1 so does the student; "
            "leave twin out",
        )


_CHOICES = {
    "divergence": DivergenceName,
    "optimizer": Optimizer,
    "precision": Precision,
    "teacher_precision": TeacherPrecision,
}


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
