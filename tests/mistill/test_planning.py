"""A plan says which steps would run, what they cost, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistill.cli import main
from mistill.folders.folder import open_folder
from mistill.planning import describe_plan, plan_recipe
from mistill.recipe import read_recipe, run_recipe

ROAD = """
out = "road"

[base]
step = "teacher"
source = "{teacher}"

[small]
step = "student"
teacher = "base"
choose = "even"
layers = 2

[trained]
step = "distill"
student = "small"
teacher = "base"
texts = "@demo-train"
tokens = {tokens}

[rounded]
step = "rounding"
source = "small"
group_size = 32
"""


@pytest.fixture
def recipe_file(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "road.toml"
    file.write_text(ROAD.format(teacher=teacher, tokens=1000))
    return file


def test_a_plan_counts_operations_and_bytes(recipe_file: Path, teacher: Path) -> None:
    parameters = open_folder(teacher).parameters
    base, _, trained, rounded = plan_recipe(read_recipe(recipe_file), flops=1e9)
    assert base.size_bytes == 4 * parameters
    # Six operations for each parameter that learns and two for each that teaches, at 0.4 of the
    # speed of a product; a student counts as its teacher while its size is not known.
    assert trained.seconds == pytest.approx(1000 * 8 * parameters / 0.4e9)
    assert rounded.size_bytes is not None
    assert parameters * 4 / 8 < rounded.size_bytes < parameters * 6 / 8
    assert not (recipe_file.parent / "road").exists()


def test_a_plan_knows_what_is_done_what_follows_and_how_long_it_took(
    recipe_file: Path, teacher: Path
) -> None:
    text = recipe_file.read_text()
    recipe_file.write_text(
        text.partition("[trained]")[0] + "[rounded]" + text.rpartition("[rounded]")[2]
    )
    recipe = read_recipe(recipe_file)
    run_recipe(recipe)
    planned = plan_recipe(recipe, flops=1e9)
    assert [step.reason for step in planned] == [None] * 3
    assert "0 of 3 steps to run, about 0 s" in describe_plan(recipe, planned)
    recipe_file.write_text(recipe_file.read_text().replace("layers = 2", "layers = 3"))
    changed = read_recipe(recipe_file)
    before = (recipe.out / ".recipe-state.json").read_bytes()
    base, small, rounded = plan_recipe(changed, flops=1e9)
    assert base.reason is None
    assert (small.reason, small.measured) == ("layers changed from 2 to 3", True)
    assert rounded.reason == "small will be another"
    assert (recipe.out / ".recipe-state.json").read_bytes() == before


def test_a_name_tells_the_size_of_a_model_that_is_not_here(recipe_file: Path) -> None:
    recipe_file.write_text(
        ROAD.format(teacher="owner/Large-7B-v0.1", tokens=20_000_000).replace("layers = 2", "")
    )
    base, *_ = plan_recipe(read_recipe(recipe_file), flops=1e12)
    assert base.size_bytes == 28e9


def test_the_command_prints_the_plan_and_runs_nothing(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe_file), "--dry-run", "--json"]) == 0
    said = capsys.readouterr().out
    assert "trained  distill: about " in said
    assert "4 of 4 steps to run, about " in said
    assert said.strip().splitlines()[-1].startswith('[{"name": "base"')
    assert not (recipe_file.parent / "road").exists()
    recipe_file.write_text(recipe_file.read_text() + "\n[x]\nstep = 'nothing'\n")
    assert main(["run", str(recipe_file), "--dry-run"]) == 2


def test_the_time_of_tuning_is_that_of_its_tokens_or_not_told(
    tmp_path: Path, teacher: Path
) -> None:
    file = tmp_path / "tuned.toml"
    table = f'[{{}}]\nstep = "supervised"\nmodel = "{teacher}"\ntexts = "@demo-train"\n'
    file.write_text(table.format("long") + "tokens = 1000\n" + table.format("unknown"))
    long, unknown = plan_recipe(read_recipe(file), flops=1e6)
    parameters = open_folder(teacher).parameters
    assert long.seconds == pytest.approx(6 * parameters * 1000 / (1e6 * 0.4))
    assert unknown.seconds is None
    assert unknown.size_bytes == 4 * parameters
