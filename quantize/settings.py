"""What each way of quantizing can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistill.gptq_layout import SUPPORTED_BITS
from mistill.settings import require


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How weights are rounded to the nearest code, without looking at any text.

    Attributes:
        bits: Bits per weight, 4 or 8.
        group_size: Input columns that share one scale; must divide every layer's inputs. -1 gives
            each row one scale.
        symmetric: Centre the codes on zero; otherwise each group has its own zero, which fits
            skewed weights better and costs as many bits as one more code per group.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        _require_grid(self.bits, self.group_size)


@dataclass(frozen=True, kw_only=True)
class GptqSettings:
    """How weights are quantized by GPTQ.

    Attributes:
        bits: Bits per weight, 4 or 8.
        group_size: Input columns that share one scale; must divide every layer's inputs. -1 gives
            each row one scale.
        symmetric: Centre the codes on zero; otherwise each group has its own zero, which fits
            skewed weights better and costs as many bits as one more code per group.
        order: In which order columns are rounded. "group" walks the groups with the largest inputs
            first and the columns inside them likewise, which costs nothing when the model runs;
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
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    order: Literal["none", "group"] = "group"
    scale_search: int = 16
    damp_percent: float = 0.01
    true_sequential: bool = True
    samples: int = 32
    block_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _require_grid(self.bits, self.group_size)
        require(
            self.order in ("none", "group"),
            f"order must be none or group, got {self.order!r}",
        )
        require(self.scale_search >= 1, f"scale_search must be at least 1, got {self.scale_search}")
        require(
            0 < self.damp_percent < 1,
            f"damp_percent must lie between 0 and 1, got {self.damp_percent}",
        )
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(self.block_length >= 2, f"block_length must be at least 2, got {self.block_length}")
        require(self.seed >= 0, f"seed must be 0 or above, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Nf4Settings:
    """How weights are stored as 4-bit NormalFloat by bitsandbytes.

    Attributes:
        double_quantization: Quantize the scales as well, to 8 bits (QLoRA, section 3), which
            saves 0.37 bits per weight.
    """

    double_quantization: bool = True


def _require_grid(bits: int, group_size: int) -> None:
    require(bits in SUPPORTED_BITS, f"bits must be 4 or 8, got {bits}")
    require(
        group_size == -1 or group_size >= 1,
        f"group_size must be 1 or more, or -1 for the whole row, got {group_size}",
    )
