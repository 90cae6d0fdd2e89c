"""Budgets, which one to ship, and the commands that make a model."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.figures.model_result import ModelResult
from benchmarks.figures.rival import Rival
from benchmarks.report.budget import bound_models, misses
from benchmarks.report.commands import commands
from benchmarks.report.report import Report
from benchmarks.report.shipping import best_to_ship, by_memory, ship_line
from benchmarks.settings import Budget, ShipSettings
from mistill.cli.app import app, main
from mistill.errors import SettingsError
from tests.benchmarks.made import made_comparison

RIVAL = Rival(
    engine="llama.cpp",
    variant="q8_0",
    version="b6123",
    system="AVX2",
    settings={},
    made="llama-quantize",
    source="student",
)


@pytest.fixture(scope="module")
def comparison() -> Report:
    return made_comparison(samples=False)


@pytest.fixture
def saved(comparison: Report, tmp_path: Path) -> str:
    (tmp_path / "report.json").write_text(comparison.to_json())
    return str(tmp_path)


def with_model(comparison: Report, place: int, **fields: Any) -> Report:
    models = list(comparison.models)
    models[place] = replace(models[place], **fields)
    return replace(comparison, models=tuple(models))


# --- budgets ------------------------------------------------------------------------------------


def test_a_budget_is_for_every_model_but_the_reference(comparison: Report):
    found = misses(comparison, max_mb=120)

    # The teacher is larger too, and is what the others are held against.
    assert [miss.model for miss in found] == ["pruned", "student", "chatbot-float"]
    assert [(m.limit, m.allowed, m.found) for m in found[:1]] == [("max_mb", 120, 425)]
    assert misses(comparison, max_mb=425) == ()


def test_a_budget_is_for_those_that_it_names(comparison: Report):
    assert misses(comparison, max_mb=120, budget_for=("chatbot-4", "road/chatbot-8")) == ()
    (miss,) = misses(comparison, max_mb=120, budget_for=("teacher",))
    assert miss.model == "teacher"
    with pytest.raises(SettingsError, match="budget_for names nobody, which is not compared"):
        misses(comparison, max_mb=120, budget_for=("nobody",))


def test_other_engines_are_held_to_no_budget_unless_named(comparison: Report):
    with_rival = with_model(comparison, 6, name="llama.cpp q8_0", rival=RIVAL)

    assert "llama.cpp q8_0" not in [m.name for m in bound_models(with_rival, Budget(max_kl=1))]
    (miss,) = misses(with_rival, max_kl=0.1, budget_for=("llama.cpp q8_0",))
    assert miss.model == "llama.cpp q8_0"


def test_the_reference_alone_is_held_to_the_budget(comparison: Report):
    alone = replace(comparison, models=comparison.models[:1])

    assert [miss.model for miss in misses(alone, max_mb=100)] == ["teacher"]


def test_every_limit_misses_on_its_own_side(comparison: Report):
    model = comparison["chatbot-4"]
    exact = {
        "max_kl": model.mean_kl,
        "min_tps": model.latency.decode_tokens_per_second,
        "max_mb": 74.0,
        "max_memory_mb": 154.0,
    }
    for limit, value in exact.items():
        outside = value * (1.01 if limit.startswith("min") else 0.99)
        limits: list[dict[str, Any]] = [{limit: value}, {limit: outside}]
        assert misses(comparison, Budget(**limits[0], budget_for=("chatbot-4",))) == ()
        (miss,) = misses(comparison, Budget(**limits[1], budget_for=("chatbot-4",)))
        assert miss.limit == limit
        assert miss.found == pytest.approx(value)


def test_a_miss_is_one_clear_line(comparison: Report):
    (miss,) = misses(comparison, min_tps=200, budget_for=("chatbot-4",))

    assert str(miss) == "chatbot-4 writes 131.0 tokens/s: 69.0 below min_tps 200"
    (miss,) = misses(comparison, max_kl=0.5, budget_for=("chatbot-4",))
    kl = comparison["chatbot-4"].mean_kl
    assert str(miss) == f"chatbot-4 has a KL of {kl:.3f} nats: {kl - 0.5:.3f} above max_kl 0.5"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_kl": -1}, "max_kl must be at least 0"), ({"budget_for": ("a",)}, "there is no limit")],
)
def test_a_budget_of_nonsense_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(SettingsError, match=words):
        Budget(**options)


def test_a_saved_report_is_checked_without_measuring(
    saved: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "check", saved, "--max-mb", "120", "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "budget missed: pruned takes 425.0 MB on disk: 305.0 above max_mb 120"
    found = json.loads(lines[-1])
    assert found["passed"] is False
    assert len(found["misses"]) == 3
    words = ["bench", "check", saved, "--max-mb", "120", "--budget-for", "chatbot-4"]
    assert main(words) == 0
    assert capsys.readouterr().out == "budget met by chatbot-4\n"
    assert main(["bench", "check", saved]) == 2
    assert "give a budget" in capsys.readouterr().err


def test_a_report_is_saved_though_the_budget_is_missed(
    comparison: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(benchmarks, "compare", lambda *_, **__: comparison)
    monkeypatch.chdir(tmp_path)
    words = ["bench", "chatbot-4", "--texts", "x", "--out", "report", "--ship-mb", "300"]

    assert main([*words, "--min-tps", "200", "--json"]) == 1

    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("budget missed: ") for line in shown) == 6
    assert any(line.startswith("Ship chatbot-8: the closest") for line in shown)
    document = json.loads(shown[-1])
    assert document["budget"]["passed"] is False
    assert len(document["models"]) == 7
    assert 'id="ship-memory"' in (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "within 300 MB of memory" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert main([*words, "--overwrite", "--min-tps", "100", "--budget-for", "chatbot-4"]) == 0


def test_a_name_that_is_not_compared_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(benchmarks, "compare", refuse)
    words = ["bench", "out/chatbot", "--texts", "x", "--max-mb", "9", "--budget-for", "chat"]

    assert main(words) == 2
    assert "budget_for names chat" in capsys.readouterr().err
    assert main([*words, "--against", "llama.cpp:q8_0"]) == 2
    expected = (
        "budget_for names chat, which is not compared; the models are chatbot, llama.cpp q8_0"
    )
    assert expected in " ".join(capsys.readouterr().err.split())
    words[-1] = "llama.cpp q8_0"
    with pytest.raises(AssertionError, match="something was measured"):
        main([*words, "--against", "llama.cpp:q8_0"])


# --- which one to ship --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "speed", "name"),
    [
        # Peak memory: chatbot-4 154, chatbot-8 196, student-nf4 516, teacher 958.
        (153, None, None),
        (154, None, "chatbot-4"),
        (196, None, "chatbot-8"),
        (196, 100, "chatbot-4"),
        (957, None, "chatbot-8"),
        (958, None, "teacher"),
        (958, 50, "chatbot-8"),
        (None, None, "teacher"),
        (None, 1000, None),
    ],
)
def test_the_closest_model_that_fits_is_shipped(
    comparison: Report, memory: float | None, speed: float | None, name: str | None
):
    best = best_to_ship(comparison, ship_mb=memory, ship_tps=speed)

    assert (best and best.name) == name


def nearly_as_close(comparison: Report) -> Report:
    """Chatbot-8 with a KL 1% above that of chatbot-float, which takes more memory."""
    fidelity = comparison["chatbot-float"].fidelity
    assert fidelity is not None
    rows = tuple(tuple(x * 1.01 for x in row) for row in fidelity.divergences)
    return with_model(comparison, 5, fidelity=replace(fidelity, divergences=rows))


def test_of_equally_close_models_the_one_of_least_memory_is_shipped(comparison: Report):
    close = nearly_as_close(comparison)

    best = best_to_ship(close, ship_mb=600)

    assert best is not None
    assert best.name == "chatbot-8"
    assert best.mean_kl > close["chatbot-float"].mean_kl


def test_the_answer_for_every_amount_of_memory(comparison: Report):
    answers = [(round(amount), model.name) for amount, model in by_memory(comparison)]

    assert answers == [(154, "chatbot-4"), (196, "chatbot-8"), (958, "teacher")]
    assert ship_line(comparison, ShipSettings()) == (
        "Ship chatbot-4 from 154 MB of memory; chatbot-8 from 196 MB of memory; teacher from "
        "958 MB of memory"
    )
    assert "| from 196 | chatbot-8 | 0.551 | 96.0 |" in comparison.to_markdown()


def test_the_line_says_why_none_is_shipped(comparison: Report):
    little = ship_line(comparison, ShipSettings(ship_mb=100, ship_tps=50))
    fast = ship_line(comparison, ShipSettings(ship_tps=500))

    assert little == (
        "Ship none: the least memory at 50 tokens/s or more takes chatbot-4 with 154 MB"
    )
    assert fast == "Ship none: the fastest is chatbot-4 with 131 tokens/s"


def test_a_saved_report_says_what_to_ship(saved: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "ship", saved, "--ship-mb", "200", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Ship chatbot-8: the closest to teacher within 200 MB of memory")
    assert json.loads(lines[-1]) == {"ship": "chatbot-8"}
    assert main(["bench", "ship", saved, "--ship-mb", "20"]) == 1


# --- the commands that make a model -------------------------------------------------------------


def made_by(model: ModelResult, *lineage: dict[str, Any], **fields: Any) -> list[str]:
    return commands(replace(model, lineage=lineage, **fields))


TEACHER = {"step": "teacher", "settings": {"source": "@smollm2"}, "source": "SmolLM2-1-1"}


def test_commands_name_each_folder_as_the_next_step_does(comparison: Report):
    from distill import TrainSettings
    from quantize import GptqSettings

    found = made_by(
        comparison["chatbot-4"],
        {"step": "gguf", "settings": {}, "source": None, "file": "SmolLM2.gguf"},
        TEACHER,
        {"step": "student", "settings": {"layers": 22}, "source": "teacher", "texts": ["a.txt"]},
        {
            "step": "distill",
            "settings": {**asdict(TrainSettings()), "tokens": 30000, "learning_rate": 0.0001},
            "changed_settings": ["tokens", "learning_rate"],
            "source": "pruned",
            "teacher": "teacher",
            "texts": ["chats.jsonl", "my file.txt"],
            "held_out": [],
        },
        {
            "step": "gptq",
            "settings": {**asdict(GptqSettings()), "bits": 8, "symmetric": False},
            "changed_settings": ["bits", "symmetric"],
            "source": "distilled",
            "texts": ["a.txt"],
        },
        {
            "step": "export",
            "settings": {"precision": "auto"},
            "changed_settings": [],
            "source": "gptq",
        },
    )

    assert found == [
        "mistill teacher @smollm2 teacher",
        "mistill student teacher pruned --texts a.txt --layers 22",
        "mistill distill pruned distilled --teacher teacher --texts chats.jsonl --texts "
        "'my file.txt' --tokens 30000 --learning-rate 0.0001",
        "mistill quantize gptq distilled gptq --texts a.txt --bits 8 --no-symmetric",
        "mistill export gptq chatbot-4",
    ]


def test_healing_is_among_the_commands(comparison: Report):
    found = made_by(
        comparison["student"],
        {"step": "student", "settings": {"layers": 22}, "source": "teacher", "texts": ["a.txt"]},
        {
            "step": "heal",
            "settings": {"tokens": 9000, "ridge": None},
            "changed_settings": ["tokens"],
            "source": "pruned",
            "teacher": "@smollm2",
            "texts": ["a.txt", "b.txt"],
        },
    )

    assert found[1] == (
        "mistill heal pruned student --teacher @smollm2 --texts a.txt --texts b.txt --tokens 9000"
    )


def test_a_tuned_model_names_its_pairs_and_prompts(comparison: Report):
    found = made_by(
        comparison["student"],
        {
            "step": "preferences",
            "settings": {},
            "source": "base",
            "pairs": ["p.jsonl"],
            "other_texts": ["more.jsonl"],
        },
        {"step": "reinforce", "settings": {}, "source": "better", "reward": "judge"},
    )

    assert found == [
        "mistill tune preferences base better --pairs p.jsonl --other-texts more.jsonl",
        "mistill tune reinforce better student --prompts PROMPTS --reward judge",
    ]


def test_every_step_of_a_recipe_that_makes_a_model_has_a_command(comparison: Report):
    from mistill.recipe import step_kinds

    others = {"generate", "reverse", "targets", "bench", "mixed"}  # mixed bits are recorded as gptq
    for name in step_kinds().keys() - others:
        entry = {"step": name, "settings": {}, "source": "a", "texts": ["t"]}
        assert made_by(comparison["student"], entry), name


def test_a_lineage_of_before_changed_settings_were_noted_gives_all_settings(comparison: Report):
    from quantize import RoundingSettings

    (line,) = made_by(
        comparison["student"],
        {"step": "rounding", "settings": asdict(RoundingSettings(bits=3)), "source": "teacher"},
    )

    app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)
    assert "--bits 3" in line
    assert f"--group-size {RoundingSettings().group_size}" in line


def test_a_lineage_of_before_is_compared_with_the_defaults_handed_in(comparison: Report):
    entry = {"step": "distill", "settings": {"tokens": 9, "seed": 0, "gone": True}}
    model = replace(comparison["student"], lineage=({**entry, "source": "a", "texts": ["t"]},))

    (line,) = commands(model, {"distill": {"tokens": 5, "seed": 0}}.get)

    assert line == "mistill distill a student --texts t --tokens 9"


def test_what_the_lineage_does_not_tell_is_in_capitals(comparison: Report):
    found = made_by(comparison["student"], {"step": "distill", "settings": {}, "source": "pruned"})

    assert found == ["mistill distill pruned student --texts TEXTS"]


def test_two_folders_of_one_name_are_told_apart(comparison: Report):
    found = made_by(
        comparison["student"],
        TEACHER,
        {"step": "rounding", "settings": {}, "source": "student"},
        {"step": "export", "settings": {}, "source": "small"},
        name="b/student",
    )

    assert found[1] == "mistill quantize rounding student small"
    assert found[2] == "mistill export small b/student"


def test_a_folder_of_others_has_no_commands(comparison: Report):
    assert made_by(comparison["student"]) == []
    assert made_by(comparison["student"], {"step": "unheard of"}) == []


def test_a_rival_is_made_of_the_folder_that_it_names(comparison: Report):
    found = made_by(
        comparison["chatbot-4"],
        TEACHER,
        {"step": "student", "settings": {"layers": 22}, "source": "teacher", "texts": ["a"]},
        name="llama.cpp q8_0",
        rival=RIVAL,
    )

    assert found[-1] == "mistill student teacher student --texts a --layers 22"


@pytest.mark.parametrize(
    "entry",
    [
        {"step": "student", "settings": {"choose": "named", "keep": [0, 2]}, "texts": ["a"]},
        {"step": "distill", "settings": {}, "targets": "targets", "texts": ["a"]},
        {"step": "gptq", "settings": {"overrides": ["a.*b: bits=8"]}, "texts": ["a", "b c"]},
        {"step": "rounding", "settings": {"bits": 3}},
        {"step": "nf4", "settings": {"double_quantization": False}},
        {"step": "rotate", "settings": {"seed": 3}},
        {"step": "tune", "settings": {}, "teacher": "teacher", "texts": ["a"]},
        {"step": "convert", "settings": {"to": "gptq_v2"}},
        {"step": "dequantize", "settings": {"dtype": "float16"}},
        {"step": "merge", "settings": {"adapter": "adapter"}},
        {"step": "export", "settings": {"head_bits": 8, "portable": True}},
        {"step": "gguf", "settings": {"dtype": "q8_0"}},
    ],
    ids=lambda entry: str(entry["step"]),
)
def test_every_command_is_one_that_the_command_line_knows(
    comparison: Report, entry: dict[str, Any]
):
    lines = made_by(comparison["student"], TEACHER, {**entry, "source": "teacher"})

    for line in lines:
        words = shlex.split(line)
        assert words[0] == "mistill"
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
    for value in entry["settings"].values():
        if not isinstance(value, bool | list):
            assert str(value) in shlex.split(lines[-1])


def test_every_command_of_the_docs_is_one_that_the_command_line_knows():
    text = (Path(__file__).parents[3] / "docs" / "reports.md").read_text("utf-8")
    whole = text.replace("\\\n", " ")
    lines = [line for line in whole.splitlines() if line.startswith("mistill ")]

    assert len(lines) == 5
    for line in lines:
        app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


HOSTILE = [
    "X;$'\\164\\157\\165\\143\\150'${IFS}COPIED",
    "TEXTS;touch COPIED",
    "a\n```\n<script>alert(1)</script>\n",
    "$(touch COPIED)",
    "`touch COPIED`",
    "it's",
    "\x1b]0;OWNED\x07\u202e",
    "-rf",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_to_copy_does_nothing_but_what_it_says(
    comparison: Report, text: str, tmp_path: Path
) -> None:
    lines = made_by(
        comparison["student"],
        {"step": "teacher", "settings": {"source": text}, "source": text},
        {"step": "distill", "settings": {text: text}, "source": text, "texts": [text]},
    )
    for line in lines:
        assert line.isprintable()
        assert not set(line) & set("`<&")
        script = line.replace("mistill", "printf '%s\\0'", 1)
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True)
        words = done.stdout.decode().split("\0")
        assert text in words or f"./{text}" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_folder_ends_a_line_or_a_block_of_markdown(
    comparison: Report, text: str
) -> None:
    student = comparison["student"]
    entry = {"step": "teacher", "settings": {"source": text}, "source": text}
    models = tuple(
        replace(model, lineage=(entry,)) if model.name == student.name else model
        for model in comparison.models
    )
    page = replace(comparison, models=models).to_markdown()
    assert "<script>" not in page
    assert page.count("```") == 2
    assert "\x1b" not in page
    assert "\u202e" not in page
