"""The command ``mistill eval``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import App
from rich.console import Console

from benchmarks import EvalSettings
from mistill.cli.help_pages import HelpPage
from mistill.cli.options import LISTS, Flat

app = App(
    name="eval",
    default_parameter=LISTS,
    help="Evaluate a model on tasks: a small offline set, or those of lm-evaluation-harness.",
    help_formatter=HelpPage(
        {
            "Tasks": (
                *("tasks", "limit", "few_shot", "chat_template", "include_path", "task_data"),
            ),
            "Computation": ("threads", "seed"),
        }
    ),
)


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
    """Evaluate a model on tasks: a small offline set, or those of lm-evaluation-harness.

    Args:
        folder: The model to evaluate: a float, GPTQ, NF4 or ONNX folder.
        settings: Which tasks, and how many questions of each.
        out: A JSON file for the result.
        overwrite: Replace the file if it exists.
        json: Print the result as one line of JSON at the end.
    """
    from benchmarks import evaluate
    from mistill.folders.publishing import creating_file

    with nullcontext() if out is None else creating_file(out, overwrite) as file:
        evaluation = evaluate(folder, settings=settings)
        document = json_library.dumps(evaluation.to_dict())
        if file is not None:
            file.write_text(f"{document}\n", "utf-8")
    Console().print(evaluation.table())
    if out is not None:
        print(f"result: {out}")
    if json:
        print(document)
