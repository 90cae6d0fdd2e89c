"""The command ``mistill eval``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import App
from rich.console import Console

from benchmarks import EvalSettings
from mistill.cli.options import Flat

app = App(name="eval", help="Let a folder answer tasks: a small offline set, or published ones.")


@app.default
def evaluate_folder(
    folder: Path,
    /,
    *,
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Let a folder answer tasks: a small offline set, or those of lm-evaluation-harness.

    Args:
        folder: Any folder of the road, ONNX ones included.
        settings: Which tasks, and how much of them.
        out: A file for the result, as JSON.
        overwrite: Replace the file if it exists.
        json: End with one line of JSON.
    """
    from benchmarks import evaluate
    from mistill.folders.publishing import creating_file

    with nullcontext() if out is None else creating_file(out, overwrite) as file:
        found = evaluate(folder, settings=settings)
        document = json_library.dumps(found.to_dict())
        if file is not None:
            file.write_text(f"{document}\n", "utf-8")
    Console().print(found.table())
    if out is not None:
        print(f"result: {out}")
    if json:
        print(document)
