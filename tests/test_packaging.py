"""What is in the wheel, what is public, and that versions and documents agree."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mistill", "tune", "distill", "quantize", "export", "benchmarks")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_six_packages_and_nothing_else(wheel):
    names = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_suite_that_measures_us_against_rivals_stays_in_the_repository(wheel):
    assert not [name for name in wheel.namelist() if name.startswith("benchmarks/suite")]
    assert (ROOT / "benchmarks" / "suite" / "loss_head.py").exists()


def test_the_wheel_holds_types_licence_texts_and_recipes(wheel):
    names = wheel.namelist()
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for name in (
        "demo-prompts.txt",
        "demo-train.jsonl",
        "demo-plain.jsonl",
        "demo-held-out.jsonl",
        "demo.toml",
        "demo-quick.toml",
        "demo-full.toml",
    ):
        assert f"mistill/data/{name}" in names
    assert {"benchmarks/data/questions.jsonl", "benchmarks/data/everyday-prompts.txt"} <= set(names)
    page = {file.name for file in (ROOT / "mistill" / "serve" / "page").iterdir()}
    assert {f"mistill/serve/page/{name}" for name in page} <= set(names)
    assert not [name for name in names if name.startswith("benchmarks/results")]
    shipped = sum(info.file_size for info in wheel.infolist() if "/data/demo" in info.filename)
    assert shipped < 1_000_000


def test_a_plain_install_asks_for_no_training_library(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = [
        re.match(r"[A-Za-z0-9_-]+", line.removeprefix("Requires-Dist: "))[0]  # type: ignore[index]
        for line in wheel.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(required) == [
        *(
            "cyclopts",
            "jinja2",
            "llguidance",
            "msgspec",
            "numpy",
            "onnxruntime",
            "rich",
            "safetensors",
            "tokenizers",
        )
    ]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_exists_and_is_documented(name):
    package = importlib.import_module(name)
    assert package.__all__ == sorted(package.__all__)
    assert package.__doc__
    for public in package.__all__:
        thing = getattr(package, public)
        assert public == "__version__" or thing.__doc__, f"{name}.{public} has no docstring"


def test_the_public_names_are_these():
    names = {name: importlib.import_module(name).__all__ for name in PACKAGES}
    assert {"new_student", "train", "generate_conversations", "forward_kl"} <= set(names["distill"])
    assert {"to_gptq", "to_nf4", "to_rounding"} <= set(names["quantize"])
    assert "to_onnx" in names["export"]
    assert "compare" in names["benchmarks"]
    assert {"ChatBot", "open_folder", "open_model", "save_model"} <= set(names["mistill"])


@pytest.mark.parametrize("name", PACKAGES)
def test_completing_a_name_offers_the_public_ones(name):
    package = importlib.import_module(name)
    assert set(dir(package)) == set(package.__all__) - {"__version__"}


def test_no_function_hides_a_module_of_its_package():
    for name in PACKAGES:
        package = importlib.import_module(name)
        assert not {file.stem for file in (ROOT / name).glob("*.py")} & set(package.__all__)


def test_an_unknown_name_is_an_attribute_error():
    import distill

    with pytest.raises(AttributeError, match="distil_everything"):
        distill.distil_everything  # noqa: B018


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in ("compress", "dev"):
        lines += project["optional-dependencies"][extra]
    wanted = {re.split(r"[>=\[<]", line)[0].lower() for line in lines} - {"mistill"}
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text("utf-8").split()
    }
    assert wanted <= pinned


def test_the_changelog_knows_this_version_or_says_unreleased():
    import mistill

    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## {mistill.__version__}" in changelog or "## Unreleased" in changelog
