"""Text that the student writes: where it begins, how it is drawn, and that a resume repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
from distill.training import step, trainer
from distill.training.on_policy import Piece, Place, find_pieces, rewrite, write
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks
from tests.distill.training.test_step import step_gradients
from tests.distill.training.test_trained_folder import QUICK, Killed, assert_same_run, kill_when
from tests.tiny import tiny_model

WRITING: dict[str, Any] = {**QUICK, "tokens": 900, "on_policy": 0.5}


def text_blocks(rows: int = 4, length: int = 20) -> TokenBlocks:
    """Rows of a conversation of 12 tokens, 5 of them a prompt, and a text that fills the row."""
    ids = np.random.default_rng(4).integers(5, 300, (rows, length))
    documents = np.where(np.arange(length) < 12, 0, 1)[None].repeat(rows, 0).astype(np.int32)
    mask = np.ones((rows, length), bool)
    mask[:, :5] = mask[:, 9:12] = mask[:, 12] = False
    return TokenBlocks(ids, mask, documents)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that wishes for no repetitions and few tokens."""
    folder = tiny_model(tmp_path_factory.mktemp("writer") / "student", seed=5, scale=0.05)
    wishes = {"repetition_penalty": 5.0, "top_k": 1, "eos_token_id": [4, 2]}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    return folder


def test_a_prompt_ends_where_the_first_reply_begins_and_a_text_gives_its_first_tokens() -> None:
    blocks = text_blocks(rows=1)
    assert find_pieces(blocks, prefix=3) == [Piece(0, 0, 12, 5), Piece(0, 12, 20, 3)]
    assert find_pieces(blocks, prefix=100) == [Piece(0, 0, 12, 5), Piece(0, 12, 20, 4)]
    silent = TokenBlocks(blocks.ids, np.zeros_like(blocks.mask), blocks.documents)
    assert find_pieces(silent, prefix=3) == []
    padded = TokenBlocks(blocks.ids, blocks.mask, np.where(blocks.documents == 0, 0, -1))
    assert find_pieces(padded, prefix=3) == [Piece(0, 0, 12, 5)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_students_own_distribution(
    endless: Path, temperature: float
) -> None:
    student = load_pytorch(endless)
    wishes = student.generation_config
    prompt = np.array([7, 9, 7, 200])
    draws = 4000
    written = write(
        student, [prompt] * draws, [1] * draws, [(1, n) for n in range(draws)],
        temperature=temperature,
    )  # fmt: skip
    assert student.generation_config is wishes
    with torch.no_grad():
        logits = student(torch.tensor(prompt[None])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, dim=-1).numpy()
    counts = np.bincount(np.concatenate(written), minlength=len(p))
    # Pearson's statistic over tokens that are expected 5 times or more; 5 standard deviations
    often = p * draws >= 5
    expected = np.append(p[often], p[~often].sum()) * draws
    found = np.append(counts[often], counts[~often].sum())
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_what_is_written_depends_on_the_place_and_not_on_the_company(endless: Path) -> None:
    student = load_pytorch(endless)
    blocks = text_blocks()
    options: dict[str, Any] = {"temperature": 1.0, "prefix": 3, "together": False}
    whole = rewrite(student, blocks, Place(0, 7, 0), **options)
    parts = [rewrite(student, blocks[[n]], Place(0, 7, n), **options) for n in range(4)]
    for n, part in enumerate(parts):
        assert np.array_equal(whole.ids[n], part.ids[0])
        assert np.array_equal(whole.documents[n], part.documents[0])
    assert len({row.tobytes() for row in whole.ids}) == 4
    later = rewrite(student, blocks, Place(0, 8, 0), **options)
    assert not np.array_equal(later.ids, whole.ids)


def test_only_what_was_written_is_to_be_predicted(endless: Path) -> None:
    student = load_pytorch(endless)
    blocks = text_blocks()
    made = rewrite(student, blocks, Place(0, 7, 0), temperature=1.0, prefix=3, together=False)
    given = np.zeros(20, bool)
    given[:5] = given[12:15] = True
    assert np.array_equal(made.ids[:, given], blocks.ids[:, given])
    assert not made.mask[:, given].any()
    there = made.documents >= 0
    assert np.array_equal(made.mask, there & ~given)
    assert np.array_equal(made.documents[there], blocks.documents[there])
    assert (made.ids != blocks.ids)[:, ~given].mean() > 0.9


def test_a_reply_ends_with_its_end_of_turn_and_leaves_padding(endless: Path) -> None:
    student = load_pytorch(endless)
    with torch.no_grad():
        student.lm_head.weight[4] = student.lm_head.weight[100:110].mean(dim=0)
        student.lm_head.weight[4] += 0.02 * torch.randn(64, generator=torch.manual_seed(0))
    blocks = text_blocks(rows=64)
    made = rewrite(student, blocks, Place(0, 0, 0), temperature=3.0, prefix=3, together=False)
    ended = 0
    for piece in find_pieces(blocks, 3):
        place = slice(piece.start + piece.prompt, piece.stop)
        ids, owners = made.ids[piece.row, place], made.documents[piece.row, place]
        ends = np.flatnonzero(np.isin(ids, (2, 4)) & (owners >= 0))
        assert len(ends) <= 1
        if len(ends) and ends[0] < len(ids) - 1:
            ended += 1
            assert (owners[ends[0] + 1 :] == -1).all()
            assert (owners[: ends[0] + 1] >= 0).all()
    assert ended > 0


def test_a_step_of_the_students_own_text_does_not_depend_on_the_micro_batches(
    monkeypatch: pytest.MonkeyPatch, model: Path, teacher: Path
) -> None:
    blocks = text_blocks()
    written = []
    original: Any = step.accumulate_gradients
    monkeypatch.setattr(
        "tests.distill.training.test_step.accumulate_gradients", lambda *args: original(*args, 3)
    )
    for size in (4, 1):
        gradients, sums = step_gradients(
            model, teacher, blocks, micro_batch_size=size, cross_entropy=0.5
        )
        written.append((gradients, sums))
    (whole, whole_sums), (parts, sums) = written
    assert sums == pytest.approx(whole_sums, rel=1e-5)
    assert whole_sums[2] == 0, "a student has nothing to learn from its own words by themselves"
    for name, gradient in whole.items():
        # float32 sums in another order
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_run_that_writes_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, model: Path, chats: Path
) -> None:
    whole = distill.train(model, tmp_path / "whole", teacher=teacher, texts=chats, **WRITING)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    flags = [line["on_policy"] for line in lines if "loss" in line]
    assert flags == [float(step % 2) for step in range(len(flags))]
    facts = read_lineage(whole)[-1]
    assert facts["after"]["kl"] < facts["before"]["kl"]
    target = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        kill_when(patch, trainer, "accumulate_gradients", 4, after=True)
        with pytest.raises(Killed):
            distill.train(model, target, teacher=teacher, texts=chats, **WRITING)
    distill.train(model, target, teacher=teacher, texts=chats, **WRITING)
    assert_same_run(target, whole)
