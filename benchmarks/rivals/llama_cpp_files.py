"""GGUF files for llama.cpp: float32 by mistill, everything smaller by llama.cpp's own quantizer."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.rivals.environment import Environment
from benchmarks.rivals.making import Order, run_mistill, run_program
from mistill.errors import MissingExtraError
from mistill.settings import require

MODEL_FILE = "model.gguf"

# Formats that mistill writes, with their names there; llama-quantize makes the others.
_OWN = {"f32": "float32", "f16": "float16", "q8_0": "q8_0", "q4_1": "q4_1", "q4_0": "q4_0"}
_OTHERS = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s"),
    *("q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "bf16"),
)


def check_variant(variant: str) -> None:
    """Refuse a weight format that llama.cpp does not have.

    Args:
        variant: Its name, such as ``q4_k_m``.
    """
    formats = (*_OWN, *_OTHERS)
    require(
        variant in formats,
        f"llama.cpp's weight formats are {', '.join(formats)}, not {variant!r}",
    )


def make(order: Order) -> tuple[dict[str, str], str]:
    """Make a file.

    Args:
        order: The weight format, the source and the folders.

    Returns:
        Settings of llama.cpp, and how the file was made.

    Raises:
        MissingExtraError: If llama-quantize is needed and missing.
    """
    variant, environment, source = order.variant, order.environment, order.source
    target = order.folder / MODEL_FILE
    settings = {"context": "as needed", "batch": "2048 in pieces of 512", "cache": "f16"}
    program = quantizer(environment)
    if program is None or variant in ("f32", "f16"):
        if variant not in _OWN:
            raise MissingExtraError(
                f"llama.cpp {variant} is made by llama.cpp's own llama-quantize, which is not "
                f"{'known' if environment.programs is None else f'in {environment.programs}'}; "
                "name the folder of its programs with --rivals-in llama.cpp-programs=DIR or "
                f"MISTILL_LLAMA_CPP_PROGRAMS, or take {', '.join(_OWN)}"
            )
        run_mistill("gguf", str(source.path), str(target), "--dtype", _OWN[variant])
        return settings, f"mistill gguf --dtype {_OWN[variant]}"
    exact = order.scratch / "float32.gguf"
    if not exact.exists():
        run_mistill("gguf", str(source.path), str(exact), "--dtype", "float32")
    run_program([str(program), str(exact), str(target), variant.upper(), "1"])
    return settings, f"mistill gguf --dtype float32; llama-quantize {variant.upper()}"


def quantizer(environment: Environment) -> Path | None:
    """The program ``llama-quantize`` of llama.cpp.

    Args:
        environment: Where llama.cpp is installed.

    Returns:
        The program; None if it is not known.
    """
    if environment.programs is None:
        return None
    program = environment.programs / "llama-quantize"
    return program if os.access(program, os.X_OK) else None
