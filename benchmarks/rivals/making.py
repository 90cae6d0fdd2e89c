"""Make a rival's file out of the very weights that it is compared with.

What mistill's own steps can do is asked of the command ``mistill`` in a process of its own: steps
do not import one another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.rivals.engines import Choice, Note, maker
from benchmarks.rivals.environment import Environment
from mistill.errors import MistillError
from mistill.folder import FolderInfo


def make_rival(
    choice: Choice, environment: Environment, source: FolderInfo, name: str, scratch: Path
) -> Path:
    """Make the folder that a child process opens as a rival.

    Args:
        choice: The rival.
        environment: Where it is installed.
        source: The float, GPTQ or NF4 folder whose weights it gets.
        name: What that folder is called in the report.
        scratch: Where to make it; what several variants share is kept there.

    Returns:
        The folder.

    Raises:
        MistillError: If the rival's own tools fail.
    """
    folder = scratch / f"{choice.engine.name}-{choice.variant}".replace("/", "_")
    folder.mkdir(parents=True)
    settings, made = maker(choice.engine).make(choice.variant, environment, source, scratch, folder)
    Note(
        engine=choice.engine.name,
        variant=choice.variant,
        python=str(environment.python),
        library=environment.library,
        made=made,
        source=name,
        context_length=source.context_length,
        settings=settings,
    ).write(folder)
    return folder


def mistill(*words: str) -> None:
    """Run a command of mistill.

    Args:
        *words: Its words.
    """
    call([sys.executable, "-P", "-m", "mistill", *words])


def call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program.

    Args:
        command: Its words.
        environment: Variables in place of ours.

    Returns:
        What it printed.

    Raises:
        MistillError: If it fails; with its last words.
    """
    ran = subprocess.run(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(environment or os.environ),
        check=False,
    )
    if ran.returncode:
        last = " ".join((ran.stdout.strip().splitlines() or ["it said nothing"])[-3:])
        program = " ".join(Path(word).name for word in command[:4] if "import" not in word)
        raise MistillError(f"{program} ended with {ran.returncode}: {last}")
    return ran.stdout


def float_folder(source: FolderInfo, scratch: Path) -> tuple[Path, str]:
    """The weights as a plain float folder.

    Args:
        source: A float, GPTQ or NF4 folder.
        scratch: Where to keep what has to be made.

    Returns:
        The folder, and words on how it came to be; none if it is the source itself.
    """
    if source.form == "model":
        return source.path, ""
    target = scratch / "float"
    if not target.exists():
        mistill("quantize", "dequantize", str(source.path), str(target))
    return target, f"its {source.form} codes multiplied out (mistill quantize dequantize); "
