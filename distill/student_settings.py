"""How a student is made from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistill.settings import require

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
