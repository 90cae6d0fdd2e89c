"""The options of each step as typed dictionaries, so that editors and type checkers know them.

    python -m tests.options

writes them anew after a change of a settings class. A test holds them against the classes.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CLASSES = {
    "distill/options.py": (
        "distill.settings",
        ("TrainSettings", "StudentSettings", "HealSettings", "TargetSettings", "GenerateSettings"),
    ),
    "export/options.py": ("export.settings", ("OnnxSettings", "GgufSettings")),
    "benchmarks/options.py": (
        "benchmarks.settings",
        (
            *("BenchSettings", "EvalSettings", "JudgeSettings", "ServingSettings"),
            *("DiffSettings", "ShipSettings", "Budget"),
        ),
    ),
    "quantize/options.py": (
        "quantize.settings",
        (
            *("RoundingSettings", "GptqSettings", "Nf4Settings", "MixedSettings"),
            *("RotationSettings", "TuningSettings", "SweepSettings"),
        ),
    ),
    "tune/options.py": (
        "tune.settings",
        ("SupervisedSettings", "PreferenceSettings", "RewardSettings", "ReinforceSettings"),
    ),
    "mistill/serve/options.py": ("mistill.serve.settings", ("ServeSettings",)),
    "mistill/chat/options.py": ("mistill.chat.settings", ("ChatSettings",)),
}
HEAD = '''"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

'''


def written(module_name: str, classes: tuple[str, ...]) -> str:
    """The module that holds the options of some settings classes."""
    module = importlib.import_module(module_name)
    body, needed = [], set()
    for name in classes:
        of_class = written_class(getattr(module, name))
        body += ["", "", *of_class]
        needed |= set(re.findall(r"\b[A-Z]\w*", "\n".join(of_class[3:])))
    text = "\n".join(body)
    lines = []
    if "Sequence" in needed:
        lines.append("from collections.abc import Sequence")
    if "Path" in needed:
        lines.append("from pathlib import Path")
    literal = ["Literal"] if "Literal" in needed else []
    lines.append(f"from typing import {', '.join([*literal, 'TypedDict'])}")
    homes: dict[str, list[str]] = {}
    for name in sorted(needed - {"Sequence", "Path", "Literal", "None", "TypedDict"}):
        homes.setdefault(_home(name, module), []).append(name)
    imports = [f"from {home} import {', '.join(names)}" for home, names in sorted(homes.items())]
    if imports:
        lines += ["", *imports]
    return HEAD + "\n".join(lines) + text + "\n"


def written_class(settings: Any) -> list[str]:
    """The lines of the options of one settings class."""
    name = settings.__name__
    lines = [
        f"class {name.removesuffix('Settings')}Options(TypedDict, total=False):",
        f'    """Fields of ``{name}``."""',
        "",
    ]
    for field in fields(settings):
        # A step takes a list where it keeps a tuple, and a text where it keeps a path.
        kind = re.sub(r"tuple\[(.*?), \.\.\.\]", r"Sequence[\1]", str(field.type))
        kind = re.sub(r"\bPath\b", "str | Path", kind)
        lines.append(f"    {field.name}: {kind}")
    return lines


def _home(name: str, module: Any) -> str:
    """The module that an alias is defined in, as its import says."""
    source = Path(str(module.__file__)).read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return str(node.module)
    assert hasattr(module, name), name
    return str(module.__name__)


def formatted(text: str) -> str:
    """The text as ruff writes it."""
    for command in (["check", "--quiet", "--fix"], ["format", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", "options.py", "-"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        text = done.stdout
    return text


def main() -> None:
    """Write all of them."""
    for file, (module, classes) in CLASSES.items():
        (ROOT / file).write_text(formatted(written(module, classes)), encoding="utf-8")


if __name__ == "__main__":
    main()
