"""Every recipe in examples/recipes runs, with a tiny teacher in the place of Mistral 7B."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mistill.folders.folder import describe
from mistill.folders.lineage import read_lineage
from mistill.recipe import read_recipe, run_recipe
from tests.launching import launched

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
TINY: dict[str, dict[str, Any]] = {
    "teacher": {},
    "student": {"layers": 2, "hidden_size": 48, "intermediate_size": 96, "key_value_heads": 2,
                "calibration_tokens": 300},
    "targets": {"block_length": 64},
    "distill": {"tokens": 600, "block_length": 64, "batch_size": 4, "micro_batch_size": 2,
                "evaluate_every": 0, "learning_rate": 2e-3},
    "reward": {"max_length": 200, "gradient_checkpointing": False, "batch_size": 4,
               "micro_batch_size": 2, "steps": 2, "keep": "last"},
    "reinforce": {"max_length": 200, "max_new_tokens": 4, "samples": 2, "batch_size": 4,
                  "micro_batch_size": 2, "gradient_checkpointing": False, "steps": 1,
                  "held_out_prompts": 2, "keep": "last"},
    "supervised": {"tokens": 1500, "block_length": 128, "batch_size": 4, "micro_batch_size": 2,
                   "learning_rate": 5e-3, "lora_rank": 4},
    "generate": {"max_new_tokens": 8, "keep_unfinished": True, "best_of": 2},
    "gptq": {"samples": 4, "block_length": 64, "group_size": 16},
    "export": {"context_length": 256},
}  # fmt: skip


def shrink(name: str, folder: Path, teacher: Path, chats: Path) -> Path:
    """The recipe with other sizes and inputs, and every other key as it stands."""
    recipe = tomllib.loads((RECIPES / name).read_text("utf-8"))
    lines = [f'out = "{recipe.pop("out")}"']
    for table, given in recipe.items():
        values: dict[str, Any] = dict(given)
        kind = values.get("step", table)
        smaller = TINY.get(kind, {})
        always = kind in ("generate", "reward", "reinforce")
        values |= {key: smaller[key] for key in smaller if always or key in values}
        if "without_prompts" in values:  # a random model ends few of the prompts that it writes
            values |= {"without_prompts": 30, "max_new_tokens": 40}
        for key in ("texts", "held_out"):
            if "/" in str(values.get(key, "")):
                values[key] = "chats.jsonl" if key == "texts" else "held-out.jsonl"
        if kind == "teacher":
            values["source"] = str(teacher)
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for text in ("chats.jsonl", "held-out.jsonl"):
        target = folder / text
        if not target.exists():
            target.write_bytes(chats.read_bytes())
    made = folder / name
    made.write_text("\n".join(lines) + "\n", "utf-8")
    return made


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_24gb_gpu(in_folder: Path, teacher: Path, chats: Path) -> None:
    made = run_recipe(read_recipe(shrink("one-24gb-gpu.toml", in_folder, teacher, chats)))
    assert describe(made["chatbot"]).form == "onnx"
    entry = read_lineage(made["distilled"])[-1]
    assert entry["settings"]["gradient_checkpointing"] is True
    assert entry["teacher_kl_of_four_bits"]  # said, not hidden
    assert describe(made["student"]).hidden_size == 48


def test_cache_targets_and_laptop_from_targets(in_folder: Path, teacher: Path, chats: Path) -> None:
    made = run_recipe(read_recipe(shrink("cache-targets.toml", in_folder, teacher, chats)))
    assert (made["targets"] / "manifest.json").is_file()
    (in_folder / "from-the-teacher" / "teacher").rename(in_folder / "gone")
    made = run_recipe(read_recipe(shrink("laptop-from-targets.toml", in_folder, teacher, chats)))
    entry = read_lineage(made["distilled"])[-1]
    assert entry["after"]["kl"] < entry["before"]["kl"]
    assert describe(made["chatbot"]).form == "onnx"


def test_eight_gpus_as_one_process(in_folder: Path, teacher: Path, chats: Path) -> None:
    recipe = shrink("eight-gpus.toml", in_folder, teacher, chats)
    made = run_recipe(read_recipe(recipe))
    assert describe(made["chatbot"]).form == "onnx"


def test_qlora_on_16gb_then_distilled(in_folder: Path, teacher: Path, chats: Path) -> None:
    recipe = shrink("qlora-mistral-7b-16gb.toml", in_folder, teacher, chats)
    made = run_recipe(read_recipe(recipe))
    assert describe(made["chatbot"]).form == "onnx"
    steps = [entry["step"] for entry in read_lineage(made["tuned"])]
    assert steps[-1] == "supervised"
    entry = read_lineage(made["tuned"])[-1]
    assert entry["merges"].keys() == {"float", "dequantized"}
    assert read_lineage(made["distilled"])[-1]["teacher"] == made["tuned"].name


def test_align_then_distil(in_folder: Path, teacher: Path, chats: Path) -> None:
    made = run_recipe(read_recipe(shrink("align-then-distil.toml", in_folder, teacher, chats)))
    assert describe(made["chatbot"]).form == "onnx"
    teachers = [
        read_lineage(made[name])[-1]["teacher"]
        for name in ("distilled", "distilled-from-the-first")
    ]
    assert teachers == [made["tuned"].name, made["teacher"].name]


def test_eight_gpus_under_zero2_as_one_process(in_folder: Path, teacher: Path, chats: Path) -> None:
    recipe = shrink("eight-gpus-zero2.toml", in_folder, teacher, chats)
    made = run_recipe(read_recipe(recipe))
    entry = read_lineage(made["tuned"])[-1]
    assert entry["after"]["cross_entropy"] < entry["before"]["cross_entropy"]


@pytest.mark.slow
def test_eight_gpus_as_two_processes(in_folder: Path, teacher: Path, chats: Path) -> None:
    recipe = shrink("eight-gpus.toml", in_folder, teacher, chats)
    alone = run_recipe(read_recipe(recipe, out=in_folder / "alone"))
    done = launched(["-m", "mistill", "run", recipe, "--out", "together", "--json"], in_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 1  # one process of the two speaks
    together = Path(json.loads(said[0])["distilled"])
    ours, theirs = (read_lineage(folder)[-1]["after"] for folder in (alone["distilled"], together))
    assert theirs["kl"] == pytest.approx(ours["kl"], rel=1e-4)
    assert describe(in_folder / "together" / "chatbot").form == "onnx"


def test_reversed_instructions(in_folder: Path, teacher: Path, chats: Path) -> None:
    texts = [json.loads(line)["messages"][1]["content"] for line in chats.read_text().splitlines()]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[:6])
    (in_folder / "texts.jsonl").write_text(rows)
    recipe = shrink("reversed-instructions.toml", in_folder, teacher, chats)
    made = run_recipe(read_recipe(recipe))
    written = [json.loads(line) for line in made["written"].read_text().splitlines()]
    assert 1 <= len(written) <= 3  # the better half
    assert {row["messages"][1]["content"] for row in written} <= set(texts)
    assert all(isinstance(row["score"], float) for row in written)
    assert [entry["step"] for entry in read_lineage(made["tuned"])][-1] == "supervised"


def test_rlhf_code(in_folder: Path, teacher: Path, chats: Path) -> None:
    tasks = [
        {
            "prompt": f"Write a function that adds {number}.",
            "outputs": [f"def add(x): return x + {number}", "def add(x): pass", "no"],
            "scores": [9, 4, 1],
            "tests": f"assert add(1) == {number + 1}",
        }
        for number in range(6)
    ]
    for name, keys in (
        ("code-rankings", ("prompt", "outputs", "scores")),
        ("code-prompts", ("prompt", "tests")),
    ):
        rows = [{key: task[key] for key in keys} for task in tasks]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (in_folder / f"{name}.jsonl").write_text(lines)
    made = run_recipe(read_recipe(shrink("rlhf-code.toml", in_folder, teacher, chats)))
    assert [entry["step"] for entry in read_lineage(made["tested"])][-2:] == ["reinforce"] * 2
    assert read_lineage(made["ranked"])[-1]["judge"].endswith("judge")
    assert describe(made["tested"]).form == "model"


def test_korean_chatbot(in_folder: Path, teacher: Path, chats: Path) -> None:
    made = run_recipe(read_recipe(shrink("korean-chatbot.toml", in_folder, teacher, chats)))
    rows = [json.loads(line) for line in made["talks"].read_text("utf-8").splitlines()]
    assert rows
    for row in rows:
        turns = {turn["role"]: turn["content"] for turn in row["messages"]}
        assert turns.keys() == {"system", "user", "assistant"}
        assert "한국어" in turns["system"]
    found = describe(made["chatbot"])
    assert (found.form, found.layers) == ("onnx", 2)
    assert read_lineage(made["chatbot"])[-1]["settings"]["context_length"] == 256


def test_every_recipe_has_a_test() -> None:
    source = Path(__file__).read_text("utf-8")
    for file in RECIPES.glob("*.toml"):
        assert f'"{file.name}"' in source
