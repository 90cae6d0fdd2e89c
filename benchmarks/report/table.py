"""A comparison as a table for the terminal, and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures.column import Column
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.frontier import dominators
from benchmarks.figures.model_result import ModelResult
from benchmarks.report.columns import columns_of
from mistill.shown import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

_NAME_WIDTH = 30


def terminal_table(comparison: Comparison) -> RenderableType:
    """The most important figures.

    Args:
        comparison: The result.

    Returns:
        A table for rich; several, one below another, where the terminal is narrow.
    """
    return _Tables(comparison)


class _Tables:
    """Tables that fit the width of the terminal, with every model in each."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.columns = [
            column
            for column in columns_of(comparison.models, comparison.reference)
            if column.compact
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        models = self.comparison.models
        name = min(max(len(model.name) + 1 for model in models), _NAME_WIDTH)
        parts: list[list[Column]] = [[]]
        room = options.max_width - name
        for column in self.columns:
            width = 1 + self._width(column)
            if parts[-1] and width > room:
                parts.append([])
                room = options.max_width - name
            parts[-1].append(column)
            room -= width
        for part in parts:
            yield self._table(part)
        caption = f"{conditions(self.comparison)}\n* another model is closer, faster and smaller"
        yield Text(caption, style="dim italic")

    def _width(self, column: Column) -> int:
        from rich.text import Text

        cells = [Text.from_markup(_cell(column, model)) for model in self.comparison.models]
        heads = [*column.title.split(), column.unit]
        return max(*map(len, heads), *(cell.cell_len for cell in cells))

    def _table(self, columns: list[Column]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("", overflow="fold", max_width=_NAME_WIDTH)
        for column in columns:
            heads = "\n".join(f"{column.title} ".split())
            table.add_column(f"{heads}\n[dim]{column.unit}[/dim]", justify="right", no_wrap=True)
        beaten = dominators(self.comparison.models)
        for model in self.comparison.models:
            star = "*" if beaten[model.name] else ""
            name = Text(f"{model.name}{star}", style="dim" if star else "bold")
            table.add_row(plain(name), *(_cell(column, model) for column in columns))
        return table


def _cell(column: Column, model: ModelResult) -> str:
    with_error = column.key in ("perplexity", "mean_kl_nats", "smoke_accuracy")
    spread = f" [dim]{column.spread_text(model)}[/dim]" if with_error else ""
    return column.text(model) + spread


def conditions(comparison: Comparison) -> str:
    """Machine, text and date in a line.

    Args:
        comparison: The result.

    Returns:
        The line, without a full stop.
    """
    machine, text = comparison.machine, comparison.text
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    return (
        f"{machine.processor}, {threads}; {text.tokens_scored:,} tokens of "
        f"{', '.join(text.sources)}; reference {comparison.reference}; {comparison.date[:10]}"
    )


def conditions_in_full(comparison: Comparison) -> list[tuple[str, str]]:
    """Everything that the figures depend on, besides the models.

    Args:
        comparison: The result.

    Returns:
        Names and values.
    """
    machine, text, settings = comparison.machine, comparison.text, comparison.settings
    cores = "" if machine.cores is None else f"{machine.cores} cores, "
    load = "" if machine.load_average is None else f"; load {machine.load_average:.2f} at the start"
    return [
        ("Processor", f"{machine.processor}{' (virtual machine)' if machine.virtual else ''}"),
        ("Instructions", ", ".join(machine.instructions) or "not known"),
        (
            "Cores",
            f"{cores}{machine.processors} logical processors, {machine.usable_processors} usable, "
            f"{machine.threads} used{load}",
        ),
        ("Frequency governor", machine.governor or "not available"),
        (
            "Energy",
            f"counters of {', '.join(machine.energy_counters)}"
            if machine.energy_counters
            else ": ".join(filter(None, ["not available", machine.no_energy])),
        ),
        ("Memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("System", machine.system),
        ("Versions", ", ".join(f"{name} {value}" for name, value in machine.versions.items())),
        (
            "Text",
            f"{', '.join(text.sources)}: {text.tokens_scored:,} of {text.tokens_read:,} tokens "
            f"scored in {text.passages} passages of at most {settings.context_length}; "
            f"fingerprint {text.fingerprint[:16]}",
        ),
        (
            "Speed",
            f"{settings.rounds} rounds after a warm-up, all models taking turns; prompts of "
            f"{settings.prompt_tokens} tokens, {settings.new_tokens} tokens written greedily, at "
            f"most {settings.turn_seconds:g} s a turn",
        ),
        ("Date", f"{comparison.date}, {comparison.duration_seconds:.0f} s in all"),
    ]


def remarks(model: ModelResult) -> list[str]:
    """Remarks on a model besides its figures.

    Args:
        model: The result.

    Returns:
        Of a rival, its version, its settings and how its file was made; of any model, what was not
        measured.
    """
    rival = model.rival
    lines = []
    if rival is not None:
        settings = ", ".join(f"{name} {value}" for name, value in rival.settings.items())
        lines += [
            f"made of {rival.source}: {rival.made}",
            f"{rival.engine} {rival.version} ({rival.system.strip(' |')}); {settings}",
        ]
    return [*lines, *(f"not measured: {reason}" for reason in model.left_out)]


def lineage_in_words(model: ModelResult) -> str:
    """The steps that made a model, with their most important settings.

    Args:
        model: The result.

    Returns:
        Such as ``teacher (@smollm2) → student (layers 22) → gptq (bits 4, group_size 64)``.
    """
    return " → ".join(
        f"{step}{f' ({settings})' if settings else ''}" for step, settings in lineage_steps(model)
    )


def lineage_steps(model: ModelResult) -> list[tuple[str, str]]:
    """The steps that made a model.

    Args:
        model: The result.

    Returns:
        The name of each step, and its most important settings in words.
    """
    if not model.lineage:
        return [("a folder without a lineage", "")]
    return [
        (str(entry.get("step", "?")), _shown_settings(entry.get("settings") or {}))
        for entry in model.lineage
    ]


_SHOWN_SETTINGS = (
    *("source", "layers", "tokens", "bits", "group_size", "symmetric", "double_quantization"),
    *("precision", "head_bits"),
)


def _shown_settings(settings: dict[str, object]) -> str:
    parts = []
    for name in _SHOWN_SETTINGS:
        value = settings.get(name)
        if value is None or value == "auto":
            continue
        label = name.replace("_", " ")
        if isinstance(value, bool):
            parts.append(label if value else f"not {label}")
        elif name == "source":
            parts.append(str(value).rsplit("/", 1)[-1])
        elif name in ("layers", "tokens") and not isinstance(value, list):
            parts.append(f"{value:,} {label}" if isinstance(value, int) else f"{label} {value}")
        elif isinstance(value, list):
            parts.append(f"{len(value)} {label}")
        else:
            parts.append(f"{label} {value}")
    return ", ".join(parts)
