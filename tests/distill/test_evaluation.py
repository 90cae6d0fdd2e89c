"""The judge: held-out KL, perplexity and agreement, against the same worked out slowly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batches import make_batch
from distill.evaluation import TokenScores, ask_teacher, evaluate, score_positions, summarize
from distill.teacher import DenseTargets, LiveTeacher
from mistill.pytorch import load_pytorch
from mistill.text import TokenBlocks
from tests.reference import distillation as reference


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    generator = np.random.default_rng(0)
    documents = np.sort(generator.integers(0, 3, (4, 20)), axis=1).astype(np.int32)
    documents[3, 15:] = -1
    return TokenBlocks(
        ids=generator.integers(5, 300, (4, 20)),
        mask=generator.random((4, 20)) < 0.7,
        documents=documents,
    )


def test_an_evaluation_is_the_mean_over_every_kept_position_of_every_document(
    teacher: Path, model: Path, blocks: TokenBlocks
) -> None:
    large, small = load_pytorch(teacher), load_pytorch(model)
    device = torch.device("cpu")
    batches = [make_batch(blocks[:3], device), make_batch(blocks[3:], device)]
    found = evaluate(small, ask_teacher(LiveTeacher(large), batches), memory_mib=0.05)

    kl: list[float] = []
    student_nll: list[float] = []
    teacher_nll: list[float] = []
    agrees: list[bool] = []
    kept = reference.kept_positions(blocks.mask.tolist(), blocks.documents.tolist())
    for row in range(4):
        for document in set(blocks.documents[row].tolist()) - {-1}:
            columns = np.flatnonzero(blocks.documents[row] == document)
            ids = torch.tensor(blocks.ids[row, columns][None])
            with torch.inference_mode():
                p, q = large(ids).logits[0], small(ids).logits[0]
            for place, column in enumerate(columns.tolist()):
                if kept[row][column]:
                    after = int(blocks.ids[row, column + 1])
                    kl.append(float(reference.kl_of_position(q[place], p[place], 1.0)))
                    student_nll.append(-float(q[place].double().log_softmax(-1)[after]))
                    teacher_nll.append(-float(p[place].double().log_softmax(-1)[after]))
                    agrees.append(int(p[place].argmax()) == int(q[place].argmax()))

    assert found.positions == len(kl) > 20
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(student_nll) / len(kl)), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(math.exp(sum(teacher_nll) / len(kl)), rel=1e-5)
    assert found.agreement == pytest.approx(sum(agrees) / len(kl))


def test_a_teacher_judged_against_itself_is_perfect(teacher: Path, blocks: TokenBlocks) -> None:
    large = load_pytorch(teacher)
    batches = [make_batch(blocks, torch.device("cpu"))]
    found = evaluate(large, ask_teacher(LiveTeacher(large), batches))
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1
    assert found.perplexity == pytest.approx(found.teacher_perplexity)


def test_an_evaluation_leaves_the_student_as_it_was(
    teacher: Path, model: Path, blocks: TokenBlocks
) -> None:
    small = load_pytorch(model).train()
    batches = [make_batch(blocks, torch.device("cpu"))]
    evaluate(small, ask_teacher(LiveTeacher(load_pytorch(teacher)), batches))
    assert small.training
    assert all(parameter.grad is None for parameter in small.parameters())
    before = load_pytorch(model).state_dict()
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_scores_of_a_coin_are_the_numbers_worked_by_hand() -> None:
    teacher = DenseTargets(torch.tensor([[1.0]]), torch.tensor([[math.log(3.0)], [0.0]]))
    scores = score_positions(
        torch.tensor([[1.0]]), torch.zeros(2, 1), teacher, torch.tensor([1]), memory_mib=1
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert scores.kl.item() == pytest.approx(kl, rel=1e-6)
    assert scores.student_nll.item() == pytest.approx(math.log(2))
    assert scores.teacher_nll.item() == pytest.approx(math.log(4))


def test_batches_count_by_their_positions_not_one_each() -> None:
    def part(kl: list[float]) -> TokenScores:
        values = torch.tensor(kl)
        return TokenScores(values, values, values, values > 1)

    found = summarize([part([1.0, 2.0, 3.0]), part([6.0])])
    assert found.kl == 3.0
    assert found.perplexity == pytest.approx(math.exp(3.0))
    assert found.agreement == 0.75
    assert found.positions == 4


def test_no_position_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="no position"):
        summarize([])
