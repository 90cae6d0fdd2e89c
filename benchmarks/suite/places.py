"""What the programs that measure rivals ask of a command line: where they are, and how much."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.rivals.engines import ENGINES

_HAVE_PROGRAMS = {
    "llama.cpp": "llama-quantize and llama-bench",
    "openvino": "optimum-cli, if it is in another environment",
}


def add_options(parser: argparse.ArgumentParser, against: Sequence[str]) -> None:
    """Add where rivals are, which of them take part, and how much is measured.

    Args:
        parser: The command line.
        against: The rivals that take part if none is named.
    """
    for name in ENGINES:
        where = "a Python or an environment"
        if name == "llama.cpp":
            where = "a Python, an environment or a folder of libraries"
        parser.add_argument(_option(name), help=where)
        if name in _HAVE_PROGRAMS:
            whose = f"the folder of {_HAVE_PROGRAMS[name]}"
            parser.add_argument(_option(f"{name}-programs"), help=whose)
    parser.add_argument("--against", nargs="+", default=list(against))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)


def places(args: argparse.Namespace) -> dict[str, str]:
    """Where the rivals are that a command line names.

    Args:
        args: The command line.

    Returns:
        Paths by the names that ``rivals`` of ``benchmarks.compare`` takes.
    """
    names = [name for engine in ENGINES for name in (engine, f"{engine}-programs")]
    by_name = {name: getattr(args, _option(name)[2:].replace("-", "_"), None) for name in names}
    return {name: str(place) for name, place in by_name.items() if place}


def _option(name: str) -> str:
    return f"--{name.replace('.', '-')}"
