"""How the parameters of several commands are read from a command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

Texts = Annotated[tuple[str, ...], Parameter(negative=())]
Flat = Parameter(name="*")


@dataclass(frozen=True, kw_only=True)
class Making:
    """What every command has that makes a quantized folder.

    Attributes:
        held_out: Text to measure the result on.
        teacher: The model that the source learnt from, to compare the result with on held-out
            text too.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.
    """

    held_out: Texts = ()
    teacher: str | None = None
    overwrite: bool = False
    json: bool = False

    def given(self) -> dict[str, Any]:
        """The same for the Python API.

        Returns:
            Keywords; what a command prints is none of them.
        """
        held_out = self.held_out or None
        return {"held_out": held_out, "teacher": self.teacher, "overwrite": self.overwrite}
