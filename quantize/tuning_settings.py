"""What the tuning of a quantized model can be told."""

from __future__ import annotations

from dataclasses import dataclass

from mistill.settings import require


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
