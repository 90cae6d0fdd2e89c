"""What a teacher says, kept on disk, against the teacher itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mistill.errors import FolderError
from mistill.loss.batches import make_batch
from mistill.loss.heads import read_head
from mistill.loss.targets import DenseTargets
from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks
from mistill.training.processes import accelerating
from quantize.calibration_text import draw_up_to
from quantize.measuring.fidelity import last_hidden_states
from quantize.scales import teacher_states
from quantize.scales.teacher_states import ask_teacher
from quantize.settings import TuningSettings
from tests.tiny import SENTENCES


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory, model: Path) -> TokenBlocks:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n\n".join(SENTENCES * 3), "utf-8")
    return draw_up_to(9, 32, file, model)


@pytest.fixture(params=["float32", "bfloat16"])
def accelerator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with accelerating(TuningSettings(precision=request.param), logs=tmp_path) as made:
        yield made


def log_probabilities(targets: DenseTargets) -> torch.Tensor:
    out, scratch = torch.empty(2, len(targets), targets.vocabulary_size)
    return targets.log_probabilities(slice(None), 1.0, out=out, scratch=scratch)


def test_blocks_in_any_order_get_what_the_teacher_says_of_them(
    tmp_path: Path, model: Path, blocks: TokenBlocks, accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher_states, "_PORTION", 4 * 32)
    said, judged = ask_teacher(model, blocks[:7], blocks[7:], accelerator, tmp_path)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [
        "teacher-judged-00000.safetensors",
        "teacher-training-00000.safetensors",
        "teacher-training-00001.safetensors",
    ]
    is_low = accelerator.mixed_precision == "bf16"
    for name, dtype in (
        (files[0], torch.float32), (files[1], torch.bfloat16 if is_low else torch.float32)
    ):  # fmt: skip
        assert load_file(tmp_path / name)["states"].dtype == dtype

    live = load_pytorch(model).requires_grad_(False)
    for rows in ([5, 0, 6], [3]):
        part = blocks[rows]
        batch = make_batch(part, torch.device("cpu"))
        states = live.get_decoder()(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False
        ).last_hidden_state[batch.kept]
        wanted = log_probabilities(DenseTargets(states, read_head(live)))
        found = log_probabilities(said.targets(part))
        if is_low:
            lost = (wanted.exp() * (wanted - found)).sum(dim=-1).mean()
            assert 0 < lost < 1e-3
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    exact = predict(live, blocks[7:])
    kl = compare({"": exact}, {"": judged.predictions()}, blocks[7:])[""][""].kl
    assert kl == pytest.approx(0, abs=1e-9)
    with pytest.raises(KeyError):
        said.targets(blocks[8:])


def test_what_was_asked_before_an_interruption_is_not_asked_again(
    tmp_path: Path, model: Path, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_states, "_PORTION", 2 * 32)
    real, asked = last_hidden_states, [0]

    def counted(*arguments: Any) -> torch.Tensor:
        asked[0] += 1
        if asked[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(teacher_states, "last_hidden_states", counted)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for work in (whole, parts):
        work.mkdir()
    with accelerating(TuningSettings(), logs=tmp_path) as accelerator:
        with pytest.raises(KeyboardInterrupt):
            ask_teacher(model, blocks[:7], blocks[7:], accelerator, parts)
        kept = {file.name: file.stat().st_mtime_ns for file in parts.iterdir()}
        assert len(kept) == 2
        ask_teacher(model, blocks[:7], blocks[7:], accelerator, parts)
        assert asked[0] == 3 + 3
        ask_teacher(model, blocks[:7], blocks[7:], accelerator, parts)
        assert asked[0] == 3 + 3, "all of it is there"
        ask_teacher(model, blocks[:7], blocks[7:], accelerator, whole)
    for file in whole.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes()
    assert all((parts / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_teacher_that_computes_no_numbers_is_refused(
    tmp_path: Path, model: Path, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> torch.Tensor:
        return real(*arguments) * float("inf")

    real = last_hidden_states
    monkeypatch.setattr(teacher_states, "last_hidden_states", broken)
    with (
        accelerating(TuningSettings(), logs=tmp_path) as accelerator,
        pytest.raises(FolderError, match="hidden states that are not numbers"),
    ):
        ask_teacher(model, blocks[:7], blocks[7:], accelerator, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
