"""The commands ``mistill bench``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from benchmarks import BenchSettings, DiffSettings
from mistill.options import Flat, Texts

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
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Compare folders: size, quality, speed and memory, in one table.

    Args:
        *models: The folders to compare.
        texts: Held-out text to judge them on.
        reference: The model that the others are held against; the first if not given.
        rivals_in: Where a rival is installed, such as genai=DIR: a Python, an environment or, of
            llama.cpp, a folder of its libraries. llama.cpp-programs=DIR has its quantizer. Else
            MISTILL_LLAMA_CPP, MISTILL_LLAMA_CPP_PROGRAMS and MISTILL_GENAI say so.
        rival_source: The float, GPTQ or NF4 folder whose weights the rivals get; the float folder
            that most of the others were made of if not given.
        out: A folder for the report: JSON, Markdown, HTML and a picture.
        settings: How much to measure.
        overwrite: Replace the report if it exists.
        json: End with one line of JSON.
    """
    from benchmarks import compare
    from benchmarks.rivals.environment import rivals_named
    from mistill.publishing import refuse_existing

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
    if out is not None:
        report.save(out, overwrite=overwrite)
        print(f"report: {out / 'report.html'}")
    if json:
        print(json_library.dumps(report.to_dict()))


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
