"""Targets from folder to folder: what is kept, who may write, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
import quantize
from distill.settings import TargetSettings
from distill.targets.cached_teacher import CachedTeacher, open_targets
from distill.targets.draws import uniform_numbers
from distill.targets.shards import find_pieces, piece_document
from distill.teacher.teacher import LiveTeacher
from mistill.cli.app import main
from mistill.errors import FolderError, SettingsError, TargetExistsError, TextError
from mistill.folders.lineage import read_lineage
from mistill.folders.location import Location, location_of
from mistill.folders.targets_folder import describe_targets
from mistill.loss.batches import make_batch
from mistill.loss.targets import SampledTargets, TopKTargets
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from tests.reference import targets as reference
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {"block_length": 64, "shard_tokens": 400, "draws": 20}


def files(folder: Path) -> dict[str, bytes]:
    """All that does not tell when and by whom it was written."""
    return {
        item.name: item.read_bytes() for item in folder.iterdir() if item.name != "lineage.json"
    }


def blocks_of(texts: Path | Sequence[Path], model: Path, block_length: int = 64) -> TokenBlocks:
    return pack(read_documents(texts, load_vocabulary(model)), block_length)


def opened(folder: Path | str, model: Path) -> CachedTeacher:
    return open_targets(folder, load_vocabulary(model))


def answer(teacher: CachedTeacher, blocks: TokenBlocks) -> SampledTargets:
    found = teacher.targets(blocks, make_batch(blocks, torch.device("cpu")))
    assert isinstance(found, SampledTargets)
    return found


@pytest.fixture(scope="module")
def targets(teacher: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of the chats, by one process; read only."""
    target = tmp_path_factory.mktemp("targets") / "targets"
    made = distill.cache_targets(teacher, target, texts=chats, **SMALL)
    assert made == target
    return target


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "gptq", "nf4"])
def test_what_is_kept_is_drawn_from_what_the_teacher_says_of_each_document_alone(
    form: str, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    folder = teacher
    if form == "gptq":
        folder = quantize.to_rounding(teacher, tmp_path / "gptq", group_size=32)
    elif form == "nf4":
        folder = quantize.to_nf4(teacher, tmp_path / "nf4")
    made = distill.cache_targets(folder, tmp_path / "t", texts=chats, temperature=1.5, **SMALL)
    cached = open_targets(made, load_vocabulary(folder), temperature=1.5)
    model = load_pytorch(folder)
    whole = blocks_of(chats, folder)
    for row in (0, 3):
        part = whole[row : row + 1]
        told = answer(cached, part)
        at = 0
        for piece in find_pieces(part):
            ids = torch.from_numpy(part.ids[:1, piece.start : piece.stop])
            with torch.inference_mode():
                logits = model(ids).logits[0]
            kept = part.kept[0, piece.start : piece.stop]
            u = uniform_numbers(piece.key, 0, piece.positions, 1)
            for number, column in enumerate(np.flatnonzero(kept)):
                p = torch.softmax(logits[column].double() / 1.5, dim=-1)
                expected = reference.systematic_counts(p.tolist(), u[number, 0], 20)
                found = dict(
                    zip(told.ids[at].tolist(), (told.weights[at] * 20).tolist(), strict=True)
                )
                # A height that falls between two tokens may fall to either by rounding.
                off = sum(abs(found.get(t, 0) - expected[t]) for t in expected | found.keys())
                assert off <= 2.001
                entropy = torch.distributions.Categorical(probs=p).entropy().item()
                assert told.entropy[at].item() == pytest.approx(entropy, abs=2e-3)
                at += 1
        assert at == len(told)


def test_almost_no_draw_is_left_to_rounding(targets: Path, teacher: Path, chats: Path) -> None:
    # Batches of another shape change the last bits of the logits, and hardly a draw.
    other = targets.parent / "other"
    distill.cache_targets(teacher, other, texts=chats, batch_size=1, **SMALL)
    blocks = blocks_of(chats, teacher)
    one, two = answer(opened(targets, teacher), blocks), answer(opened(other, teacher), blocks)
    assert (one.ids == two.ids).double().mean() > 0.999


def test_the_most_probable_tokens_are_kept_with_their_probabilities(
    teacher: Path, chats: Path, tmp_path: Path
) -> None:
    made = distill.cache_targets(
        teacher, tmp_path / "t", texts=chats, method="top_k", top_k=8, block_length=64
    )
    blocks = blocks_of(chats, teacher)[:2]
    batch = make_batch(blocks, torch.device("cpu"))
    told = opened(made, teacher).targets(blocks, batch)
    assert isinstance(told, TopKTargets)
    dense = LiveTeacher(load_pytorch(teacher)).targets(blocks, batch)
    buffers = torch.empty((2, len(dense), dense.vocabulary_size))
    p = dense.log_probabilities(slice(None), 1.0, buffers[0], buffers[1]).exp()
    expected = p.topk(8, dim=-1)
    assert told.ids.tolist() == expected.indices.tolist()
    # 16-bit floats have 11 bits
    torch.testing.assert_close(told.probabilities, expected.values, rtol=2**-11, atol=2**-25)


def test_both_ways_of_drawing_have_the_distribution_as_their_mean(
    teacher: Path, chats: Path, tmp_path: Path
) -> None:
    lines = chats.read_text("utf-8").splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text(lines[0] + "\n")
    blocks = blocks_of(few, teacher)
    batch = make_batch(blocks, torch.device("cpu"))
    dense = LiveTeacher(load_pytorch(teacher)).targets(blocks, batch)
    buffers = torch.empty((2, len(dense), dense.vocabulary_size))
    p = dense.log_probabilities(slice(None), 1.0, buffers[0], buffers[1]).exp()
    errors = {}
    for method in ("systematic", "multinomial"):
        total = torch.zeros_like(p)
        apart = 0.0
        for seed in range(25):
            made = distill.cache_targets(
                teacher, tmp_path / method, texts=few, method=method, seed=seed, overwrite=True,
                block_length=64,
            )  # fmt: skip
            told = answer(opened(made, teacher), blocks)
            share = torch.zeros_like(p).scatter_add_(1, told.ids, told.weights)
            total += share
            apart += (share - p).square().sum().item() / 25
        errors[method] = apart
        # The mean of 25 is 25 times nearer.
        assert (total / 25 - p).square().sum().item() < 1.3 * apart / 25
    assert errors["systematic"] < 0.8 * errors["multinomial"]


def test_order_batches_and_packing_may_change_afterwards(
    targets: Path, teacher: Path, chats: Path
) -> None:
    cached = opened(targets, teacher)
    straight = blocks_of(chats, teacher)
    documents = [piece_document(straight, piece) for piece in find_pieces(straight)]
    other = pack(documents[::-1], 150)
    cached.require(other)

    def by_document(blocks: TokenBlocks, count: int) -> dict[bytes, list[Any]]:
        found = {}
        for start in range(0, len(blocks), count):
            part = blocks[start : start + count]
            told = answer(cached, part)
            at = 0
            for piece in find_pieces(part):
                rows = slice(at, at + piece.positions)
                found[piece.key] = [
                    [pair for pair in zip(ids, weights, strict=True) if pair[1] > 0]
                    for ids, weights in zip(
                        told.ids[rows].tolist(), told.weights[rows].tolist(), strict=True
                    )
                ]
                at += piece.positions
        return found

    assert by_document(straight, 2) == by_document(other, 5)


def test_the_same_piece_twice_is_kept_once(teacher: Path, chats: Path, tmp_path: Path) -> None:
    once = distill.cache_targets(teacher, tmp_path / "once", texts=chats, **SMALL)
    twice = distill.cache_targets(teacher, tmp_path / "twice", texts=[chats, chats], **SMALL)
    assert files(Path(once)) == files(Path(twice))


def test_the_folder_says_what_it_is(targets: Path, teacher: Path, chats: Path) -> None:
    info = describe_targets(location_of(targets))
    blocks = blocks_of(chats, teacher)
    pieces = {piece.key: piece for piece in find_pieces(blocks)}.values()
    assert info.pieces == len(pieces)
    assert info.positions == sum(piece.positions for piece in pieces)
    assert info.tokens == sum(piece.stop - piece.start for piece in pieces)
    assert info.shards == len(list(targets.glob("shard-*"))) > 4
    assert info.size_bytes == sum(item.stat().st_size for item in targets.iterdir())
    told = [answer(opened(targets, teacher), blocks)]
    mean = torch.cat([part.entropy for part in told]).double().mean().item()
    assert info.mean_entropy == pytest.approx(mean, rel=0.05)  # equal pieces count once
    assert info.teacher["name"] == "teacher"
    (entry,) = read_lineage(targets)
    assert (entry["step"], entry["settings"]["draws"]) == ("targets", 20)


# --- who writes, and what a kill leaves ---------------------------------------------------------

# A fresh process that forks: importing torch once is what takes the time. A child that is to be
# killed stops of itself a little later, so that it cannot get away however busy the machine is.
FORKING = """
import json, os, random, signal, sys, time
import torch, accelerate.utils, safetensors.numpy
from transformers import LlamaForCausalLM, MistralForCausalLM
import mistill.loss.batches, mistill.loss.losses, distill.teacher.teacher
from distill.targets.targets_folder import Location, cache_targets
torch.set_num_threads(1)
teacher, texts, folder, kills, options = *sys.argv[1:5], json.loads(sys.argv[5])
write = Location.write

def child(target, doomed_after=None, **environment):
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.environ.update(environment)
    written = 0

    def counted(self, name, content):
        nonlocal written
        if written == doomed_after:
            os.write(writing, b"x")
        if written == doomed_after + 2:
            signal.pause()
        time.sleep(0.02)
        write(self, name, content)
        written += 1

    if doomed_after is not None:
        Location.write = counted
    cache_targets(teacher, os.path.join(folder, target), texts=texts, **options)
    os._exit(0)

def code(process):
    return os.waitstatus_to_exitcode(os.waitpid(process[0], 0)[1])

assert code(child("one")) == 0
random.seed(0)
killed = 0
for _ in range(int(kills)):
    process = child("killed", doomed_after=random.randint(0, 60 // int(kills)))
    if os.read(process[1], 1):  # else it had nothing left to write
        time.sleep(random.uniform(0, 0.06))
        os.kill(process[0], signal.SIGKILL)
    killed += code(process) == -signal.SIGKILL
if not os.path.exists(os.path.join(folder, "killed", "manifest.json")):
    assert code(child("killed")) == 0
ranks = [child("two", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
assert [code(process) for process in ranks] == [0, 0]
print(killed)
"""


def fork(teacher: Path, texts: Path, folder: Path, kills: int) -> int:
    """Cache in one process, in one that is killed and resumed, and in two; how many kills hit."""
    # A file for every piece or two, so that kills find something to interrupt.
    options = json.dumps({**SMALL, "shard_tokens": 40})
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", FORKING, teacher, texts, folder, str(kills), options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def forked(teacher: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forked")
    assert fork(teacher, chats, folder, kills=3) == 3
    return folder


def test_a_run_that_is_killed_ends_with_the_same_bytes(forked: Path) -> None:
    assert len(files(forked / "one")) > 20
    assert files(forked / "killed") == files(forked / "one")


def test_two_launched_processes_write_what_one_writes(forked: Path) -> None:
    assert files(forked / "two") == files(forked / "one")


@pytest.mark.slow
def test_twenty_kills_change_nothing(teacher: Path, chats: Path, tmp_path: Path) -> None:
    assert fork(teacher, chats, tmp_path / "forked", kills=20) >= 10
    assert files(tmp_path / "forked" / "killed") == files(tmp_path / "forked" / "one")


def test_machines_without_a_launcher_share_the_work_by_rank(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "t"
    with caplog.at_level(logging.INFO, "distill.targets.targets_folder"):
        distill.cache_targets(teacher, target, texts=chats, rank=1, ranks=3, **SMALL)
    shards = sorted(targets.glob("shard-*"))
    assert sorted(item.name for item in target.iterdir()) == sorted(
        ["plan.json", *(item.name for item in shards[1::3])]
    )
    assert f"{len(shards[1::3])} of {len(shards)} shards" in caplog.text
    with pytest.raises(FolderError, match="unfinished"):
        opened(target, teacher)
    for rank in (2, 0):
        distill.cache_targets(teacher, target, texts=chats, rank=rank, ranks=3, **SMALL)
    assert files(target) == files(targets)
    # A rank that comes late finds all done.
    distill.cache_targets(teacher, target, texts=chats, rank=1, ranks=3, **SMALL)
    assert files(target) == files(targets)


def test_a_damaged_or_missing_shard_is_made_again(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "t"
    shutil.copytree(targets, target)
    (target / "manifest.json").unlink()
    (target / "shard-00002.safetensors").unlink()
    damaged = target / "shard-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (target / ".shard-00002.safetensors.abc.partial").write_bytes(b"left by a kill")
    written = []
    write = Location.write

    def watched(self: Location, file: str, content: bytes) -> None:
        written.append(file)
        write(self, file, content)

    monkeypatch.setattr(Location, "write", watched)
    distill.cache_targets(teacher, target, texts=chats, **SMALL)
    assert [name for name in written if name.startswith("shard")] == [
        "shard-00002.safetensors",
        "shard-00004.safetensors",
    ]
    assert files(target) == files(targets)


def test_any_file_system_that_fsspec_knows_will_do(
    targets: Path, teacher: Path, chats: Path
) -> None:
    address = "memory://bucket/targets"
    assert distill.cache_targets(teacher, address, texts=chats, **SMALL) == address
    location = location_of(address)
    assert {
        name: location.read(name) for name in location.names() if name != "lineage.json"
    } == files(targets)
    blocks = blocks_of(chats, teacher)[:4]
    one, two = answer(opened(address, teacher), blocks), answer(opened(targets, teacher), blocks)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.weights, two.weights)
    with pytest.raises(TargetExistsError):
        distill.cache_targets(teacher, address, texts=chats, **SMALL)


# --- what is refused ----------------------------------------------------------------------------


def test_finished_targets_are_kept_unless_they_are_to_be_overwritten(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    target = tmp_path / "t"
    shutil.copytree(targets, target)
    with pytest.raises(TargetExistsError, match="exists already"):
        distill.cache_targets(teacher, target, texts=chats, **SMALL)
    other = {**SMALL, "seed": 1, "shard_tokens": 4000}
    distill.cache_targets(teacher, target, texts=chats, overwrite=True, **other)
    again = distill.cache_targets(teacher, tmp_path / "fresh", texts=chats, **other)
    assert files(target) == files(Path(again))


def test_unfinished_targets_of_another_kind_are_refused_by_what_differs(
    teacher: Path, model: Path, chats: Path, tmp_path: Path
) -> None:
    target = tmp_path / "t"
    begun = {**SMALL, "rank": 0, "ranks": 2}
    distill.cache_targets(teacher, target, texts=chats, **begun)
    lines = chats.read_text("utf-8").splitlines()[:20]
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(lines))
    for source, texts, options, word in (
        (teacher, chats, {"draws": 30}, "draws 30 instead of 20"),
        (teacher, chats, {"codec": "coded"}, "codec coded instead of plain"),
        (model, chats, {}, "another teacher"),
        (teacher, half, {}, "another text"),
    ):
        with pytest.raises(FolderError, match=f"holds unfinished targets, .*{word}"):
            distill.cache_targets(source, target, texts=texts, **{**begun, **options})
    distill.cache_targets(teacher, target, texts=chats, overwrite=True, **SMALL | {"seed": 3})
    assert opened(target, teacher).positions > 0


def test_a_folder_of_something_else_is_never_overwritten(
    teacher: Path, model: Path, chats: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    for overwrite in (False, True):
        with pytest.raises(FolderError):
            distill.cache_targets(teacher, copy, texts=chats, overwrite=overwrite)
    assert sorted(item.name for item in copy.iterdir()) == sorted(
        item.name for item in model.iterdir()
    )


def test_what_cannot_be_cached_is_refused_before_the_teacher_is_loaded(
    teacher: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.targets import targets_folder as caching

    def never(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(caching, "_load_teacher", never)
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"text": "a"}) + "\n")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SettingsError, "does not fit the teacher's context of 512", {"block_length": 1000}),
        (SettingsError, "remove it before", {"ranks": 2, "rank": 0, "overwrite": True}),
        (TextError, "there is no file", {"texts": tmp_path / "none.jsonl"}),
        (TextError, "nothing to be predicted", {"texts": silent}),
        (SettingsError, "no option tokens", {"tokens": 3}),
    ]
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            distill.cache_targets(teacher, tmp_path / "t", **{"texts": chats, **options})
    with pytest.raises(FolderError):
        distill.cache_targets(tmp_path / "none", tmp_path / "t", texts=chats)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "random"},
        {"codec": "zip"},
        {"precision": "float16"},
        {"draws": 0},
        {"draws": 256},
        {"top_k": 0},
        {"shard_tokens": 0},
        {"shard_tokens": 2**23},
        {"batch_size": 0},
        {"block_length": 1},
        {"temperature": 0.0},
        {"memory_mib": 0.0},
        {"seed": -1},
        {"method": "top_k", "codec": "coded"},
        {"rank": 0},
        {"rank": 0, "ranks": 0},
        {"ranks": 2, "rank": 2},
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=list(options)[-1]):
        TargetSettings(**options)


# --- from the shell -----------------------------------------------------------------------------


def test_the_command_makes_targets_and_counts_every_byte(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t"
    words = ["--block-length", "64", "--shard-tokens", "400", "--draws", "20", "--json"]
    assert main(["targets", str(teacher), str(target), "--texts", str(chats), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    size = sum(item.stat().st_size for item in target.iterdir())
    assert facts["finished"]
    assert facts["size_bytes"] == size
    assert facts["bytes_per_position"] == pytest.approx(size / facts["positions"], abs=1e-3)
    assert "bytes a position" in lines[0]
    assert files(target) == files(targets)


def test_the_command_says_when_other_ranks_are_at_work(
    teacher: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shard-tokens", "400", "--rank", "0", "--ranks", "2", "--json"]
    assert main(["targets", str(teacher), str(tmp_path / "t"), "--texts", str(chats), *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] is False


def test_inspect_shows_targets_and_names_a_damaged_file(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "t"
    shutil.copytree(targets, copy)
    assert main(["inspect", str(copy), "--json"]) == 0
    said = capsys.readouterr().out
    assert "20 systematic draws" in said
    assert json.loads(said.splitlines()[-1])["targets"]["settings"]["draws"] == 20
    file = copy / "shard-00001.safetensors"
    content = file.read_bytes()
    for changed, words in (
        (content[:-1] + bytes([content[-1] ^ 1]), "shard-00001.safetensors is damaged"),
        (content[:-1], f"has {len(content) - 1} bytes"),
        (None, "shard-00001.safetensors is missing"),
    ):
        file.unlink() if changed is None else file.write_bytes(changed)
        assert words in inspected(copy, capsys)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace("targets 1", "targets 2"))
    assert "format is 'mistill targets 2'" in inspected(copy, capsys)
    (copy / "manifest.json").write_text(manifest[:50])
    assert "manifest.json" in inspected(copy, capsys)
    (copy / "manifest.json").rename(copy / "plan.json")
    assert "unfinished" in inspected(copy, capsys)


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one problem of a folder."""
    assert main(["inspect", str(folder), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    return str(problem)


def test_a_recipe_goes_on_with_targets_that_were_interrupted(
    targets: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    from mistill.recipe import read_recipe, run_recipe

    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[targets]\nteacher = "{teacher}"\ntexts = "{chats}"\nblock_length = 64\n'
        "shard_tokens = 400\ndraws = 20\n"
    )
    out = tmp_path / "out"
    run_recipe(read_recipe(recipe, out=out))
    assert files(out / "targets") == files(targets)
    state = json.loads((out / ".recipe-state.json").read_text())
    # As a kill leaves it: the step has begun, and the manifest is not there.
    (out / ".recipe-state.json").write_text(
        json.dumps({"targets": {"started": state["targets"]["key"]}})
    )
    (out / "targets" / "manifest.json").unlink()
    (out / "targets" / "shard-00001.safetensors").unlink()
    run_recipe(read_recipe(recipe, out=out))
    assert files(out / "targets") == files(targets)
    before = {item: item.stat().st_mtime_ns for item in (out / "targets").iterdir()}
    run_recipe(read_recipe(recipe, out=out))
    assert {item: item.stat().st_mtime_ns for item in (out / "targets").iterdir()} == before


def test_a_student_of_another_template_is_refused(
    targets: Path, teacher: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    from mistill.errors import VocabularyError

    with pytest.raises(VocabularyError, match="chat template is not that of teacher"):
        opened(targets, other)


def test_a_student_with_other_tokens_of_the_same_number_is_refused(
    targets: Path, teacher: Path, tmp_path: Path
) -> None:
    from mistill.errors import VocabularyError

    other = tiny_model(tmp_path / "other", seed=3)
    definition = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = definition["model"]["vocab"]
    one, two = (token for token, number in vocabulary.items() if number in (70, 71))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(VocabularyError, match="ids stand for different tokens"):
        opened(targets, other)
