"""How the parameters of several commands are read from a command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

Texts = Annotated[tuple[str, ...], Parameter(negative=())]
Flat = Parameter(name="*")
LISTS = Parameter(negative_iterable=())
"""For every program: an option that takes several values has no second form that takes none."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The options of every command that writes a quantized folder.

    Attributes:
        held_out: Text on which the KL divergence from the source and the perplexity are measured.
        teacher: The model that the source was distilled from. If it is given, the KL divergence
            from it is measured on the held-out text too.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.
    """

    held_out: Texts = ()
    teacher: str | None = None
    overwrite: bool = False
    json: bool = False

    def keywords(self) -> dict[str, Any]:
        """The same as keywords of the Python API.

        Returns:
            The keywords, without the option for printing.
        """
        held_out = self.held_out or None
        return {"held_out": held_out, "teacher": self.teacher, "overwrite": self.overwrite}
