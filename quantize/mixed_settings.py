"""What mixing precisions can be told."""

from __future__ import annotations

from dataclasses import dataclass

from mistill.settings import require
from mistill.weights.gptq_layout import ModuleFormat, ScaleType
from quantize.overrides import parse_override
from quantize.settings import GptqSettings, Method, Order


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
