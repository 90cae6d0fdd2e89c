"""How the parameters of several commands are read from a command line."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Texts = Annotated[tuple[str, ...], Parameter(negative=())]
Flat = Parameter(name="*")
