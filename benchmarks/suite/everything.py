"""Measure mistill's own steps against their rivals, and write the tables of the documentation.

    python -m benchmarks.suite.everything --work FOLDER        or: make bench

Rivals live in environments of their own, which variables name; a rival whose variable is not set
is left out, and that is said:

    MISTILL_TRL                  trl==1.16.0, and liger-kernel==0.8.5 without its dependencies
    MISTILL_GPTQMODEL_VENV       gptqmodel and optimum
    MISTILL_GENAI                onnxruntime-genai==0.18.0 and what its builder needs
    MISTILL_LLAMA_CPP            llama.cpp: an environment with its bindings, or its libraries
    MISTILL_LLAMA_CPP_PROGRAMS   the folder of llama.cpp's programs
    MISTILL_OPENVINO_VENV        openvino-genai and optimum-intel[openvino]

The model is the embedded teacher unless ``--model`` names a float folder. What a program prints
is kept in ``benchmarks/results/``, from which ``benchmarks.suite.page`` writes the tables. A
program that fails is named at the end, and the others are run all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite import page


@dataclass(frozen=True)
class Rival:
    """Something to measure against.

    Attributes:
        name: What it is called.
        variable: The environment variable that names it.
        option: The option by which a program is given it.
        python: Whether a Python is wanted where the variable names an environment.
        against: What ``--against`` calls it, in every form that is measured.
    """

    name: str
    variable: str
    option: str
    python: bool = False
    against: tuple[str, ...] = ()

    def found(self, environment: Mapping[str, str]) -> str | None:
        """What the option is given.

        Args:
            environment: Variables.

        Returns:
            A Python or a folder; None where the variable is not set.
        """
        named = environment.get(self.variable)
        if not named:
            return None
        python = Path(named) / "bin" / "python"
        return str(python) if self.python and not Path(named).is_file() else named


@dataclass(frozen=True)
class Program:
    """A program of the suite, and how it is called.

    Attributes:
        name: Of its module and of its record.
        arguments: Its words; ``{model}``, ``{chatbot}`` and ``{work}`` stand for folders, and
            ``{threads}`` for a number.
        rivals: What it can be given to measure against.
        needs_rival: Whether it has nothing to say without one.
    """

    name: str
    arguments: tuple[str, ...]
    rivals: tuple[Rival, ...] = ()
    needs_rival: bool = False


TRL = Rival("TRL and Liger", "MISTILL_TRL", "--rivals-python", python=True)
GPTQMODEL = Rival("gptqmodel", "MISTILL_GPTQMODEL_VENV", "--gptqmodel-python", python=True)
BUILDER = Rival("onnxruntime-genai's builder", "MISTILL_GENAI", "--genai-python", python=True)
GENAI = Rival(
    "onnxruntime-genai", "MISTILL_GENAI", "--genai", against=("genai:default", "genai:best")
)
LLAMA_CPP = Rival(
    "llama.cpp", "MISTILL_LLAMA_CPP", "--llama-cpp", against=("llama.cpp:q4_0", "llama.cpp:q4_k_m")
)
OPENVINO = Rival(
    "OpenVINO GenAI", "MISTILL_OPENVINO_VENV", "--openvino", against=("openvino:int4",)
)
PROGRAMS_OF = Rival("llama.cpp's programs", "MISTILL_LLAMA_CPP_PROGRAMS", "--llama-cpp-programs")

_TEXT = ("--texts", "@demo-train", "--held-out", "@demo-held-out")
_THREADS = ("--threads", "{threads}")

PROGRAMS = (
    Program("loss_head", _THREADS, (TRL,)),
    Program(
        "quantized_kl",
        (
            *("{model}", *_TEXT, *_THREADS, "--tokens", "16384", "--keep", "{work}/quantized"),
            *("--ways", "rounding-64", "gptq-64", "gptaq-64", "gptqmodel-64"),
        ),
        (GPTQMODEL,),
    ),
    Program("export_time", ("{model}", *_THREADS), (BUILDER,)),
    Program("export_parity", ("{chatbot}", "{source}", *_THREADS)),
    Program("step_time", ("{model}", "{work}/steps", *_THREADS)),
    Program("later_turn", ("{chatbot}", *_THREADS)),
    Program(
        "rivals",
        ("{chatbot}", "--source", "{model}", "--texts", "@demo-held-out", *_THREADS),
        (LLAMA_CPP, PROGRAMS_OF, GENAI, OPENVINO),
        needs_rival=True,
    ),
)


def called(
    program: Program, places: Mapping[str, str], environment: Mapping[str, str]
) -> list[str]:
    """The words after ``python -m``.

    Args:
        program: Which program.
        places: What stands for the words in braces.
        environment: Variables that name rivals.

    Returns:
        The module and its arguments.
    """
    words = [f"benchmarks.suite.{program.name}"]
    words += [word.format(**places) for word in program.arguments]
    for rival in program.rivals:
        path = rival.found(environment)
        if path is not None:
            words += [rival.option, path]
    there = [word for rival in program.rivals if rival.found(environment) for word in rival.against]
    return [*words, "--against", *there] if there else words


def shown(program: Program, environment: Mapping[str, str], threads: int = 2) -> str:
    """The command as a page shows it: names in capitals where this machine has places.

    Args:
        program: Which program.
        environment: Variables that name rivals.
        threads: Threads that it computes with.

    Returns:
        The command.
    """
    names = {"model": "MODEL", "chatbot": "CHATBOT", "source": "SOURCE", "work": "WORK"}
    words = called(program, names | {"threads": str(threads)}, environment)
    for rival in program.rivals:
        path = rival.found(environment)
        words = ["PATH" if word == path else word for word in words]
    return " ".join(["python", "-m", *words])


def prepare(model: str, work: Path) -> dict[str, str]:
    """Make what the programs read; what is there already is kept.

    Args:
        model: A float folder, or a name such as ``@smollm2``.
        work: Where folders go.

    Returns:
        Folders by name.
    """
    import export
    import mistill
    import quantize

    work.mkdir(parents=True, exist_ok=True)
    source = Path(model)
    if not source.is_dir():
        source = work / "teacher"
        if not source.is_dir():
            mistill.save_model(model, source)
    small, chatbot = work / "gptq", work / "chatbot"
    if not small.is_dir():
        quantize.to_gptq(source, small, texts="@demo-train", bits=4, group_size=64)
    if not chatbot.is_dir():
        export.to_onnx(small, chatbot)
    folders = {"model": source, "source": small, "chatbot": chatbot, "work": work}
    return {name: str(folder) for name, folder in folders.items()}


def main() -> int:
    """Measure, keep and write.

    Returns:
        1 if a program failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="@smollm2")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[program.name for program in PROGRAMS])
    args = parser.parse_args()
    places = prepare(args.model, args.work) | {"threads": str(args.threads)}
    failed, left_out = [], set()
    for program in PROGRAMS:
        if args.only and program.name not in args.only:
            continue
        left_out |= {rival for rival in program.rivals if not rival.found(os.environ)}
        words = called(program, places, os.environ)
        if program.needs_rival and "--against" not in words:
            continue
        print(f"measuring {program.name}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            failed.append(program.name)
            continue
        page.keep(
            program.name, page.last_document(done.stdout), shown(program, os.environ, args.threads)
        )
    page.write()
    for rival in sorted(left_out, key=lambda one: one.name):
        print(f"left out: {rival.name}; {rival.variable} names none", file=sys.stderr)
    for complaint in page.outdated():
        print(complaint, file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
