"""What a report records of a rival: which engine, which version, and how its file was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another engine that ran the same weights.

    Attributes:
        engine: Its name, such as ``llama.cpp``.
        variant: Its weight format, such as ``q4_k_m``.
        version: Of the engine.
        system: The engine's own description of its build and of the processor.
        settings: Its settings by name.
        made: How its file was made from the folder that it is compared with.
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
        """Name of its row in the report."""
        return f"{self.engine} {self.variant}"
