"""Names of the divergences, for settings, which import no PyTorch."""

from __future__ import annotations

from typing import Literal

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
