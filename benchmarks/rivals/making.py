"""Make a rival's file from the weights of the folder that it is compared with.

mistill's own steps are run by the command ``mistill`` in a process of their own, because steps do
not import one another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rivals.engines import Choice, Note, maker
from benchmarks.rivals.environment import Environment
from mistill.errors import MistillError
from mistill.folders.folder import FolderInfo, read_json
from mistill.folders.renaming import link_or_copy

# Usual block sizes of 4-bit weights, the largest first.
_BLOCKS = (128, 64, 32)
_FIND = (
    "import importlib.util as u, json, pathlib; s = u.find_spec({module!r}); "
    "print(json.dumps([str(pathlib.Path(s.origin).parent), "
    "all(u.find_spec(n) for n in {needs!r})]))"
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Arguments of a module that makes a rival's files.

    Attributes:
        variant: The weight format, one that its ``check_variant`` accepts.
        environment: Where the rival is installed.
        source: The folder whose weights it gets; quantized weights are dequantized.
        scratch: Folder for files that several variants share.
        folder: Folder for the rival's files.
    """

    variant: str
    environment: Environment
    source: FolderInfo
    scratch: Path
    folder: Path


def make_rival(
    choice: Choice, environment: Environment, source: FolderInfo, name: str, scratch: Path
) -> Note:
    """Make the folder that a child process opens as a rival.

    Args:
        choice: The rival.
        environment: Where it is installed.
        source: The float, GPTQ or NF4 folder whose weights it gets.
        name: Name of that folder in the report.
        scratch: Folder to make it in, and for files that several variants share.

    Returns:
        The folder, and what runs it.

    Raises:
        MistillError: If the rival's own tools fail.
    """
    folder = scratch / f"{choice.engine.name}-{choice.variant}".replace("/", "_")
    folder.mkdir(parents=True)
    order = Order(
        variant=choice.variant,
        environment=environment,
        source=source,
        scratch=scratch,
        folder=folder,
    )
    settings, how_made = maker(choice.engine).make(order)
    return Note(
        folder=str(folder),
        engine=choice.engine.name,
        variant=choice.variant,
        python=str(environment.python),
        library=environment.library,
        made=how_made,
        source=name,
        context_length=source.context_length,
        vocabulary_size=source.vocabulary_size,
        settings=settings,
    )


def run_mistill(*arguments: str) -> None:
    """Run a command of mistill.

    Args:
        *arguments: Its arguments.
    """
    run_program([sys.executable, "-P", "-m", "mistill", *arguments])


def run_program(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program.

    Args:
        command: Program and arguments.
        environment: Environment variables; ours if not given.

    Returns:
        Its output.

    Raises:
        MistillError: If it fails, with the last lines of its output.
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
        last = " ".join((ran.stdout.strip().splitlines() or ["it printed nothing"])[-3:])
        program = " ".join(Path(word).name for word in command[:4] if "import" not in word)
        raise MistillError(f"{program} ended with {ran.returncode}: {last}")
    return ran.stdout


def run_offline(command: Sequence[str], **variables: str) -> str:
    """Run a rival's own tool, without our PYTHONPATH and without downloads.

    Args:
        command: Program and arguments.
        **variables: More environment variables.

    Returns:
        Its output.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run_program(command, {**inherited, "HF_HUB_OFFLINE": "1", **variables})


def find_package(environment: Environment, module: str, needs: Sequence[str]) -> tuple[Path, Path]:
    """A rival's package, and a Python that can run the converter in it.

    Converters need PyTorch and transformers. Where the rival's environment lacks them, our Python
    runs the converter of that environment.

    Args:
        environment: Where the rival is installed.
        module: Its package.
        needs: Modules that its converter imports.

    Returns:
        The folder of the package, and the Python.
    """
    script = _FIND.format(module=module, needs=tuple(needs))
    ran = subprocess.run(
        [str(environment.python), "-P", "-c", script], capture_output=True, text=True, check=True
    )
    package, able = json.loads(ran.stdout)
    return Path(package), environment.python if able else Path(sys.executable)


def float_folder(source: FolderInfo, scratch: Path) -> tuple[Path, str]:
    """The weights as a plain float folder that older releases of transformers read as well.

    Args:
        source: A float, GPTQ or NF4 folder.
        scratch: Folder for what has to be made.

    Returns:
        The folder, and how its weights were made; empty where they are the source's own.
    """
    weights, how_made = source.path, ""
    if source.form != "model":
        weights = scratch / "dequantized"
        how_made = f"its {source.form} weights dequantized (mistill quantize dequantize); "
        if not weights.exists():
            run_mistill("quantize", "dequantize", str(source.path), str(weights))
    target = scratch / "float"
    if not target.exists():
        target.mkdir()
        for file in weights.iterdir():
            link_or_copy(file.absolute(), target / file.name)
        config = older_config(read_json(weights / "config.json"))
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target, how_made


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config.json for every release of transformers.

    transformers 5 writes ``rope_parameters``, which older releases ignore: they would silently use
    rotary embeddings of base 10,000 for every model.

    Args:
        config: The config of any release.

    Returns:
        The config with the keys that older releases read.
    """
    rotary = dict(config.get("rope_parameters") or {})
    base = rotary.pop("rope_theta", None)
    older = dict(config)
    if base is not None:
        older.setdefault("rope_theta", base)
    if rotary.get("rope_type", "default") != "default":
        older.setdefault("rope_scaling", {**rotary, "rope_theta": base})
    if "dtype" in config:
        older.setdefault("torch_dtype", config["dtype"])
    return older


def largest_block(config: Mapping[str, Any]) -> int:
    """Block size for 4-bit weights, for engines that let it be chosen.

    Args:
        config: The model's config.json.

    Returns:
        The largest of 128, 64 and 32 that divides the model's widths; 32 where none does.
    """
    widths = [config[name] for name in ("hidden_size", "intermediate_size")]
    fitting = [b for b in _BLOCKS if all(isinstance(w, int) and w % b == 0 for w in widths)]
    return fitting[0] if fitting else _BLOCKS[-1]
