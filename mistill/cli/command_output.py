"""What a command prints about its result.

One line of text, and the same as JSON with ``--json``. Of several processes that a launcher
started, only the main one prints.
"""

from __future__ import annotations

import json as json_library
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from mistill.folders.folder import open_folder
from mistill.shown import visible


def print_folder(path: Path, json: bool, **more: Any) -> dict[str, Any]:
    """Print facts about a model folder that a step wrote.

    Args:
        path: Path of the folder.
        json: Whether to print the facts as one line of JSON too.
        **more: Facts beside those of the folder.

    Returns:
        The facts.
    """
    info = open_folder(path)
    if info.form == "onnx":
        _print_tuning(path)
    facts = {
        "path": str(path),
        "form": info.form,
        "layers": info.layers,
        "parameters": info.parameters,
        "weight_bytes": info.weight_bytes,
        "bits_per_weight": info.bits_per_weight,
        **more,
    }
    words = (
        f"{info.form} folder, {info.layers} layers, {info.parameters / 1e6:.1f} M parameters, "
        f"{info.weight_bytes / 1e6:.1f} MB ({info.bits_per_weight:.2f} bits per weight)"
    )
    return print_result(facts, words, path, json)


def print_result(facts: dict[str, Any], words: str, path: Path | str, json: bool) -> dict[str, Any]:
    """Print what a command wrote.

    Args:
        facts: Facts about it, as JSON values.
        words: The facts as text.
        path: Path of the result.
        json: Whether to print the facts as one line of JSON too.

    Returns:
        The facts.
    """
    if not is_main_process():
        return facts
    print(visible(f"{path}: {words}"))
    if json:
        print(json_library.dumps(facts))
    return facts


def is_main_process() -> bool:
    """Whether this is the main process of those that a launcher such as torchrun started.

    Returns:
        True also where there is only one process.
    """
    return os.environ.get("RANK", "0") == "0"


def _print_tuning(path: Path) -> None:
    """Print the times of matrix products, if an ONNX folder was tuned."""
    from mistill.cli.onnx_report import tuning_table
    from mistill.folders.folder import MANIFEST_FILE, read_json

    tuning = read_json(path / MANIFEST_FILE).get("tuning")
    if tuning is not None and is_main_process():
        Console().print(tuning_table(tuning))
