"""What a table of a recipe can be: each step describes itself so, in its ``recipe_steps``.

Nothing here, and nothing in a ``recipe_steps`` module, imports what a step needs to run: a recipe
is read and checked without PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = Callable[[Mapping[str, Any], Any, Path, bool], object]
"""Does the work of a step: inputs by key, settings, the target, and whether to overwrite it."""


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What a table of a recipe can be.

    Attributes:
        name: The word for it, as in the command line.
        settings: Its settings class, or None for a step without settings.
        models: Keys that name a model: an earlier table, or what the command line takes.
        texts: Keys that name text.
        optional: Keys of ``models`` and ``texts`` that may be left out.
        one_of: Keys of ``optional`` of which exactly one is required.
        needs: Keys of ``optional`` that stand only beside another one, and that other one.
        by_hand: Settings that name code to import, which no file decides: a recipe that has one is
            refused.
        output: ``folder``, or the suffix of the file that is written.
        last_file: The file of the folder without which it is unfinished; None for a folder that
            appears whole.
        together: Whether processes that one launcher has started make it together.
        run: Does the work.
    """

    name: str
    settings: type[Any] | None
    models: tuple[str, ...]
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    by_hand: tuple[str, ...] = ()
    output: str = "folder"
    last_file: str | None = None
    together: bool = False
    run: Run


def calling(function: str, *before_target: str) -> Run:
    """Run a step by calling a public function, which is imported only then.

    Args:
        function: Package and name, such as ``distill.train``.
        *before_target: Inputs that the function takes by position, before the target; it takes
            the others by name.

    Returns:
        What a ``StepKind`` runs.
    """

    def run(inputs: Mapping[str, Any], settings: Any, target: Path, overwrite: bool) -> object:
        package, _, name = function.rpartition(".")
        make = getattr(importlib.import_module(package), name)
        first = [inputs[key] for key in before_target]
        others = {key: value for key, value in inputs.items() if key not in before_target}
        if settings is not None:
            others["settings"] = settings
        return make(*first, target, **others, overwrite=overwrite)

    return run
