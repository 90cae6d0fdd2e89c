"""Tasks: the small offline set, and lm-evaluation-harness where it is installed.

MISTILL_LM_EVAL_VENV names an environment with lm-eval[ifeval] 0.4.13 and what mistill[compress]
needs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import benchmarks
import export
from benchmarks import EvalSettings, evaluate
from mistill.cli.app import main
from mistill.errors import MissingExtraError, SettingsError, TextError
from tests.tiny import SENTENCES, tiny_model

ROOT = Path(__file__).parents[3]


def test_the_offline_set_gives_a_number_without_lm_eval(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tasks.evaluation.find_spec", lambda name: None)
    found = evaluate(model, limit=24, threads=1)
    scores = {(score.task, score.measure): score for score in found.scores}
    whole = scores["smoke", "acc_norm"]
    assert whole.questions == 24
    kinds = [score for score in found.scores if "/" in score.task]
    assert [score.task for score in kinds] == [
        "smoke/cloze",
        "smoke/arithmetic",
        "smoke/fact",
        "smoke/instruction",
    ]
    right = sum(score.value * (score.questions or 0) for score in kinds)
    assert whole.value == pytest.approx(right / 24)
    assert whole.interval is not None
    assert whole.interval[0] < whole.value < whole.interval[1]
    assert found.harness is None
    assert found.machine.threads == 1
    assert json.loads(json.dumps(found.to_dict()))["settings"]["tasks"] == ["smoke"]


def test_a_published_task_asks_for_the_extra_before_anything_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tasks.evaluation.find_spec", lambda name: None)
    monkeypatch.setattr("benchmarks.tasks.evaluation.Worker", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mistill\[eval\]'"):
        evaluate(model, tasks=("smoke,arc_easy",))


def test_nonsense_is_refused() -> None:
    assert EvalSettings(tasks=("a, b", "a")).tasks == ("a", "b")
    with pytest.raises(SettingsError, match="tasks must name at least one"):
        EvalSettings(tasks=(" ",))
    with pytest.raises(SettingsError, match="limit must be at least 1"):
        EvalSettings(limit=0)
    with pytest.raises(SettingsError, match="few_shot must be at least 0"):
        EvalSettings(few_shot=-1)


@pytest.mark.parametrize(
    "option",
    [{"few_shot": 2}, {"chat_template": True}, {"include_path": "x"}, {"seed": 3}],
    ids=str,
)
def test_what_the_offline_set_does_not_heed_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(option))} applies to tasks of lm-eval"):
        EvalSettings(**option)
    assert EvalSettings(tasks=("smoke", "arc_easy"), **option).tasks == ("smoke", "arc_easy")


def test_as_many_questions_are_asked_as_are_allowed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ask(_: object, questions: Any, *__: object) -> Any:
        asked.append(len({question.text for question in questions}))
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.tasks.evaluation.answer_questions", ask)
    for limit in (1, 100, 500, None):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, limit=limit, threads=1)
    assert asked == [1, 100, 120, 120]


def test_the_command_writes_what_it_found(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    words = ["eval", str(model), "--limit", "8", "--threads", "1", "--out", str(out), "--json"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "smoke/instruction" in said
    document = json.loads(said.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["schema"] == "mistill-evaluation-1"
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_place_that_is_no_file_is_refused_before_anything_is_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks, "evaluate", None)
    assert main(["eval", str(model), "--out", str(tmp_path), "--overwrite"]) == 2
    assert "is a folder; give the name of the file to make" in capsys.readouterr().err


# --- lm-evaluation-harness ----------------------------------------------------------------------

CHOICE = """
task: winds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
REPLY = """
task: replies
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{reply}}}}"
generation_kwargs: {{until: ["zz", "qq"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
  - {{metric: bleu}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
SCRIPT = """
import json, sys
from pathlib import Path
folder, onnx, tasks = sys.argv[1:]
import torch
torch.set_num_threads(1)
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
import benchmarks
from benchmarks.harness_model import MistillLM
from mistill.errors import SettingsError

names = ["winds", "replies", "rolling"]
def figures(lm):
    found = simple_evaluate(
        model=lm, tasks=names, task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=10, log_samples=True,
    )
    samples = {
        name: [one["filtered_resps"] for one in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }
    results = {
        task: {name: value for name, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }
    return {"results": results, "samples": samples}

theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
report = {
    "transformers": figures(theirs),
    "float": figures(MistillLM(folder, threads=1)),
    "onnx": figures(MistillLM(onnx, threads=1)),
    "api": benchmarks.evaluate(
        onnx, tasks=("winds", "smoke"), include_path=tasks, limit=8, threads=1
    ).to_dict(),
}
try:
    benchmarks.evaluate(onnx, tasks=("no_such_task",), include_path=tasks)
except SettingsError as error:
    report["refused"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def harness_python() -> str:
    folder = os.environ.get("MISTILL_LM_EVAL_VENV")
    if not folder:
        pytest.skip("MISTILL_LM_EVAL_VENV names no environment with lm-eval")
    return str(Path(folder) / "bin" / "python")


@pytest.fixture(scope="module")
def report(harness_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval finds of one model by its own transformers model and by ours."""
    tasks = tmp_path_factory.mktemp("tasks")
    model = tiny_model(tasks / "model", model_type="llama", seed=2)
    onnx = export.to_onnx(model, tasks / "onnx", precision="float32", parity_positions=0)
    rows = [
        {
            "question": f"{SENTENCES[place % 4]} {place}",
            "answers": [f"answer {choice} {place}" for choice in ("one", "two", "three")],
            "right": place % 3,
            "reply": SENTENCES[place % 3],
            # Longer than the model holds, so that windows roll.
            "text": " ".join(SENTENCES[: 1 + place % 4]) * (1 if place else 12),
        }
        for place in range(12)
    ]
    file = tasks / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, task in (("winds", CHOICE), ("replies", REPLY), ("rolling", ROLLING)):
        (tasks / f"{name}.yaml").write_text(task.format(file=file), "utf-8")
    done = subprocess.run(
        [harness_python, "-c", SCRIPT, str(model), str(onnx), str(tasks)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tasks / "home"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["float", "onnx"])
def test_lm_eval_finds_of_our_folders_what_it_finds_of_transformers(
    ours: str, report: dict[str, Any]
) -> None:
    theirs, found = report["transformers"], report[ours]
    assert found["samples"]["replies"] == theirs["samples"]["replies"]
    for task in ("winds", "rolling"):
        for mine, other in zip(found["samples"][task], theirs["samples"][task], strict=True):
            for a, b in zip(_numbers(mine), _numbers(other), strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-3)
    for task, figures in theirs["results"].items():
        assert found["results"][task] == pytest.approx(figures, rel=1e-3, nan_ok=True), task


@pytest.mark.slow
def test_figures_come_with_intervals_and_unknown_tasks_are_refused(report: dict[str, Any]) -> None:
    scores = {(score["task"], score["measure"]): score for score in report["api"]["scores"]}
    assert scores["winds", "acc"]["questions"] == 8
    low, high = scores["winds", "acc"]["interval"]
    assert low < scores["winds", "acc"]["value"] < high
    assert scores["smoke", "acc_norm"]["questions"] == 8
    assert report["api"]["harness"]
    assert "has no task no_such_task" in report["refused"]


Instruction = tuple[str, dict[str, Any]]
IFEVAL = """
import importlib.util, json, sys
import torch
torch.set_num_threads(1)
import benchmarks
from mistill.errors import SettingsError

folder, file = sys.argv[1:]
if importlib.util.find_spec("langdetect") is None:
    print("null")
    sys.exit()
data = ("ifeval=" + file,)
found = benchmarks.evaluate(folder, tasks=("ifeval",), task_data=data, threads=1).to_dict()
try:
    benchmarks.evaluate(folder, tasks=("mmlu",), task_data=("mmlu=" + file,), threads=1)
except SettingsError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_ifeval_reads_its_questions_from_a_local_file(harness_python: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", seed=2, max_position_embeddings=2048)
    # What any reply follows, what none does, and both.
    short: Instruction = (
        "length_constraints:number_words",
        {"relation": "less than", "num_words": 1_000_000},
    )
    zebra: Instruction = "keywords:existence", {"keywords": ["zebra in a hat"]}
    rows = [
        {
            "key": number,
            "prompt": SENTENCES[number],
            "instruction_id_list": [name for name, _ in instructions],
            "kwargs": [
                {"relation": None, "num_words": None, "keywords": None, **numbers}
                for _, numbers in instructions
            ],
        }
        for number, instructions in enumerate([[short], [zebra], [short, zebra]])
    ]
    file = tmp_path / "input_data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    # lm-eval looks for nltk's data when it is imported, and no check here reads them.
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    done = subprocess.run(
        [harness_python, "-c", IFEVAL, str(model), str(file)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "NLTK_DATA": str(tmp_path / "nltk"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("the environment has no lm-eval[ifeval]")
    scores = {score["measure"]: score for score in found["scores"]}
    for kind in ("strict", "loose"):
        assert scores[f"prompt_level_{kind}_acc"]["value"] == pytest.approx(1 / 3)
        assert scores[f"inst_level_{kind}_acc"]["value"] == pytest.approx(2 / 4)
    assert scores["prompt_level_strict_acc"]["questions"] == 3
    assert "mmlu is no single task" in found["refused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_data": ("ifeval",)}, "must be TASK=FILE"),
        ({"task_data": ("=x.jsonl",)}, "must be TASK=FILE"),
        ({"task_data": ("arc_easy=x.jsonl",)}, "which is none of tasks"),
        ({"tasks": ("smoke",), "task_data": ("smoke=x.jsonl",)}, "which is none of tasks"),
        ({"task_data": ("ifeval=x.jsonl", "ifeval=y.jsonl")}, "names a task twice"),
    ],
)
def test_files_of_questions_that_belong_to_no_task_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        EvalSettings(**{"tasks": ("ifeval",), **options})
    settings = EvalSettings(tasks=("ifeval",), task_data=("ifeval=a=b.jsonl",))
    assert settings.data_files == {"ifeval": Path("a=b.jsonl")}


def test_a_file_of_questions_that_is_missing_or_no_json_is_refused_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tasks.evaluation._published", None)
    with pytest.raises(TextError, match=r"missing\.jsonl"):
        evaluate(model, tasks=("ifeval",), task_data=(f"ifeval={tmp_path / 'missing.jsonl'}",))
    (tmp_path / "rows.txt").write_text("rows")
    with pytest.raises(TextError, match=r"should end in \.jsonl or \.json"):
        evaluate(model, tasks=("ifeval",), task_data=(f"ifeval={tmp_path / 'rows.txt'}",))


def _numbers(value: Any) -> list[float]:
    """Every number in nested lists, true and false among them."""
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    if isinstance(value, str):
        return (
            [{"True": 1.0, "False": 0.0}[value]] if value in ("True", "False") else [float(value)]
        )
    return [float(value)]


def test_the_public_functions_are_exported() -> None:
    assert benchmarks.evaluate is evaluate
