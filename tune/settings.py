"""What a user decides about tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.settings import TextSettings, require, require_choice, require_range
from mistill.training.processes import OptimizerName, Precision, TrackerName, require_known_trackers

Base = Literal["float", "nf4"]
LongConversations = Literal["refuse", "leave_out", "split"]
Start = Literal["zero", "pissa"]
Target = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
]

# Learning rates of adapters and of whole models.
ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5

MATRICES: tuple[Target, ...] = get_args(Target)[:-1]


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(TextSettings):
    """How a model is tuned on conversations; only what the assistant writes counts.

    Attributes:
        epochs: How often the text is read; may be a fraction. If neither this nor tokens is given,
            once.
        tokens: Text tokens to train on, without padding, instead of epochs.
        block_length: Tokens of one block (T). Conversations share blocks; attention does not cross
            from one to the next.
        long_conversations: What becomes of a conversation that is longer than a block: refuse it,
            leave_out (the report counts them), or split it, so that its end is learned without its
            beginning. Plain text is always split.
        batch_size: Blocks of one optimizer step, over all processes.
        micro_batch_size: Blocks that one process computes at once; must divide batch_size. It
            changes memory and speed, not the result.
        lora_rank: Rank of the LoRA adapters that are trained beside frozen weights; 0 trains all
            weights.
        lora_alpha: The adapters' output is multiplied by this, divided by the rank; if not given
            twice the rank.
        lora_targets: Matrices that get adapters. lm_head is for models whose head is not their
            embedding.
        lora_ranks: Other ranks for some matrices, such as down_proj=32.
        lora_start: zero starts the adapters without effect; pissa starts them at the largest
            singular values of the weights, and trains those (float weights alone).
        rslora: Divide lora_alpha by the square root of the rank, which suits high ranks.
        dora: Train the length of each row of the matrices apart from its direction (DoRA); a step
            takes about half as long again.
        base: How frozen weights are held beside adapters: float, or nf4, in 4 bits with double
            quantization (QLoRA).
        learning_rate: Highest learning rate, reached at the end of the warm-up; it then falls
            towards 0 along half a cosine. If not given, 2e-4 with adapters and 2e-5 without.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Weight decay of AdamW, on matrices alone.
        max_gradient_norm: Gradients longer than this are scaled down to this length.
        optimizer: adamw, or adamw_8bit from bitsandbytes, which stores both moments in one byte
            per weight.
        neftune: Strength of the noise on embeddings during training (NEFTune), such as 5; 0 for
            none.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass, to
            save memory.
        held_out_share: Share of the text held out for evaluation, where no held-out text is named;
            conversations with the same prompt stay on one side.
        held_out_tokens: Most tokens of held-out text to evaluate on, taken evenly from all of it.
        evaluate_every: Optimizer steps between two evaluations; if not given, a fifth of the run; 0
            evaluates before and after training alone. The best model of all evaluations is kept.
        patience: End the run after this many evaluations without a better model; 0 never does.
        checkpoint_every: Optimizer steps between two checkpoints; with 0 an interrupted run starts
            again from the beginning.
        replies: Held-out prompts that the model answers before and after, for the report.
        reply_tokens: Most tokens of such a reply.
        loss_memory_mib: Memory for logits, in MiB; they are computed a few rows at a time.
        precision: float32, bfloat16 (trained weights and sums stay in float32), or auto: bfloat16
            on a GPU, float32 on a CPU.
        trackers: Also log metrics to these: tensorboard, trackio, wandb.
        seed: Seed of the order of the texts, the adapters and the held-out share.
    """

    epochs: float | None = None
    tokens: int | None = None
    block_length: int = 2048
    long_conversations: LongConversations = "refuse"
    batch_size: int = 4
    micro_batch_size: int = 1
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_targets: tuple[Target, ...] = MATRICES
    lora_ranks: tuple[str, ...] = ()
    lora_start: Start = "zero"
    rslora: bool = False
    dora: bool = False
    base: Base = "float"
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    optimizer: OptimizerName = "adamw"
    neftune: float = 0.0
    gradient_checkpointing: bool = False
    held_out_share: float = 0.05
    held_out_tokens: int = 16_384
    evaluate_every: int | None = None
    patience: int = 0
    checkpoint_every: int = 100
    replies: int = 3
    reply_tokens: int = 64
    loss_memory_mib: float = 128.0
    precision: Precision = "auto"
    trackers: tuple[TrackerName, ...] = ()
    seed: int = 0

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return ADAPTER_RATE if self.lora_rank else FULL_RATE

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the matrices that have one of their own."""
        return {
            kind: int(rank) for kind, _, rank in (one.partition("=") for one in self.lora_ranks)
        }

    def tokens_of(self, text_tokens: int) -> int:
        """Tokens to train on.

        Args:
            text_tokens: How many the text has.

        Returns:
            At least 1.
        """
        if self.tokens is not None:
            return self.tokens
        return max(1, round((1.0 if self.epochs is None else self.epochs) * text_tokens))

    def __post_init__(self) -> None:
        """Refuse what cannot be tuned with."""
        for name in ("lora_targets", "lora_ranks"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name in (
            *("tokens", "batch_size", "micro_batch_size", "held_out_tokens", "reply_tokens"),
        ):
            require_range(name, getattr(self, name), 1)
        require_range("block_length", self.block_length, 2)
        for name in ("epochs", "learning_rate", "max_gradient_norm", "loss_memory_mib"):
            require_range(name, getattr(self, name), 0, exclusive=True)
        require_range("lora_alpha", self.lora_alpha, 0, exclusive=True)
        for name in (
            *("weight_decay", "evaluate_every", "checkpoint_every", "lora_rank", "seed"),
            *("neftune", "patience", "replies"),
        ):
            require_range(name, getattr(self, name), 0)
        require_range("warmup", self.warmup, 0, 1)
        require_range("held_out_share", self.held_out_share, 0, 1, exclusive=True)
        for name, kind in _CHOICES.items():
            require_choice(name, getattr(self, name), get_args(kind))
        require_known_trackers(self.trackers)
        require(
            self.epochs is None or self.tokens is None,
            "epochs and tokens both say how long to train; give one of them",
        )
        require(
            self.batch_size % self.micro_batch_size == 0,
            f"micro_batch_size should divide batch_size, but {self.micro_batch_size} does not "
            f"divide {self.batch_size}",
        )
        require(
            self.patience == 0 or self.evaluate_every != 0,
            "patience counts evaluations, and with evaluate_every at 0 there are none on the way; "
            "leave one of them out",
        )
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.lora_rank == 0:
            require(
                self.base == "float",
                "base nf4 is for frozen weights beside adapters, and lora_rank 0 trains all "
                "weights, which 4 bits cannot hold; give a lora_rank, such as 16",
            )
            others = {
                "lora_alpha": self.lora_alpha is not None,
                "lora_targets": self.lora_targets != MATRICES,
                "lora_ranks": bool(self.lora_ranks),
                "lora_start": self.lora_start != "zero",
                "rslora": self.rslora,
                "dora": self.dora,
            }
            given = [name for name, changed in others.items() if changed]
            require(
                not given,
                f"{', '.join(given)} is about adapters, and lora_rank 0 makes none; give a "
                "lora_rank, such as 16",
            )
            return
        require(bool(self.lora_targets), "lora_targets should name at least one matrix")
        for target in self.lora_targets:
            require_choice("lora_targets", target, get_args(Target))
        for one in self.lora_ranks:
            kind, _, rank = one.partition("=")
            require(
                kind in self.lora_targets and rank.isascii() and rank.isdecimal() and int(rank) > 0,
                f"lora_ranks should name one of the lora_targets and a rank above 0, such as "
                f"down_proj=32, not {one!r:.80}",
            )
        require(
            not (self.dora and self.lora_start == "pissa"),
            "dora and lora_start pissa both take the weights apart; choose one of them",
        )
        require(
            not (self.base == "nf4" and self.lora_start == "pissa"),
            "lora_start pissa takes its start out of the weights, which nf4 would round again; "
            "choose base float or lora_start zero",
        )
        require(
            not (self.dora and "lm_head" in self.lora_targets),
            "dora is for the matrices of the layers; leave lm_head out of lora_targets",
        )


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    require(
        isinstance(value, list | tuple) and len(set(value)) == len(value),
        f"{name} should be a list in which nothing stands twice, not {value!r:.80}",
    )
    assert isinstance(value, list | tuple)
    return tuple(value)


_CHOICES = {
    "base": Base,
    "long_conversations": LongConversations,
    "lora_start": Start,
    "optimizer": OptimizerName,
    "precision": Precision,
}
