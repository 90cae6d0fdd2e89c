"""What a user decides about tuning.

The settings of all commands are one file because every step has one ``settings.py``, which imports
no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.judging.judge import Check
from mistill.preferences.reading import PairsOfRanking
from mistill.settings import (
    TextSettings,
    require,
    require_choice,
    require_divisor,
    require_range,
)
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
        other_tokens: Most tokens of text that the model is not tuned on, by which the report says
            what it has forgotten; 0 reads none.
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
    other_tokens: int = 4096
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
            *("neftune", "patience", "other_tokens", "replies"),
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
        require_divisor("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        require(
            self.patience == 0 or self.evaluate_every != 0,
            "patience counts evaluations, and with evaluate_every at 0 there are none on the way; "
            "leave one of them out",
        )
        self._check_adapters()

    def _check_adapters(self) -> None:
        require_adapters_beside(self.base, self.lora_rank)
        if self.lora_rank == 0:
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


def require_adapters_beside(base: Base, lora_rank: int) -> None:
    """Refuse to train weights that 4 bits hold.

    Args:
        base: How frozen weights are held.
        lora_rank: Rank of the adapters beside them; 0 for none.

    Raises:
        SettingsError: If they would be trained.
    """
    require(
        base == "float" or lora_rank > 0,
        "base nf4 is for frozen weights beside adapters, and lora_rank 0 trains all weights, which "
        "4 bits cannot hold; give a lora_rank, such as 16",
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


# --- preferences, rewards and reinforcement -------------------------------------------------------

PreferenceLoss = Literal["sigmoid", "ipo", "sigmoid_norm", "robust", "kto", "orpo"]
Keep = Literal["best", "last"]

# Rates for adapters and for all weights, where none is given.
PREFERENCE_RATES = (5e-6, 5e-7)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(TextSettings):
    """How a model is trained by a trainer of TRL.

    Attributes:
        lora_rank: Train LoRA adapters of this rank beside all seven kinds of matrices; 0 trains
            all weights.
        lora_alpha: The adapters' product is scaled by lora_alpha / lora_rank; if not given, twice
            the rank.
        base: How frozen weights are held beside adapters: float, or nf4, in 4 bits with double
            quantization (QLoRA).
        epochs: How often the data are gone through.
        steps: Optimizer steps; if given, epochs does not count.
        batch_size: Rows of one optimizer step, over all processes.
        micro_batch_size: Rows that one process computes at once; must divide batch_size. It changes
            memory and speed; with the losses kto and orpo, which compare the rows of a
            micro-batch or average over its tokens, also a little of the result.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Weight decay of AdamW.
        max_gradient_norm: Gradients longer than this are scaled down to this length.
        max_length: Most tokens of a prompt and an answer; longer rows are left out and counted.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass, to
            save memory.
        precision: float32, bfloat16 (weights and sums stay in float32), or auto: bfloat16 on a
            GPU, float32 on a CPU.
        checkpoint_every: Optimizer steps between two checkpoints; if not given, an evaluation has
            one.
        seed: Seed of the order of the data, of the adapters and of the held-out share.
    """

    lora_rank: int = 16
    lora_alpha: int | None = None
    base: Base = "float"
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 2
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    max_length: int = 1024
    gradient_checkpointing: bool = False
    precision: Precision = "auto"
    checkpoint_every: int | None = None
    seed: int = 0

    @property
    def adapter_alpha(self) -> int:
        """What the factor of the adapters' product is, times the rank."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("batch_size", "micro_batch_size", "steps", "checkpoint_every", "lora_alpha"):
            require_range(name, getattr(self, name), 1)
        require_range("max_length", self.max_length, 2)
        require_divisor("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        for name in ("max_gradient_norm", "epochs"):
            require_range(name, getattr(self, name), 0, exclusive=True)
        for name in ("weight_decay", "lora_rank", "seed"):
            require_range(name, getattr(self, name), 0)
        require_range("warmup", self.warmup, 0, 1)
        require_choice("precision", self.precision, get_args(Precision))
        require_choice("base", self.base, get_args(Base))
        require_adapters_beside(self.base, self.lora_rank)
        require(
            self.lora_alpha is None or self.lora_rank > 0,
            "lora_alpha is for adapters; give a lora_rank above 0, or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluatedSettings(TrainerSettings):
    """How a model is trained on judged answers, and evaluated on some of them.

    Attributes:
        held_out_share: Share of the prompts held out for evaluation, where no held-out data are
            named. No prompt is on both sides.
        evaluate_every: Optimizer steps between two evaluations; if not given, a fifth of the run.
        ranking: Which pairs a ranking of several answers gives: best_worst, best_random (the best
            and a lower one drawn at random) or all.
    """

    held_out_share: float = 0.1
    evaluate_every: int | None = None
    ranking: PairsOfRanking = "best_worst"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        super().__post_init__()
        require_range("held_out_share", self.held_out_share, 0, 1, exclusive=True)
        require_range("evaluate_every", self.evaluate_every, 1)
        require_choice("ranking", self.ranking, get_args(PairsOfRanking))


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(EvaluatedSettings):
    """How a model learns which of two answers is better.

    Attributes:
        loss: sigmoid (DPO), ipo, sigmoid_norm (DPO on log-probabilities per token, which does not
            reward longer answers), robust (DPO for labels of which some are wrong), kto (answers
            labelled good or bad, without pairs), or orpo (without a reference; experimental in
            TRL, where it also learns the prompts).
        learning_rate: Highest learning rate, reached at the end of the warm-up; it then falls
            towards 0 along half a cosine. If not given, 5e-6 for adapters and 5e-7 for all weights.
        beta: How strongly the model is held to the one it starts from; smaller moves it further.
            For ipo its tau, for orpo the weight of the odds ratio.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round, for
            the loss robust; from 0 to below 0.5.
        good_weight: Weight of the good answers, for the loss kto.
        bad_weight: Weight of the bad answers, for the loss kto.
        keep: best (of all evaluations, by the held-out loss) or last.
        other_tokens: Most tokens of text that the model is not tuned on, by which the report says
            what it has forgotten; 0 reads none.
    """

    loss: PreferenceLoss = "sigmoid"
    learning_rate: float | None = None
    beta: float = 0.1
    label_smoothing: float | None = None
    good_weight: float = 1.0
    bad_weight: float = 1.0
    keep: Keep = "best"
    other_tokens: int = 4096

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        adapters, weights = PREFERENCE_RATES
        return self.learning_rate or (adapters if self.lora_rank else weights)

    @property
    def smoothing(self) -> float:
        """The share of wrong labels that the loss robust assumes; 0 for the others."""
        if self.loss != "robust":
            return 0.0
        return 0.1 if self.label_smoothing is None else self.label_smoothing

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        super().__post_init__()
        require_choice("loss", self.loss, get_args(PreferenceLoss))
        require_choice("keep", self.keep, get_args(Keep))
        for name in ("learning_rate", "beta", "good_weight", "bad_weight"):
            require_range(name, getattr(self, name), 0, exclusive=True)
        require_range("other_tokens", self.other_tokens, 0)
        smoothing = self.label_smoothing
        require(
            smoothing is None or 0 <= smoothing < 0.5,
            f"label_smoothing must be from 0 to below 0.5, not {smoothing}",
        )
        require(
            smoothing is None or self.loss == "robust",
            f"label_smoothing is for the loss robust, not {self.loss}; leave it out",
        )
        require(
            self.loss == "kto" or (self.good_weight == 1 and self.bad_weight == 1),
            f"good_weight and bad_weight are for the loss kto, not {self.loss}; leave them out",
        )
        require(
            self.loss != "kto" or self.micro_batch_size > 1,
            "the loss kto estimates its KL divergence from the other answers of a micro-batch; "
            "give a micro_batch_size of at least 2",
        )


# The same for reward models.
REWARD_RATES = (1e-4, 1e-5)


@dataclass(frozen=True, kw_only=True)
class RewardSettings(EvaluatedSettings):
    """How a reward model learns from pairs of answers.

    Attributes:
        learning_rate: Highest learning rate, reached at the end of the warm-up; it then falls
            towards 0 along half a cosine. If not given, 1e-4 for adapters and 1e-5 for all weights.
        margins: Ask for scores as far apart as the pairs' own scores or margins say (Touvron et
            al., 2023, section 3.2.2); every pair needs one.
        centering: Weight of the square of the sum of both scores, which holds them near 0; 0
            leaves it out.
        keep: best (of all evaluations, by the held-out loss) or last.
    """

    learning_rate: float | None = None
    margins: bool = False
    centering: float = 0.01
    keep: Keep = "best"

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        adapters, weights = REWARD_RATES
        return self.learning_rate or (adapters if self.lora_rank else weights)

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        super().__post_init__()
        require_range("learning_rate", self.learning_rate, 0, exclusive=True)
        require_range("centering", self.centering, 0)
        require_choice("keep", self.keep, get_args(Keep))


Method = Literal["grpo", "rloo", "ppo"]

# The same for reinforcement.
REINFORCE_RATES = (1e-5, 1e-6)
# Weight of the KL divergence from the start, by the method, where none is given.
_BETAS = {"grpo": 0.0, "rloo": 0.05}


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings(TrainerSettings):
    """How a model learns from a judge of the answers that it writes itself.

    Attributes:
        method: grpo or rloo, neither of which needs a critic. ppo is refused, with a word on
            where to get it.
        samples: Answers to one prompt, which are compared with one another.
        batch_size: Answers of one optimizer step; a multiple of samples.
        max_new_tokens: Most tokens of an answer. One that is cut off teaches nothing.
        temperature: Sampling temperature of the answers.
        top_p: Sample from the most probable tokens that together have this probability.
        learning_rate: Highest learning rate, reached at the end of the warm-up; it then falls
            towards 0 along half a cosine. If not given, 1e-5 for adapters and 1e-6 for all weights.
        beta: Weight of the KL divergence from the start in the loss; if not given, 0 for grpo and
            0.05 for rloo.
        max_kl: The run stops when the KL divergence from the start exceeds this, in nats a token,
            measured on the answers of each step.
        check: Judge the answers by a check: json (they are JSON of a schema), regex (they match a
            pattern), code (their code runs and passes the tests in the prompt's column tests), or
            instructions (the share of IFEval's instructions that they follow).
        schema: The JSON schema for the check json: a file, or its text.
        pattern: The regular expression for the check regex; it must match the whole answer.
        function: Judge the answers by a function of yours, named package.module:function. It is
            imported and run: name no function that you have not read.
        held_out_share: Share of the prompts held out for evaluation.
        held_out_prompts: Most held-out prompts, each answered once by the likeliest tokens.
        evaluate_every: Optimizer steps between two evaluations; if not given, a fifth of the run.
        keep: best (of all evaluations, by the mean reward) or last.
        other_tokens: Most tokens of text that the model is not tuned on, by which the report says
            what it has forgotten; 0 reads none.
    """

    method: Method = "grpo"
    samples: int = 8
    batch_size: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    learning_rate: float | None = None
    beta: float | None = None
    max_kl: float = 1.0
    check: Check | None = None
    schema: str | None = None
    pattern: str | None = None
    function: str | None = None
    held_out_share: float = 0.1
    held_out_prompts: int = 32
    evaluate_every: int | None = None
    keep: Keep = "best"
    other_tokens: int = 4096

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        adapters, weights = REINFORCE_RATES
        return self.learning_rate or (adapters if self.lora_rank else weights)

    @property
    def divergence_weight(self) -> float:
        """The weight of the KL divergence from the start."""
        return _BETAS[self.method] if self.beta is None else self.beta

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        super().__post_init__()
        require_choice("method", self.method, get_args(Method))
        require(
            self.method != "ppo",
            "PPO with a critic is not offered, since TRL has removed it; take OpenRLHF or verl on "
            "a cluster, or grpo or rloo here, which need no critic",
        )
        require_range("samples", self.samples, 2)
        for name in ("max_new_tokens", "held_out_prompts", "evaluate_every"):
            require_range(name, getattr(self, name), 1)
        for name in ("temperature", "learning_rate", "max_kl"):
            require_range(name, getattr(self, name), 0, exclusive=True)
        for name in ("beta", "other_tokens"):
            require_range(name, getattr(self, name), 0)
        require_range("held_out_share", self.held_out_share, 0, 1, exclusive=True)
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require_choice("keep", self.keep, get_args(Keep))
        require(
            self.batch_size % self.samples == 0,
            f"batch_size should be a multiple of samples, but {self.batch_size} is none of "
            f"{self.samples}",
        )
        require(
            self.max_new_tokens < self.max_length,
            f"max_new_tokens should be below max_length, and {self.max_new_tokens} leaves no room "
            f"for a prompt in {self.max_length}",
        )
        if self.check is not None:
            require_choice("check", self.check, get_args(Check))
