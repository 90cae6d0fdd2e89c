"""The commands ``mistill bench``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from benchmarks import (
    BenchSettings,
    Budget,
    DiffSettings,
    JudgeSettings,
    ServingSettings,
    ShipSettings,
)
from mistill.cli.help_pages import HelpPage
from mistill.cli.options import LISTS, Flat, Texts
from mistill.settings import require, settings_dict

if TYPE_CHECKING:
    from benchmarks import Comparison

_BUDGET = {"Budget": ("max_kl", "min_tps", "max_mb", "max_memory_mb", "budget_for")}
_SHIP = {"Limits of the model to ship": ("ship_mb", "ship_tps")}

app = App(
    name="bench",
    default_parameter=LISTS,
    help="Compare models: size, quality, speed and memory, in one table.",
    help_formatter=HelpPage(
        {
            "Data": ("texts", "reference"),
            "Quality": (
                *("scored_tokens", "context_length", "perplexity", "perplexity_tokens", "tasks"),
                *("task_models", "replies", "reply_models", "reply_tokens"),
            ),
            "Speed": (
                *(
                    "threads",
                    "provider",
                    "rounds",
                    "prompt_tokens",
                    "new_tokens",
                    "prompts",
                    "depths",
                ),
                *("loads", "turn_seconds", "transformers_generate"),
            ),
            "Other engines": ("against", "rivals_in", "rival_source"),
            "Replies to read": ("sample_prompts", "sample_models", "sample_tokens"),
            **_BUDGET,
            **_SHIP,
        }
    ),
)


@app.default
def bench_models(
    *models: Annotated[Path, Parameter(help="The folders to compare, of any form.")],
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
    """Compare models: size, quality, speed and memory, in one table.

    Args:
        *models: The folders to compare.
        texts: Held-out text, on which KL divergence and perplexity are measured.
        reference: The model that the others are compared with. By default the first one.
        rivals_in: Where other engines are installed, each as NAME=PATH. PATH is a Python or its
            environment; for llama.cpp it is the folder of its libraries, and for
            llama.cpp-programs the folder of its quantizer. By default the environment variables
            MISTILL_LLAMA_CPP, MISTILL_LLAMA_CPP_PROGRAMS, MISTILL_GENAI, MISTILL_CTRANSLATE2,
            MISTILL_OPENVINO_VENV and MISTILL_OPTIMUM_VENV name them.
        rival_source: The float, GPTQ or NF4 folder whose weights the other engines run. By
            default the float folder that most of the models were made from.
        out: The folder of the report to write: JSON, Markdown, HTML and a picture.
        settings: What is measured, and how often.
        budget: The limits that every model must meet.
        ship: The limits of the machine that the model will run on.
        overwrite: Replace the report if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        0, or 1 if a model exceeds the budget; the report is saved in either case.
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


@app.command(help_formatter=HelpPage(_BUDGET))
def check(
    report: Path,
    /,
    *,
    budget: Annotated[Budget, Flat] = Budget(),
    json: bool = False,
) -> int:
    """Check the models of a saved report against a budget, without measuring again.

    Args:
        report: The folder of a report, or its report.json.
        budget: The limits that every model must meet.
        json: Print the result as one line of JSON at the end.

    Returns:
        0, or 1 if a model exceeds the budget.
    """
    from benchmarks import open_report

    require(bool(budget), "give a budget: --max-kl, --min-tps, --max-mb or --max-memory-mb")
    facts = _checked(open_report(report), budget)
    if json:
        print(json_library.dumps(facts))
    return 0 if facts["passed"] else 1


@app.command(help_formatter=HelpPage(_SHIP))
def ship(
    report: Path,
    /,
    *,
    ship: Annotated[ShipSettings, Flat] = ShipSettings(),
    json: bool = False,
) -> int:
    """Name the model to ship: of those in a saved report that fit, the closest to the reference.

    Args:
        report: The folder of a report, or its report.json.
        ship: The limits of the machine that the model will run on.
        json: Print the result as one line of JSON at the end.

    Returns:
        0, or 1 if no model fits.
    """
    from benchmarks import open_report
    from benchmarks.report.shipping import best_to_ship

    opened = open_report(report)
    _print_ship_line(opened, ship)
    best = best_to_ship(opened, ship)
    if json:
        print(json_library.dumps({"ship": best and best.name}))
    return 1 if best is None else 0


@app.command(
    help_formatter=HelpPage({"Statistics": ("confidence", "tolerance", "clock_tolerance", "pairs")})
)
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
    """Show what changed from one report to another, and which figures are too noisy to tell.

    Args:
        old: The earlier report: its folder, or its report.json.
        new: The later report: its folder, or its report.json.
        settings: How large a change must be to count.
        fail_on_regression: Exit with 1 if a figure became worse or a model is missing.
        markdown: Print Markdown, as for a comment on a pull request.
        json: Print the result as one line of JSON at the end.

    Returns:
        0, or 1 for a regression with --fail-on-regression.
    """
    from benchmarks import diff as diff_reports

    changes = diff_reports(old, new, settings=settings)
    if markdown:
        print(changes.to_markdown())
    else:
        Console().print(changes.table())
    if json:
        print(json_library.dumps(changes.to_dict()))
    return 1 if fail_on_regression and not changes.passed else 0


@app.command(
    help_formatter=HelpPage(
        {
            "Load": ("clients", "requests", "rounds", "prompt_tokens", "new_tokens", "seed"),
            "Server": ("model", "api_key_file", "threads"),
        }
    )
)
def serve(
    target: str,
    /,
    *,
    settings: Annotated[ServingSettings, Flat] = ServingSettings(),
    json: bool = False,
) -> None:
    """Measure a server under the load of more and more clients.

    Args:
        target: An ONNX folder, which is served meanwhile, or the address of any server that speaks
            as OpenAI's does, such as http://127.0.0.1:8080.
        settings: How it is loaded.
        json: Print the result as one line of JSON at the end.
    """
    from benchmarks import bench_serving

    report = bench_serving(target, settings=settings)
    Console().print(report.table())
    if json:
        print(json_library.dumps(report.to_dict()))


@app.command(
    help_formatter=HelpPage(
        {
            "Judge": ("judge", "server", "server_model", "api_key_file"),
            "Data": ("prompts", "limit"),
            "Replies": ("new_tokens", "threads"),
        }
    )
)
def judge(
    first: str,
    second: str,
    /,
    *,
    judge: str | None = None,
    prompts: Texts,
    settings: Annotated[JudgeSettings, Flat] = JudgeSettings(),
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Let a judge say whose replies are better: those of one model or of another.

    Every pair of replies is shown in both orders, and the share of pairs about which both orders
    agree is told first. The win rate is that of the second model among those.

    Args:
        first: A chat model, such as the one that was tuned: a folder of any form.
        second: The other one, such as what tuning made of it.
        judge: The chat model that judges: a folder of any form, a Hub id, or @smollm2. Best one
            that is neither of the two, nor made from them. Leave it out for one behind a server.
        prompts: Prompts to answer. A .txt file with a prompt on each line, or a .jsonl, .json,
            .csv or .parquet file.
        settings: How many prompts, and how long the replies.
        out: A JSON file for the figures and every verdict.
        overwrite: Replace the file if it exists.
        json: Print the figures as one line of JSON at the end.
    """
    from benchmarks import judge_replies
    from mistill.folders.publishing import creating_file

    with nullcontext() if out is None else creating_file(out, overwrite) as file:
        rates = judge_replies(first, second, judge=judge, prompts=prompts, settings=settings)
        if file is not None:
            document = json_library.dumps(rates.to_dict(), indent=1, ensure_ascii=False)
            file.write_text(f"{document}\n", "utf-8")
    Console().print(rates.table())
    if out is not None:
        print(f"result: {out}")
    if json:
        about = {"models": rates.models, "judge": rates.judge, "read_by": rates.read_by}
        print(json_library.dumps({**about, **rates.figures}))


def _step_defaults(step: str) -> dict[str, Any] | None:
    """Defaults of the settings of a step; None for a step without settings."""
    from mistill.recipe import step_kinds

    kind = step_kinds().get(step)
    return None if kind is None or kind.settings is None else settings_dict(kind.settings())


def _print_ship_line(report: Comparison, ship: ShipSettings) -> None:
    from benchmarks.report.shipping import ship_line

    Console().print(ship_line(report, ship), soft_wrap=True, markup=False, highlight=False)


def _checked(report: Comparison, budget: Budget) -> dict[str, Any]:
    """Print one line for each limit that is exceeded, or that all are met."""
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
