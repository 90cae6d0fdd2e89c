"""A teacher writes conversations: the right tokens, each prompt once, whatever interrupts it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import GenerateSettings, generate_conversations
from distill import conversations as module
from distill.conversations import Reply, write_replies
from mistill.engine.language_model import greedy
from mistill.errors import (
    ContextError,
    FolderError,
    SettingsError,
    TargetExistsError,
    TextError,
    VocabularyError,
)
from mistill.measures.repetition import most_repeats
from mistill.text.conversation import prompt_share
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from tests.mistill.text import templates
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer

PROMPTS = [f"{sentence} {number}" for number in range(4) for sentence in SENTENCES]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), "utf-8")
    return file


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that ends its turn after a few tokens, now earlier and now later."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path_factory.mktemp("models") / "talker", num_hidden_layers=1, seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 0.25  # nearly all tokens are nearly as probable
    weights["lm_head.weight"][4] *= 8  # the one that ends a turn is either sure or out
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]


def asked(talks: list[list[dict[str, str]]]) -> list[str]:
    return [next(turn["content"] for turn in talk if turn["role"] == "user") for talk in talks]


def leftovers(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.startswith("."))


# --- the replies --------------------------------------------------------------------------------


def test_a_batch_writes_what_transformers_writes_for_each_prompt_alone(talker: Path):
    import torch

    from mistill.pytorch.loading import load_pytorch

    model = load_pytorch(talker)
    generator = np.random.default_rng(0)
    batch = [generator.integers(5, 300, n).tolist() for n in (3, 17, 8, 1, 30, 12, 5, 9)]
    replies = write_replies(model, batch, [greedy] * len(batch), [2, 4], 24)
    for prompt, reply in zip(batch, replies, strict=True):
        whole = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=[2, 4],
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        finished = whole[-1] in (2, 4)
        assert reply == Reply(whole[:-1] if finished else whole, finished)
    assert len({len(reply.ids) for reply in replies}) > 2  # they left the batch at different times


def test_a_teacher_in_an_onnx_folder_writes_what_it_wrote_before_its_export(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import export

    settings = GenerateSettings(temperature=0, max_new_tokens=24, keep_unfinished=True)
    before = generate_conversations(talker, prompts, tmp_path / "before.jsonl", settings=settings)
    onnx = export.to_onnx(talker, tmp_path / "onnx", parity_positions=0)
    monkeypatch.setattr("mistill.pytorch.loading.load_pytorch", None)
    after = generate_conversations(onnx, prompts, tmp_path / "after.jsonl", settings=settings)
    assert written(after) == written(before)
    one, three = (
        generate_conversations(
            onnx, prompts, tmp_path / f"{size}.jsonl", batch_size=size, keep_unfinished=True
        )
        for size in (1, 3)
    )
    assert written(one) == written(three) != written(after)


def test_a_sliding_window_sees_as_far_in_a_batch_as_alone(tmp_path: Path):
    from mistill.pytorch.loading import load_pytorch

    model = load_pytorch(tiny_model(tmp_path / "m", sliding_window=6))
    batch = [list(range(20, 20 + n)) for n in (4, 19, 10)]
    together = write_replies(model, batch, [greedy] * 3, [2, 4], 12)
    for prompt, reply in zip(batch, together, strict=True):
        assert write_replies(model, [prompt], [greedy], [2, 4], 12) == [reply]


def test_a_prompt_draws_the_same_whatever_the_batch(talker: Path, prompts: Path, tmp_path: Path):
    one, three, all_at_once = (
        generate_conversations(
            talker, prompts, tmp_path / f"{size}.jsonl", batch_size=size, max_new_tokens=20
        )
        for size in (1, 3, 50)
    )
    assert one.read_bytes() == three.read_bytes() == all_at_once.read_bytes()
    other = generate_conversations(
        talker, prompts, tmp_path / "other.jsonl", seed=1, max_new_tokens=20
    )
    assert other.read_bytes() != one.read_bytes()


def test_a_prompt_given_twice_is_answered_twice_and_differently(talker: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text("Again?\n" * 6)
    talks = written(
        generate_conversations(
            talker,
            tmp_path / "p.txt",
            tmp_path / "a.jsonl",
            max_new_tokens=8,
            keep_unfinished=True,
        )
    )
    assert asked(talks) == ["Again?"] * 6
    assert len({talk[1]["content"] for talk in talks}) == 6


def test_a_conversation_is_the_prompt_and_what_the_teacher_said(
    talker: Path, prompts: Path, tmp_path: Path
):
    target = generate_conversations(
        talker, prompts, tmp_path / "a.jsonl", temperature=0, max_new_tokens=30, batch_size=5
    )
    assert target == tmp_path / "a.jsonl"
    talks = written(target)
    assert 3 < len(talks) <= len(PROMPTS)
    vocabulary = load_vocabulary(talker)
    for talk in talks:
        assert [turn["role"] for turn in talk] == ["user", "assistant"]
        assert talk[0]["content"] in PROMPTS
        assert "<|im_end|>" not in talk[1]["content"]
    places = [PROMPTS.index(prompt) for prompt in asked(talks)]
    assert places == sorted(places)
    assert len(list(read_documents(target, vocabulary))) == len(talks)
    assert leftovers(tmp_path) == []


def test_a_system_prompt_begins_every_conversation(talker: Path, prompts: Path, tmp_path: Path):
    target = generate_conversations(
        talker, prompts, tmp_path / "a.jsonl", system="Be brief.", max_new_tokens=30
    )
    for talk in written(target):
        assert talk[0] == {"role": "system", "content": "Be brief."}
        assert [turn["role"] for turn in talk[1:]] == ["user", "assistant"]


def test_replies_that_never_ended_are_dropped_and_counted(
    talker: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "distill.conversations"):
        few = written(
            generate_conversations(talker, prompts, tmp_path / "a.jsonl", max_new_tokens=6)
        )
        every = written(
            generate_conversations(
                talker, prompts, tmp_path / "b.jsonl", max_new_tokens=6, keep_unfinished=True
            )
        )
    assert 0 < len(few) < len(every) <= len(PROMPTS)
    assert [talk for talk in every if talk in few] == few
    dropped, kept = (record.getMessage() for record in caplog.records)
    assert dropped.startswith(f"{len(PROMPTS)} prompts, {len(few)} conversations kept; dropped ")
    assert "cut off after 6 tokens" in dropped
    assert "cut off" not in kept


def test_replies_in_loops_and_replies_given_before_are_dropped_on_demand(
    talker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    replies = [
        "Apples, pears, plums.",
        "I like it, I like it, I like it, I like it.",
        "apples pears  plums",
        "One two three four. One two three four.",
        "Plums, pears, apples.",
    ]
    ids = [Reply(load_vocabulary(talker).encode(reply), True) for reply in replies]
    monkeypatch.setattr(module, "_resumed_replies", lambda *_: ids)
    (tmp_path / "prompts.txt").write_text("".join(f"Ask {n}.\n" for n in range(5)), "utf-8")

    def kept(name: str, **options: Any) -> list[str]:
        file = generate_conversations(
            talker, tmp_path / "prompts.txt", tmp_path / name, max_new_tokens=16, **options
        )
        return [talk[-1]["content"] for talk in written(file)]

    assert kept("all.jsonl") == replies
    assert kept("loops.jsonl", max_repeats=2) == [*replies[:1], *replies[2:]]
    with caplog.at_level(logging.INFO, "distill.conversations"):
        both = kept("both.jsonl", max_repeats=1, drop_duplicates=True)
    assert both == [replies[0], replies[4]]
    assert "2 conversations kept; dropped replies: 2 that repeat themselves, 1 given before" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("", 0),
        ("Only three words", 0),
        ("Just four words here", 1),
        ("a b c d a b c d", 2),
        ("A, b C d; a, B c d", 2),
        ("bananas, oranges, apples, bananas, oranges, apples, bananas, oranges, apples", 2),
        ("no no no no no no", 3),
    ],
)
def test_the_run_of_four_words_that_stands_most_often_is_counted(text: str, repeats: int):
    assert most_repeats(text) == repeats


def test_a_teacher_that_never_ends_its_turn_is_an_error(model: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(TextError, match=r"none of the 24 replies is kept: 24 cut off after 1"):
        generate_conversations(
            model, prompts, tmp_path / "a.jsonl", max_new_tokens=1, temperature=0
        )
    assert not (tmp_path / "a.jsonl").exists()


# --- held out -----------------------------------------------------------------------------------


def test_a_share_of_the_prompts_is_held_out_by_their_hash(
    talker: Path, prompts: Path, tmp_path: Path
):
    options: dict[str, Any] = {"max_new_tokens": 10, "keep_unfinished": True}
    whole = written(generate_conversations(talker, prompts, tmp_path / "all.jsonl", **options))
    held_out = tmp_path / "held" / "out.jsonl"
    target = generate_conversations(
        talker,
        prompts,
        tmp_path / "train.jsonl",
        held_out=held_out,
        held_out_share=0.3,
        **options,
    )
    ours, theirs = written(target), written(held_out)
    assert len(ours) > len(theirs) > 0
    assert sorted(map(str, ours + theirs)) == sorted(map(str, whole))
    for talk in whole:
        digest = hashlib.sha256(talk[0]["content"].encode()).hexdigest()[:8]
        assert prompt_share(talk) == int(digest, 16) / 16**8
        assert (talk in theirs) == (prompt_share(talk) < 0.3)


# --- resuming -----------------------------------------------------------------------------------

# It keeps so many batches, says so of each, and would wait for its end in the middle of the next.
SLOWED = """
import signal, sys, time
import distill.conversations as conversations
from distill import generate_conversations

record, left = conversations._record, int(sys.argv[4])
def slowly(file, replies):
    global left
    if not left:
        signal.pause()
    left -= 1
    record(file, replies)
    print("batch", flush=True)
    time.sleep(0.05)
conversations._record = slowly
generate_conversations(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=3, max_new_tokens=20)
"""


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_file(
    talker: Path, prompts: Path, tmp_path: Path
):
    expected = generate_conversations(
        talker, prompts, tmp_path / "whole.jsonl", batch_size=3, max_new_tokens=20
    )
    target = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", SLOWED, str(talker), str(prompts), str(target)]
    seen = 0
    for batches, pause in ((1, 0.0), (2, 0.04), (2, 0.06)):
        process = subprocess.Popen(
            [*command, str(batches)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(batches):
            assert process.stdout.readline() == "batch\n", process.stderr.read()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not target.exists()
        [work] = tmp_path.glob(".killed.jsonl.*")
        record = work / "replies.jsonl"
        lines = record.read_bytes().count(b"\n")
        assert lines == seen + 3 * batches
        seen = lines
        # A kill in the middle of a write leaves a part of a batch and half a line.
        with record.open("ab") as opened:
            opened.write(b'{"ids": [1, 2], "finished": true}\n{"ids": [5, 6')
    generate_conversations(talker, prompts, target, batch_size=3, max_new_tokens=20)
    assert target.read_bytes() == expected.read_bytes()
    assert leftovers(tmp_path) == []


def test_what_was_written_down_is_not_written_again(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "a.jsonl"
    answered: list[int] = []
    write = module.write_replies

    def failing(model: Any, batch: Any, *rest: Any) -> Any:
        if len(answered) >= 12:
            raise KeyboardInterrupt
        answered.extend(range(len(batch)))
        return write(model, batch, *rest)

    monkeypatch.setattr(module, "write_replies", failing)
    with pytest.raises(KeyboardInterrupt):
        generate_conversations(talker, prompts, target, batch_size=4, max_new_tokens=8)
    assert not target.exists()

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        answered.extend(range(len(batch)))
        return write(model, batch, *rest)

    monkeypatch.setattr(module, "write_replies", counting)
    generate_conversations(talker, prompts, target, batch_size=4, max_new_tokens=8)
    assert len(answered) == len(PROMPTS)


def test_other_settings_begin_anew_where_overwriting_is_asked_for(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "a.jsonl"
    counts: list[int] = []
    write = module.write_replies

    def interrupted(model: Any, batch: Any, *rest: Any) -> Any:
        counts.append(len(batch))
        if len(counts) % 2 == 0:
            raise KeyboardInterrupt
        return write(model, batch, *rest)

    monkeypatch.setattr(module, "write_replies", interrupted)
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 2, "temperature": 0.1}):
        with pytest.raises(KeyboardInterrupt):
            generate_conversations(
                talker, prompts, target, max_new_tokens=4, overwrite=True, **options
            )
        [work] = tmp_path.glob(".a.jsonl.*")
        assert (work / "replies.jsonl").read_bytes().count(b"\n") == 16
        assert json.loads((work / "key.json").read_text())["settings"]["seed"] == options["seed"]


def test_another_batch_size_resumes_and_another_seed_is_refused(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "a.jsonl"
    write = module.write_replies
    answered: list[int] = []

    def interrupted(model: Any, batch: Any, *rest: Any) -> Any:
        if len(answered) >= 16:
            raise KeyboardInterrupt
        answered.extend(range(len(batch)))
        return write(model, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_replies", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_conversations(talker, prompts, target, max_new_tokens=4, batch_size=8)

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        answered.extend(range(len(batch)))
        return write(model, batch, *rest)

    monkeypatch.setattr(module, "write_replies", counting)
    with pytest.raises(SettingsError, match="seed is 1 and was 0"):
        generate_conversations(talker, prompts, target, max_new_tokens=4, batch_size=4, seed=1)
    generate_conversations(talker, prompts, target, max_new_tokens=4, batch_size=4)
    assert len(answered) == len(PROMPTS)


def test_two_at_once_are_refused(talker: Path, prompts: Path, tmp_path: Path):
    from mistill.folders.publishing import working

    target = tmp_path / "a.jsonl"
    with (
        working(target, {}),
        pytest.raises(FolderError, match="another process is making"),
    ):
        generate_conversations(talker, prompts, target)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.5}, "temperature must be at least 0, not -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0, not nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"held_out_share": 1}, "held_out_share must be above 0 and below 1, not 1"),
        ({"held_out": Path("x.txt")}, r"held_out must be a .jsonl file, not x\.txt"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"temprature": 1}, "no option temprature; did you mean temperature"),
    ],
)
def test_settings_out_of_range_are_refused(
    options: dict[str, Any], message: str, model: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(SettingsError, match=message):
        generate_conversations(model, prompts, tmp_path / "a.jsonl", **options)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["prompts.txt"]


def test_targets_that_cannot_be_are_refused(talker: Path, prompts: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for target, options, kind, message in (
        ("a.jsonl", {}, TargetExistsError, "exists already"),
        ("b.jsonl", {"held_out": tmp_path / "a.jsonl"}, TargetExistsError, "exists already"),
        ("folder.jsonl", {"overwrite": True}, TargetExistsError, "exists already"),
        ("a.txt", {}, SettingsError, r"must end in \.jsonl"),
        ("b.jsonl", {"held_out": tmp_path / "b.jsonl"}, SettingsError, "the same file"),
        ("a.jsonl/b.jsonl", {}, FolderError, "is a file"),
    ):
        with pytest.raises(kind, match=message):
            generate_conversations(talker, prompts, tmp_path / target, **options)
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    generate_conversations(talker, prompts, tmp_path / "a.jsonl", overwrite=True, max_new_tokens=20)
    assert len(written(tmp_path / "a.jsonl")) > 3


def test_a_prompt_that_leaves_no_room_is_refused_before_the_teacher_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.pytorch.loading.load_pytorch", lambda *a: pytest.fail("loaded"))
    (tmp_path / "p.txt").write_text("short\n" + "long " * 300)
    with pytest.raises(ContextError, match=r"prompt 2 and 64 new tokens need \d+ .* has 512"):
        generate_conversations(model, tmp_path / "p.txt", tmp_path / "a.jsonl", max_new_tokens=64)


def test_a_teacher_without_a_template_and_missing_prompts_are_refused(
    model: Path, prompts: Path, tmp_path: Path
):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(VocabularyError, match="has no chat template"):
        generate_conversations(bare, prompts, tmp_path / "a.jsonl")
    with pytest.raises(TextError, match=r"there is no file nothing\.txt"):
        generate_conversations(model, "nothing.txt", tmp_path / "a.jsonl")
    with pytest.raises(FolderError, match=r"config\.json is missing"):
        generate_conversations(tiny_tokenizer(tmp_path / "t"), prompts, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_settings_may_be_given_as_an_object(talker: Path, prompts: Path, tmp_path: Path):
    settings = GenerateSettings(max_new_tokens=20)
    one = generate_conversations(talker, prompts, tmp_path / "a.jsonl", settings=settings)
    two = generate_conversations(talker, prompts, tmp_path / "b.jsonl", max_new_tokens=20)
    assert one.read_bytes() == two.read_bytes()


def test_what_a_teacher_thinks_and_says_can_be_learned(tmp_path: Path, talker: Path):
    """Where the prompt opens the thoughts, the reply is written with their opening."""
    folder = tmp_path / "thinker"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text(templates.OPENS_THOUGHTS)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"What follows {number}?\n" for number in range(6)))
    file = generate_conversations(
        folder, prompts, tmp_path / "own.jsonl", max_new_tokens=12, keep_unfinished=True
    )
    vocabulary = load_vocabulary(folder)
    for talk, document in zip(written(file), read_documents(file, vocabulary), strict=True):
        prompt = vocabulary.render(talk[:1], add_generation_prompt=True)
        assert prompt.endswith("<think>\n")
        reply = talk[-1]["content"]
        assert reply.startswith("<think>\n")
        text = vocabulary.decode(document.ids.tolist())
        assert text == f"{prompt}{reply.removeprefix('<think>').lstrip()}<|im_end|>"
