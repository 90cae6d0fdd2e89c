"""What each way of quantizing can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from mistill.errors import SettingsError
from mistill.settings import require
from mistill.weights.gptq_layout import ScaleType
from quantize.overrides import module_formats, require_grid

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
