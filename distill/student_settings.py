"""How a student is made from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistill.settings import require

Choice = Literal["influence", "even", "named"]


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """Which layers of the teacher a student keeps, or the sizes of a fresh one.

    Attributes:
        layers: How many of the teacher's layers to keep. A fresh student may have any number, and
            has the teacher's if none is given.
        choose: Which layers to keep: those with the most influence on the hidden state, measured
            on text; evenly spaced ones, the first and the last among them; or those named.
        keep: With choose "named": the layers to keep, counted from 0, in ascending order.
        fresh: Start from random weights, with sizes of its own and the teacher's vocabulary.
        hidden_size: Of a fresh student: width of the hidden state; the teacher's if not given.
        intermediate_size: Of a fresh student: width inside the feed-forward part; the teacher's
            if not given.
        attention_heads: Of a fresh student: attention heads; the teacher's if not given.
        key_value_heads: Of a fresh student: key and value heads; the teacher's if not given.
        seed: Of a fresh student: where the random weights start.
        calibration_tokens: Tokens of text to measure influence on, at most.
        block_length: Tokens that the teacher reads at once when influence is measured.
    """

    layers: int | None = None
    choose: Choice = "influence"
    keep: tuple[int, ...] = ()
    fresh: bool = False
    hidden_size: int | None = None
    intermediate_size: int | None = None
    attention_heads: int | None = None
    key_value_heads: int | None = None
    seed: int = 0
    calibration_tokens: int = 8192
    block_length: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in (*_FRESH_SIZES, "layers", "calibration_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be 1 or more, not {value}")
        require(
            self.block_length >= 2,
            f"block_length must be 2 or more, so that tokens have a past; not {self.block_length}",
        )
        require(self.seed >= 0, f"seed must be 0 or more, not {self.seed}")
        require(
            self.choose in ("influence", "even", "named"),
            f"choose must be influence, even or named, not {self.choose!r}",
        )
        self._check_names()
        self._check_fresh()

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

    def _check_fresh(self) -> None:
        given = [name for name in _FRESH_SIZES if getattr(self, name) is not None]
        require(
            self.fresh or not given,
            f"{' and '.join(given)} can be chosen for a fresh student only, since other students "
            "have their teacher's; add fresh, or leave this out",
        )
        require(
            not self.fresh or self.choose == "influence",
            f"a fresh student keeps no layer of its teacher; leave out choose {self.choose!r}",
        )


_FRESH_SIZES = ("hidden_size", "intermediate_size", "attention_heads", "key_value_heads")


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
