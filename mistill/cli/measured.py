"""How close a quantized folder is to its source and to a teacher, as its report tells."""

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


def read_measured(folder: Path) -> dict[str, Any] | None:
    """What a folder's report says of the held-out text that it was measured on.

    Args:
        folder: A folder of any form.

    Returns:
        Closeness by what it is to: ``source``, and where there was a teacher ``teacher`` and
        ``source_to_teacher``; ``held_out`` names the text. None if it was not measured.

    Raises:
        FolderError: If the report is damaged.
    """
    file = folder / QUANTIZE_REPORT_FILE
    found = read_json(file).get("measured") if file.is_file() else None
    return found if isinstance(found, dict) and "source" in found else None


def measured_table(measured: Mapping[str, Any]) -> Table:
    """The measurement for people.

    Args:
        measured: From ``read_measured``.

    Returns:
        A table: a row for each pair of models.
    """
    from rich.table import Table

    tokens = measured["source"]["tokens"]
    table = Table(title=f"how close it is, on {tokens:,} held-out tokens")
    table.add_column("what")
    for heading in ("KL", "99%", "agreement", "perplexity", "against"):
        table.add_column(heading, justify="right")
    for name, words in _ROWS.items():
        if name not in measured:
            continue
        found = measured[name]
        error = found["kl_standard_error"]
        table.add_row(
            words,
            f"{found['kl']:.5f}" + ("" if error is None else f" ± {error:.5f}"),
            f"{found['kl_p99']:.3f}",
            f"{found['agreement']:.1%}",
            f"{found['perplexity']:.2f}",
            f"{found['reference_perplexity']:.2f}",
        )
    return table
