"""The commands ``mistill tune``: parse, call the Python API, print."""

from __future__ import annotations

from cyclopts import App

app = App(name="tune", help="Tune a model on conversations, preferences or rewards.")
