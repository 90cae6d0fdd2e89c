"""The traps of distillation: we avoid each, and every check of the suite notices its mistake."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite import conformance, conformance_roads
from benchmarks.suite.conformance import CHECKS, Check, ask
from benchmarks.suite.conformance_losses import (
    CASES,
    HERE,
    OURS,
    TRAINER,
    Adapter,
    Case,
    Model,
    dense_weight,
)
from distill.settings import TrainSettings
from distill.teacher.live_teacher import load_teacher
from distill.teacher.teacher import LiveTeacher
from mistill.folders.folder import open_folder
from mistill.loss.batches import make_batch
from mistill.loss.targets import DenseTargets
from mistill.text.answers import conversation_documents
from mistill.text.blocks import pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.processes import accelerating
from tests.distill.training.test_step import make_blocks
from tests.mistill import made
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
by_name = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)

# bitsandbytes tells where its kernels are not.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# --- ours ---------------------------------------------------------------------------------------


@by_name
def test_we_pass_every_check_that_can_be_asked_of_us(check: Check) -> None:
    found = ask(OURS, check)
    if check.name == "teacher's dropout":
        assert found.status == "n/a"
        assert found.detail == "it loads its teacher itself, in eval mode"
    else:
        assert found.status == "pass", found.detail


# --- the checks notice ----------------------------------------------------------------------------


def logits_of(model: Model, case: Case, leave_out: str, dtype: torch.dtype) -> Tensor:
    """Logits by the definition, but for what is left out of it."""
    side, hidden, head = model.side, model.get_decoder()().last_hidden_state, model.head
    weight: Tensor = head.weight if side.kind == "float" else dense_weight(model)
    if side.kind == "lora":
        weight = head.base_layer.weight
        if leave_out != "lora":
            weight = weight + head.get_delta_weight("default")
    if side.kind == "nf4" and leave_out == "nf4":
        codes = head.weight.data.float()
        weight = codes.reshape(len(side.weight), -1).repeat(1, 2) / 256
    logits: Tensor = hidden.to(dtype) @ weight.to(dtype).t()
    if side.bias is not None and leave_out != "bias":
        logits = logits + side.bias
    if leave_out != "scale":
        logits = logits * side.scale
    if side.soft_cap is not None and leave_out != "soft_cap":
        logits = side.soft_cap * torch.tanh(logits / side.soft_cap)
    return logits / (1.0 if leave_out == "temperature" else case.temperature)


def kept_of(case: Case, mistake: str) -> Tensor:
    if mistake == "shift":
        return case.labels != -100
    if mistake == "ignored labels":
        return torch.ones_like(case.kept)
    if mistake == "padding":
        return case.kept | ~case.present
    return case.kept


def logarithms(logits: Tensor, mistake: str) -> Tensor:
    if mistake.startswith("sharp"):
        return torch.softmax(logits, dim=-1).log()
    return torch.log_softmax(logits, dim=-1)


def known(log_p: Tensor, log_q: Tensor, k: int, mistake: str) -> Tensor:
    """KL where the k most probable tokens of the teacher are known."""
    ids = log_p.topk(k, dim=-1).indices
    top_p, top_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    if mistake == "top k: no bias":
        top_p = torch.log_softmax(top_p, dim=-1)
    rows = (top_p.exp() * (top_p - top_q)).sum(dim=-1)
    if mistake == "top k: pulls right":
        return rows.clamp(min=0)
    if mistake.startswith("top k: no"):
        return rows
    p_rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    if mistake == "top k: the tail":
        p_rest = (p_rest.exp() + 1e-8 * log_p.shape[-1]).log()
    q_rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return rows + p_rest.exp() * (p_rest - q_rest)


def apart(log_p: Tensor, log_q: Tensor, case: Case, mistake: str) -> Tensor:
    """The divergence of every position."""
    rows: Tensor
    p, q = log_p.exp(), log_q.exp()
    if case.top_k is not None:
        return known(log_p, log_q, case.top_k, mistake)
    if case.divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - np.log(2)
        if mistake == "JSD of strangers":
            log_m = ((p + q) / 2).log()
        rows = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(dim=-1)
        return rows
    if mistake == "no floor":
        return -(p * log_q).sum(dim=-1)
    terms = p * (log_p - log_q)
    if mistake == "downhill":
        terms = terms.clamp(min=0)
    rows = terms.sum(dim=-1)
    return torch.relu(rows - 2e-4) if mistake == "none below 0" else rows


def by_hand(student: Model, teacher: Model, case: Case, *, mistake: str = "") -> Tensor:
    """The loss over full logits, with one mistake or none."""
    left_out = {"logit scale": "scale", "soft cap": "soft_cap", "LoRA on the head": "lora",
                "4-bit head": "nf4", "temperature counts": "temperature"}  # fmt: skip
    left = left_out.get(mistake, mistake)
    narrow = mistake.startswith(("bfloat16", "sharp, bfloat16"))
    dtype = torch.bfloat16 if narrow else torch.float32
    if mistake != "teacher's dropout":
        teacher.eval()
    log_q = logarithms(logits_of(student, case, left, dtype), mistake)
    log_p = logarithms(logits_of(teacher, case, left, dtype), mistake).detach()
    if mistake == "other vocabulary size":
        log_p = log_p[..., : log_q.shape[-1]]
    assert log_p.shape == log_q.shape
    kept = kept_of(case, mistake)
    if mistake == "sums of 8 million":
        p, ratio = log_p[kept].exp().flatten(), (log_p - log_q)[kept].flatten()
        # One number after the other, as a plain loop in float32 adds them.
        flat = float(np.add.accumulate((p * ratio).detach().numpy())[-1])
        return flat / case.positions_in_step + 0 * log_q.sum()
    rows = apart(log_p, log_q, case, mistake)
    total: Tensor = rows[kept].sum()
    if mistake == "no hidden cross-entropy":
        following = case.labels.roll(-1, dims=1).clamp(min=0)
        total = total - log_q.gather(-1, following[..., None])[..., 0][kept].sum()
    if mistake not in ("times T^2", "temperature counts"):
        total = total * case.temperature**2
    if mistake == "scaled gradient":
        at_once: Tensor = AtOnce.apply(student.hidden, total / case.positions_in_step)
        return at_once
    if mistake == "mean per token":
        return total / len(case.labels)
    if mistake in ("micro-batches", "nothing to learn"):
        return total / kept.sum()
    return total / max(case.positions_in_step, 1)


class AtOnce(torch.autograd.Function):
    """A gradient worked out in the forward pass that does not hear of what comes after it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.ones(2, 6, 64), None


def by_hand_evaluated(student: Model, teacher: Model, case: Case, *, mistake: str = "") -> Tensor:
    loss = by_hand(student, teacher, case)
    return loss * case.positions_in_step if mistake == "evaluation" else loss


class WrongRoad:
    """Refuses nothing, learns everything, begins twice, and weighs micro-batches alike."""

    def open(self, student: Path, teacher: Path, out: Path, *, lora_head: bool = False) -> None:
        pass

    def labelled(
        self, folder: Path, messages: Sequence[dict[str, str]]
    ) -> tuple[list[int], list[int]]:
        vocabulary = load_vocabulary(folder)
        ids = vocabulary.encode(vocabulary.render(messages))
        first = [1] if vocabulary.adds_bos and vocabulary.bos_id == 1 else []
        pad = vocabulary.special_tokens.get("pad_token")
        masked = [-100 if vocabulary.spelling(token) == repr(pad) else token for token in ids]
        return first + ids, first + masked

    def whole_step(
        self, student: Path, teacher: Path, conversations: Any, size: int, out: Path
    ) -> Tensor:
        return torch.arange(4.0) * size


def wrong(mistake: str = "") -> Adapter:
    return Adapter(
        "by hand",
        partial(by_hand, mistake=mistake),
        CASES | TRAINER | {"top_k", "tail", "sizes", "folders", "text", "whole_step"},
        evaluate=partial(by_hand_evaluated, mistake=mistake),
    )


@by_name
def test_every_check_notices_the_mistake_that_it_is_named_for(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conformance_roads.ROADS, "by hand", WrongRoad())
    found = ask(wrong(check.name), check)
    assert found.status == "fail", f"{check.name} passes: {found.detail}"
    assert not found.detail.startswith("raises"), found.detail


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if not set(check.needs) & {"folders", "text", "whole_step"}],
    ids=lambda check: check.name,
)
def test_a_loss_by_the_definition_passes_every_check_of_losses(check: Check) -> None:
    found = ask(wrong(), check)
    assert found.status == "pass", found.detail


def test_what_cannot_be_asked_is_not_passed_and_what_raises_is_no_answer() -> None:
    silent = Adapter("silent", by_hand, frozenset(), {"shift": "the caller shifts"})
    by_check = {check.name: check for check in CHECKS}
    assert ask(silent, by_check["shift"]).status == "n/a"
    assert ask(silent, by_check["shift"]).detail == "the caller shifts"
    assert ask(silent, by_check["times T^2"]).detail == "it offers no temperature"

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("out of\nmemory")

    found = ask(Adapter("broken", broken, CASES), by_check["padding"])
    assert (found.status, found.detail) == ("fail", "raises RuntimeError: out of memory")
    with pytest.raises(RuntimeError, match="out of"):
        conformance.ask_all([Adapter("broken", broken, CASES)])


def test_the_formulas_written_here_fail_where_their_sources_do() -> None:
    # Both add up row by row; to see them do it takes long.
    asked = [check for check in CHECKS if check.name != "sums of 8 million"]
    failed = {
        adapter.name: {check.name for check in asked if ask(adapter, check).status == "fail"}
        for adapter in HERE
        if adapter is not OURS
    }
    assert failed == {
        "DistillKit-style formula": {
            "shift", "micro-batches", "nothing to learn", "bfloat16, within 0.1 %",
            "top k: pulls right", "top k: no bias",
        },
        "torchtune-style formula": {"nothing to learn", "no floor"},
    }  # fmt: skip


# --- traps that are met around the loss ---------------------------------------------------------


def test_templates_that_differ_in_a_space_are_different_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistill.sources.source import resolve_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    turns = [
        {"role": "user", "content": "What is a mistral?"},
        {"role": "assistant", "content": "A cold wind."},
    ]
    documents, texts = [], []
    for name, template in (("v1", made.MISTRAL_V1), ("v3", made.MISTRAL_V3)):
        folder = resolve_model(made.sentencepiece_folder(tmp_path / name, template))
        vocabulary = load_vocabulary(folder)
        texts.append(vocabulary.render(turns))
        documents.append(conversation_documents(turns, vocabulary)[0].ids.tolist())
    first, third = texts
    assert first == "<s>[INST] What is a mistral? [/INST]A cold wind.</s>"
    assert third == "<s>[INST] What is a mistral?[/INST] A cold wind.</s>"
    assert documents[0] != documents[1]


def test_the_end_of_a_turn_is_predicted_even_where_it_is_the_padding_token(
    tmp_path: Path, chats: Path
) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "</s>"',
                                                     '"pad_token": "<|im_end|>"'))  # fmt: skip
    vocabulary = load_vocabulary(folder)
    assert vocabulary.special_tokens["pad_token"] == vocabulary.special_tokens["eos_token"]
    batch = make_batch(pack(read_documents(chats, vocabulary), 200), torch.device("cpu"))
    assert int((batch.next_ids == 4).sum()) == 40
    assert not batch.kept[:, -1].any()


def test_a_teacher_drops_nothing_whatever_its_config_says(tmp_path: Path) -> None:
    blocks = make_blocks()
    batch = make_batch(blocks, torch.device("cpu"))
    answers = []
    for name, dropout in (("plain", 0.0), ("dropping", 0.5)):
        folder = tiny_model(tmp_path / name, seed=4, attention_dropout=dropout)
        settings = TrainSettings(precision="float32")
        with accelerating(settings, tmp_path) as accelerator:
            teacher = load_teacher(open_folder(folder), settings, accelerator)
        assert isinstance(teacher, LiveTeacher)
        assert not teacher.model.training
        for _ in range(2):
            targets = teacher.targets(blocks, batch)
            assert isinstance(targets, DenseTargets)
            answers.append(targets.hidden)
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=0)


# --- the page ------------------------------------------------------------------------------------


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/conformance.md, without its head."""
    page = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_of_the_32_traps_has_tests_that_exist() -> None:
    rows = rows_of("The traps, and where they are tested")
    assert [int(row[0]) for row in rows] == list(range(1, 33))
    names = {check.name: check.trap for check in CHECKS}
    named: set[str] = set()
    for number, trap, checks, tests in rows:
        assert trap
        asked = set(re.findall(r"`([^`]+)`", checks))
        assert {names[name] for name in asked} <= {int(number)}, number
        named |= asked
        places = re.findall(r"`([^`]+)::([^`]+)`", tests)
        assert asked or places, f"nothing tests trap {number}"
        for file, name in places:
            tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
            found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in found, f"{file}::{name}"
    assert named == {name for name, trap in names.items() if trap}


def test_the_page_tells_of_every_check_and_of_what_we_pass() -> None:
    rows = rows_of("Who passes what")
    assert [row[0] for row in rows] == [check.name for check in CHECKS]
    assert {row[1] for row in rows} <= {"pass", "n/a"}
    for row in rows:
        assert set(row[1:]) <= {"pass", "**fail**", "n/a"}, row
