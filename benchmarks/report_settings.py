"""What can be asked of a report that has been measured.

Every command imports this module, so it stays small.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistill.settings import require


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every model must keep to; the command ends with 1 if one does not.

    Attributes:
        max_kl: Most KL to the reference, in nats.
        min_tps: Fewest tokens written per second.
        max_mb: Most megabytes on disk.
        max_memory_mb: Most megabytes of memory while it runs.
        budget_for: Models that must keep to these; all but the reference and other engines if
            none is named.
    """

    max_kl: float | None = None
    min_tps: float | None = None
    max_mb: float | None = None
    max_memory_mb: float | None = None
    budget_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_kl", "min_tps", "max_mb", "max_memory_mb"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0, not {value}")
        require(
            bool(self) or not self.budget_for,
            "budget_for names who must keep to a budget, and there is none; give max_kl, min_tps, "
            "max_mb or max_memory_mb",
        )

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        limits = self.max_kl, self.min_tps, self.max_mb, self.max_memory_mb
        return any(limit is not None for limit in limits)


@dataclass(frozen=True, kw_only=True)
class ShipSettings:
    """What there is to run a model on.

    Attributes:
        ship_mb: Megabytes of memory that the model to ship may take while it runs.
        ship_tps: Tokens per second that it must write.
    """

    ship_mb: float | None = None
    ship_tps: float | None = None

    def __post_init__(self) -> None:
        for name in ("ship_mb", "ship_tps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class DiffSettings:
    """When a change counts as one.

    Attributes:
        confidence: Chance that two reports of the same thing are found to differ in nothing.
        tolerance: A share of a figure of quality below which no change is called.
        clock_tolerance: The same for what a clock or a process's memory says, which differs from
            run to run of one machine.
        pairs: Models that go by other names in the new report, each as OLD=NEW.
    """

    confidence: float = 0.95
    tolerance: float = 0.02
    clock_tolerance: float = 0.05
    pairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            0.5 <= self.confidence < 1,
            f"confidence must be at least 0.5 and below 1, not {self.confidence}",
        )
        for name in ("tolerance", "clock_tolerance"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be at least 0 and below 1, not {value}")
        for pair in self.pairs:
            old, sign, new = pair.partition("=")
            require(bool(old and sign and new), f"pairs must look like OLD=NEW, not {pair!r}")
