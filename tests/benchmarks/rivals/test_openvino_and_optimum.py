"""OpenVINO GenAI and optimum as rivals: what they are told, what they are given, who is refused.

Packages that look like OpenVINO's stand in for them here. The rivals themselves are run by
``test_rivals.py`` where MISTILL_OPENVINO_VENV and MISTILL_OPTIMUM_VENV name an environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measure.children import start_children
from benchmarks.measure.measuring import compare
from benchmarks.report.report import Report
from benchmarks.rivals.contest import find_rivals
from benchmarks.rivals.engines import ENGINES, Note, choices
from benchmarks.rivals.environment import Environment, find_environment
from benchmarks.rivals.making import Order, float_folder, make_rival, older_config
from benchmarks.rivals.openvino_files import exporter
from benchmarks.rivals.optimum_files import make as make_optimum
from benchmarks.rivals.optimum_files import quantizer_flag
from benchmarks.rivals.writing import GreedyEngine
from benchmarks.suite.places import add_options, places
from mistill.errors import ArchitectureError, MissingExtraError, MistillError, SettingsError
from mistill.folders.folder import open_folder, read_json
from tests.benchmarks.rivals.fake_openvino import install
from tests.benchmarks.rivals.test_rivals import QUICK
from tests.tiny import tiny_model

THE_PYTHON = Environment(
    python=Path(sys.executable), library="", programs=None, version="1", system=""
)


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ENGINES.values():
        monkeypatch.delenv(engine.variable, raising=False)
        monkeypatch.delenv(f"{engine.variable}_PROGRAMS", raising=False)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def compared(model: Path, chats: Path, fake: Path) -> Report:
    return compare(
        model,
        texts=chats,
        rivals={"openvino": fake},
        against=("openvino,openvino:fp32",),
        depths=("20",),  # type: ignore[arg-type]
        **QUICK,
    )


def made(word: str, place: Path, source: Path, scratch: Path) -> Note:
    """A rival's files, and what runs them."""
    (contestant,) = find_rivals([word], {"openvino": place})
    return make_rival(
        contestant.choice, contestant.environment, open_folder(source), "model", scratch / "s"
    )


# --- OpenVINO ------------------------------------------------------------------------------------


def test_openvino_takes_part_and_says_how_its_graph_was_made(compared: Report):
    assert [result.name for result in compared.models] == [
        "model",
        "openvino int4",
        "openvino fp32",
    ]
    rival = compared["openvino int4"].rival
    assert rival is not None
    assert rival.version == "1.2.3.0"
    assert rival.system == "openvino 1.2.3, computes in bf16, keeps keys and values in u8"
    assert rival.made == "optimum-cli export openvino --weight-format int4 --group-size 64"
    assert rival.settings == {"weight-format": "int4", "group-size": "64"}
    assert compared["openvino int4"].footprint.weight_bytes == 1000
    exact = compared["openvino fp32"].rival
    assert exact is not None
    assert exact.settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert len(compared["openvino int4"].depths[0].latency.turns) == 2


def test_openvino_predicts_what_its_graph_says(compared: Report, model: Path):
    # One logit of 1 and the others 0: a token of the text is right or it is not.
    right = np.log(1 + np.exp(-1) * (open_folder(model).vocabulary_size - 1))
    losses = {round(x, 3) for row in compared["openvino int4"].perplexity.losses for x in row}
    assert losses <= {round(right, 3), round(1 + right, 3)}
    fidelity = compared["openvino int4"].fidelity
    assert fidelity is not None
    assert fidelity.mean_kl > 0


def test_a_text_that_is_broken_off_is_ended_before_the_next(
    fake: Path, model: Path, tmp_path: Path
):
    note = made("openvino", fake, model, tmp_path)

    with start_children([note], threads=1) as (child,):
        child.ask("open")
        # The clock runs out after eight tokens; the pipeline that stands in refuses a second text
        # as long as the first goes on.
        first = child.ask("turn", prompt=[2], new_tokens=40, seconds=0.0)
        second = child.ask("turn", prompt=[2], new_tokens=12, seconds=60.0)

    assert len(first["token_seconds"]) == 7
    assert len(second["token_seconds"]) == 11


def test_a_graph_for_openvino_has_the_options_that_follow_its_variant(
    fake: Path, model: Path, tmp_path: Path
):
    note = made("openvino:int4+group-size=32+sym", fake, model, tmp_path)

    words, config = json.loads((Path(note.folder) / "words.json").read_text())
    assert words[words.index("--weight-format") :][:5] == [
        *("--weight-format", "int4", "--group-size", "32", "--sym")
    ]
    assert config["rope_theta"] == 10000.0
    assert note.settings == {"weight-format": "int4", "group-size": "32", "sym": ""}


def test_openvino_reads_a_gguf_file_without_any_exporter(model: Path, tmp_path: Path):
    place = install(tmp_path / "bare", exporter=False)
    note = made("openvino:gguf-q4_0", place, model, tmp_path)

    names = sorted(file.name for file in Path(note.folder).iterdir())
    assert names == ["openvino_model.bin", "openvino_model.xml"]
    assert note.made == "mistill gguf --dtype q4_0; read by OpenVINO GenAI"


def test_positions_that_its_reader_of_gguf_files_takes_otherwise_are_refused(
    fake: Path, tmp_path: Path
):
    rotary = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    source = tiny_model(tmp_path / "model", model_type="llama", rope_parameters=rotary)

    with pytest.raises(
        ArchitectureError, match=r"leaves out the linear scaling .* take int4, int8"
    ):
        made("openvino:gguf-f16", fake, source, tmp_path)


def test_an_environment_without_the_exporter_is_refused_in_one_line(model: Path, tmp_path: Path):
    place = install(tmp_path / "bare", exporter=False)

    with pytest.raises(MissingExtraError) as caught:
        made("openvino", place, model, tmp_path)

    message = str(caught.value)
    assert "\n" not in message
    assert f"made by optimum-intel, which is not in {place}/bin/python" in message
    assert "pip install 'optimum-intel[openvino]'" in message
    assert "or take gguf-f16, gguf-q8_0, gguf-q4_1, gguf-q4_0" in message


def test_the_exporter_of_another_environment_can_be_named(tmp_path: Path):
    bare = install(tmp_path / "bare", exporter=False)
    program = tmp_path / "other" / "optimum-cli"
    program.parent.mkdir()
    named = {"openvino": bare, "openvino-programs": program.parent}

    with pytest.raises(MissingExtraError, match=f"is not in {program.parent}"):
        exporter(find_environment(ENGINES["openvino"], named))
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert exporter(find_environment(ENGINES["openvino"], named)) == [str(program)]


def test_an_exporter_that_fails_says_why(fake: Path, model: Path, tmp_path: Path):
    with pytest.raises(MistillError, match=r"ended with 1: the exporter knows no option --sullen$"):
        made("openvino:int8+sullen", fake, model, tmp_path)


def test_a_python_without_openvino_is_refused_in_one_line():
    with pytest.raises(MissingExtraError) as caught:
        find_environment(ENGINES["openvino"], {"openvino": sys.executable})

    message = str(caught.value)
    assert "\n" not in message
    assert "openvino-genai cannot be imported here" in message
    assert "--rivals-in openvino=DIR or MISTILL_OPENVINO_VENV" in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("openvino:q4", "openvino's variants are int4, int8, fp16, fp32, gguf-f16, .* not 'q4'"),
        ("openvino:gguf-q4_0+sym", "openvino's variants are .* not 'gguf-q4_0"),
        ("openvino:int4+--sym", "given as in int4.group-size=32.sym, not as '--sym'"),
        ("openvino:int4+group-size=", "not as 'group-size='"),
        ("optimum:int4", "optimum's variants are fp32, int8, int8.per_channel, not 'int4'"),
    ],
)
def test_an_unknown_variant_is_refused(word: str, message: str):
    with pytest.raises(SettingsError, match=message):
        choices([word])


# --- optimum -------------------------------------------------------------------------------------


def test_heads_that_optimum_does_not_run_are_refused_before_anything_is_made(tmp_path: Path):
    source = tiny_model(tmp_path / "wide", model_type="llama", head_dim=32)
    order = Order(
        variant="fp32",
        environment=THE_PYTHON,
        source=open_folder(source),
        scratch=tmp_path / "s",
        folder=tmp_path / "f",
    )

    with pytest.raises(ArchitectureError, match=r"every head to be 16 wide, .* are 32; leave"):
        make_optimum(order)


def test_optimum_quantizes_for_the_instructions_of_the_machine():
    assert quantizer_flag(("avx", "avx2", "avx512f", "avx512_vnni")) == "--avx512_vnni"
    assert quantizer_flag(("avx", "avx2", "avx512f")) == "--avx512"
    assert quantizer_flag(("avx2", "avx_vnni")) == "--avx2"
    assert quantizer_flag(("asimd", "sve")) == "--arm64"
    assert quantizer_flag(()) == "--avx2"


def test_a_python_without_optimum_is_refused_in_one_line():
    with pytest.raises(MissingExtraError) as caught:
        find_environment(ENGINES["optimum"], {"optimum": sys.executable})

    message = str(caught.value)
    assert "\n" not in message
    assert "'optimum-onnx[onnxruntime]' cannot be imported here" in message
    assert "--rivals-in optimum=DIR or MISTILL_OPTIMUM_VENV" in message


# --- what converters are given --------------------------------------------------------------------


def test_older_releases_of_transformers_find_the_angles_where_they_look():
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}

    assert older_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}) == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rope_theta": 1e5,
    }
    assert older_config({"rope_parameters": scaled, "dtype": "float32"}) == {
        "rope_parameters": scaled,
        "rope_theta": 5e5,
        "rope_scaling": scaled,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    old = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert older_config(old) == old


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    ],
)
def test_the_float_folder_of_converters_is_the_same_model_to_ours(
    rotary: dict[str, Any], tmp_path: Path
):
    from transformers import AutoConfig

    source = tiny_model(tmp_path / "model", model_type="llama", rope_parameters=rotary)
    (tmp_path / "s").mkdir()
    folder, words = float_folder(open_folder(source), tmp_path / "s")

    assert words == ""
    assert folder != source
    assert read_json(source / "config.json").get("rope_theta") is None
    ours, theirs = (AutoConfig.from_pretrained(place).to_dict() for place in (source, folder))
    assert {**theirs, "_name_or_path": ""} == {**ours, "_name_or_path": ""}
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (source / weights).read_bytes()
    assert float_folder(open_folder(source), tmp_path / "s")[0] == folder


# --- engines that choose for themselves -----------------------------------------------------------


class Counting(GreedyEngine):
    """Its own choice counts up by one, and its logits say two."""

    vocabulary_size = 100
    context_length = 20

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.eye(100, dtype=np.float32)[ids + 2]

    def _greedily(self, prompt: list[int], count: int) -> Iterator[int]:
        return iter(range(prompt[-1] + 1, prompt[-1] + 1 + count))


def test_such_an_engine_writes_as_far_as_was_reserved_and_the_context_reaches():
    model = Counting()

    assert len(list(model.stream([1, 2]))) == 18
    model.reserve(5)
    assert list(model.stream([1, 2])) == [3, 4, 5]
    model.reserve(50)
    assert len(list(model.stream([1, 2]))) == 18
    assert list(model.stream([1] * 30)) == []


def test_another_choice_than_its_own_is_made_of_its_logits():
    written = Counting().stream([1, 2], lambda scores: int(scores.argmax()))

    assert list(islice(written, 3)) == [4, 6, 8]


# --- programs that measure rivals -----------------------------------------------------------------


def test_programs_that_measure_rivals_are_told_where_they_are():
    parser = argparse.ArgumentParser()
    add_options(parser, ["genai"])

    words = ["--openvino", "/o", "--openvino-programs", "/o/bin", "--llama-cpp", "/l"]
    given = parser.parse_args([*words, "--threads", "3"])
    assert places(given) == {"llama.cpp": "/l", "openvino": "/o", "openvino-programs": "/o/bin"}
    assert (given.against, given.threads) == (["genai"], 3)
    assert places(parser.parse_args([])) == {}
