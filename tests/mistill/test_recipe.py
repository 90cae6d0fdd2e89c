"""A recipe skips what is done, redoes what changed and what depends on it, and survives a kill."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mistill.errors import FolderError, RecipeError, TargetExistsError
from mistill.folders.lineage import fingerprint
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

[rounded]
step = "rounding"
source = "small"
group_size = 32
"""


@pytest.fixture
def recipe_file(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "road.toml"
    file.write_text(ROAD.format(teacher=teacher))
    return file


def run(file: Path) -> dict[str, str]:
    """Run a recipe and return what was said of every step."""
    said = io.StringIO()
    run_recipe(read_recipe(file), Console(file=said, width=200))
    return dict(line.split(maxsplit=1) for line in said.getvalue().splitlines())


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_recipe_names_no_code_to_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text("open('ran', 'w').close()\n")
    file = tmp_path / "rewarded.toml"
    file.write_text(
        '[reinforce]\nmodel = "@smollm2"\nprompts = "@demo-train"\nfunction = "strange:score"\n'
    )
    with pytest.raises(RecipeError, match=r"\[reinforce\]: function names code to import, and a"):
        read_recipe(file)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_makes_every_output_and_then_skips_them(recipe_file, tmp_path):
    assert run(recipe_file) == {"base": "teacher", "small": "student", "rounded": "rounding"}
    assert json.loads((tmp_path / "road/small/config.json").read_text())["num_hidden_layers"] == 2
    assert (tmp_path / "road/rounded/lineage.json").is_file()
    dates = {file: file.stat().st_mtime_ns for file in (tmp_path / "road").rglob("*")}
    assert set(run(recipe_file).values()) == {"done before"}
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "road").rglob("*")} == dates


def test_a_changed_setting_redoes_what_depends_on_it_and_says_so(recipe_file, tmp_path):
    run(recipe_file)
    change(recipe_file, "layers = 2", "layers = 3")
    said = run(recipe_file)
    assert said["base"] == "done before"
    assert "layers changed from 2 to 3" in said["small"]
    assert said["rounded"] == "rounding (its source changed)"
    assert json.loads((tmp_path / "road/rounded/config.json").read_text())["num_hidden_layers"] == 3


def test_a_changed_last_step_leaves_the_others_alone(recipe_file):
    run(recipe_file)
    change(recipe_file, "group_size = 32", "group_size = 16")
    said = run(recipe_file)
    assert said["small"] == "done before"
    assert said["rounded"] == "rounding (group_size changed from 32 to 16)"


def test_an_output_that_is_gone_or_tampered_with_is_made_again(recipe_file, tmp_path):
    run(recipe_file)
    before = fingerprint(tmp_path / "road/small")
    (tmp_path / "road/small/config.json").write_text("{}")
    assert "its output was changed" in run(recipe_file)["small"]
    assert fingerprint(tmp_path / "road/small") == before
    (tmp_path / "road/small").rename(tmp_path / "moved")
    assert "its output is gone" in run(recipe_file)["small"]
    assert fingerprint(tmp_path / "road/small") == before


def test_a_folder_that_the_recipe_did_not_make_is_not_touched(recipe_file, tmp_path):
    (tmp_path / "road/small").mkdir(parents=True)
    (tmp_path / "road/small/precious.txt").write_text("precious")
    with pytest.raises(TargetExistsError, match="not made by this recipe"):
        run(recipe_file)
    assert (tmp_path / "road/small/precious.txt").read_text() == "precious"


KILLS = """
import os, random, signal, sys, time
from mistill.recipe import read_recipe, run_recipe

def run(out):
    run_recipe(read_recipe(sys.argv[1], out=out))

run("warm")  # what a step imports is not the moment to be killed in
begun = time.perf_counter()
run("timed")
took = time.perf_counter() - begun
chance = random.Random(0)
met = []
# So many times, and until two of them were killed in different steps, as a busy machine has it.
while len(met) < int(sys.argv[2]) or (len({len(names) for names in met}) == 1 and len(met) < 40):
    child = os.fork()
    if child == 0:
        run("killed")
        os._exit(0)
    time.sleep(chance.uniform(0, took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.makedirs("killed", exist_ok=True)
    os.rename("killed", f"killed-{len(met)}")
    met.append([name for name in os.listdir(f"killed-{len(met)}") if not name.startswith(".")])
    print(*met[-1], flush=True)
"""


def test_a_recipe_killed_at_any_moment_ends_with_the_same_outputs(recipe_file, tmp_path):
    names = ("base", "small", "rounded")
    command = [sys.executable, "-c", KILLS, str(recipe_file), "8"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    expected = {name: fingerprint(tmp_path / "warm" / name) for name in names}
    met = [set(names) & set(line.split()) for line in done.stdout.splitlines()]
    assert len({len(one) for one in met}) > 1, "they were killed in different steps"
    for number, there in enumerate(met):
        out = tmp_path / f"killed-{number}"
        for name in there:
            assert fingerprint(out / name) == expected[name]
        run_recipe(read_recipe(recipe_file, out=out))
        assert {name: fingerprint(out / name) for name in names} == expected
        left = [file.name for file in out.iterdir() if file.name.startswith(".")]
        assert left == [".recipe-state.json"]


def test_what_a_killed_run_left_of_its_notes_is_cleared_away(recipe_file, tmp_path):
    run(recipe_file)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    torn = tmp_path / f"road/..recipe-state.json.{int(dead.stdout)}.partial"
    torn.write_text("{")
    assert set(run(recipe_file).values()) == {"done before"}
    assert not torn.exists()


def test_texts_are_found_beside_the_recipe(tmp_path, teacher, chats):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "my.jsonl").write_bytes(chats.read_bytes())
    (folder / "r.toml").write_text(
        f'[q]\nstep = "gptq"\nsource = "{teacher}"\ntexts = ["my.jsonl", "@demo-train"]\n'
    )
    (step,) = read_recipe(folder / "r.toml").steps
    assert step.inputs["texts"] == [str(folder / "my.jsonl"), "@demo-train"]


def test_a_damaged_state_is_named(recipe_file, tmp_path):
    run(recipe_file)
    (tmp_path / "road/.recipe-state.json").write_text("{")
    with pytest.raises(RecipeError, match="is damaged"):
        run(recipe_file)


@pytest.mark.parametrize("name", ["demo", "demo-quick", "demo-full"])
def test_the_shipped_recipes_are_sound(name):
    import mistill

    recipe = read_recipe(Path(mistill.__file__).parent / "data" / f"{name}.toml")
    kinds = [step.kind.name for step in recipe.steps]
    assert kinds[:3] == ["teacher", "student", "distill"]
    assert {"mixed", "rounding", "nf4", "export"} <= set(kinds)
    assert kinds[-1] == "bench"
    assert recipe.steps[-1].name == "report"
    assert recipe.out.name == name


@pytest.mark.parametrize(
    "name",
    ["../../beside", "../beside", "", ".", "..", ".recipe-state.json", "a\\u0000b", "x" * 300],
)
def test_a_table_is_named_as_a_file_of_the_folder_may_be(tmp_path, teacher, name):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'["{name}"]\nstep = "teacher"\nsource = "{teacher}"\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match="the name of a table is that of its output") as raised:
        read_recipe(recipe, out=tmp_path / "inner" / "road")
    assert "\n" not in str(raised.value)
    assert "\0" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "state",
    [
        '{"photos": {"started": {"step": "x"}}}',
        '{"photos": {"key": {"step": "teacher", "settings": {}, "inputs": {}}, "output": "x"}}',
    ],
)
def test_a_state_from_elsewhere_lets_no_folder_be_replaced(tmp_path, teacher, state):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[photos]\nstep = "teacher"\nsource = "{teacher}"\n')
    photos = tmp_path / "road" / "photos"
    photos.mkdir(parents=True)
    (photos / "wedding.jpg").write_text("mine")
    (tmp_path / "road" / ".recipe-state.json").write_text(state)
    with pytest.raises(FolderError, match="was not made by mistill"):
        run_recipe(read_recipe(recipe, out=tmp_path / "road"))
    assert (photos / "wedding.jpg").read_text() == "mine"


@pytest.mark.parametrize(
    "state",
    [
        *("[1]", '"text"', '{"base": 1}', '{"base": {"other": 1}}', '{"base": {"key": 1}}'),
        *('{"base": {"key": {"step": "x"}, "output": "y"}}', "[" * 100_000, "\udcff"),
    ],
)
def test_a_state_that_is_none_is_named(recipe_file, tmp_path, state):
    (tmp_path / "road").mkdir()
    file = tmp_path / "road" / ".recipe-state.json"
    file.write_text(state, "utf-8", "surrogateescape")
    with pytest.raises(RecipeError, match="is damaged"):
        run(recipe_file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('symmetric = "no"', "symmetric should be true or false, got 'no'"),
        ("symmetric = 1", "symmetric should be true or false, got 1"),
        ('bits = "4"', "bits should be a whole number, got '4'"),
        ("bits = true", "bits should be a whole number, got True"),
        ("group_size = 32.5", "group_size should be a whole number, got 32.5"),
        ("bits = [4]", r"bits should be a whole number, got \[4\]"),
        ("bits = 1979-05-27", "bits should be a whole number"),
        ("overrides = {a = 1}", "overrides should be a list"),
        ("overrides = [1]", "overrides should be text as item 1"),
    ],
)
def test_a_value_is_never_read_as_another_type(tmp_path, teacher, line, words):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[small]\nstep = "rounding"\nsource = "{teacher}"\n{line}\n')
    with pytest.raises(RecipeError, match=words) as raised:
        read_recipe(recipe)
    assert "[small]" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_with_markup_are_printed_as_they_are(tmp_path, teacher):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'["[red]base[bold]"]\nstep = "teacher"\nsource = "{teacher}"\n')
    written = io.StringIO()
    run_recipe(read_recipe(recipe, out=tmp_path / "road"), Console(file=written, width=200))
    assert "[red]base[bold]" in written.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("out = 3\n[teacher]\nsource = 'x/y'", "out should be the path of a folder, got 3"),
        ('out = "a\\u0000b"\n[teacher]\nsource = "x/y"', "out should be the path of a folder"),
        ("[a]\nstep = ['x']", r"step should be a name, got \['x'\]"),
        ("[a]\nstep = {x = 1}", "step should be a name, got {'x': 1}"),
        ("[a]\nstep = 'teacher'\nsource = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[a]\nstep = 'gptq'\nsource = 'x/y'\ntexts = [['x']]", "got a list"),
    ],
)
def test_a_recipe_of_other_types_is_refused_in_one_line(tmp_path, text, words):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=words) as raised:
        read_recipe(recipe)
    assert "\n" not in str(raised.value)
