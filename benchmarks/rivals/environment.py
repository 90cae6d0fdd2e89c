"""Where a rival is installed, and how a process is started there.

A rival's Python may be of another version than ours and has other libraries. It imports only the
packages ``mistill`` and ``benchmarks`` of ours, and of those only modules that need no library but
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

# Our two packages are imported from their folder, which is then taken off the path, so that nothing
# else in it, such as our numpy, is imported.
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
        system: The engine's own description of its build.
    """

    python: Path
    library: str
    programs: Path | None
    version: str
    system: str


def child_command(python: str | Path) -> list[str]:
    """The command that starts a process which runs a rival.

    Args:
        python: The rival's Python.

    Returns:
        A command line, to which the arguments of ``benchmarks.measure.child`` are added.
    """
    return [str(python), "-P", "-c", _BEGIN.format(packages=str(PACKAGES)) + _CHILD]


def rivals_named(options: Iterable[str]) -> dict[str, str]:
    """Parse where rivals are installed.

    Args:
        options: Each ``NAME=PATH``; the name is that of an engine, or has ``-programs`` after it.

    Returns:
        Paths by name.

    Raises:
        SettingsError: If an option has another form, or names no rival.
    """
    names = [name for engine in ENGINES for name in (engine, f"{engine}-programs")]
    paths = {}
    for word in options:
        name, equals, path = word.partition("=")
        require(
            name in names and bool(equals and path),
            f"rivals-in takes NAME=PATH with a name out of {', '.join(names)}, not {word!r}",
        )
        paths[name] = path
    return paths


def find_environment(engine: Engine, named: Mapping[str, str | Path]) -> Environment:
    """Find where a rival is installed, and its version.

    Args:
        engine: The rival.
        named: Paths that the user named, by the engine, or the engine with ``-programs``. Missing
            ones are looked up in the environment variables.

    Returns:
        The environment.

    Raises:
        MissingExtraError: If the rival is not installed at the named path, or, without one, in this
            Python.
    """
    named_path = named.get(engine.name) or os.environ.get(engine.variable)
    python, library = _interpreter(engine, named_path)
    programs_path = named.get(f"{engine.name}-programs") or os.environ.get(
        f"{engine.variable}_PROGRAMS"
    )
    programs = Path(programs_path).expanduser() if programs_path else None
    if programs is None and library:
        programs = Path(library).parent
    description = _probe(engine, python, library, named_path)
    return Environment(
        python=python,
        library=library,
        programs=programs,
        version=description["version"],
        system=description["system"],
    )


def _interpreter(engine: Engine, named_path: str | Path | None) -> tuple[Path, str]:
    """The Python of an environment, or this one with the library in a folder."""
    if named_path is None:
        return Path(sys.executable), ""
    path = Path(named_path).expanduser()
    if path.is_file():
        # Not resolved: an environment's Python is a link to the Python that created it.
        return path.absolute(), ""
    for python in (path / "bin" / "python", path / "Scripts" / "python.exe"):
        if python.is_file():
            return python.absolute(), ""
    for inner in _PLACES:
        for file in sorted((path / inner).glob("libllama.*")):
            if engine.name == "llama.cpp" and file.suffix in (".so", ".dylib"):
                return Path(sys.executable), str(file.absolute())
    raise MissingExtraError(
        f"{engine.name} should be in {named_path}, which is neither a Python nor an environment "
        f"with bin/python{', nor a folder with libllama' if engine.name == 'llama.cpp' else ''}; "
        f"make one with: python -m venv DIR && DIR/bin/{engine.install}, and name it with "
        f"--rivals-in {engine.name}=DIR or {engine.variable}"
    )


def _probe(
    engine: Engine, python: Path, library: str, named_path: str | Path | None
) -> dict[str, str]:
    script = _BEGIN.format(packages=str(PACKAGES)) + _PROBE.format(
        engine=engine.name, library=library
    )
    # The child process runs without our PYTHONPATH too: no library of ours may be imported.
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
    last = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    where = "this Python has none" if named_path is None else f"{named_path} has none that works"
    raise MissingExtraError(
        f"to compare with {engine.name} it must be installed, and {where} ({last}); install it "
        f"in an environment of its own with: {engine.install}, and name that with --rivals-in "
        f"{engine.name}=DIR or {engine.variable}"
    )
