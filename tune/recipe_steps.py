"""The steps of a recipe that this package makes."""

from __future__ import annotations

from mistill.step_kind import StepKind

KINDS: tuple[StepKind, ...] = ()
