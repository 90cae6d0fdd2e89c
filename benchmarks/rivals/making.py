"""Make a rival's file out of the very weights that it is compared with.

What mistill's own steps can do is asked of the command ``mistill`` in a process of its own: steps
do not import one another.
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

# Largest first: what 4-bit weights that share a scale are usually cut into.
_BLOCKS = (128, 64, 32)
_FIND = (
    "import importlib.util as u, json, pathlib; s = u.find_spec({module!r}); "
    "print(json.dumps([str(pathlib.Path(s.origin).parent), "
    "all(u.find_spec(n) for n in {needs!r})]))"
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the module that makes a rival's files is given.

    Attributes:
        variant: How the weights shall be stored, as its ``check_variant`` says.
        environment: Where the rival is installed.
        source: The folder whose weights it gets; codes are multiplied out.
        scratch: Where what several variants share is kept.
        folder: Where to put the files.
    """

    variant: str
    environment: Environment
    source: FolderInfo
    scratch: Path
    folder: Path


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
    order = Order(
        variant=choice.variant,
        environment=environment,
        source=source,
        scratch=scratch,
        folder=folder,
    )
    settings, made = maker(choice.engine).make(order)
    Note(
        engine=choice.engine.name,
        variant=choice.variant,
        python=str(environment.python),
        library=environment.library,
        made=made,
        source=name,
        context_length=source.context_length,
        vocabulary_size=source.vocabulary_size,
        settings=settings,
    ).write(folder)
    return folder


def run_mistill(*words: str) -> None:
    """Run a command of mistill.

    Args:
        *words: Its words.
    """
    run_program([sys.executable, "-P", "-m", "mistill", *words])


def run_program(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
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


def run_offline(command: Sequence[str], **variables: str) -> str:
    """Run a rival's own tool: nothing of ours is seen by it, and it downloads nothing.

    Args:
        command: Its words.
        **variables: More environment variables.

    Returns:
        What it printed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run_program(command, {**inherited, "HF_HUB_OFFLINE": "1", **variables})


def find_package(environment: Environment, module: str, needs: Sequence[str]) -> tuple[Path, Path]:
    """A rival's package, and a Python that can run the converter in it.

    Converters need PyTorch and transformers, which an environment that only runs models need not
    have: they are then run by our Python, as they lie in that environment.

    Args:
        environment: Where the rival is installed.
        module: Its package.
        needs: What its converter imports besides.

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
        scratch: Where to keep what has to be made.

    Returns:
        The folder, and words on how it came to be; none where its weights are the source's own.
    """
    weights, words = source.path, ""
    if source.form != "model":
        weights = scratch / "multiplied-out"
        words = f"its {source.form} codes multiplied out (mistill quantize dequantize); "
        if not weights.exists():
            run_mistill("quantize", "dequantize", str(source.path), str(weights))
    target = scratch / "float"
    if not target.exists():
        target.mkdir()
        for file in weights.iterdir():
            (target / file.name).symlink_to(file.absolute())
        config = older_config(read_json(weights / "config.json"))
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target, words


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config.json for every release of transformers.

    transformers 5 writes ``rope_parameters``, which older ones do not look at: they would turn
    every model by the angles of base 10,000 and say nothing.

    Args:
        config: What either writes.

    Returns:
        The same, with what older ones look for.
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
    """How many 4-bit weights share a scale, where the engine leaves that to be chosen.

    Args:
        config: The model's config.json.

    Returns:
        The largest of 128, 64 and 32 that divides the model's widths; 32 where none does.
    """
    widths = [config[name] for name in ("hidden_size", "intermediate_size")]
    fitting = [b for b in _BLOCKS if all(isinstance(w, int) and w % b == 0 for w in widths)]
    return fitting[0] if fitting else _BLOCKS[-1]
