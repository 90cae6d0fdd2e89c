"""What a rotation can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from mistill.settings import require
from quantize.settings import FloatType


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
