"""What a user decides about targets on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistill.settings import require

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
