"""What a user decides about distillation.

The settings of all commands stand in one file because every step has one ``settings.py``, which
imports no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from mistill.loss.names import DivergenceName
from mistill.settings import (
    TextSettings,
    require,
    require_choice,
    require_divisor,
    require_range,
)
from mistill.training.processes import OptimizerName, Precision, TrackerName, require_known_trackers

ChoiceBy = Literal["log_p", "json", "regex", "code", "instructions"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
TeacherPrecision = Literal["auto", "float32", "bfloat16", "nf4"]


# Learning rates of students as they were cut or trained, and as they were healed.
LEARNING_RATE, HEALED_LEARNING_RATE = 3e-4, 1e-4


TRAIN_TOKENS = 1_000_000
"""Tokens that a student is trained on where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TextSettings):
    """How a student is trained on its teacher's predictions.

    Attributes:
        tokens: Text tokens to train on, without padding. A text with fewer tokens is repeated, in
            another order each time.
        epochs: How often to go through the text, in place of tokens.
        block_length: Tokens of one block (T). Longer documents are split; shorter ones share a
            block, and attention does not cross from one to the next.
        batch_size: Blocks of one optimizer step, over all processes.
        micro_batch_size: Blocks that one process computes at once; must divide batch_size. It
            changes memory and speed, not the result.
        learning_rate: Highest learning rate, reached at the end of the warm-up; it then falls
            towards 0 along half a cosine. If not given, 3e-4, or 1e-4 for a student that was
            healed, whose good start the higher rate throws away.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Weight decay of AdamW, on matrices alone; norms, biases, embedding and head
            have none.
        max_gradient_norm: Gradients longer than this are scaled down to this length.
        optimizer: adamw, or adamw_8bit from bitsandbytes, which stores both moments in one byte
            per weight.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass, to
            save memory.
        lora_rank: Train LoRA adapters of this rank and merge them at the end; 0 trains all
            weights.
        divergence: Divergence between teacher and student to minimise: forward_kl, reverse_kl,
            jsd, skew_kl, skew_reverse_kl or tvd. Cached targets allow forward_kl alone.
        mixture: Mixture weight of jsd, skew_kl and skew_reverse_kl, above 0 and below 1.
        temperature: Softmax temperature of both distributions; the loss is multiplied by its
            square.
        cross_entropy: Weight of the cross-entropy with the text in the loss, 0 to 1. At 1 the
            teacher is used for evaluation alone.
        on_policy: Share of the steps that train on text which the student writes itself from the
            prompts of the texts, 0 to 1 (on-policy distillation). Cross-entropy does not count in
            them.
        on_policy_temperature: Sampling temperature of the text that the student writes.
        on_policy_prompt: Tokens that the student continues from, in texts without a prompt of
            their own.
        held_out_share: Share of the documents held out for evaluation, where no held-out text is
            named.
        held_out_tokens: Most tokens of held-out text to evaluate on, taken evenly from all of it.
        kept_back_share: Share of the documents that are not trained on, chosen by a hash of their
            tokens, so that a later step such as quantize tune has text which the student has not
            seen; 0 trains on all.
        evaluate_every: Optimizer steps between two evaluations; 0 evaluates before and after
            training alone. The best student of all evaluations is kept.
        checkpoint_every: Optimizer steps between two checkpoints; with 0 an interrupted run starts
            again from the beginning.
        loss_memory_mib: Memory for logits, in MiB; they are computed a few rows at a time.
        precision: float32, bfloat16 (weights and sums stay in float32), or auto: bfloat16 on a
            GPU, float32 on a CPU.
        teacher_precision: Precision of the teacher: float32, bfloat16, nf4 (quantized while it is
            loaded; the KL that this costs is measured and recorded), or auto: the same as
            precision.
        teacher_device_map: How to spread a teacher over several GPUs and the CPU's memory, as in
            accelerate: auto, balanced, balanced_low_0 or sequential.
        divide_teacher: Shard one teacher over the processes of a machine (FSDP), instead of one
            copy per process.
        twin: Also train the same student on the text alone, by cross-entropy: once for as many
            tokens, and once for as much time. The fidelity card shows both beside the student, so
            that the gain from the teacher can be read off. Takes about three times as long.
        trackers: Also log metrics to these: tensorboard, trackio, wandb.
        seed: Seed of the order of the texts and of the held-out share.
    """

    tokens: int = TRAIN_TOKENS
    epochs: float | None = None
    block_length: int = 512
    batch_size: int = 2
    micro_batch_size: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    optimizer: OptimizerName = "adamw"
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
    kept_back_share: float = 0.05
    evaluate_every: int = 100
    checkpoint_every: int = 100
    loss_memory_mib: float = 128.0
    precision: Precision = "auto"
    teacher_precision: TeacherPrecision = "auto"
    teacher_device_map: DeviceMap | None = None
    divide_teacher: bool = False
    twin: bool = False
    trackers: tuple[TrackerName, ...] = ()
    seed: int = 0

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        return LEARNING_RATE if self.learning_rate is None else self.learning_rate

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in (
            *("tokens", "batch_size", "micro_batch_size"),
            *("held_out_tokens", "on_policy_prompt"),
        ):
            require_range(name, getattr(self, name), 1)
        require_range("epochs", self.epochs, 0, exclusive=True)
        require(
            self.epochs is None or self.tokens == TRAIN_TOKENS,
            "give either tokens or epochs, which says how many they are; both are given",
        )
        require_range("block_length", self.block_length, 2)
        require_divisor("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        for name in (
            *("learning_rate", "max_gradient_norm", "temperature"),
            *("on_policy_temperature", "loss_memory_mib"),
        ):
            require_range(name, getattr(self, name), 0, exclusive=True)
        for name in ("weight_decay", "evaluate_every", "checkpoint_every", "lora_rank", "seed"):
            require_range(name, getattr(self, name), 0)
        for name in ("warmup", "cross_entropy", "on_policy"):
            require_range(name, getattr(self, name), 0, 1)
        require(
            0 <= self.kept_back_share < 1,
            f"kept_back_share must be at least 0 and below 1, got {self.kept_back_share:g}",
        )
        for name in ("mixture", "held_out_share"):
            require_range(name, getattr(self, name), 0, 1, exclusive=True)
        for name, kind in _CHOICES.items():
            require_choice(name, getattr(self, name), get_args(kind))
        if self.teacher_device_map is not None:
            require_choice("teacher_device_map", self.teacher_device_map, get_args(DeviceMap))
        require_known_trackers(self.trackers)
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
    "optimizer": OptimizerName,
    "precision": Precision,
    "teacher_precision": TeacherPrecision,
}


Choice = Literal["influence", "angular", "greedy_kl", "healed", "even", "named"]


CHOICES = ("influence", "angular", "greedy_kl", "healed", "even", "named")


MEASURED = ("influence", "angular", "greedy_kl", "healed")


_WALK_TOKENS = 8192


_GREEDY_TOKENS = 1024

# What healing needs to fit a matrix of 1,536 inputs.
_CHOOSING_TOKENS = 6144


# Tokens of each text that a student is healed on.
HEALING_TOKENS = 16_384


_WIDTHS = ("hidden_size", "intermediate_size", "key_value_heads")


_TARGETS = ("layers", "parameters", "megabytes_at_4_bits")


@dataclass(frozen=True, kw_only=True)
class StudentSettings(TextSettings):
    """How a student is pruned from its teacher, or the sizes of one with random weights.

    Attributes:
        layers: Number of layers to keep. A fresh student may have any number.
        parameters: Keep as many layers as fit into this number of parameters.
        megabytes_at_4_bits: Keep as many layers as fit into this many megabytes (10**6 bytes), with
            4-bit layers and an 8-bit embedding and head.
        choose: How the layers to drop are chosen. "influence": those that change the hidden state
            least on text (block influence). "angular": the run of neighbouring layers that together
            changes it least. "greedy_kl": one at a time, whichever raises the KL to the teacher
            least; reads the text about layers x dropped / 2 times. "healed": those whose work the
            others take over best, by what healing leaves of their absence; takes about as long as
            healing the teacher on this text once for each dropped layer. "even": evenly spaced,
            keeping the first and the last. "named": the layers in keep stay.
        keep: Numbers of the layers to keep, from 0, in ascending order; for choose "named".
        fresh: Start from random weights with the teacher's vocabulary instead of pruning. To make a
            random counterpart of a pruned student, give that student as the teacher.
        hidden_size: Width of the hidden state; the channels that are most active on text are kept.
            A fresh student may have any width. The teacher's if not given.
        intermediate_size: Neurons of each feed-forward layer; the most active ones are kept. The
            teacher's if not given.
        attention_heads: Attention heads of a fresh student. A pruned student keeps those that
            belong to its key_value_heads.
        key_value_heads: Key and value heads; the query heads that share one are kept or dropped
            with it. The teacher's if not given.
        seed: Seed of the random weights of a fresh student.
        calibration_tokens: Most tokens of text to measure the teacher on; if not given 8,192, or
            1,024 for greedy_kl. For healed 6,144, as many of each text.
        block_length: Tokens of one block of that text.
        heal: Refit the output matrices of every layer in closed form after pruning, so that the
            hidden states are the teacher's again as far as they can be; if not given, wherever
            there is text. Text of several kinds keeps the student from losing on other kinds.
        heal_tokens: Most tokens of each text to fit them to.
    """

    layers: int | None = None
    parameters: int | None = None
    megabytes_at_4_bits: float | None = None
    choose: Choice = "influence"
    keep: tuple[int, ...] = ()
    fresh: bool = False
    hidden_size: int | None = None
    intermediate_size: int | None = None
    attention_heads: int | None = None
    key_value_heads: int | None = None
    seed: int = 0
    calibration_tokens: int | None = None
    block_length: int = 512
    heal: bool | None = None
    heal_tokens: int = HEALING_TOKENS

    @property
    def walk_tokens(self) -> int:
        """Tokens to measure influence, angles and activations on, at most."""
        return self.calibration_tokens or _WALK_TOKENS

    @property
    def greedy_tokens(self) -> int:
        """Tokens to search the cheapest layers on, at most."""
        return self.calibration_tokens or _GREEDY_TOKENS

    @property
    def choosing_tokens(self) -> int:
        """Tokens to choose layers on by what healing leaves, at most."""
        return self.calibration_tokens or _CHOOSING_TOKENS

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        counts = ("attention_heads", "layers", "parameters", "calibration_tokens", "heal_tokens")
        for name in (*_WIDTHS, *counts):
            require_range(name, getattr(self, name), 1)
        require_range("megabytes_at_4_bits", self.megabytes_at_4_bits, 0, exclusive=True)
        require_range("block_length", self.block_length, 2)
        require_range("seed", self.seed, 0)
        require_choice("choose", self.choose, CHOICES)
        self._check_size()
        self._check_names()
        self._check_fresh()

    def _check_size(self) -> None:
        depth_options = [name for name in _TARGETS if getattr(self, name) is not None]
        require(
            len(depth_options) <= 1,
            f"{' and '.join(depth_options)} each say how many layers there are; give one of them",
        )

    def _check_names(self) -> None:
        by_name = self.choose == "named"
        require(not by_name or bool(self.keep), "choose 'named' needs keep: the layers to keep")
        require(
            by_name or not self.keep,
            f"keep names layers and choose asks for {self.choose!r} ones; set choose to 'named'",
        )
        _check_ascending("keep", self.keep)
        require(
            not self.keep or self.layers in (None, len(self.keep)),
            f"keep names {len(self.keep)} layers and layers asks for {self.layers}; leave layers "
            "out",
        )
        sized = [name for name in _TARGETS[1:] if getattr(self, name) is not None]
        require(
            not self.keep or not sized,
            f"keep names the layers, so that {' and '.join(sized)} has nothing to decide; leave "
            "one of them out",
        )

    def _check_fresh(self) -> None:
        require(
            not (self.fresh and self.heal),
            "a fresh student has nothing of its teacher that could be healed; leave out heal",
        )
        require(
            self.fresh or self.attention_heads is None,
            "attention_heads can be chosen for a fresh student only, since other students keep "
            "whole groups of them; give key_value_heads, and they follow",
        )
        require(
            not self.fresh or self.choose == "influence",
            f"a fresh student keeps no layer of its teacher; leave out choose {self.choose!r}",
        )


def _check_ascending(name: str, layers: tuple[int, ...]) -> None:
    require(
        all(earlier < later for earlier, later in pairwise(layers)),
        f"{name} must be in ascending order and name no layer twice, not {_listed(layers)}",
    )
    require(
        not layers or layers[0] >= 0,
        f"{name} counts layers from 0, so none is below it; got {_listed(layers)}",
    )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


# Places in a file are stored in 4 bytes.
_MOST_SHARD_TOKENS = 2**22


# A count of draws is stored in a byte.
_MOST_DRAWS = 255


@dataclass(frozen=True, kw_only=True)
class HealSettings(TextSettings):
    """How a pruned student is healed in closed form.

    Attributes:
        tokens: Most tokens of each text to fit to.
        block_length: Tokens of one block of that text.
        ridge: Ridge of every fit, as a share of the mean square of its inputs; if not given, the
            best of several for each matrix, judged on an eighth of the text that is left out of
            the fit.
        kept_layers: The layers of the teacher that the student has, ascending from 0, where its
            lineage does not say.
    """

    tokens: int = HEALING_TOKENS
    block_length: int = 512
    ridge: float | None = None
    kept_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be healed with."""
        object.__setattr__(self, "kept_layers", tuple(self.kept_layers))
        require_range("tokens", self.tokens, 1)
        require_range("block_length", self.block_length, 2)
        require_range("ridge", self.ridge, 0, exclusive=True)
        _check_ascending("kept_layers", self.kept_layers)


@dataclass(frozen=True, kw_only=True)
class TargetSettings(TextSettings):
    """How teacher logits are sampled and stored.

    Attributes:
        method: How tokens are stored. "systematic": tokens sampled at evenly spaced heights of the
            cumulative distribution. "multinomial": sampled independently, with more variance for
            the same bytes. "top_k": the most probable tokens and the rest as one bucket; cheaper
            to make, and biased.
        draws: Samples per position, 1 to 255; probable tokens are sampled several times.
        top_k: Tokens stored per position by method top_k.
        temperature: Softmax temperature of the teacher; training must use the same.
        codec: plain, or coded: about a quarter smaller and slower to read.
        block_length: Length at which longer documents are split (T); training must use the same,
            unless all documents are shorter.
        shard_tokens: Text tokens of one file; an interruption loses the work on one file at most.
        batch_size: Blocks that the teacher computes at once.
        memory_mib: Memory for logits, in MiB; they are computed a few rows at a time.
        precision: Precision of the teacher: float32, bfloat16, or auto: bfloat16 on a GPU.
        seed: Seed of the samples.
        rank: Number of this process or machine among ranks, from 0; for processes that no common
            launcher has started.
        ranks: Processes or machines that share the work; each writes files of its own into the
            same target.
    """

    method: Literal["systematic", "multinomial", "top_k"] = "systematic"
    draws: int = 50
    top_k: int = 50
    temperature: float = 1.0
    codec: Literal["plain", "coded"] = "plain"
    block_length: int = 512
    shard_tokens: int = 65_536
    batch_size: int = 4
    memory_mib: float = 128.0
    precision: Precision = "auto"
    seed: int = 0
    rank: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no targets can be made with."""
        require_choice("method", self.method, ("systematic", "multinomial", "top_k"))
        require_choice("codec", self.codec, ("plain", "coded"))
        require_choice("precision", self.precision, get_args(Precision))
        require_range("draws", self.draws, 1, _MOST_DRAWS)
        require_range("shard_tokens", self.shard_tokens, 1, _MOST_SHARD_TOKENS)
        for name in ("top_k", "batch_size"):
            require_range(name, getattr(self, name), 1)
        require_range("block_length", self.block_length, 2)
        for name in ("temperature", "memory_mib"):
            require_range(name, getattr(self, name), 0, exclusive=True)
        require_range("seed", self.seed, 0)
        require(
            self.codec == "plain" or self.method != "top_k",
            "codec coded is for draws, and method top_k makes none; choose codec plain",
        )
        require(
            (self.rank is None) == (self.ranks is None),
            "rank and ranks belong together: this process and how many there are",
        )
        if self.rank is not None and self.ranks is not None:
            require_range("ranks", self.ranks, 1)
            require_range("rank", self.rank, 0, self.ranks - 1)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TextSettings):
    """How a teacher writes conversations.

    Attributes:
        max_new_tokens: Most tokens of a reply; a reply that has not ended by then is unfinished.
        temperature: Sampling temperature; 0 takes the most probable token.
        top_p: Nucleus sampling: keep the most probable tokens whose probabilities add up to this;
            1 keeps all.
        system: System prompt of every conversation; the chat template's own if not given.
        keep_unfinished: Keep replies that were cut off. A student trained on them learns not to
            stop.
        max_repeats: Drop replies in which a run of four words stands more often than this; 0 keeps
            them.
        drop_duplicates: Drop replies that were given before, but for case, punctuation and space.
        held_out: A second .jsonl file, for the conversations held out from training.
        held_out_share: Share of the prompts that are held out, chosen by a hash of the prompt, so
            that equal prompts stay together.
        batch_size: Prompts that the teacher answers at once.
        seed: Seed of the sampling; each prompt has a generator of its own.
        best_of: Replies to each prompt, of which the best is kept; with 1 there is no choice.
        by: Choose by log_p (of a token, under the teacher), or by a check that a machine can make:
            json, regex, code or instructions, as in mistill tune reinforce. Leave it out where a
            reward model chooses.
        schema: The JSON schema for json: a file, or its text.
        pattern: The regular expression for regex; it must match the whole reply.
        pairs: Write the best and the worst reply to each prompt as a pair of preferences, in place
            of conversations. A prompt whose replies tie gives none.
        without_prompts: Let the teacher write as many prompts itself and answer them (Magpie); the
            prompts are then named @teacher. What is empty, unfinished or written before is dropped.
        reverse: Write instructions for texts: the prompts are texts, and the teacher is a model
            that was tuned on reversed conversations (mistill reverse).
        keep_share: Share of the instructions that are kept, best first, where a forward model
            grades them.
        server: Address of a server that speaks OpenAI's chat completions, such as
            http://127.0.0.1:8000/v1; the teacher is then the name of a model there.
        api_key_file: A file with the API key for that server.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    system: str | None = None
    keep_unfinished: bool = False
    max_repeats: int = 0
    drop_duplicates: bool = False
    held_out: Path | None = None
    held_out_share: float = 0.125
    batch_size: int = 16
    seed: int = 0
    best_of: int = 1
    by: ChoiceBy | None = None
    schema: str | None = None
    pattern: str | None = None
    pairs: bool = False
    without_prompts: int = 0
    reverse: bool = False
    keep_share: float = 1.0
    server: str | None = None
    api_key_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no reply can be written with."""
        require(
            self.api_key_file is None or self.server is not None,
            "api_key_file is for a teacher on a server; give server too",
        )
        require_range("max_new_tokens", self.max_new_tokens, 1)
        require_range("temperature", self.temperature, 0)
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require_range("held_out_share", self.held_out_share, 0, 1, exclusive=True)
        require_range("batch_size", self.batch_size, 1)
        for name in ("seed", "max_repeats"):
            require_range(name, getattr(self, name), 0)
        require(
            self.held_out is None or Path(self.held_out).suffix.lower() == ".jsonl",
            f"held_out must be a .jsonl file, not {self.held_out}",
        )
        require_range("best_of", self.best_of, 1)
        require_range("without_prompts", self.without_prompts, 0)
        if self.by is not None:
            require_choice("by", self.by, get_args(ChoiceBy))
        require(0 < self.keep_share <= 1, f"keep_share must be above 0, not {self.keep_share}")
        require(
            self.best_of > 1 or (self.by is None and not self.pairs),
            "by and pairs choose among several replies; give best_of of at least 2",
        )
        require(
            self.best_of == 1 or self.temperature > 0,
            "at temperature 0 all replies to a prompt are the same; raise temperature, or leave "
            "best_of out",
        )
        require(
            not (self.reverse and (self.pairs or self.without_prompts or self.by is not None)),
            "reverse writes instructions, which a forward model grades; leave pairs, by and "
            "without_prompts out",
        )
        for name, is_set in (
            ("best_of", self.best_of > 1),
            ("without_prompts", self.without_prompts > 0),
            ("reverse", self.reverse),
        ):
            require(
                self.server is None or not is_set,
                f"{name} needs a teacher on this machine, and a server is given; leave one out",
            )
