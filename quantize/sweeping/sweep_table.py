"""A sweep as a table for people: what each variant weighs, what it costs, and what makes it."""

from __future__ import annotations

from rich.table import Table

from quantize.sweeping.sweeping import SweepReport


def sweep_table(report: SweepReport) -> Table:
    """Draw a sweep.

    Args:
        report: What was measured.

    Returns:
        A table, a line for each variant.
    """
    taught = any(row.teacher_kl is not None for row in report.rows)
    table = Table(
        title=f"{report.folder.name}: {report.tokens:,} held-out tokens, the float model has "
        f"{report.source_bytes / 1e6:.1f} MB and perplexity {report.source_perplexity:.2f}",
        caption="variants in grey are no better than another of as few bytes",
    )
    table.add_column("variant")
    for name in ("MB", "bits a weight", "KL to source", *(["KL to teacher"] if taught else [])):
        table.add_column(name, justify="right")
    for name in ("perplexity", "same token"):
        table.add_column(name, justify="right")
    table.add_column("beaten by")
    for row in report.rows:
        error = row.kl_standard_error
        cells = [
            row.name,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.kl:.4f}" + ("" if error is None else f" \u00b1 {error:.4f}"),
            *([f"{row.teacher_kl:.4f}"] if row.teacher_kl is not None else []),
            f"{row.perplexity:.2f}",
            f"{row.agreement:.1%}",
            row.dominated_by or "",
        ]
        table.add_row(*cells, style="dim" if row.dominated_by else "")
    return table


def sweep_notes(report: SweepReport) -> str:
    """Say how the variants worth having are made, and why others were left out.

    Args:
        report: What was measured.

    Returns:
        A line for each of them.
    """
    worth = [f"{row.name}: {row.command}" for row in report.rows if row.dominated_by is None]
    return "\n".join(
        [*worth, *(f"{name} was left out: {reason}" for name, reason in report.skipped.items())]
    )
