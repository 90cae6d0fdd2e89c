"""The commands ``mistill bench``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from benchmarks import BenchSettings, Budget, DiffSettings, ShipSettings
from mistill.cli.options import Flat, Texts
from mistill.settings import require, settings_dict

if TYPE_CHECKING:
    from benchmarks import Comparison

app = App(name="bench", help="Compare folders: size, quality, speed and memory, in one table.")


@app.default
def bench_models(
    *models: Path,
    texts: Texts,
    reference: Path | None = None,
    rivals_in: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    rival_source: Path | None = None,
    out: Path | None = None,
    settings: Annotated[BenchSettings, Flat] = BenchSettings(),
    budget: Annotated[Budget, Flat] = Budget(),
    ship: Annotated[ShipSettings, Flat] = ShipSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Compare folders: size, quality, speed and memory, in one table.

    Args:
        *models: The folders to compare.
        texts: Held-out text to judge them on.
        reference: The model that the others are held against; the first if not given.
        rivals_in: Where a rival is installed, such as genai=DIR: a Python, an environment or, of
            llama.cpp, a folder of its libraries; llama.cpp-programs=DIR has its quantizer. Else
            MISTILL_LLAMA_CPP, MISTILL_LLAMA_CPP_PROGRAMS, MISTILL_GENAI, MISTILL_CTRANSLATE2,
            MISTILL_OPENVINO_VENV and MISTILL_OPTIMUM_VENV say so.
        rival_source: The float, GPTQ or NF4 folder whose weights the rivals get; the float folder
            that most of the others were made of if not given.
        out: A folder for the report: JSON, Markdown, HTML and a picture.
        settings: How much to measure.
        budget: What every model must keep to.
        ship: What there is to run a model on.
        overwrite: Replace the report if it exists.
        json: End with one line of JSON.

    Returns:
        0, or 1 where a model does not keep to the budget; the report is saved all the same.
    """
    from benchmarks import compare
    from benchmarks.measure.subjects import short_names
    from benchmarks.report.budget import find_names
    from benchmarks.rivals.engines import choices
    from benchmarks.rivals.environment import rivals_named
    from mistill.folders.publishing import refuse_existing

    if budget.budget_for:
        rivals = [choice.name for choice in choices(settings.against)]
        find_names(budget.budget_for, [*short_names([*map(str, models)]), *rivals])
    if out is not None:
        refuse_existing(out, overwrite)
    report = compare(
        models,
        texts=texts,
        reference=reference,
        rivals=rivals_named(rivals_in),
        rival_source=rival_source,
        settings=settings,
    )
    Console().print(report.table())
    _print_ship_line(report, ship)
    if out is not None:
        report.save(out, overwrite=overwrite, ship=ship, step_defaults=_step_defaults)
        print(f"report: {out / 'report.html'}")
    facts = _checked(report, budget) if budget else {"passed": True}
    if json:
        print(json_library.dumps({**report.to_dict(), "budget": facts}))
    return 0 if facts["passed"] else 1


@app.command
def check(
    report: Path,
    /,
    *,
    budget: Annotated[Budget, Flat] = Budget(),
    json: bool = False,
) -> int:
    """Hold a saved report against a budget, without measuring again.

    Args:
        report: The folder of a report, or its report.json.
        budget: What every model must keep to.
        json: End with one line of JSON.

    Returns:
        0, or 1 where a model does not keep to it.
    """
    from benchmarks import open_report

    require(bool(budget), "give a budget: max_kl, min_tps, max_mb or max_memory_mb")
    facts = _checked(open_report(report), budget)
    if json:
        print(json_library.dumps(facts))
    return 0 if facts["passed"] else 1


@app.command
def ship(
    report: Path,
    /,
    *,
    ship: Annotated[ShipSettings, Flat] = ShipSettings(),
    json: bool = False,
) -> int:
    """Say which model of a saved report to ship: the closest one that fits.

    Args:
        report: The folder of a report, or its report.json.
        ship: What there is to run it on.
        json: End with one line of JSON.

    Returns:
        0, or 1 where none fits.
    """
    from benchmarks import open_report
    from benchmarks.report.shipping import best_to_ship

    opened = open_report(report)
    _print_ship_line(opened, ship)
    best = best_to_ship(opened, ship)
    if json:
        print(json_library.dumps({"ship": best and best.name}))
    return 1 if best is None else 0


@app.command
def diff(
    old: Path,
    new: Path,
    /,
    *,
    settings: Annotated[DiffSettings, Flat] = DiffSettings(),
    fail_on_regression: Annotated[bool, Parameter(negative=())] = False,
    markdown: Annotated[bool, Parameter(negative=())] = False,
    json: bool = False,
) -> int:
    """Say what changed from one report to another, and what cannot be told.

    Args:
        old: The folder of a report, or its report.json.
        new: The same, measured later.
        settings: When a change counts as one.
        fail_on_regression: Exit with 1 if a figure has become worse, or a model is missing.
        markdown: Print Markdown, for the comment of a pull request.
        json: End with one line of JSON.

    Returns:
        0, or 1 for a regression that was to fail.
    """
    from benchmarks import diff as diff_reports

    found = diff_reports(old, new, settings=settings)
    if markdown:
        print(found.to_markdown())
    else:
        Console().print(found.table())
    if json:
        print(json_library.dumps(found.to_dict()))
    return 1 if fail_on_regression and not found.passed else 0


def _step_defaults(step: str) -> dict[str, Any] | None:
    """Defaults of the settings of a step; None for a step without settings."""
    from mistill.recipe import step_kinds

    kind = step_kinds().get(step)
    return None if kind is None or kind.settings is None else settings_dict(kind.settings())


def _print_ship_line(report: Comparison, ship: ShipSettings) -> None:
    from benchmarks.report.shipping import ship_line

    Console().print(ship_line(report, ship), soft_wrap=True, markup=False, highlight=False)


def _checked(report: Comparison, budget: Budget) -> dict[str, Any]:
    """Print one line for every miss, or who keeps to the budget; the same as JSON values."""
    from benchmarks.report.budget import bound_models, misses

    names = [model.name for model in bound_models(report, budget)]
    missed = misses(report, budget)
    for miss in missed:
        print(f"budget missed: {miss}")
    if not missed:
        print(f"budget met by {', '.join(names)}")
    return {
        "passed": not missed,
        "models": names,
        "misses": [{**vars(miss), "line": str(miss)} for miss in missed],
    }
