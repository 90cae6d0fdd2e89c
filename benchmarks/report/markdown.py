"""A comparison in Markdown: all figures, their meaning and the conditions of the measurement."""

from __future__ import annotations

from benchmarks.figures.column import significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.frontier import dominators
from benchmarks.report.columns import columns_of
from benchmarks.report.commands import StepDefaults, commands
from benchmarks.report.shipping import by_memory, ship_line, speed
from benchmarks.report.table import (
    conditions,
    conditions_in_full,
    lineage_in_words,
    remarks,
)
from benchmarks.settings import ShipSettings
from mistill.shown import escaped


def markdown(
    comparison: Comparison,
    ship: ShipSettings | None = None,
    step_defaults: StepDefaults | None = None,
) -> str:
    """All figures, their meaning and the conditions of the measurement.

    Args:
        comparison: The result.
        ship: Memory and speed that the model to ship must meet.
        step_defaults: Gives the defaults of a step, to write the commands of models whose lineage
            was written by an earlier version.

    Returns:
        Markdown text.
    """
    columns = columns_of(comparison.models, comparison.reference)
    beaten = dominators(comparison.models)
    heads = [f"{column.title}{f' ({column.unit})' if column.unit else ''}" for column in columns]
    lines = [
        "# Comparison",
        "",
        f"{conditions(comparison)}.",
        "",
        f"| model | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for model in comparison.models:
        cells = [
            " ".join(filter(None, [column.text(model), _bracketed(column.spread_text(model))]))
            for column in columns
        ]
        star = "\\*" if beaten[model.name] else ""
        lines.append(f"| {escaped(model.name)}{star} | {' | '.join(cells)} |")
    lines += ["", "\\* another model is at least as close, as fast and as small.", ""]
    lines += [f"- **{column.title}.** {column.meaning}" for column in columns]
    lines += ["", "## Which one should I ship?", "", *_ship_lines(comparison, ship)]
    lines += ["", "## Where each comes from", ""]
    for model in comparison.models:
        lines.append(
            f"- **{escaped(model.name)}** ({model.kind}): {escaped(lineage_in_words(model))}"
        )
    lines += [
        f"- **{escaped(model.name)}**: {escaped(remark)}"
        for model in comparison.models
        for remark in remarks(model)
    ]
    lines += ["", "```sh", *_all_commands(comparison, step_defaults), "```"]
    lines += ["", "## Conditions", ""]
    lines += [f"- {name}: {escaped(value)}" for name, value in conditions_in_full(comparison)]
    for prompt, replies in comparison.samples.items():
        lines += ["", f"## “{escaped(prompt)}”", ""]
        lines += [f"- **{escaped(name)}**: {escaped(reply)}" for name, reply in replies.items()]
    return "\n".join(lines) + "\n"


def _ship_lines(comparison: Comparison, ship: ShipSettings | None) -> list[str]:
    """The answer to the question, and the answers for every amount of memory."""
    question = ship or ShipSettings()
    lines = []
    if question.ship_mb is not None:
        lines += [f"{escaped(ship_line(comparison, question))}.", ""]
    answers = by_memory(comparison, question.ship_tps)
    if not answers:
        return lines or [f"{escaped(ship_line(comparison, question))}."]
    speed_limit = f", writing {question.ship_tps:g} tokens/s or more" if question.ship_tps else ""
    lines += [
        f"The closest to {escaped(comparison.reference)} that fits{speed_limit}:",
        "",
        "| memory, MB | ship | KL, nats | tokens/s |",
        "|---:|---|---:|---:|",
    ]
    lines += [
        f"| from {amount:,.0f} | {escaped(model.name)} | {significant(model.mean_kl)} "
        f"| {significant(speed(model))} |"
        for amount, model in answers
    ]
    return lines


def _all_commands(comparison: Comparison, step_defaults: StepDefaults | None) -> list[str]:
    """The commands that make all models, each once."""
    lines = dict.fromkeys(
        line for model in comparison.models for line in commands(model, step_defaults)
    )
    return list(lines) or ["# no folder has a lineage"]


def _bracketed(text: str) -> str:
    return f"({text})" if text and not text.startswith("±") else text
