"""What each way of quantizing can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args

from mistill.errors import SettingsError
from mistill.settings import require
from mistill.weights.gptq_layout import ModuleFormat, ScaleType
from quantize.overrides import module_formats, parse_override, require_grid

Order = Literal["static", "dynamic", "group", "none"]
Method = Literal["gptq", "gptaq"]

# Types that the weights of a float folder are written in.
FloatType = Literal["float32", "float16", "bfloat16"]

# Bits that a table of all tokens may have; fewer lose too much.
TABLE_BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How weights are rounded to the nearest code, without looking at any text.

    Attributes:
        bits: Bits per weight: 2, 3, 4 or 8.
        group_size: Input columns that share one scale; must divide every layer's inputs. -1 gives
            each row one scale.
        symmetric: Centre the codes on zero; otherwise each group has its own zero, which fits
            skewed weights better and costs as many bits as one more code per group.
        scale_type: The type that scales are stored in: float16, bfloat16 or float32.
        overrides: Other grids for some modules, each "REGEX: bits=8, group_size=32" or
            "REGEX: keep"; a regular expression matches from the start of a module's name, and
            the first that does decides.
        head_bits: Bits of the output head, 4 or 8; float if not given. Only mistill reads it then.
        embedding_bits: Bits of the embedding, 4 or 8; float if not given. Only mistill reads it
            then. Where the two are one table, either number stands for both.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_type: ScaleType = "float16"
    overrides: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None

    def __post_init__(self) -> None:
        _require_grids(self)


@dataclass(frozen=True, kw_only=True)
class GptqSettings:
    """How weights are quantized by GPTQ.

    Attributes:
        bits: Bits per weight: 2, 3, 4 or 8.
        group_size: Input columns that share one scale; must divide every layer's inputs. -1 gives
            each row one scale.
        symmetric: Centre the codes on zero; otherwise each group has its own zero, which fits
            skewed weights better and costs as many bits as one more code per group.
        scale_type: The type that scales are stored in: float16, bfloat16 or float32.
        overrides: Other grids for some modules, each "REGEX: bits=8, group_size=32" or
            "REGEX: keep"; a regular expression matches from the start of a module's name, and
            the first that does decides.
        head_bits: Bits of the output head, 4 or 8; float if not given. Only mistill reads it then.
        embedding_bits: Bits of the embedding, 4 or 8; float if not given. Only mistill reads it
            then. Where the two are one table, either number stands for both.
        method: "gptq" makes each layer right for the inputs that it gets; "gptaq" also for those
            that it would have got from float layers, in about twice the time: a quarter less KL
            on the one model measured.
        order: In which order columns are rounded. "static" walks the columns with the largest
            inputs first, on scales chosen beforehand; "dynamic" forms the groups on the way, which
            costs an index for each column when the model runs; "group" walks whole groups;
            "none" walks from left to right.
        scale_search: Scales tried for each group, the one with the least weighted error is kept;
            1 takes the scale that just covers the group.
        damp_percent: Share of the Hessian's mean diagonal that is added to it. Raised, and
            reported, where the Hessian cannot be factored otherwise.
        true_sequential: Let the later matrices of a layer see what the earlier ones, already
            quantized, send them.
        samples: Blocks of calibration text.
        block_length: Tokens per block.
        seed: Which blocks are drawn when the text has more than needed.
        model_file_base_name: Name of the weights' file without its ending, as AutoGPTQ gives it,
            such as "gptq_model-4bit-128g", with a quantize_config.json beside it. transformers
            reads only folders where it is left out.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_type: ScaleType = "float16"
    overrides: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    method: Method = "gptq"
    order: Order = "static"
    scale_search: int = 16
    damp_percent: float = 0.01
    true_sequential: bool = True
    samples: int = 32
    block_length: int = 512
    seed: int = 0
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        _require_grids(self)
        _require_one_of("order", self.order, get_args(Order))
        _require_one_of("method", self.method, get_args(Method))
        require(self.scale_search >= 1, f"scale_search must be at least 1, got {self.scale_search}")
        require(
            0 < self.damp_percent < 1,
            f"damp_percent must lie between 0 and 1, got {self.damp_percent}",
        )
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(self.block_length >= 2, f"block_length must be at least 2, got {self.block_length}")
        require(self.seed >= 0, f"seed must be 0 or above, got {self.seed}")
        name = self.model_file_base_name
        require(
            name is None or (bool(name) and PurePath(name).name == name),
            f"model_file_base_name must be a plain file name without its ending, got {name!r}",
        )


@dataclass(frozen=True, kw_only=True)
class Nf4Settings:
    """How weights are stored as 4-bit NormalFloat by bitsandbytes.

    Attributes:
        double_quantization: Quantize the scales as well, to 8 bits (QLoRA, section 3), which
            saves 0.37 bits per weight.
    """

    double_quantization: bool = True


def _require_grids(settings: RoundingSettings | GptqSettings) -> None:
    require_grid(settings.bits, settings.group_size)
    _require_one_of("scale_type", settings.scale_type, get_args(ScaleType))
    for name in ("head_bits", "embedding_bits"):
        bits = getattr(settings, name)
        require(bits is None or bits in TABLE_BITS, f"{name} must be 4 or 8, got {bits}")
    if isinstance(settings.overrides, str):
        raise SettingsError(
            f"overrides must be a list of texts, got one text; write ({settings.overrides!r},)"
        )
    object.__setattr__(settings, "overrides", tuple(settings.overrides))
    module_formats(settings)


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    words = f"{', '.join(known[:-1])} or {known[-1]}"
    require(value in known, f"{name} must be {words}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MixedSettings:
    """How precision is given to where it lowers KL most, within a size.

    Attributes:
        size_mb: Most megabytes of weights, scales and tables together; or give bits_per_weight.
        bits_per_weight: Most bits for each weight of the model, everything counted.
        formats: Grids to choose from, each "bits=4, group_size=64"; those that do not fit a
            matrix are left out there.
        tables: Whether the embedding and the head may have 4 or 8 bits too. Only mistill reads
            such tables.
        sensitivity_samples: Blocks of text on which the KL of each choice is estimated.
        symmetric: Centre the codes on zero.
        scale_type: The type that scales are stored in: float16, bfloat16 or float32.
        method: As in GPTQ: gptq or gptaq.
        order: As in GPTQ: static, dynamic, group or none.
        scale_search: Scales tried for each group.
        damp_percent: Share of the Hessian's mean diagonal that is added to it.
        true_sequential: Let the later matrices of a layer see what the earlier ones send them.
        samples: Blocks of calibration text.
        block_length: Tokens per block.
        seed: Which blocks are drawn, and which next tokens.
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
    sensitivity_samples: int = 4
    symmetric: bool = True
    scale_type: ScaleType = "float16"
    method: Method = "gptq"
    order: Order = "static"
    scale_search: int = 16
    damp_percent: float = 0.01
    true_sequential: bool = True
    samples: int = 32
    block_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        given = [self.size_mb is not None, self.bits_per_weight is not None]
        require(sum(given) < 2, "give either size_mb or bits_per_weight, not both")
        for name in ("size_mb", "bits_per_weight"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0, got {value}")
        require(
            self.sensitivity_samples >= 1,
            f"sensitivity_samples must be at least 1, got {self.sensitivity_samples}",
        )
        require(not isinstance(self.formats, str), "formats must be a list of texts, got one text")
        object.__setattr__(self, "formats", tuple(self.formats))
        require(bool(self.formats), "formats is empty; give at least one, such as 'bits=4'")
        self.choices()
        self.gptq()

    def choices(self) -> tuple[ModuleFormat, ...]:
        """The grids to choose from.

        Returns:
            Each once, in the order given.
        """
        start = ModuleFormat(bits=4, group_size=128, symmetric=self.symmetric)
        found = [parse_override(f".*: {text}", start)[1] for text in self.formats]
        for text, form in zip(self.formats, found, strict=True):
            require(form is not None, f"a format reads 'bits=4, group_size=64', got {text!r}")
        return tuple(dict.fromkeys(form for form in found if form is not None))

    def gptq(self) -> GptqSettings:
        """GPTQ's own part of the settings.

        Returns:
            The settings, with the grid still to be chosen.
        """
        return GptqSettings(
            symmetric=self.symmetric,
            scale_type=self.scale_type,
            method=self.method,
            order=self.order,
            scale_search=self.scale_search,
            damp_percent=self.damp_percent,
            true_sequential=self.true_sequential,
            samples=self.samples,
            block_length=self.block_length,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class RotationSettings:
    """How the hidden states of a model are rotated.

    Attributes:
        seed: Which rotation is drawn.
        dtype: Type of the weights that are written: float32, float16 or bfloat16. The shorter ones
            round what the rotation made once more.
    """

    seed: int = 0
    dtype: FloatType = "float32"

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed must be 0 or above, got {self.seed}")
        require(
            self.dtype in get_args(FloatType),
            f"dtype must be {', '.join(get_args(FloatType))}, got {self.dtype!r}",
        )


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How scales and norms of a quantized model are tuned.

    Attributes:
        steps: Optimizer steps; 50 to 200 are usual.
        batch_size: Blocks of text in a step.
        block_length: Tokens in a block.
        learning_rate: Largest change of a scale or a gain in one step, as a share of itself; it
            rises over the first tenth of the steps and falls to nothing by a half cosine.
        norms: Whether the gains of the norms are tuned too.
        held_out_blocks: Blocks to judge on.
        seed: In which order blocks are read.
    """

    steps: int = 100
    batch_size: int = 4
    block_length: int = 512
    learning_rate: float = 1e-3
    norms: bool = True
    held_out_blocks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("block_length", 2),
            ("held_out_blocks", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}, got {value}")
        require(
            0 < self.learning_rate < 1,
            f"learning_rate must lie between 0 and 1, got {self.learning_rate}",
        )


@dataclass(frozen=True)
class Variant:
    """A way to quantize.

    Attributes:
        name: What it is called in the table and on disk.
        step: The command: gptq, rounding, nf4 or mixed.
        options: Fields of the step's settings.
    """

    name: str
    step: str
    options: dict[str, Any]


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
    Variant("mixed", "mixed", {}),
)


NAMES = tuple(variant.name for variant in VARIANTS)


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is tried in a sweep, and on how much text.

    Attributes:
        variants: Which of rounding-row, rounding-128, rounding-64, rounding-8bit, nf4, gptq-row,
            gptq-128, gptq-64, gptq-32, gptq-8bit and mixed to try; all that fit the model if not
            given. The number is the group size; mixed takes the bytes of rounding by groups of 64
            and shares them out, the tables' among them.
        held_out_samples: Blocks of held-out text that every variant is measured on.
        samples: Blocks of calibration text.
        block_length: Tokens per block.
        seed: Which blocks are drawn when a text has more than needed.
    """

    variants: tuple[str, ...] = ()
    held_out_samples: int = 32
    samples: int = 32
    block_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.variants, str):
            raise SettingsError(f"variants must be a list of names, got {self.variants!r}")
        object.__setattr__(self, "variants", tuple(self.variants))
        for name in self.variants:
            require(name in NAMES, f"a variant is one of {', '.join(NAMES)}; got {name!r}")
        for field in ("held_out_samples", "samples"):
            value = getattr(self, field)
            require(value >= 1, f"{field} must be at least 1, got {value}")
        require(self.block_length >= 2, f"block_length must be at least 2, got {self.block_length}")
        require(self.seed >= 0, f"seed must be 0 or above, got {self.seed}")

    def chosen(self) -> tuple[Variant, ...]:
        """The variants to try.

        Returns:
            In the order of the table.
        """
        return tuple(v for v in VARIANTS if not self.variants or v.name in self.variants)
