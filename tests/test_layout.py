"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ("tune", "distill", "quantize", "export", "benchmarks")
SUITE = ROOT / "benchmarks" / "suite"
# Modules of the shared package that call steps: the command line, and what runs recipes.
MAY_IMPORT_STEPS = ("mistill.cli", "mistill.recipe", "mistill.demo", "mistill.compressing")
MOST_MODULES = 15
MOST_LINES = 450
LAPTOP_MODULES = (
    "chat/bot",
    "chat/terminal_chat",
    "engine/language_model",
    "engine/onnx_model",
    "engine/sampling",
    "errors",
    "folders/folder",
    "progress",
    "settings",
    "text/vocabulary",
    "weights/gptq_layout",
)
LAPTOP_LIBRARIES = {
    "cyclopts",
    "jinja2",
    "msgspec",
    "numpy",
    "onnxruntime",
    "rich",
    "safetensors",
    "tokenizers",
}


def imported(file: Path) -> set[str]:
    """Top-level names of all packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add((node.module or "").partition(".")[0])
    return names


def modules(package: str) -> list[Path]:
    """The files of a package; the suite measures the other steps and is no part of its own."""
    files = sorted((ROOT / package).rglob("*.py"))
    return [file for file in files if SUITE not in file.parents]


def name_of(file: Path) -> str:
    """The dotted name of a module."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for package in ("mistill", *STEPS) for file in modules(package)}


def imports_of(name: str) -> set[str]:
    """Modules of ours that a module imports, at its top, inside functions or for types alone."""
    imports: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                imports.add(module if module in FILES else str(node.module))
    return {module for module in imports if module in FILES and module != name}


# An __init__.py hands on names and stands above what it hands on.
IMPORTS = {name: imports_of(name) for name, file in FILES.items() if file.name != "__init__.py"}


def floors() -> dict[str, int]:
    """The rooms and modules on the map in CONTRIBUTING.md, by the line on which they stand."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (drawing,) = re.findall(r"```text\n(mistill/\n.*?)```", text, re.DOTALL)
    places: dict[str, int] = {}
    package = ""
    for number, line in enumerate(drawing.splitlines()):
        if not line.startswith(" "):
            package = line.strip().rstrip("/")
            continue
        for word in line.split():
            if not word.endswith(("/", ".py")):
                break
            places[f"{package}.{word.rstrip('/').removesuffix('.py')}"] = number
    return places


FLOORS = floors()


def room_of(name: str) -> str:
    """The room of a module, or the module itself where it stands in no room."""
    return ".".join(name.split(".")[:2])


def test_the_map_shows_every_room_and_no_other():
    rooms = {room_of(name) for name in FILES if "." in name}
    assert set(FLOORS) == rooms


def test_no_module_imports_itself_by_way_of_others():
    sorter = graphlib.TopologicalSorter(IMPORTS)
    sorter.prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_a_room_imports_only_rooms_below_it(room):
    upward = {
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        if room_of(name) == room
        for other in others
        if "." in other and room_of(other) != room
        if FLOORS[room_of(other)] > FLOORS[room] and room not in MAY_IMPORT_STEPS
    }
    assert not upward


@pytest.mark.parametrize("step", STEPS)
def test_steps_do_not_import_one_another(step):
    for file in modules(step):
        others = imported(file) & (set(STEPS) - {step})
        assert not others, f"{file} imports {others}"


@pytest.mark.parametrize("step", STEPS)
def test_no_step_imports_the_command_line_or_the_recipe(step):
    for name, others in IMPORTS.items():
        if name.startswith(f"{step}."):
            driven = {other for other in others if room_of(other) in MAY_IMPORT_STEPS}
            assert not driven, f"{name} imports {driven}"


def test_the_shared_package_imports_steps_only_where_they_are_driven():
    for name, file in FILES.items():
        if name.startswith("mistill.") and room_of(name) not in MAY_IMPORT_STEPS:
            assert not imported(file) & set(STEPS), file


def test_no_room_is_crowded():
    rooms: dict[Path, int] = {}
    for file in FILES.values():
        if file.name not in ("__init__.py", "__main__.py"):
            rooms[file.parent] = rooms.get(file.parent, 0) + 1
    assert {room: count for room, count in rooms.items() if count > MOST_MODULES} == {}


def test_a_long_file_says_why_it_is_long():
    for file in FILES.values():
        text = file.read_text("utf-8")
        if len(text.splitlines()) > MOST_LINES:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            assert "one file because" in " ".join(docstring.split()), f"{file} is long"


def test_no_package_imports_the_suite():
    for package in ("mistill", *STEPS):
        for file in modules(package):
            assert "benchmarks.suite" not in file.read_text("utf-8"), file


def test_nothing_that_is_shipped_imports_the_tests():
    for package in ("mistill", *STEPS):
        for file in modules(package):
            assert "tests" not in imported(file), file


@pytest.mark.parametrize("module", LAPTOP_MODULES)
def test_what_a_laptop_needs_names_only_the_libraries_of_a_plain_install(module):
    tree = ast.parse((ROOT / "mistill" / f"{module}.py").read_text("utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in top
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    foreign = names - LAPTOP_LIBRARIES - {"mistill"} - set(sys.stdlib_module_names)
    assert not foreign


@pytest.mark.parametrize("package", ["mistill", *STEPS])
def test_importing_a_package_loads_no_heavy_library(package):
    code = (
        f"import sys; import {package}; dir({package}); "
        "print(sorted({'torch', 'transformers', 'datasets', 'onnxruntime', 'matplotlib'} "
        "& sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_loads_no_heavy_library_for_help():
    code = (
        "import sys; from mistill.cli.app import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_recipe_is_checked_without_pytorch():
    code = (
        "import sys; from mistill.recipe import step_kinds; assert len(step_kinds()) == 19; "
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
