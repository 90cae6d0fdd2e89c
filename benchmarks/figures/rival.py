"""What a report says of a rival: which engine, which version, and how its file came to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rival:
    """An engine of others that ran the same weights.

    Attributes:
        engine: Its name, such as ``llama.cpp``.
        variant: Which of its ways to store weights, such as ``q4_k_m``.
        version: Of the engine.
        system: What the engine says of itself and of the processor it was built for.
        settings: What it was told, by name.
        made: How its file was made of the folder that it is compared with.
        source: Name of that folder.
    """

    engine: str
    variant: str
    version: str
    system: str
    settings: dict[str, str]
    made: str
    source: str

    @property
    def name(self) -> str:
        """What its row is called."""
        return f"{self.engine} {self.variant}"
