"""Rivals run the same weights in a Python of their own.

llama.cpp, ONNX Runtime GenAI, CTranslate2, OpenVINO GenAI and optimum themselves are run where
MISTILL_LLAMA_CPP, MISTILL_GENAI, MISTILL_CTRANSLATE2, MISTILL_OPENVINO_VENV and
MISTILL_OPTIMUM_VENV name an environment; a package that looks like the second stands in for them
elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import quantize
from benchmarks.measure.children import start_children
from benchmarks.measure.measuring import compare
from benchmarks.measure.subjects import add_rivals, open_subjects, rival_source_of
from benchmarks.report.report import Report
from benchmarks.rivals import llama_cpp_files
from benchmarks.rivals.contest import check_source, find_rivals
from benchmarks.rivals.engines import ENGINES, Note, choices
from benchmarks.rivals.environment import (
    Environment,
    child_command,
    find_environment,
    rivals_named,
)
from benchmarks.rivals.genai_files import builder_options
from benchmarks.rivals.making import Order, make_rival
from mistill.errors import MissingExtraError, MistillError, SettingsError
from mistill.folders.folder import open_folder
from tests.benchmarks.rivals.fake_genai import install

QUICK: dict[str, Any] = {
    "threads": 1,
    "scored_tokens": 40,
    "rounds": 2,
    "prompt_tokens": 12,
    "new_tokens": 4,
    "transformers_generate": False,
}


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ENGINES.values():
        monkeypatch.delenv(engine.variable, raising=False)
        monkeypatch.delenv(f"{engine.variable}_PROGRAMS", raising=False)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


@pytest.fixture(scope="module")
def compared(chatbot: Path, model: Path, chats: Path, fake: Path) -> Report:
    """A chatbot beside two rivals that only pretend, at two depths that it holds and one not."""
    return compare(
        chatbot,
        texts=chats,
        rivals={"genai": fake},
        rival_source=model,
        against=("genai,genai:best",),
        prompts=("8",),  # type: ignore[arg-type]
        depths=("0,20,4096",),  # type: ignore[arg-type]
        loads=1,
        **QUICK,
    )


def test_rivals_take_part_and_say_what_they_are(compared: Report):
    names = [result.name for result in compared.models]
    assert names == ["chatbot", "genai default", "genai best"]
    rival = compared["genai best"].rival
    assert rival is not None
    assert rival.version == "0.0-fake"
    assert rival.source == "model"
    assert rival.made.endswith("builder.py -p int4 -e cpu block_size=64 prune_lm_head=true")
    assert rival.settings["block_size"] == "64"
    assert compared["genai best"].kind == "genai best"
    assert compared["chatbot"].rival is None
    assert compared["genai default"].footprint.weight_bytes == 1010
    assert (
        compared["genai default"].footprint.parameters == compared["chatbot"].footprint.parameters
    )
    text = compared.to_markdown()
    assert "made of model: onnxruntime-genai's builder.py -p int4 -e cpu" in text
    assert "genai 0.0-fake (onnxruntime" in text
    assert "genai best" in compared.to_html()


def test_a_rival_predicts_what_its_graph_says_also_one_token_at_a_time(
    compared: Report, model: Path
):
    # One logit of 1 and the others 0: a token of the text is right or it is not.
    right = np.log(1 + np.exp(-1) * (open_folder(model).vocabulary_size - 1))
    wrong = 1 + right
    whole, pruned = compared["genai default"].perplexity, compared["genai best"].perplexity
    assert whole.losses == pruned.losses
    assert {round(loss, 3) for losses in whole.losses for loss in losses} <= {
        round(right, 3),
        round(wrong, 3),
    }


def test_lengths_that_a_context_holds_are_timed_and_the_others_named(compared: Report):
    for result in compared.models:
        assert [at.tokens for at in result.prompts] == [8]
        assert [at.tokens for at in result.depths] == [0, 20]
        assert [len(at.latency.turns) for at in result.depths] == [2, 2]
        deep = result.depths[1].latency.turns[0]
        assert (deep.prompt_tokens, len(deep.token_seconds)) == (20, 3)
        assert result.depths[0].latency.turns[0].prompt_tokens == 1
        assert result.left_out[-1] == "4,096 tokens and 4 more: the context holds 512"
    assert "not measured: 4,096 tokens" in compared.to_markdown()


def test_loads_are_of_processes_of_their_own(compared: Report):
    for result in compared.models:
        warm = [load for load in result.loads if not load.cold]
        assert len(warm) == 1
        assert warm[0].seconds > 0
        assert warm[0].first_token_seconds > 0
        assert len(result.loads) == 2 or any("page cache" in words for words in result.left_out)


def test_a_report_with_rivals_survives_the_round_trip(compared: Report):
    again = Report.from_json(compared.to_json())

    assert again == compared
    assert "Writing at 20" in again.to_markdown()
    summary = compared.to_dict()["models"][0]["summary"]
    assert summary["decode_tokens_per_second_at_20"] > 0
    assert 0 < summary["roofline_share"] < 10
    assert summary["load_warm_ms"] > 0


def test_nothing_of_a_rivals_place_is_in_a_report(compared: Report, fake: Path):
    assert str(fake) not in compared.to_json()


def test_rivals_get_the_float_model_that_the_others_were_made_of(
    chatbot: Path, model: Path, teacher: Path, fake: Path, tmp_path: Path
):
    subjects = open_subjects([teacher, model, chatbot], None)
    source = rival_source_of(subjects, None)
    (rival,) = add_rivals(find_rivals(["genai"], {"genai": fake}), source, subjects, tmp_path)

    assert source.name == "model"
    assert rival_source_of(subjects, teacher) is subjects[0]
    assert rival.parent is source
    assert rival.folder != source.folder
    assert not rival.runs_pytorch


@pytest.mark.slow
def test_quantized_weights_are_dequantized_for_a_rival(model: Path, tmp_path: Path, fake: Path):
    codes = open_folder(quantize.to_rounding(model, tmp_path / "codes", group_size=32, bits=4))
    (contestant,) = find_rivals(["genai"], {"genai": fake})

    made = make_rival(contestant.choice, contestant.environment, codes, "codes", tmp_path / "s")

    words = json.loads((Path(made.folder) / "genai_config.json").read_text())["model"]["words"]
    given = Path(words[words.index("-i") + 1])
    assert open_folder(given).form == "model"
    assert made.made.startswith("its gptq weights dequantized (mistill quantize dequantize)")


def test_a_builder_that_fails_says_why(model: Path, tmp_path: Path, fake: Path):
    (contestant,) = find_rivals(["genai:fail=1"], {"genai": fake})

    with pytest.raises(MistillError, match="the builder knows no option fail"):
        make_rival(
            contestant.choice, contestant.environment, open_folder(model), "model", tmp_path / "s"
        )


# --- what is asked for ---------------------------------------------------------------------------


def test_variants_follow_the_name_of_an_engine():
    names = [choice.name for choice in choices(["llama.cpp", "llama.cpp:q4_k_m", "genai:best"])]

    assert names == ["llama.cpp q4_0", "llama.cpp q4_k_m", "genai best"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "ollama",
            "names 'ollama', which is not a known engine; known are llama.cpp, genai, ctr",
        ),
        ("llama.cpp:q9", "weight formats are f32, .* not 'q9'"),
        ("genai:fast", "genai's variants are default, best, .* not 'fast'"),
    ],
)
def test_an_unknown_rival_is_refused(word: str, message: str):
    with pytest.raises(SettingsError, match=message):
        choices([word])


def test_a_rival_named_twice_is_refused():
    with pytest.raises(SettingsError, match="twice"):
        choices(["llama.cpp", "llama.cpp:q4_0"])


def test_the_best_of_genai_is_the_largest_block_that_divides_the_widths():
    config: dict[str, object] = {"hidden_size": 576, "intermediate_size": 1536}

    assert builder_options("default", config) == ("int4", {})
    assert builder_options("best", config) == (
        "int4",
        {"block_size": "64", "prune_lm_head": "true"},
    )
    assert builder_options("best", {**config, "hidden_size": 512, "tie_word_embeddings": True}) == (
        "int4",
        {"block_size": "128", "prune_lm_head": "true", "shared_embeddings": "true"},
    )
    assert builder_options("int8+block_size=32", config) == ("int8", {"block_size": "32"})


def test_places_are_read_as_name_and_path():
    assert rivals_named(["genai=/a=b"]) == {"genai": "/a=b"}
    with pytest.raises(SettingsError, match=r"NAME=PATH .* not 'genai'"):
        rivals_named(["genai"])
    with pytest.raises(SettingsError, match="not 'other=/a'"):
        rivals_named(["other=/a"])


# --- environments that lack the rival ------------------------------------------------------------


def test_a_python_without_the_rival_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(MissingExtraError) as caught:
        find_environment(ENGINES["genai"], {"genai": sys.executable})

    message = str(caught.value)
    assert "\n" not in message
    assert f"{sys.executable} has none that works" in message
    assert "onnxruntime-genai cannot be imported here" in message
    assert "--rivals-in genai=DIR or MISTILL_GENAI" in message


def test_a_place_that_is_no_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MISTILL_LLAMA_CPP", str(tmp_path))

    with pytest.raises(MissingExtraError, match="neither a Python nor an environment"):
        find_environment(ENGINES["llama.cpp"], {})


def test_a_missing_rival_is_refused_before_a_process_is_started(
    model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.measure.measuring.start_children", None)

    with pytest.raises(MissingExtraError, match="to compare with genai it must be installed"):
        compare(model, texts=chats, against=("genai",), rivals={"genai": sys.executable}, **QUICK)


def test_an_onnx_folder_alone_has_no_weights_for_a_rival(chatbot: Path):
    with pytest.raises(SettingsError, match=r"chatbot is an ONNX folder; name .* --rival-source"):
        check_source(open_folder(chatbot))
    with pytest.raises(SettingsError, match="none is compared"):
        check_source(None)


def test_what_only_llama_quantize_makes_is_refused_without_it(model: Path, tmp_path: Path):
    nowhere = Environment(
        python=Path(sys.executable), library="", programs=None, version="1", system=""
    )

    order = Order(
        variant="q4_k_m",
        environment=nowhere,
        source=open_folder(model),
        scratch=tmp_path,
        folder=tmp_path,
    )
    with pytest.raises(MissingExtraError, match=r"q4_k_m is made by .* --rivals-in llama.cpp-prog"):
        llama_cpp_files.make(order)


# --- the rivals themselves -----------------------------------------------------------------------


def _named(variable: str) -> str:
    place = _PLACES.get(variable)
    if not place:
        pytest.skip(f"{variable} names no environment")
    return place


# Kept before the fixture above forgets them.
_PLACES = {name: value for name, value in os.environ.items() if name.startswith("MISTILL_")}


_EXACT = (
    ("llama.cpp:f32", "MISTILL_LLAMA_CPP"),
    ("genai:fp32", "MISTILL_GENAI"),
    ("genai:fp32+prune_lm_head=true", "MISTILL_GENAI"),
    ("ctranslate2:float32", "MISTILL_CTRANSLATE2"),
    ("openvino:fp32", "MISTILL_OPENVINO_VENV"),
    ("optimum:fp32", "MISTILL_OPTIMUM_VENV"),
)
_COARSE = (
    ("llama.cpp:q8_0", "MISTILL_LLAMA_CPP"),
    ("ctranslate2:int8", "MISTILL_CTRANSLATE2"),
    ("openvino:int8", "MISTILL_OPENVINO_VENV"),
    # OpenVINO computes in a narrower type where the processor has one, unless told otherwise.
    ("openvino:gguf-f16", "MISTILL_OPENVINO_VENV"),
    ("openvino:gguf-q8_0", "MISTILL_OPENVINO_VENV"),
    ("optimum:int8", "MISTILL_OPTIMUM_VENV"),
    ("optimum:int8+per_channel", "MISTILL_OPTIMUM_VENV"),
)


def _made(word: str, variable: str, model: Path, scratch: Path) -> Note:
    named = {word.partition(":")[0]: _named(variable)}
    for engine in ENGINES.values():
        if f"{engine.variable}_PROGRAMS" in _PLACES:
            named[f"{engine.name}-programs"] = _PLACES[f"{engine.variable}_PROGRAMS"]
    (contestant,) = find_rivals([word], named)
    return make_rival(
        contestant.choice, contestant.environment, open_folder(model), "model", scratch
    )


@pytest.mark.parametrize(("word", "variable"), [*_EXACT, *_COARSE])
def test_a_real_rival_says_what_the_model_says(
    word: str, variable: str, tmp_path: Path, model: Path
):
    note = _made(word, variable, model, tmp_path / "s")
    ids = [5, 9, 7, 12, 6, 8, 11, 5, 30, 31]
    passage = {"ids": ids, "kept": [True] * (len(ids) - 1)}
    with start_children([model, note], threads=1) as (ours, theirs):
        for child in (ours, theirs):
            child.ask("open")
        reference = str(tmp_path / "logits.npy")
        expected = ours.ask("score", **passage, write=reference)
        found = theirs.ask("score", **passage, against=[reference])
        turn = theirs.ask("turn", prompt=ids, new_tokens=5, seconds=60.0)
        deep = theirs.ask("turn", prompt=ids * 45, new_tokens=5, seconds=60.0)
        maps = Path(f"/proc/{theirs._process.pid}/maps").read_text()

    coarse = (word, variable) in _COARSE
    # llama.cpp keeps keys and values in half precision.
    assert found["losses"] == pytest.approx(expected["losses"], abs=0.3 if coarse else 5e-3)
    assert max(found["divergences"][0]) < (0.05 if coarse else 1e-4)
    assert len(turn["token_seconds"]) == len(deep["token_seconds"]) == 4
    assert word.startswith("optimum") or "libtorch" not in maps


@pytest.mark.parametrize(("word", "variable"), _EXACT)
def test_a_real_rival_writes_what_its_logits_say(
    word: str, variable: str, tmp_path: Path, model: Path
):
    note = _made(word, variable, model, tmp_path / "s")
    script = (
        "import json; from pathlib import Path; import numpy as np; from itertools import islice; "
        "from benchmarks.rivals.engines import Note, open_rival; "
        f"model = open_rival(Note.from_json({note.to_json()!r}), 1); "
        "prompt = [5, 9, 7, 12]; getattr(model, 'reserve', int)(40); "
        "own = list(islice(model.stream(prompt), 30)); text = prompt + own; "
        "logits = model.logits(np.array([text[:-1]])); "
        "ours = list(islice(model.stream(prompt, lambda s: int(s.argmax())), 30)); "
        "print(json.dumps([own, ours, logits[0, 3:].argmax(-1).tolist()]))"
    )
    begin = child_command(note.python)[-1].partition("from benchmarks.measure.child")[0]
    ran = subprocess.run(
        [note.python, "-P", "-c", begin + script], capture_output=True, text=True, check=True
    )
    own, ours, said = json.loads(ran.stdout.splitlines()[-1])

    assert len(own) == 30
    assert own == ours == said


# --- a folder of a stranger's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        {"python": "model/start"},
        {"python": "python3", "library": "model/libx.so"},
        {"evil": 1},
        [],
    ],
)
def test_no_file_of_a_folder_decides_what_runs(
    words: Any, model: Path, tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    start = folder / "start"
    start.write_text("#!/bin/sh\ntouch RAN\n")
    start.chmod(0o755)
    note = {
        "engine": "llama.cpp",
        "variant": "q4_0",
        "made": "x",
        "source": "x",
        "context_length": 64,
        "vocabulary_size": 384,
        "library": "",
        "python": "python3",
    }
    content = {**note, **words} if isinstance(words, dict) else words
    (folder / "rival.json").write_text(json.dumps(content))
    report = compare([folder], texts=chats, **QUICK)
    assert [result.rival for result in report.models] == [None]
    assert not (tmp_path / "RAN").exists()
