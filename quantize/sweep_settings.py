"""What a sweep can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistill.errors import SettingsError
from mistill.settings import require


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
