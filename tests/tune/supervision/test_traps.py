"""Mistakes that other trainers make without an error, each of which would show here.

Which of them TRL makes at its defaults, and which the loop cannot make, stands in docs/tuning.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistill.loss.batches import last_hidden_states, make_batch
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.text.vocabulary import load_vocabulary
from mistill.training.adapters import MATRICES, AdapterPlan, add_adapters
from mistill.training.processes import accelerating
from tests.tiny import tiny_model
from tune.settings import SupervisedSettings
from tune.supervision.reading import read_texts
from tune.supervision.step import SupervisedStep, held_out_cost

CPU = torch.device("cpu")

# As they come with SmolLM2-Instruct and with the first Mistral-Instruct.
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
}
ANSWERS = ("Yes.", "[1] is first", ") closes", "  spaced", "7 winds", "\nbelow", "[]")


def reading_of(folder: Path, name: str) -> tuple[Any, TokenBlocks]:
    """Two turns of every answer, in the blocks that a model is tuned on."""
    model = tiny_model(folder / "model", num_hidden_layers=1)
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    rows = folder / "rows.jsonl"
    lines = []
    for number, answer in enumerate(ANSWERS):
        turns = [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    rows.write_text("".join(lines))
    settings = SupervisedSettings(block_length=256, held_out_tokens=10_000)
    vocabulary = load_vocabulary(model)
    reading = read_texts(rows, rows, vocabulary, settings)
    return vocabulary, reading.training


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_is_each_answer_and_the_token_that_ends_it(
    tmp_path: Path, name: str
) -> None:
    """Not the prompt, nor the template's own words, nor a line break after the end."""
    vocabulary, blocks = reading_of(tmp_path, name)
    end = vocabulary.token_bytes(vocabulary.eos_id).decode()
    learnt: list[str] = []
    for row, begin, stop in blocks.runs:
        if blocks.documents[row, begin] < 0:
            continue
        kept = np.flatnonzero(blocks.mask[row, begin:stop])
        pieces = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
        learnt += [vocabulary.decode(blocks.ids[row, begin + piece].tolist()) for piece in pieces]
    # A template may trim an answer, and a first token may be shared with the prompt.
    wanted = sorted(2 * [answer.strip() + end for answer in ANSWERS])
    assert sorted(piece.strip() for piece in learnt) == wanted
    ends = (blocks.ids == vocabulary.eos_id) & blocks.mask
    assert ends.sum() == 2 * len(ANSWERS)
    assert 0 < blocks.kept.sum() < 0.5 * blocks.tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_conversation_begins_twice(tmp_path: Path, name: str) -> None:
    vocabulary, blocks = reading_of(tmp_path, name)
    begins = blocks.runs[blocks.documents[blocks.runs[:, 0], blocks.runs[:, 1]] >= 0]
    for row, start, _ in begins:
        first = blocks.ids[row, start : start + 2].tolist()
        assert first.count(vocabulary.bos_id) == (name == "mistral")


def counting_model(folder: Path) -> Any:
    """A model that says after every token the next one by number, and nothing else."""
    model: Any = load_pytorch(tiny_model(folder, hidden_size=384, num_hidden_layers=1))
    size = model.config.vocab_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(10 * torch.eye(size).roll(1, 0))
    return model


def test_a_model_that_knows_the_next_token_pays_nothing(tmp_path: Path) -> None:
    """Labels at the prompt's positions, unshifted or shifted twice, would cost it everything."""
    model = counting_model(tmp_path / "counting")
    documents = []
    for start, prompt in ((20, 7), (100, 1), (200, 30)):
        mask = np.arange(40) >= prompt
        documents.append(Document(np.arange(start, start + 40), mask))
    settings = SupervisedSettings(batch_size=2, block_length=100)
    blocks = pack(documents, 100)
    with accelerating(settings, Path()) as accelerator:
        module = accelerator.prepare(SupervisedStep(model, settings))
        nats, positions = held_out_cost(module, blocks, settings, accelerator)
    assert nats < 1e-6
    assert positions == 33 + 39 + 10


def test_a_document_does_not_see_the_one_before_it(model: Path) -> None:
    """Through adapters too: another first document moves nothing in the second."""
    adapted: Any = load_pytorch(model)
    torch.manual_seed(0)
    add_adapters(adapted, 4, AdapterPlan(rank=4, targets=MATRICES))
    generator = np.random.default_rng(0)
    second = generator.integers(5, 300, 30)
    states = []
    for _ in range(2):
        first = generator.integers(5, 300, 34)
        documents = [Document(ids, np.arange(len(ids)) > 0) for ids in (first, second)]
        batch = make_batch(pack(documents, 64), CPU)
        with torch.no_grad():
            hidden = last_hidden_states(adapted.eval(), batch.ids, batch.positions)[0]
        states.append(hidden)
    assert (states[0][:34] - states[1][:34]).abs().max() > 0.1
    torch.testing.assert_close(states[0][34:], states[1][34:], rtol=0, atol=1e-6)
