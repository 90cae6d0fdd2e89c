from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import QUANTIZE_REPORT_FILE, read_json
from quantize import to_gptq
from quantize.gptq.layers import quantize_layer
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {"group_size": 16, "samples": 4, "block_length": 32}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers with a tied head; read only."""
    return tiny_model(
        tmp_path_factory.mktemp("deep") / "model",
        model_type="llama",
        seed=7,
        num_hidden_layers=6,
        tie_word_embeddings=True,
    )


class Killed(BaseException):
    """Ends the work where no handler of errors sees it, as a kill does."""


def stop_in_layer(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the work die when a layer has been computed and is not yet kept; the layers begun."""
    begun: list[int] = []

    def quantize_or_die(layer: Any, index: int, *rest: Any) -> None:
        begun.append(index)
        quantize_layer(layer, index, *rest)
        if index == number and begun.count(index) == 1:
            raise Killed

    monkeypatch.setattr("quantize.folders.gptq_folder.quantize_layer", quantize_or_die)
    return begun


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the records of when it was made."""
    records = ("lineage.json", "quantize_report.json", "quantize_report.csv", "README.md")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in records}


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "gptaq"}, {"head_bits": 8, "order": "dynamic"}, {"true_sequential": False}],
)
def test_what_was_interrupted_resumes_with_one_layer_repeated_and_the_same_bytes(
    options: dict[str, Any],
    deep: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = to_gptq(deep, tmp_path / "whole", texts=chats, **SMALL, **options)
    begun = stop_in_layer(3, monkeypatch)
    target = tmp_path / "resumed"
    with pytest.raises(Killed):
        to_gptq(deep, target, texts=chats, **SMALL, **options)
    assert not target.exists()
    to_gptq(deep, target, texts=chats, **SMALL, **options)
    assert begun == [0, 1, 2, 3, 3, 4, 5]
    assert bytes_of(target) == bytes_of(whole)
    reports = [
        [{**module, "seconds": 0} for module in read_json(folder / QUANTIZE_REPORT_FILE)["modules"]]
        for folder in (whole, target)
    ]
    assert reports[0] == reports[1]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["resumed", "whole"]


def test_other_settings_and_other_text_are_refused_or_begin_again_where_asked_for(
    deep: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = stop_in_layer(2, monkeypatch)
    target = tmp_path / "small"
    with pytest.raises(Killed):
        to_gptq(deep, target, texts=chats, **SMALL)
    other = tmp_path / "other.txt"
    other.write_text("Another text, which says nothing of the wind. " * 40)
    options = {**SMALL, "bits": 8, "samples": 3}
    with pytest.raises(SettingsError, match=r"bits is 8 and was 4.*texts has changed"):
        to_gptq(deep, target, texts=other, **options)
    to_gptq(deep, target, texts=other, overwrite=True, **options)
    assert begun == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    alone = to_gptq(deep, tmp_path / "alone", texts=other, **options)
    assert bytes_of(target) == bytes_of(alone)


def test_a_part_that_is_cut_short_is_made_again(
    deep: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = to_gptq(deep, tmp_path / "whole", texts=chats, **SMALL)
    begun = stop_in_layer(3, monkeypatch)
    target = tmp_path / "small"
    with pytest.raises(Killed):
        to_gptq(deep, target, texts=chats, **SMALL)
    part = tmp_path / ".small.working" / "part-00002.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    to_gptq(deep, target, texts=chats, **SMALL)
    assert begun == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert bytes_of(target) == bytes_of(whole)


def test_a_full_disk_keeps_what_is_done(
    deep: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr("mistill.weights.tensor_writer.TensorWriter._flush", no_room)
        with pytest.raises(FolderError, match=r"no room.*it will resume"):
            to_gptq(deep, target, texts=chats, **SMALL)
    begun = stop_in_layer(-1, monkeypatch)
    to_gptq(deep, target, texts=chats, **SMALL)
    assert begun == []
    assert [item.name for item in tmp_path.iterdir()] == ["small"]


PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from quantize import to_gptq
to_gptq(sys.argv[1], sys.argv[2], texts=sys.argv[3], group_size=16, samples=32, block_length=128)
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(chats: Path, tmp_path: Path) -> None:
    source = tiny_model(
        tmp_path / "model",
        model_type="llama",
        seed=8,
        num_hidden_layers=24,
        hidden_size=256,
        intermediate_size=512,
    )
    moments = random.Random(0)
    whole, target = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(source)]
    subprocess.run([*command, str(whole), str(chats)], check=True)
    seconds_of_a_layer = read_json(whole / QUANTIZE_REPORT_FILE)["seconds"] / 24
    working = tmp_path / ".killed.working"
    for kill in range(10):
        process = subprocess.Popen([*command, str(target), str(chats)])
        if kill < 2:  # before it has got anywhere
            time.sleep(moments.uniform(0, 3))
        else:
            done = len(list(working.glob("part-*.safetensors")))
            while process.poll() is None and len(list(working.glob("part-*.safetensors"))) <= done:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, seconds_of_a_layer))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    subprocess.run([*command, str(target), str(chats)], check=True)
    assert bytes_of(target) == bytes_of(whole)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["killed", "model", "whole"]
