"""A cached teacher answers like the live one, ahead of time, and says what it does not know."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
from distill.settings import TrainSettings
from distill.targets import cached_teacher
from distill.targets.cached_teacher import CachedTeacher, open_targets
from distill.teacher.teacher import LiveTeacher
from mistill.errors import FolderError, SettingsError, TextError
from mistill.folders.location import Location
from mistill.loss.batches import make_batch
from mistill.loss.losses import head_loss
from mistill.loss.targets import SampledTargets
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.training_text import read_blocks
from tests.distill.judged import judged

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def targets(teacher: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("targets") / "targets"
    distill.cache_targets(
        teacher, target, texts=chats, block_length=64, shard_tokens=400, draws=255
    )
    return target


@pytest.fixture(scope="module")
def blocks(teacher: Path, chats: Path) -> TokenBlocks:
    return pack(read_documents(chats, load_vocabulary(teacher)), 64)


@pytest.fixture
def cached(targets: Path, teacher: Path) -> CachedTeacher:
    return open_targets(targets, load_vocabulary(teacher))


def answer(teacher: CachedTeacher, blocks: TokenBlocks) -> SampledTargets:
    found = teacher.targets(blocks, make_batch(blocks, CPU))
    assert isinstance(found, SampledTargets)
    return found


def test_the_loss_is_near_that_of_the_live_teacher(
    cached: CachedTeacher, blocks: TokenBlocks, teacher: Path, model: Path
) -> None:
    batch = make_batch(blocks, CPU)
    student = load_pytorch(model)
    hidden = torch.randn((int(batch.kept.sum()), 64), generator=torch.Generator().manual_seed(0))
    head = student.get_output_embeddings().weight.detach()
    losses, gradients = [], []
    for who in (LiveTeacher(load_pytorch(teacher)), cached):
        H = hidden.clone().requires_grad_()
        found = head_loss(
            H, head, who.targets(blocks, batch), batch.next_ids, positions_in_step=len(hidden)
        )
        found.loss.backward()
        losses.append(found.loss.item())
        assert H.grad is not None
        gradients.append(H.grad)
    # 255 draws a position; were a position off by one, both would be far apart.
    assert losses[1] == pytest.approx(losses[0], rel=0.005)
    live, stored = (gradient.flatten() for gradient in gradients)
    assert torch.cosine_similarity(live, stored, dim=0) > 0.98


def test_a_student_is_judged_without_the_teacher(
    cached: CachedTeacher, blocks: TokenBlocks, teacher: Path, model: Path
) -> None:
    parts = [(blocks[i : i + 4], make_batch(blocks[i : i + 4], CPU)) for i in (0, 4)]
    student = load_pytorch(model)
    live, stored = (
        judged(student, who, parts) for who in (LiveTeacher(load_pytorch(teacher)), cached)
    )
    assert stored.kl == pytest.approx(live.kl, rel=0.02)
    assert stored.perplexity == pytest.approx(live.perplexity, rel=1e-6)
    assert stored.agreement is None


def test_what_is_expected_is_read_by_another_thread_and_once(
    cached: CachedTeacher, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.get_ident()
    readers = []
    read = Location.read_parts

    def watched(self: Location, parts: Any) -> list[bytes]:
        readers.append(threading.get_ident())
        return read(self, parts)

    monkeypatch.setattr(Location, "read_parts", watched)
    straight = answer(cached, blocks[:3])
    assert readers == [here]
    cached.expect(blocks[:3])
    cached.expect(blocks[:3])
    ahead = answer(cached, blocks[:3])
    assert len(readers) == 2
    assert readers[1] != here
    for name in ("ids", "weights", "entropy"):
        assert torch.equal(getattr(ahead, name), getattr(straight, name))
    answer(cached, blocks[:3])
    assert readers[2:] == [here]


def test_reading_goes_on_while_the_caller_is_busy(
    cached: CachedTeacher, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    read = Location.read_parts

    def waiting(self: Location, parts: Any) -> list[bytes]:
        begun.set()
        assert go_on.wait(300)
        return read(self, parts)

    monkeypatch.setattr(Location, "read_parts", waiting)
    cached.expect(blocks[:2])
    assert begun.wait(300)  # and the caller is here, not held up
    go_on.set()
    assert len(answer(cached, blocks[:2])) == blocks[:2].kept.sum()


def test_many_announcements_are_read_a_few_at_a_time_and_none_is_lost(
    cached: CachedTeacher, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.get_ident()
    readers = []
    read = Location.read_parts

    def watched(self: Location, parts: Any) -> list[bytes]:
        readers.append(threading.get_ident())
        return read(self, parts)

    monkeypatch.setattr(Location, "read_parts", watched)
    monkeypatch.setattr(cached_teacher, "_MOST_READY", 3)
    rows = range(12)
    for row in rows:
        cached.expect(blocks[row : row + 1])
    assert len(cached._ready) == 3
    for row in rows:
        assert len(answer(cached, blocks[row : row + 1])) == blocks[row : row + 1].kept.sum()
        assert len(cached._ready) == min(3, 11 - row)
    assert len(readers) == 12
    assert here not in readers


def test_announcements_that_were_never_meant_do_not_stop_the_others(
    cached: CachedTeacher, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_teacher, "_MOST_READY", 2)
    for row in range(8):
        cached.expect(blocks[row : row + 1])
    for row in range(4, 8):
        answer(cached, blocks[row : row + 1])
    assert len(cached._ready) + len(cached._waiting) <= 2
    cached.close()
    assert not cached._ready


def test_the_end_of_a_single_text_is_held_out_where_its_pieces_end(
    teacher: Path, tmp_path: Path
) -> None:
    file = tmp_path / "one.txt"
    file.write_text("".join(f"{n} small models answer sooner than {n * n}. " for n in range(300)))
    settings = TrainSettings(block_length=64, held_out_share=0.1)
    vocabulary = load_vocabulary(teacher)
    training, judged = read_blocks(file, None, vocabulary, settings)
    assert training.tokens + judged.tokens == pack(read_documents(file, vocabulary), 64).tokens
    made = distill.cache_targets(teacher, tmp_path / "t", texts=file, block_length=64)
    open_targets(made, vocabulary, texts=[("texts", training), ("held_out", judged)])


def test_a_block_without_a_position_that_counts_has_no_targets(
    cached: CachedTeacher, blocks: TokenBlocks
) -> None:
    silent = TokenBlocks(blocks.ids[:1], np.zeros_like(blocks.mask[:1]), blocks.documents[:1])
    assert len(answer(cached, silent)) == 0
    mixed = TokenBlocks(*(
        np.concatenate([getattr(silent, name), getattr(blocks, name)[:2]])
        for name in ("ids", "mask", "documents")
    ))  # fmt: skip
    assert torch.equal(answer(cached, mixed).ids, answer(cached, blocks[:2]).ids)


def test_text_that_the_teacher_was_not_asked_about_is_refused_by_number(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(
        chats.read_text("utf-8") + json.dumps({"text": "A wind that nobody has heard of."}) + "\n"
    )
    vocabulary = load_vocabulary(teacher)
    known, other = (pack(read_documents(file, vocabulary), 64) for file in (chats, more))
    with pytest.raises(TextError, match=r"1 of \d+ pieces of the held_out are not in the targets"):
        open_targets(targets, vocabulary, texts=[("texts", known), ("held_out", other)])
    longer = pack(read_documents(chats, vocabulary), 80)
    with pytest.raises(TextError, match="read blocks of 64 and these have 80"):
        open_targets(targets, vocabulary, texts=[("texts", longer)])


def test_another_temperature_is_refused(targets: Path, teacher: Path) -> None:
    with pytest.raises(SettingsError, match="cached at temperature 1 and not 2"):
        open_targets(targets, load_vocabulary(teacher), temperature=2.0)


def test_folders_that_hold_no_targets_are_refused(
    targets: Path, teacher: Path, tmp_path: Path
) -> None:
    vocabulary = load_vocabulary(teacher)
    with pytest.raises(FolderError, match="there are no targets in"):
        open_targets(tmp_path / "none", vocabulary)
    with pytest.raises(FolderError, match="is not a folder of targets"):
        open_targets(teacher, vocabulary)
    later = tmp_path / "later"
    shutil.copytree(targets, later)
    manifest = json.loads((later / "manifest.json").read_text())
    (later / "manifest.json").write_text(json.dumps({**manifest, "format": "mistill targets 9"}))
    with pytest.raises(FolderError, match="format is 'mistill targets 9'"):
        open_targets(later, vocabulary)
    (later / "manifest.json").unlink()
    (later / "plan.json").write_text("{}")
    with pytest.raises(FolderError, match="unfinished"):
        open_targets(later, vocabulary)


def test_a_damaged_shard_is_named_when_it_is_opened_or_read(
    targets: Path, teacher: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    vocabulary = load_vocabulary(teacher)
    copy = tmp_path / "copy"
    shutil.copytree(targets, copy)
    file = copy / "shard-00002.safetensors"
    content = file.read_bytes()
    named = r"shard-00002.safetensors of the targets in .* is damaged; remove it"
    file.write_bytes(content[:-1])
    with pytest.raises(FolderError, match=named):
        open_targets(copy, vocabulary)
    place = content.index(b'"shape"') + 400  # among the keys
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(FolderError, match=named):
        open_targets(copy, vocabulary)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cached = open_targets(copy, vocabulary)
    cached.expect(blocks)
    with pytest.raises(FolderError, match=named):
        answer(cached, blocks)
    # A sound shard that is not the one it says it is.
    shutil.copyfile(copy / "shard-00001.safetensors", file)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][file.name] = manifest["files"]["shard-00001.safetensors"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match=named):
        open_targets(copy, vocabulary)


def test_the_fingerprint_is_that_of_what_was_said(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path, cached: CachedTeacher
) -> None:
    assert open_targets(targets, load_vocabulary(teacher)).fingerprint == cached.fingerprint
    other = distill.cache_targets(
        teacher, tmp_path / "t", texts=chats, block_length=64, shard_tokens=400, draws=254
    )
    assert open_targets(other, load_vocabulary(teacher)).fingerprint != cached.fingerprint
