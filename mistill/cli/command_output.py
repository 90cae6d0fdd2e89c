"""What a command prints about its result.

One line of text, and the same as JSON with ``--json``. Of several processes that a launcher
started, only the main one prints.
"""

from __future__ import annotations

import json as json_library
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from mistill.folders.folder import FolderInfo, open_folder
from mistill.folders.lineage import read_lineage
from mistill.shown import visible

_log = logging.getLogger(__name__)

# What usually comes after a step, in the words of the command line.
_AFTER = {
    "teacher": "mistill compress {path} CHATBOT, or mistill student {path} STUDENT --texts TEXTS",
    "student": "mistill distill {path} TRAINED --teacher TEACHER --texts TEXTS",
    "heal": "mistill distill {path} TRAINED --teacher TEACHER --texts TEXTS",
}
_OF_FORM = {
    "model": "mistill quantize gptq {path} SMALL --texts TEXTS",
    "gptq": "mistill export {path} CHATBOT",
    "nf4": "mistill export {path} CHATBOT",
    "onnx": "mistill chat {path}, or mistill serve {path}",
}


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
    printed = print_result(facts, words, path, json)
    _log.info("next: %s", next_command(path, info))
    return printed


def next_command(path: Path, info: FolderInfo) -> str:
    """What usually comes after a folder was made.

    Args:
        path: Path of the folder.
        info: What it is.

    Returns:
        A command, or two to choose from.
    """
    steps = read_lineage(path)
    last = steps[-1]["step"] if steps and info.form == "model" else ""
    return _AFTER.get(last, _OF_FORM[info.form]).format(path=shlex.quote(str(path)))


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
