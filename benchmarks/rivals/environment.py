"""Where a rival is installed, and how a process is started there.

A rival's Python is not ours: it may be of another version and has other libraries. Only the
packages ``mistill`` and ``benchmarks`` are shown to it, and of those only what needs no more than
numpy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rivals.engines import ENGINES, Engine
from mistill.errors import MissingExtraError
from mistill.settings import require

PACKAGES = Path(__file__).resolve().parents[2]

# Our two packages are imported from where they are and then find their own modules; nothing else
# that lies there, such as our numpy, is seen.
_BEGIN = (
    "import sys; sys.path.insert(0, {packages!r}); import benchmarks, mistill; "
    "sys.path.remove({packages!r}); "
)
_CHILD = "from benchmarks.measure.child import main; main()"
_PROBE = (
    "import json, numpy; from benchmarks.rivals.engines import describe; "
    "print('\\n' + json.dumps(describe({engine!r}, {library!r})))"
)
_PLACES = ("", "bin", "lib", "build/bin", "build/lib")
_PROBE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a rival runs.

    Attributes:
        python: The Python that runs it.
        library: The engine's own library where a folder was named, else empty.
        programs: Folder of the engine's own programs; None where none is known.
        version: Of the engine.
        system: What the engine says of itself.
    """

    python: Path
    library: str
    programs: Path | None
    version: str
    system: str


def child_command(python: str | Path) -> list[str]:
    """How a process that runs a rival is started.

    Args:
        python: The rival's Python.

    Returns:
        A command line, to which the arguments of ``benchmarks.measure.child`` are added.
    """
    return [str(python), "-P", "-c", _BEGIN.format(packages=str(PACKAGES)) + _CHILD]


def rivals_named(words: Iterable[str]) -> dict[str, str]:
    """Read where rivals are installed.

    Args:
        words: Each ``NAME=PATH``; the name is that of an engine, or has ``-programs`` after it.

    Returns:
        Paths by name.

    Raises:
        SettingsError: If a word is none, or names no rival.
    """
    known = [name for engine in ENGINES for name in (engine, f"{engine}-programs")]
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        require(
            name in known and bool(equals and path),
            f"rivals-in takes NAME=PATH with a name out of {', '.join(known)}, not {word!r}",
        )
        found[name] = path
    return found


def find_environment(engine: Engine, named: Mapping[str, str | Path]) -> Environment:
    """Find where a rival is installed, and ask it what it is.

    Args:
        engine: The rival.
        named: What the user named: the engine, or the engine with ``-programs``, to a path. What
            is missing is looked up in the environment variables.

    Returns:
        The environment.

    Raises:
        MissingExtraError: If nothing is named and this Python has no such rival, or if there is
            none where it was said to be.
    """
    place = named.get(engine.name) or os.environ.get(engine.variable)
    python, library = _interpreter(engine, place)
    own = named.get(f"{engine.name}-programs") or os.environ.get(f"{engine.variable}_PROGRAMS")
    programs = Path(own).expanduser() if own else None
    if programs is None and library:
        programs = Path(library).parent
    found = _probe(engine, python, library, place)
    return Environment(
        python=python,
        library=library,
        programs=programs,
        version=found["version"],
        system=found["system"],
    )


def _interpreter(engine: Engine, place: str | Path | None) -> tuple[Path, str]:
    """The Python of an environment, or this one with the library in a folder."""
    if place is None:
        return Path(sys.executable), ""
    path = Path(place).expanduser()
    if path.is_file():
        # Not resolved: the Python of an environment is a link to the one that it was made with.
        return path.absolute(), ""
    for python in (path / "bin" / "python", path / "Scripts" / "python.exe"):
        if python.is_file():
            return python.absolute(), ""
    for inner in _PLACES:
        for file in sorted((path / inner).glob("libllama.*")):
            if engine.name == "llama.cpp" and file.suffix in (".so", ".dylib"):
                return Path(sys.executable), str(file.absolute())
    raise MissingExtraError(
        f"{engine.name} should be in {place}, which is neither a Python nor an environment with "
        f"bin/python{', nor a folder with libllama' if engine.name == 'llama.cpp' else ''}; make "
        f"one with: python -m venv DIR && DIR/bin/{engine.install}, and name it with "
        f"--rivals-in {engine.name}=DIR or {engine.variable}"
    )


def _probe(engine: Engine, python: Path, library: str, place: str | Path | None) -> dict[str, str]:
    script = _BEGIN.format(packages=str(PACKAGES)) + _PROBE.format(
        engine=engine.name, library=library
    )
    # What is found here would be found by the child too: nothing of ours may leak in.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        ran = subprocess.run(
            [str(python), "-P", "-c", script],
            capture_output=True,
            text=True,
            env={**environment, "HF_HUB_OFFLINE": "1"},
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingExtraError(f"{python} cannot be run to find {engine.name}: {error}") from error
    if ran.returncode == 0:
        answer: dict[str, str] = json.loads(ran.stdout.strip().splitlines()[-1])
        return answer
    last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
    where = "this Python has none" if place is None else f"{place} has none that works"
    raise MissingExtraError(
        f"to compare with {engine.name} it must be installed, and {where} ({last}); install it "
        f"in an environment of its own with: {engine.install}, and name that with --rivals-in "
        f"{engine.name}=DIR or {engine.variable}"
    )
