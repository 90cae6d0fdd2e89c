"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ("distill", "quantize", "export", "benchmarks")
SUITE = ROOT / "benchmarks" / "suite"
MAY_IMPORT_STEPS = {
    *("bench_commands.py", "eval_commands.py", "quantize_commands.py"),
    *("app.py", "recipe.py", "demo.py"),
}
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


@pytest.mark.parametrize("step", STEPS)
def test_steps_do_not_import_one_another(step):
    for file in modules(step):
        others = imported(file) & (set(STEPS) - {step})
        assert not others, f"{file} imports {others}"


def test_the_shared_package_imports_steps_only_where_they_are_driven():
    for file in modules("mistill"):
        if file.name not in MAY_IMPORT_STEPS:
            assert not imported(file) & set(STEPS), file


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
