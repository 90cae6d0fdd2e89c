"""The KL divergence of a quantized folder from its source and from a teacher, as measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.folders.folder import QUANTIZE_REPORT_FILE, read_json

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = {
    "source": "it, from its source",
    "teacher": "it, from the teacher",
    "source_to_teacher": "its source, from the teacher",
}


def read_measured(folder: Path) -> dict[str, Any] | None:
    """The figures that were measured on held-out text when a folder was quantized.

    Args:
        folder: A folder of any form.

    Returns:
        Figures by what the folder is compared with: ``source``, and with a teacher ``teacher``
        and ``source_to_teacher``; ``held_out`` names the text. None if nothing was measured.

    Raises:
        FolderError: If the report is damaged.
    """
    file = folder / QUANTIZE_REPORT_FILE
    measured = read_json(file).get("measured") if file.is_file() else None
    return measured if isinstance(measured, dict) and "source" in measured else None


def measured_table(measured: Mapping[str, Any]) -> Table:
    """The figures as a table.

    Args:
        measured: Figures that ``read_measured`` returned.

    Returns:
        A row for each pair of models.
    """
    from rich.table import Table

    tokens = measured["source"]["tokens"]
    table = Table(title=f"KL divergence on {tokens:,} held-out tokens")
    table.add_column("model")
    for heading in ("KL", "99%", "agreement", "perplexity", "perplexity of the other"):
        table.add_column(heading, justify="right")
    for name, words in _ROWS.items():
        if name not in measured:
            continue
        figures = measured[name]
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
