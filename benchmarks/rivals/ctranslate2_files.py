"""Folders for CTranslate2, made by its own converter.

The converter needs PyTorch and transformers, which an environment that only runs models need not
have: it is then run by our Python, which must be of the same version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rivals.environment import Environment
from benchmarks.rivals.making import call, float_folder
from mistill.folder import FolderInfo
from mistill.settings import require

_TYPES = ("int8", "float32")
_FIND = (
    "import importlib.util as u, json, pathlib; s = u.find_spec('ctranslate2'); "
    "print(json.dumps([str(pathlib.Path(s.origin).parents[1]), "
    "all(u.find_spec(n) for n in ('torch', 'transformers'))]))"
)
# Our own libraries first, and no mistral-common, which needs more than it says.
_CONVERT = (
    "import sys; sys.path.append({packages!r}); sys.modules['mistral_common'] = None; "
    "from ctranslate2.converters.transformers import main; main()"
)


def check_variant(variant: str) -> None:
    """Refuse a type that weights are not stored in.

    Args:
        variant: ``int8`` or ``float32``.
    """
    require(variant in _TYPES, f"ctranslate2's variants are {', '.join(_TYPES)}, not {variant!r}")


def make(
    variant: str, environment: Environment, source: FolderInfo, scratch: Path, folder: Path
) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        variant: As ``check_variant`` says.
        environment: Where CTranslate2 is installed.
        source: The folder whose weights it gets; codes are multiplied out.
        scratch: Where a float folder is kept for the next variant.
        folder: Where to put the files.

    Returns:
        What the engine is told, and how the folder came to be.
    """
    weights, words = float_folder(source, scratch)
    ran = subprocess.run(
        [str(environment.python), "-P", "-c", _FIND], capture_output=True, text=True, check=True
    )
    packages, able = json.loads(ran.stdout)
    python = environment.python if able else Path(sys.executable)
    command = [str(python), "-c", _CONVERT.format(packages=packages), "--model", str(weights)]
    command += ["--output_dir", str(folder), "--quantization", variant, "--force"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call(command, {**variables, "HF_HUB_OFFLINE": "1"})
    made = f"{words}ct2-transformers-converter --quantization {variant}"
    return {"compute type": variant}, made
