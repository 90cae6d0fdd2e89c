"""The fidelity of a quantized folder to its source and to a teacher, from its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.folders.folder import QUANTIZE_REPORT_FILE, read_json

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = {
    "source": "it, to its source",
    "teacher": "it, to the teacher",
    "source_to_teacher": "its source, to the teacher",
}


def read_fidelity(folder: Path) -> dict[str, Any] | None:
    """The fidelity that a folder's report holds.

    Args:
        folder: A folder of any form.

    Returns:
        Figures to ``source``, and where there was a teacher to ``teacher`` and of
        ``source_to_teacher``; ``held_out`` names the text. None if nothing was measured.

    Raises:
        FolderError: If the report is damaged.
    """
    file = folder / QUANTIZE_REPORT_FILE
    fidelity = read_json(file).get("measured") if file.is_file() else None
    return fidelity if isinstance(fidelity, dict) and "source" in fidelity else None


def fidelity_table(fidelity: Mapping[str, Any]) -> Table:
    """A table of the fidelity.

    Args:
        fidelity: From ``read_fidelity``.

    Returns:
        A row for each pair of models.
    """
    from rich.table import Table

    tokens = fidelity["source"]["tokens"]
    table = Table(title=f"how close it is, on {tokens:,} held-out tokens")
    table.add_column("what")
    for heading in ("KL", "99%", "agreement", "perplexity", "against"):
        table.add_column(heading, justify="right")
    for name, words in _ROWS.items():
        if name not in fidelity:
            continue
        figures = fidelity[name]
        error = figures["kl_standard_error"]
        table.add_row(
            words,
            f"{figures['kl']:.5f}" + ("" if error is None else f" ± {error:.5f}"),
            f"{figures['kl_p99']:.3f}",
            f"{figures['agreement']:.1%}",
            f"{figures['perplexity']:.2f}",
            f"{figures['reference_perplexity']:.2f}",
        )
    return table
