"""The tests notice every mistake of ``heart.py``: each is made in a copy, where tests must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.heart import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("mistill", "tune", "distill", "quantize", "export", "benchmarks", "tests", "examples")
TESTS_FAILED = 1  # pytest's exit code where tests ran and some did not pass


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def test_there_are_forty_mutations_and_each_changes_one_place():
    assert len(MUTATIONS) >= 40
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text("utf-8").count(mutation.right) == 1, mutation.name
        for test in mutation.tests:
            assert (ROOT / test).exists(), test


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_no_mutation_survives(copy: Path, mutation: Mutation):
    file = copy / mutation.file
    whole = file.read_text("utf-8")
    file.write_text(whole.replace(mutation.right, mutation.wrong), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow and not gpu"]
    try:
        done = subprocess.run(
            [*command, *mutation.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(whole, "utf-8")
    assert done.returncode == TESTS_FAILED, done.stdout[-2000:]
