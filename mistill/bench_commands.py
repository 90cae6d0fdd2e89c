"""The commands ``mistill bench``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import Annotated

from cyclopts import App
from rich.console import Console

from benchmarks import BenchSettings
from mistill.options import Flat, Texts

app = App(name="bench", help="Compare folders: size, quality, speed and memory, in one table.")


@app.default
def bench_models(
    *models: Path,
    texts: Texts,
    reference: Path | None = None,
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
        out: A folder for the report: JSON, Markdown, HTML and a picture.
        settings: How much to measure.
        overwrite: Replace the report if it exists.
        json: End with one line of JSON.
    """
    from benchmarks import compare
    from mistill.publishing import refuse_existing

    if out is not None:
        refuse_existing(out, overwrite)
    report = compare(models, texts=texts, reference=reference, settings=settings)
    Console().print(report.table())
    if out is not None:
        report.save(out, overwrite=overwrite)
        print(f"report: {out / 'report.html'}")
    if json:
        print(json_library.dumps(report.to_dict()))
