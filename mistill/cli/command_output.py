"""What a command prints when it has made something.

One line for people, the same as JSON where it is asked for, from one process of all.
"""

from __future__ import annotations

import json as json_library
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from mistill.folders.folder import open_folder


def made_folder(path: Path, json: bool, **more: Any) -> dict[str, Any]:
    """Say what a step has made.

    Args:
        path: The folder.
        json: Whether to end with one line of JSON.
        **more: Facts beside those of the folder.

    Returns:
        The facts.
    """
    info = open_folder(path)
    if info.form == "onnx":
        _show_tuning(path)
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
        f"{info.weight_bytes / 1e6:.1f} MB ({info.bits_per_weight:.2f} bits a weight)"
    )
    return say(facts, words, path, json)


def say(facts: dict[str, Any], words: str, path: Path | str, json: bool) -> dict[str, Any]:
    """Print what there is to say of a path.

    Args:
        facts: The same as JSON values.
        words: For people.
        path: What was made.
        json: Whether to print the facts too.

    Returns:
        The facts.
    """
    if not speaks():
        return facts
    print(f"{path}: {words}")
    if json:
        print(json_library.dumps(facts))
    return facts


def speaks() -> bool:
    """Whether this is the one process of all that a launcher started to say what was made.

    Returns:
        True where there is one process.
    """
    return os.environ.get("RANK", "0") == "0"


def _show_tuning(path: Path) -> None:
    """Print what a probe found, if an ONNX folder was tuned."""
    from mistill.cli.onnx_report import tuning_table
    from mistill.folders.folder import MANIFEST_FILE, read_json

    tuning = read_json(path / MANIFEST_FILE).get("tuning")
    if tuning is not None and speaks():
        Console().print(tuning_table(tuning))
