"""What a reward model was trained on and how often it is right, from its folder's own report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from mistill.folders.folder import is_reward_folder
from mistill.folders.json_text import check, read_json_file
from mistill.shown import facts_table

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT_FILE = "tuning_report.json"

_Share = Annotated[float, Meta(ge=0, le=1)]


class _Rows(Struct, kw_only=True):
    """Pairs."""

    learned: Annotated[int, Meta(ge=0)]
    held_out: Annotated[int, Meta(ge=0)]


class _Figures(Struct, kw_only=True):
    """What the trained model says of held-out pairs."""

    accuracy: _Share


class _RewardReport(Struct, kw_only=True):
    """tuning_report.json of a reward model, as far as it is read."""

    rows: _Rows
    after: _Figures
    accuracy_interval: tuple[_Share, _Share]
    longer_wins: _Share


def read_reward(folder: Path) -> dict[str, Any] | None:
    """What the report of a reward model holds.

    Args:
        folder: A sound folder of float weights.

    Returns:
        ``rows`` learned and held_out, ``after`` with its ``accuracy`` on the held-out pairs,
        ``accuracy_interval`` and ``longer_wins``; empty for a reward model of somebody else, and
        None for a folder that holds none.

    Raises:
        FolderError: If the report is damaged.
    """
    if not is_reward_folder(folder):
        return None
    file = folder / REPORT_FILE
    if not file.is_file():
        return {}
    value = read_json_file(file)
    check(value, _RewardReport, str(file))
    figures = {name: value[name] for name in _RewardReport.__struct_fields__}
    return {**figures, "after": {"accuracy": value["after"]["accuracy"]}}


def reward_facts(reward: dict[str, Any]) -> RenderableType:
    """What a reward model is, and how often it is right.

    Args:
        reward: From ``read_reward``.

    Returns:
        A table.
    """
    rows = {
        "reward model": "scores a conversation with one number, and writes nothing; for mistill "
        "tune reinforce --reward and mistill generate --best-of --reward"
    }
    if reward:
        low, high = reward["accuracy_interval"]
        rows["learnt from"] = f"{reward['rows']['learned']:,} pairs"
        rows["right about"] = (
            f"{reward['after']['accuracy']:.3f} ({low:.3f} to {high:.3f}) of "
            f"{reward['rows']['held_out']:,} held-out pairs; a judge that knows only which answer "
            f"is longer about {reward['longer_wins']:.3f}"
        )
    return facts_table(rows)
