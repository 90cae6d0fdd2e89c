"""What a user decides about distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mistill.settings import require
from mistill.training.processes import OptimizerName, Precision

# Those of distill.loss.divergences, which imports PyTorch.
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
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
    "optimizer": OptimizerName,
    "precision": Precision,
    "teacher_precision": TeacherPrecision,
}


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


Choice = Literal["influence", "angular", "greedy_kl", "even", "named"]


CHOICES = ("influence", "angular", "greedy_kl", "even", "named")


MEASURED = ("influence", "angular", "greedy_kl")


_WALK_TOKENS = 8192


_GREEDY_TOKENS = 1024


_WIDTHS = ("hidden_size", "intermediate_size", "key_value_heads")


_TARGETS = ("layers", "parameters", "megabytes_at_4_bits")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What a student keeps of its teacher, or the sizes of a fresh one.

    Attributes:
        layers: How many of the teacher's layers to keep. A fresh student may have any number, and
            has the teacher's if none is given.
        parameters: Keep as many layers as fit into this many parameters, instead of saying how
            many.
        megabytes_at_4_bits: Keep as many layers as fit into this many megabytes (10**6 bytes) of
            weights in a 4-bit chatbot, whose embedding and head have 8 bits.
        choose: Which layers to keep. "influence": those that turn the hidden state most on text.
            "angular": all but the block of neighbours that together turn it least. "greedy_kl":
            drop one at a time, whichever costs least KL to the teacher; the text is read about
            layers x dropped / 2 times. "even": evenly spaced, the first and the last among them.
            "named": those in keep.
        keep: With choose "named": the layers to keep, counted from 0, in ascending order.
        fresh: Start from random weights, with sizes of its own and the teacher's vocabulary. For
            a random twin of a pruned student, give that student as the teacher.
        hidden_size: Width of the hidden state, the teacher's if not given: the channels that are
            used most on text are kept. Of a fresh student: any.
        intermediate_size: Neurons in the feed-forward part of a layer, likewise.
        attention_heads: Of a fresh student: attention heads; the teacher's if not given. Of
            another they follow key_value_heads.
        key_value_heads: Key and value heads, likewise; the query heads that share one are kept or
            go with it.
        seed: Of a fresh student: where the random weights start.
        calibration_tokens: Tokens of text to measure on, at most; if not given 8,192, or 1,024
            for greedy_kl.
        block_length: Tokens that the teacher reads at once when it is measured.
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

    @property
    def walk_tokens(self) -> int:
        """Tokens to measure influence, angles and activations on, at most."""
        return self.calibration_tokens or _WALK_TOKENS

    @property
    def greedy_tokens(self) -> int:
        """Tokens to search the cheapest layers on, at most."""
        return self.calibration_tokens or _GREEDY_TOKENS

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in (*_WIDTHS, "attention_heads", "layers", "parameters", "calibration_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be 1 or more, not {value}")
        require(
            self.megabytes_at_4_bits is None or 0 < self.megabytes_at_4_bits < float("inf"),
            f"megabytes_at_4_bits must be above 0, not {self.megabytes_at_4_bits}",
        )
        require(
            self.block_length >= 2,
            f"block_length must be 2 or more, so that tokens have a past; not {self.block_length}",
        )
        require(self.seed >= 0, f"seed must be 0 or more, not {self.seed}")
        require(
            self.choose in CHOICES,
            f"choose must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}, not {self.choose!r}",
        )
        self._check_size()
        self._check_names()
        self._check_fresh()

    def _check_size(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        require(
            len(given) <= 1,
            f"{' and '.join(given)} each say how many layers there are; give one of them",
        )

    def _check_names(self) -> None:
        named = self.choose == "named"
        require(not named or bool(self.keep), "choose 'named' needs keep: the layers to keep")
        require(
            named or not self.keep,
            f"keep names layers and choose asks for {self.choose!r} ones; set choose to 'named'",
        )
        require(
            all(earlier < later for earlier, later in zip(self.keep, self.keep[1:], strict=False)),
            f"keep must be in ascending order and name no layer twice, not {_listed(self.keep)}",
        )
        require(
            not self.keep or self.keep[0] >= 0,
            f"keep counts layers from 0, so none is below it; got {_listed(self.keep)}",
        )
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
            self.fresh or self.attention_heads is None,
            "attention_heads can be chosen for a fresh student only, since other students keep "
            "whole groups of them; give key_value_heads, and they follow",
        )
        require(
            not self.fresh or self.choose == "influence",
            f"a fresh student keeps no layer of its teacher; leave out choose {self.choose!r}",
        )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


# Places in a file are stored in 4 bytes.
_MOST_SHARD_TOKENS = 2**22


# A count of draws is stored in a byte.
_MOST_DRAWS = 255


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """How what a teacher says is kept on disk.

    Attributes:
        method: systematic draws tokens at evenly spaced heights of the distribution, multinomial
            each by itself, which varies more for the same bytes; top_k keeps the most probable
            tokens and puts all others into one bucket, which is cheaper to make and biased.
        draws: Tokens drawn at each position, 1 to 255; most are drawn several times.
        top_k: Tokens kept at each position where the method is top_k.
        temperature: Softens the teacher's distribution; training must use the same.
        codec: plain, or coded: about a quarter smaller and slower to read.
        block_length: Where longer documents are cut, T; training must use the same, unless all
            documents are shorter.
        shard_tokens: Text tokens of one file; a kill loses the work on one file at most.
        batch_size: Blocks that the teacher reads at once.
        memory_mib: Room for logits, which are made a few rows at a time.
        precision: Of the teacher: float32, bfloat16, or auto: bfloat16 on a GPU.
        seed: Decides what is drawn.
        rank: Which of ``ranks`` processes or machines this is, from 0; for those that no common
            launcher has started.
        ranks: How many share the work; each writes its own files into the same target.
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    rank: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no targets can be made with."""
        _require_one_of("method", self.method, ("systematic", "multinomial", "top_k"))
        _require_one_of("codec", self.codec, ("plain", "coded"))
        _require_one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        require(
            1 <= self.draws <= _MOST_DRAWS,
            f"draws should be between 1 and {_MOST_DRAWS}, not {self.draws}",
        )
        for name in ("top_k", "shard_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} should be at least 1, not {value}")
        require(
            self.shard_tokens <= _MOST_SHARD_TOKENS,
            f"shard_tokens should be at most {_MOST_SHARD_TOKENS}, not {self.shard_tokens}",
        )
        require(
            self.block_length >= 2,
            f"block_length should be at least 2, a token and the one it predicts, not "
            f"{self.block_length}",
        )
        for name in ("temperature", "memory_mib"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} should be above 0, not {value}")
        require(self.seed >= 0, f"seed should be 0 or more, not {self.seed}")
        require(
            self.codec == "plain" or self.method != "top_k",
            "codec coded is for draws, and method top_k makes none; choose codec plain",
        )
        require(
            (self.rank is None) == (self.ranks is None),
            "rank and ranks belong together: this process and how many there are",
        )
        if self.rank is not None and self.ranks is not None:
            require(self.ranks >= 1, f"ranks should be at least 1, not {self.ranks}")
            require(
                0 <= self.rank < self.ranks,
                f"rank should be between 0 and {self.ranks - 1}, not {self.rank}",
            )


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    words = f"{', '.join(known[:-1])} or {known[-1]}"
    require(value in known, f"{name} should be {words}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How a teacher writes conversations.

    Attributes:
        max_new_tokens: Most tokens of a reply; what has not ended by then is unfinished.
        temperature: Divides the logits; 0 always takes the most probable token.
        top_p: Keep the most probable tokens until their probabilities reach this sum; 1 keeps all.
        system: A system prompt that begins every conversation; without one, the teacher's chat
            template decides.
        keep_unfinished: Keep replies that were cut off; a student that learns from them learns
            not to stop.
        held_out: A second .jsonl file for a share of the prompts, for measuring what was not
            trained on.
        held_out_share: Share of the prompts whose conversations go there, by a hash of the
            prompt, so that equal prompts never part.
        batch_size: Prompts that the teacher answers at once.
        seed: Makes the replies repeatable; each prompt draws by itself.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    system: str | None = None
    keep_unfinished: bool = False
    held_out: Path | None = None
    held_out_share: float = 0.125
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no reply can be written with."""
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, not {self.max_new_tokens}",
        )
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be 0 or above, not {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(
            0 < self.held_out_share < 1,
            f"held_out_share must be between 0 and 1, not {self.held_out_share}",
        )
        require(
            self.held_out is None or Path(self.held_out).suffix.lower() == ".jsonl",
            f"held_out must be a .jsonl file, not {self.held_out}",
        )
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.seed >= 0, f"seed must be 0 or above, not {self.seed}")
