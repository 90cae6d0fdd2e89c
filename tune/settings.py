"""What a user decides about tuning."""

from __future__ import annotations
