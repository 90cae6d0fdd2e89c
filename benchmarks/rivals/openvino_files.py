"""Graphs for OpenVINO GenAI, by either of its two roads.

``optimum-cli export openvino`` traces the model with PyTorch and stores its weights as NNCF does.
OpenVINO GenAI itself also reads GGUF files of some architectures, which needs nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.rivals.environment import Environment
from benchmarks.rivals.making import (
    Order,
    float_folder,
    largest_block,
    run_mistill,
    run_offline,
)
from benchmarks.rivals.openvino_model import EXACT, MODEL_FILE
from mistill.errors import ArchitectureError, MissingExtraError, MistillError
from mistill.folders.folder import read_json
from mistill.settings import require

_FORMATS = ("int4", "int8", "fp16", "fp32")
# GGUF files by mistill, and what it calls how their weights are stored.
_GGUF = {
    "gguf-f16": "float16",
    "gguf-q8_0": "q8_0",
    "gguf-q4_1": "q4_1",
    "gguf-q4_0": "q4_0",
}
_OPTION = re.compile(r"[a-z][a-z-]*(=[^=\s]+)?")
_HAS_EXPORTER = (
    "import importlib.util as u; "
    "raise SystemExit(not (u.find_spec('optimum') and u.find_spec('optimum.intel')))"
)
_READ_GGUF = (
    "import sys, openvino_genai; "
    "openvino_genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
)


def check_variant(variant: str) -> None:
    """Refuse a variant that cannot be made.

    Args:
        variant: A weight format of ``optimum-cli export openvino``, with more of its options
            joined by ``+``, or ``gguf-`` and a way to store weights in such a file.
    """
    kind, *options = variant.split("+")
    require(
        kind in _FORMATS or (kind in _GGUF and not options),
        f"openvino's variants are {', '.join((*_FORMATS, *_GGUF))}, not {variant!r}",
    )
    for option in options:
        require(
            bool(_OPTION.fullmatch(option)),
            "an option of optimum-cli export openvino is given as in int4+group-size=32+sym, not "
            f"as {option!r}",
        )


def make(order: Order) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        order: The weight format, the source and the folders.

    Returns:
        Settings of exporter and engine, and how the folder was made.
    """
    kind, *options = order.variant.split("+")
    if kind in _GGUF:
        return _from_gguf(order)
    weights, preparation = float_folder(order.source, order.scratch)
    options_by_name = {"weight-format": kind}
    options_by_name.update({name: value for name, _, value in (o.partition("=") for o in options)})
    if kind == "int4":
        options_by_name.setdefault(
            "group-size", str(largest_block(read_json(weights / "config.json")))
        )
    flags = [
        word for name, value in options_by_name.items() for word in (f"--{name}", value) if word
    ]
    command = [*exporter(order.environment), "export", "openvino", "-m", str(weights)]
    command += ["--task", "text-generation-with-past", "--disable-convert-tokenizer", *flags]
    run_offline([*command, str(order.folder)])
    exact = EXACT if kind == "fp32" else {}
    return {
        **options_by_name,
        **exact,
    }, f"{preparation}optimum-cli export openvino {' '.join(flags)}"


def exporter(environment: Environment) -> list[str]:
    """How optimum-intel's exporter is run.

    Args:
        environment: Where OpenVINO GenAI is installed, and the exporter if not elsewhere.

    Returns:
        The first words of its command.

    Raises:
        MissingExtraError: If there is none.
    """
    if environment.programs is not None:
        program = environment.programs / "optimum-cli"
        if os.access(program, os.X_OK):
            return [str(program)]
    else:
        check = subprocess.run(
            [str(environment.python), "-P", "-c", _HAS_EXPORTER], capture_output=True, check=False
        )
        if check.returncode == 0:
            return [str(environment.python), "-P", "-m", "optimum.commands.optimum_cli"]
    raise MissingExtraError(
        f"openvino's {', '.join(_FORMATS)} are made by optimum-intel, which is not in "
        f"{environment.programs or environment.python}; install it there with: pip install "
        "'optimum-intel[openvino]', or name the folder of another environment's optimum-cli with "
        f"--rivals-in openvino-programs=DIR, or take {', '.join(_GGUF)}"
    )


def _from_gguf(order: Order) -> tuple[dict[str, str], str]:
    """Let OpenVINO GenAI read a GGUF file and keep what it made of it."""
    config = read_json(order.source.path / "config.json")
    rotary = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    scaling = rotary.get("rope_type", rotary.get("type", "default"))
    if scaling != "default":
        raise ArchitectureError(
            f"OpenVINO GenAI's reader of GGUF files leaves out the {scaling} scaling of rotary "
            f"positions that {order.source.path} has; take {', '.join(_FORMATS)}"
        )
    dtype = _GGUF[order.variant]
    scratch = order.scratch / order.variant
    scratch.mkdir()
    file = scratch / "model.gguf"
    run_mistill("gguf", str(order.source.path), str(file), "--dtype", dtype)
    python = str(order.environment.python)
    output = run_offline([python, "-P", "-c", _READ_GGUF, str(file)])
    for name in (MODEL_FILE, Path(MODEL_FILE).with_suffix(".bin").name):
        if not (scratch / name).is_file():
            last = " ".join(output.split()[-40:])
            raise MistillError(f"OpenVINO GenAI made no {name} of a GGUF file: {last}")
        shutil.move(scratch / name, order.folder / name)
    shutil.rmtree(scratch)
    return {"file": dtype}, f"mistill gguf --dtype {dtype}; read by OpenVINO GenAI"
