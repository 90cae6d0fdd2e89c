"""A virtual environment in which transformers reads GPTQ folders, as others will read ours.

transformers hands GPTQ folders to optimum and gptqmodel, which pins other versions than mistill's
own and compiles C when it is installed: it needs an environment of its own. Run as a script this
makes one and prints its Python; the variable MISTILL_GPTQMODEL_VENV names one that exists.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

# What gptqmodel runs beside, and what mistill itself imports there.
REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "optimum==2.3.0", "msgspec>=0.19")
# The newest gptqmodel that accepts torch 2.13. It is built with torch, setuptools and a C compiler.
GPTQMODEL = "gptqmodel==7.6.0"
BUILD = ("setuptools", "wheel", "ninja")
_DONE = "gptqmodel-is-installed"


class NotInstallable(Exception):
    """The environment cannot be made here; says why."""


def interop_python() -> Path:
    """The Python of the environment, which is made if it does not exist (some minutes, 2 GB)."""
    named = os.environ.get("MISTILL_GPTQMODEL_VENV")
    if named:
        python = Path(named) / "bin" / "python"
        if not python.is_file():
            raise NotInstallable(f"MISTILL_GPTQMODEL_VENV names {named}, which has no bin/python")
        return python
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "mistill" / GPTQMODEL.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / _DONE).is_file():
        venv.create(folder, clear=True, with_pip=True)
        _pip(python, *REQUIREMENTS, *BUILD)
        _pip(python, *REQUIREMENTS, GPTQMODEL, "--no-build-isolation")
        (folder / _DONE).touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise NotInstallable(f"pip install {arguments[-1]} failed: {' '.join(last)}")


if __name__ == "__main__":
    sys.stdout.write(f"{interop_python()}\n")
