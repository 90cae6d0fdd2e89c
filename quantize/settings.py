"""The settings of every way of quantizing; imports no torch.

They stand in one file because every step has one ``settings.py``, and several ways share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any, Literal, Self, get_args

from mistill.errors import SettingsError
from mistill.settings import TextSettings, require, require_divisor, require_range
from mistill.training.processes import (
    OptimizerName,
    Precision,
    TrackerName,
    require_known_trackers,
)
from mistill.weights.gptq_layout import ModuleFormat, ScaleType
from quantize.overrides import Override, format_of, parse_override, parse_overrides, require_grid

Order = Literal["static", "dynamic", "group", "none"]
Method = Literal["gptq", "gptaq"]

# Types that the weights of a float folder are written in.
FloatType = Literal["float32", "float16", "bfloat16"]

# Bits that a table of all tokens may have; fewer lose too much.
TABLE_BITS = (4, 8)


# --- shared by several ways -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """The codes and scales that weights are stored as.

    Attributes:
        bits: Bits per weight: 2, 3, 4 or 8.
        group_size: Input columns that share one scale. It must divide the inputs of every layer;
            -1 gives each row one scale.
        symmetric: Store codes around a fixed zero point. Without it each group has its own zero
            point, which fits skewed weights better and takes as many bits as one more weight.
        scale_type: The type that scales are stored in: float16, bfloat16 or float32.
        overrides: Other bits or group sizes for some modules, each "REGEX: bits=8, group_size=32"
            or "REGEX: keep". The regular expression is matched from the start of a module's name,
            and the first one that matches decides.
        head_bits: Bits of the output head, 4 or 8; the head stays float if not given. Only mistill
            reads a quantized head.
        embedding_bits: Bits of the embedding, 4 or 8; the embedding stays float if not given. Only
            mistill reads a quantized embedding. Where head and embedding are one table, either
            option sets its bits.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_type: ScaleType = "float16"
    overrides: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None

    def __post_init__(self) -> None:
        require_grid(self.bits, self.group_size)
        _require_one_of("scale_type", self.scale_type, get_args(ScaleType))
        for name in ("head_bits", "embedding_bits"):
            bits = getattr(self, name)
            require(bits is None or bits in TABLE_BITS, f"{name} must be 4 or 8, not {bits}")
        if isinstance(self.overrides, str):
            raise SettingsError(
                f"overrides must be a list of texts, not one text; write ({self.overrides!r},)"
            )
        object.__setattr__(self, "overrides", tuple(self.overrides))
        self.module_formats()

    @property
    def default_format(self) -> ModuleFormat:
        """The format of modules that no override matches."""
        return ModuleFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def module_formats(self) -> tuple[Override, ...]:
        """The overrides as patterns and formats.

        Returns:
            One for each, in order.
        """
        return parse_overrides(self.overrides, self.default_format)

    def format_of(self, module: str) -> ModuleFormat | None:
        """The format that a matrix of a layer is stored in.

        Args:
            module: Its name, such as ``model.layers.0.mlp.down_proj``.

        Returns:
            Its format; None if it stays float.
        """
        return format_of(module, self.module_formats(), self.default_format)

    def with_format(self, form: ModuleFormat) -> Self:
        """The settings for one module.

        Args:
            form: The format of the module.

        Returns:
            These settings with its bits, group size and symmetry, and no overrides.
        """
        return replace(
            self,
            bits=form.bits,
            group_size=form.group_size,
            symmetric=form.symmetric,
            overrides=(),
        )


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How GPTQ rounds the columns of a weight.

    Attributes:
        method: "gptq" keeps the outputs of each layer for the inputs that the quantized layers
            before it produce. "gptaq" also corrects for what those layers changed: it takes about
            twice the time, and gave a quarter less KL on the one model measured.
        order: The order in which columns are rounded. "static" rounds the columns with the largest
            inputs first, with scales chosen beforehand. "dynamic" forms the groups in that order,
            which costs an index for each column at inference. "group" sorts whole groups. "none"
            goes from left to right.
        scale_search: Number of scales tried for each group; the one with the least weighted error
            is used. 1 takes the scale that just covers the group.
        damp_percent: Share of the Hessian's mean diagonal that is added to its diagonal. It is
            raised, and reported, where the Hessian has no Cholesky factor otherwise.
        true_sequential: Quantize the matrices of a layer in the order of their use, so that later
            ones are calibrated on the outputs of quantized earlier ones.
    """

    method: Method = "gptq"
    order: Order = "static"
    scale_search: int = 16
    damp_percent: float = 0.01
    true_sequential: bool = True

    def __post_init__(self) -> None:
        _require_one_of("order", self.order, get_args(Order))
        _require_one_of("method", self.method, get_args(Method))
        require_range("scale_search", self.scale_search, 1)
        require_range("damp_percent", self.damp_percent, 0, 1, exclusive=True)


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How much calibration text is read.

    Attributes:
        samples: Number of blocks of calibration text.
        block_length: Tokens per block.
        seed: Seed of every random choice, such as which blocks are drawn from a longer text.
    """

    samples: int = 32
    block_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require_range("samples", self.samples, 1)
        require_range("block_length", self.block_length, 2)
        require_range("seed", self.seed, 0)


# --- one way each ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RoundingSettings(TextSettings, GridSettings):
    """How weights are rounded to the nearest code, without calibration text."""


@dataclass(frozen=True, kw_only=True)
class GptqSettings(TextSettings, CalibrationSettings, SolverSettings, GridSettings):
    """How weights are quantized by GPTQ.

    Attributes:
        model_file_base_name: Name of the weights file without its ending, as AutoGPTQ names it,
            such as "gptq_model-4bit-128g"; a quantize_config.json is then written beside it.
            transformers reads only folders where this option is not given.
    """

    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        GridSettings.__post_init__(self)
        SolverSettings.__post_init__(self)
        CalibrationSettings.__post_init__(self)
        name = self.model_file_base_name
        require(
            name is None or (bool(name) and PurePath(name).name == name),
            f"model_file_base_name must be a plain file name without its ending, not {name!r}",
        )


@dataclass(frozen=True, kw_only=True)
class Nf4Settings(TextSettings):
    """How weights are stored as 4-bit NormalFloat by bitsandbytes.

    Attributes:
        double_quantization: Quantize the scales as well, to 8 bits (QLoRA, section 3), which
            saves 0.37 bits per weight.
    """

    double_quantization: bool = True


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """The size that a model with mixed precision may have, and the formats to choose from.

    Attributes:
        size_mb: Largest size of weights, scales and tables together, in megabytes; give either
            this or bits_per_weight. If neither is given, what llama.cpp's Q4_K_M would take.
        bits_per_weight: Largest size in bits for each weight of the model, everything counted.
        formats: Formats to choose from, each "bits=4, group_size=64". A format that does not fit a
            matrix is not considered for it.
        tables: Whether the embedding and the head may be stored in 4 or 8 bits too. Only mistill
            reads such tables.
        fused: Give matrices that an ONNX folder multiplies as one (query, key and value; gate and
            up) the same format, without which it must multiply them one by one.
        sensitivity_samples: Number of blocks of text on which the KL of each choice is estimated.
        symmetric: Store codes around a fixed zero point.
        scale_type: The type that scales are stored in: float16, bfloat16 or float32.
    """

    size_mb: float | None = None
    bits_per_weight: float | None = None
    formats: tuple[str, ...] = (
        "bits=4, group_size=128",
        "bits=4, group_size=64",
        "bits=4, group_size=32",
        "bits=8, group_size=128",
        "bits=8, group_size=64",
    )
    tables: bool = True
    fused: bool = False
    sensitivity_samples: int = 4
    symmetric: bool = True
    scale_type: ScaleType = "float16"

    def __post_init__(self) -> None:
        require(
            self.size_mb is None or self.bits_per_weight is None,
            "give either size_mb or bits_per_weight, not both",
        )
        for name in ("size_mb", "bits_per_weight"):
            value = getattr(self, name)
            if value is not None:
                require_range(name, value, 0, exclusive=True)
        require_range("sensitivity_samples", self.sensitivity_samples, 1)
        require(not isinstance(self.formats, str), "formats must be a list of texts, not one text")
        object.__setattr__(self, "formats", tuple(self.formats))
        require(bool(self.formats), "formats is empty; give at least one, such as 'bits=4'")
        self.choices()

    def choices(self) -> tuple[ModuleFormat, ...]:
        """The formats to choose from.

        Returns:
            Each once, in the order given.
        """
        default = ModuleFormat(bits=4, group_size=128, symmetric=self.symmetric)
        formats = [parse_override(f".*: {text}", default)[1] for text in self.formats]
        for text, form in zip(self.formats, formats, strict=True):
            require(form is not None, f"a format reads 'bits=4, group_size=64', not {text!r}")
        return tuple(dict.fromkeys(form for form in formats if form is not None))


@dataclass(frozen=True, kw_only=True)
class MixedSettings(TextSettings, CalibrationSettings, SolverSettings, BudgetSettings):
    """Which bits and group size each matrix gets so that KL is lowest within a size."""

    def __post_init__(self) -> None:
        BudgetSettings.__post_init__(self)
        self.gptq()

    def gptq(self) -> GptqSettings:
        """The settings that GPTQ shares with these.

        Returns:
            GPTQ's settings, with the default bits and group size.
        """
        shared = {field.name for field in fields(self)} & {
            field.name for field in fields(GptqSettings)
        }
        return GptqSettings(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True, kw_only=True)
class RotationSettings:
    """How the hidden states of a model are rotated.

    Attributes:
        seed: Seed of the random signs of the rotation.
        dtype: Type of the weights that are written: float32, float16 or bfloat16. float16 and
            bfloat16 round the rotated weights once more.
    """

    seed: int = 0
    dtype: FloatType = "float32"

    def __post_init__(self) -> None:
        require_range("seed", self.seed, 0)
        _require_one_of("dtype", self.dtype, get_args(FloatType))


@dataclass(frozen=True, kw_only=True)
class TuningSettings(TextSettings):
    """How scales and norms of a quantized model are tuned.

    Attributes:
        steps: Number of optimizer steps; 50 to 200 are usual.
        batch_size: Blocks of text of one optimizer step, over all processes.
        micro_batch_size: Blocks that one process computes at once; must divide batch_size. It
            changes memory and speed, not the result.
        block_length: Tokens per block.
        learning_rate: Peak learning rate, relative to the value of each scale or norm weight. It
            rises linearly over the first tenth of the steps and falls by a half cosine after them.
        norms: Whether the weights of the norms are tuned too.
        seen_text: Read all of a text that the model was distilled on. Without it only the
            documents are read that distillation kept back (its kept_back_share).
        held_out_blocks: Number of held-out blocks on which KL is measured before and after.
        evaluate_every: Optimizer steps between two measurements, of which the best model is kept;
            0 measures before and after alone.
        checkpoint_every: Optimizer steps between two checkpoints; with 0 an interrupted run starts
            again from the beginning.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass, to
            save memory.
        loss_memory_mib: Memory for logits, in MiB; they are computed a few rows at a time.
        precision: float32, bfloat16 (scales and sums stay in float32), or auto: bfloat16 on a GPU,
            float32 on a CPU.
        trackers: Also log metrics to these: tensorboard, trackio, wandb.
        seed: Seed of the order in which blocks are read.
    """

    steps: int = 100
    batch_size: int = 4
    micro_batch_size: int = 1
    block_length: int = 512
    learning_rate: float = 1e-3
    norms: bool = True
    seen_text: bool = False
    held_out_blocks: int = 16
    evaluate_every: int = 0
    checkpoint_every: int = 10
    gradient_checkpointing: bool = False
    loss_memory_mib: float = 128.0
    precision: Precision = "auto"
    trackers: tuple[TrackerName, ...] = ()
    seed: int = 0

    @property
    def optimizer(self) -> OptimizerName:
        """AdamW: so few weights move that its state is small."""
        return "adamw"

    @property
    def max_gradient_norm(self) -> float:
        """No gradient is scaled down."""
        return math.inf

    def __post_init__(self) -> None:
        require_range("steps", self.steps, 1)
        require_range("batch_size", self.batch_size, 1)
        require_range("micro_batch_size", self.micro_batch_size, 1)
        require_divisor("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        require_range("evaluate_every", self.evaluate_every, 0)
        require_range("checkpoint_every", self.checkpoint_every, 0)
        require_range("loss_memory_mib", self.loss_memory_mib, 0, exclusive=True)
        _require_one_of("precision", self.precision, get_args(Precision))
        require_known_trackers(self.trackers)
        require_range("block_length", self.block_length, 2)
        require_range("held_out_blocks", self.held_out_blocks, 1)
        require_range("seed", self.seed, 0)
        require_range("learning_rate", self.learning_rate, 0, 1, exclusive=True)


# --- sweeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to quantize that a sweep tries.

    Attributes:
        name: Its name in the table and on disk.
        step: The command: gptq, rounding, nf4, mixed or tune.
        options: Fields of the step's settings.
        of: The variant that it is made of; None for the source itself.
    """

    name: str
    step: str
    options: dict[str, Any]
    of: str | None = None


# Some 8,000 tokens in blocks of 512.
_FEW_STEPS = {"steps": 16, "batch_size": 1, "held_out_blocks": 8}


VARIANTS = (
    Variant("rounding-row", "rounding", {"group_size": -1}),
    Variant("rounding-128", "rounding", {"group_size": 128}),
    Variant("rounding-64", "rounding", {"group_size": 64}),
    Variant("rounding-8bit", "rounding", {"bits": 8, "group_size": 64}),
    Variant("nf4", "nf4", {}),
    Variant("gptq-row", "gptq", {"group_size": -1}),
    Variant("gptq-128", "gptq", {"group_size": 128}),
    Variant("gptq-64", "gptq", {"group_size": 64}),
    Variant("gptq-32", "gptq", {"group_size": 32}),
    Variant("gptq-8bit", "gptq", {"bits": 8, "group_size": 64}),
    Variant("gptq-64-tuned", "tune", _FEW_STEPS, of="gptq-64"),
    Variant("mixed", "mixed", {}),
    Variant("mixed-tuned", "tune", _FEW_STEPS, of="mixed"),
)
NAMES = tuple(variant.name for variant in VARIANTS)


@dataclass(frozen=True, kw_only=True)
class ComparedSettings:
    """Which ways of quantizing a sweep compares, and on how much held-out text.

    Attributes:
        variants: Ways to try: any of rounding-row, rounding-128, rounding-64, rounding-8bit, nf4,
            gptq-row, gptq-128, gptq-64, gptq-32, gptq-8bit, gptq-64-tuned, mixed and mixed-tuned;
            all that fit the model if not given. The number is the group size. "mixed" distributes
            the bytes of rounding-64, those of the embedding and the head included, over all
            matrices. A "tuned" one brings the one that it is made of: its scales and norms learn
            from the teacher, or from the source where there is none.
        held_out_samples: Number of blocks of held-out text that every variant is measured on.
    """

    variants: tuple[str, ...] = ()
    held_out_samples: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.variants, str):
            raise SettingsError(f"variants must be a list of names, not {self.variants!r}")
        object.__setattr__(self, "variants", tuple(self.variants))
        for name in self.variants:
            require(name in NAMES, f"a variant is one of {', '.join(NAMES)}; got {name!r}")
        require_range("held_out_samples", self.held_out_samples, 1)

    def chosen(self) -> tuple[Variant, ...]:
        """The variants to try.

        Returns:
            In the order in which they are made: each behind the one that it is made of.
        """
        named = set(self.variants or NAMES)
        named |= {v.of for v in VARIANTS if v.name in named and v.of is not None}
        return tuple(v for v in VARIANTS if v.name in named)


@dataclass(frozen=True, kw_only=True)
class SweepSettings(TextSettings, CalibrationSettings, ComparedSettings):
    """What a sweep tries, and how much text it reads."""

    def __post_init__(self) -> None:
        ComparedSettings.__post_init__(self)
        CalibrationSettings.__post_init__(self)


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    words = f"{', '.join(known[:-1])} or {known[-1]}"
    require(value in known, f"{name} must be {words}, not {value!r}")
