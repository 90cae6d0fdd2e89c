"""The judge: held-out KL, perplexity and agreement, against the same worked out slowly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training.evaluation import (
    ModelScores,
    TokenScores,
    calibration_error,
    score_positions,
    summarize,
)
from distill.training.held_out import HeldOutPart, judge
from distill.training.step import DistillationStep
from mistill.loss.batches import make_batch
from mistill.loss.heads import as_head
from mistill.loss.targets import DenseTargets, SampledTargets
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks
from mistill.training.processes import accelerating
from tests.distill.judged import judged
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
    parts = [(part, make_batch(part, device)) for part in (blocks[:3], blocks[3:])]
    found = judged(small, LiveTeacher(large), parts, memory_mib=0.05)

    kl: list[float] = []
    student_nll: list[float] = []
    teacher_nll: list[float] = []
    agrees: list[bool] = []
    accepted: list[float] = []
    sure: list[tuple[float, bool]] = []
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
                    both = p[place].double().softmax(-1), q[place].double().softmax(-1)
                    accepted.append(float(torch.minimum(*both).sum()))
                    sure.append((float(both[1].max()), int(q[place].argmax()) == after))

    assert found.positions == len(kl) > 20
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(student_nll) / len(kl)), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(math.exp(sum(teacher_nll) / len(kl)), rel=1e-5)
    assert found.agreement == pytest.approx(sum(agrees) / len(kl))
    assert found.acceptance == pytest.approx(sum(accepted) / len(kl), rel=1e-5)
    assert found.calibration_error == pytest.approx(reference.calibration_error(sure), rel=1e-5)
    assert found.kl_p99 == pytest.approx(sorted(kl)[math.ceil(0.99 * len(kl)) - 1], rel=1e-5)


def test_a_teacher_judged_against_itself_is_perfect(teacher: Path, blocks: TokenBlocks) -> None:
    large = load_pytorch(teacher)
    batches = [(blocks, make_batch(blocks, torch.device("cpu")))]
    found = judged(large, LiveTeacher(large), batches)
    assert abs(found.kl) < 1e-6
    assert found.kl >= 0
    assert found.agreement == 1
    assert found.acceptance == pytest.approx(1, rel=1e-6)
    assert found.calibration_error == found.teacher_calibration_error
    assert found.perplexity == pytest.approx(found.teacher_perplexity)


def test_an_evaluation_leaves_the_student_as_it_was(
    tmp_path: Path, teacher: Path, model: Path, blocks: TokenBlocks
) -> None:
    small = load_pytorch(model).train()
    batches = [(blocks, make_batch(blocks, torch.device("cpu")))]
    module = DistillationStep(small, TrainSettings()).train()
    live = LiveTeacher(load_pytorch(teacher))
    parts = [HeldOutPart(batch, live.targets(part, batch), True) for part, batch in batches]
    with accelerating(TrainSettings(), logs=tmp_path) as accelerator:
        judge(module, parts, accelerator)
    assert small.training
    assert all(parameter.grad is None for parameter in small.parameters())
    before = load_pytorch(model).state_dict()
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_scores_of_a_coin_are_the_numbers_worked_by_hand() -> None:
    teacher = DenseTargets(torch.tensor([[1.0]]), as_head(torch.tensor([[math.log(3.0)], [0.0]])))
    (scores,) = score_positions(
        torch.tensor([[1.0]]), torch.zeros(2, 1), teacher, torch.tensor([1]), memory_mib=1
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert scores.teacher is not None
    assert scores.acceptance is not None
    assert scores.kl.item() == pytest.approx(kl, rel=1e-6)
    assert scores.student.nll.item() == pytest.approx(math.log(2))
    assert scores.teacher.nll.item() == pytest.approx(math.log(4))
    assert scores.teacher.confidence.item() == pytest.approx(0.75)
    assert not scores.teacher.correct.item()
    assert scores.acceptance.item() == pytest.approx(0.75)  # min(3/4, 1/2) + min(1/4, 1/2)


def test_a_part_of_what_the_teacher_says_gives_kl_and_no_agreement() -> None:
    hidden, head = torch.randn(6, 3), torch.randn(40, 3)
    p = torch.softmax(torch.randn(6, 40), dim=-1)
    whole = torch.arange(40).expand(6, 40)
    entropy = -(p * p.log()).sum(dim=-1)
    q = torch.log_softmax(hidden @ head.t(), dim=-1)
    targets = SampledTargets(whole, p, entropy, 40)
    found = summarize(score_positions(hidden, head, targets, torch.zeros(6, dtype=torch.int64)))
    assert found.kl == pytest.approx(float((p * (p.log() - q)).sum() / 6), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-float(q[:, 0].mean())), rel=1e-5)
    assert found.agreement is None
    assert found.acceptance is None
    assert found.teacher_perplexity is None


def test_calibration_is_the_gap_between_being_sure_and_being_right() -> None:
    # Two bins: four positions sure at 0.9 of which two are right, one at 0.5 that is right.
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5])
    correct = torch.tensor([True, True, False, False, True])
    assert calibration_error(confidence, correct) == pytest.approx((4 * 0.4 + 0.5) / 5)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_batches_count_by_their_positions_not_one_each() -> None:
    def part(kl: list[float]) -> TokenScores:
        values = torch.tensor(kl)
        model = ModelScores(values, values / 10, values > 1)
        return TokenScores(values, model, model, values > 1, values / 10)

    found = summarize([part([1.0, 2.0, 3.0]), part([6.0])])
    assert found.kl == 3.0
    assert found.kl_p99 == 6.0
    assert found.perplexity == pytest.approx(math.exp(3.0))
    assert found.agreement == 0.75
    assert found.acceptance == pytest.approx(0.3)
    assert found.positions == 4


def test_no_position_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="no position"):
        summarize([])
