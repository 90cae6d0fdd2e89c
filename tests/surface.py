"""What users have: public names, settings, commands with their options, and recipe keys.

    python -m tests.surface > tests/surface.json

writes the list anew after a change that users are told of in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

PACKAGES = ("mistill", "tune", "distill", "quantize", "export", "benchmarks")
# Modules that users import from by name, beside the packages themselves.
MODULES = {
    "mistill.chat": ("ChatBot", "ChatSettings", "Speed"),
    "mistill.cli": ("main",),
    "mistill.constraints": ("json_schema", "lark", "regex"),
    "mistill.engine": ("OnnxModel",),
    "mistill.pytorch": ("PytorchModel", "load_pytorch", "read_tensors"),
    "mistill.serve": ("ServeSettings", "serve"),
    "mistill.source": ("save_model",),
    "mistill.vocabulary": ("Vocabulary", "load_vocabulary"),
    "mistill.text": (
        "Document",
        "Texts",
        "TokenBlocks",
        "pack",
        "read_documents",
        "read_prompts",
        "read_stream",
    ),
}


def public_names() -> dict[str, list[str]]:
    """The names that each package offers."""
    return {name: list(importlib.import_module(name).__all__) for name in PACKAGES}


def settings() -> dict[str, dict[str, str]]:
    """Fields of every settings class that a package offers, with their defaults."""
    from mistill.chat import ChatSettings
    from mistill.serve import ServeSettings

    classes: dict[str, Any] = {
        name: getattr(importlib.import_module(package), name)
        for package, names in public_names().items()
        for name in names
        if name.endswith("Settings") or name == "Budget"
    }
    return {
        name: {
            field.name: "required" if field.default is MISSING else repr(field.default)
            for field in fields(one)
        }
        for name, one in {
            **classes,
            "ChatSettings": ChatSettings,
            "ServeSettings": ServeSettings,
        }.items()
    }


def commands() -> dict[str, list[str]]:
    """The options and arguments of every command."""
    from mistill.cli.app import app

    return dict(sorted(_commands(app, ())))


def _commands(app: Any, path: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    for name in app:
        if not name.startswith("-"):
            yield from _commands(app[name], (*path, name))
    if app.default_command:
        from mistill.cli.options import LISTS

        arguments = app.assemble_argument_collection(default_parameter=LISTS, parse_docstring=True)
        names = {name for argument in arguments for name in argument.names}
        yield " ".join(path), sorted(names - {"*"})


def recipe_keys() -> dict[str, list[str]]:
    """The keys of every kind of table that a recipe may have."""
    from mistill.recipe import step_kinds

    return {
        name: sorted(
            {
                *kind.models,
                *kind.texts,
                *(field.name for field in (fields(kind.settings) if kind.settings else ())),
            }
        )
        for name, kind in sorted(step_kinds().items())
    }


def surface() -> dict[str, Any]:
    """All of it, as the JSON document beside this file holds it."""
    return {
        "public names": public_names(),
        "modules": {module: list(names) for module, names in MODULES.items()},
        "settings": settings(),
        "commands": commands(),
        "recipe keys": recipe_keys(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(surface(), indent=1) + "\n")
