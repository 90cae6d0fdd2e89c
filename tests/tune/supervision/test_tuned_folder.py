"""Supervised tuning from folder to folder: what is published, what resumes, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantize
import tune
from mistill.errors import (
    ArchitectureError,
    FolderError,
    MistillError,
    SettingsError,
    TargetExistsError,
    TextError,
    TrainingError,
)
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from mistill.training import loop
from tests.reference import supervised as reference
from tests.tiny import SENTENCES, changed_config, tiny_model
from tune.supervision import trainer, tuned_folder
from tune.trainers import merged_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

QUICK: dict[str, Any] = {
    "block_length": 128,
    "batch_size": 2,
    "learning_rate": 5e-3,
    "epochs": 1,
    "held_out_share": 0.2,
    "evaluate_every": 4,
    "checkpoint_every": 2,
    "lora_rank": 4,
    "reply_tokens": 12,
}
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
)
IDS = torch.arange(40)[None] + 7


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, model: Path, chats: Path) -> Path:
    target = tmp_path_factory.mktemp("tuned") / "model"
    return tune.supervised(model, target, texts=chats, **QUICK)


def report_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "tuning_report.json").read_text("utf-8"))
    return read


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return logits


def hidden_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- what is published --------------------------------------------------------------------------


def test_the_report_says_what_the_folders_say_when_they_are_measured_again(
    tmp_path: Path, tuned: Path, model: Path, chats: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(chats.read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    made = tune.supervised(model, tmp_path / "out", texts=chats, held_out=held, **QUICK)
    report = report_of(made)
    documents = list(read_documents(held, load_vocabulary(model)))
    for name, folder in (("before", model), ("after", made)):
        expected = reference.loss(load_pytorch(folder), documents).item()
        assert report[name]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert report["after"]["cross_entropy"] < report["before"]["cross_entropy"] - 1
    assert report["trained_after"] == pytest.approx(report["after"]["cross_entropy"], rel=1e-5)
    assert report["kl"]["tokens"] == sum(int(document.mask.sum()) for document in documents)
    assert report["rows"] == 40

    kept = pack(documents, 128)
    log_p: list[torch.Tensor] = []
    log_q: list[torch.Tensor] = []
    for folder, into in ((model, log_p), (made, log_q)):
        one: Any = load_pytorch(folder)
        with torch.no_grad():
            said = one(
                torch.tensor(kept.ids),
                position_ids=torch.tensor(kept.position_ids),
                use_cache=False,
            ).logits
        into.append(said[torch.tensor(kept.kept)].double().log_softmax(-1))
    (p,), (q,) = log_p, log_q
    there, back = ((a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p)))
    assert report["kl"]["base_from_tuned"] == pytest.approx(there, rel=1e-4)
    assert report["kl"]["tuned_from_base"] == pytest.approx(back, rel=1e-4)
    nats = [
        -log.gather(1, torch.tensor(kept.ids[:, 1:][kept.kept[:, :-1]])[:, None])[:, 0].numpy()
        for log in (p, q)
    ]
    blocks = np.repeat(np.arange(len(kept)), kept.kept.sum(axis=1))
    gaps = np.array([(nats[1] - nats[0])[blocks == b].sum() for b in range(len(kept))])
    sizes = np.bincount(blocks)
    spread = gaps - gaps.sum() / sizes.sum() * sizes
    error = np.sqrt(len(kept) / (len(kept) - 1) * np.square(spread).sum()) / sizes.sum()
    assert report["change_standard_error"] == pytest.approx(error, rel=1e-4)


def test_companions_and_config_are_those_of_the_model_that_came(tuned: Path, model: Path) -> None:
    for name in (*COMPANIONS, "config.json"):
        assert (tuned / name).read_bytes() == (model / name).read_bytes(), name
    assert same_vocabulary(load_vocabulary(model), load_vocabulary(tuned)) == []
    facts = read_lineage(tuned)[-1]
    assert facts["step"] == "supervised"
    assert facts["source_fingerprint"] == fingerprint(model)
    assert facts["after"] == report_of(tuned)["after"]
    assert open_folder(tuned).form == "model"


def test_the_adapter_beside_the_model_is_the_model_on_its_base(tuned: Path, model: Path) -> None:
    from peft import PeftModel

    files = {path.name for path in (tuned / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == model.name
    theirs: Any = PeftModel.from_pretrained(load_pytorch(model), str(tuned / "adapter"))
    expected = logits_of(load_pytorch(tuned))
    torch.testing.assert_close(logits_of(theirs), expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(load_pytorch(model)) - expected).abs().max() > 0.1


def test_only_the_seven_matrices_move_and_nearly_every_entry_of_them_does(
    tuned: Path, model: Path
) -> None:
    before, after = weights(model), weights(tuned)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    changed = sum(int((before[name] != after[name]).sum()) for name in moved)
    entries = sum(before[name].numel() for name in moved)
    report = report_of(tuned)
    assert report["entries"] == entries
    assert report["entries_moved"] == pytest.approx(changed / entries)
    assert report["entries_moved"] > 0.99


def test_a_tuned_model_ends_its_reply_where_the_conversations_do(
    tmp_path: Path, model: Path
) -> None:
    """The end of turn is learnt, also where it is the padding token."""
    folder = changed_config(model, tmp_path / "padded", pad_token_id=4)
    rows = tmp_path / "rows.jsonl"
    turns = [
        [
            {"role": "user", "content": f"{SENTENCES[n % 6]} {n}"},
            {"role": "assistant", "content": "Yes."},
        ]
        for n in range(40)
    ]
    rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    options = {**QUICK, "epochs": 4, "lora_rank": 0, "learning_rate": 3e-3}
    made = tune.supervised(folder, tmp_path / "out", texts=rows, **options)
    replies = report_of(made)["replies"]
    assert len(replies) == 3
    for reply in replies:
        assert reply["after"] == "Yes."
        assert reply["before"] != "Yes."
        assert reply["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dora": True}, torch.float32),
        ({"lora_start": "pissa", "learning_rate": 1e-3}, torch.float32),
        ({"rslora": True, "lora_ranks": ("down_proj=6",), "lora_targets": ("down_proj",)},
         torch.bfloat16),
    ],
    ids=["dora", "pissa", "rslora-bfloat16"],
)  # fmt: skip
def test_every_variant_is_merged_to_what_its_adapter_says(
    tmp_path: Path, model: Path, chats: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    from peft import PeftModel

    folder = model
    if dtype != torch.float32:
        folder = tmp_path / "low"
        shutil.copytree(model, folder)
        low: Any = load_pytorch(model, dtype)
        low.save_pretrained(folder)
    made = tune.supervised(folder, tmp_path / "out", texts=chats, **{**QUICK, **options})
    assert {tensor.dtype for tensor in weights(made).values()} == {dtype}
    theirs: Any = PeftModel.from_pretrained(load_pytorch(folder), str(made / "adapter"))
    expected = logits_of(theirs)
    # A merged matrix is rounded once to the folder's own type.
    atol = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits_of(load_pytorch(made)), expected, rtol=1e-3, atol=atol)
    assert (
        report_of(made)["after"]["cross_entropy"] < report_of(made)["before"]["cross_entropy"] - 0.3
    )


def test_all_weights_are_trained_without_adapters(tmp_path: Path, model: Path, chats: Path) -> None:
    options = {**QUICK, "lora_rank": 0, "learning_rate": 1e-3}
    made = tune.supervised(model, tmp_path / "out", texts=chats, **options)
    assert not (made / "adapter").exists()
    before, after = weights(model), weights(made)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    for name in COMPANIONS:
        assert (made / name).read_bytes() == (model / name).read_bytes()
    ours, theirs = (json.loads((one / "config.json").read_text()) for one in (made, model))
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"dtype"}
    assert report_of(made)["merged_into"] is None


# --- four bits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory: pytest.TempPathFactory, model: Path, chats: Path) -> Path:
    target = tmp_path_factory.mktemp("four-bits") / "model"
    return tune.supervised(model, target, texts=chats, base="nf4", **QUICK)


def test_of_both_ways_to_merge_the_one_that_the_text_costs_less_is_taken(
    in_four_bits: Path, model: Path, chats: Path
) -> None:
    report = report_of(in_four_bits)
    assert report["merges"].keys() == {"float", "dequantized"}
    assert report["merges"][report["merged_into"]] == min(report["merges"].values())
    assert report["after"]["cross_entropy"] == min(report["merges"].values())
    assert report["trained_after"] == pytest.approx(report["merges"]["dequantized"], rel=1e-4)
    assert report["trained_before"] != pytest.approx(report["before"]["cross_entropy"], rel=1e-3)
    facts = read_lineage(in_four_bits)[-1]
    assert facts["merges"] == report["merges"]
    assert facts["settings"]["base"] == "nf4"


def test_what_four_bits_stand_for_is_what_quantize_makes_of_a_matrix(
    tmp_path: Path, model: Path
) -> None:
    plain = quantize.dequantize(quantize.to_nf4(model, tmp_path / "nf4"), tmp_path / "plain")
    before, after = weights(model), weights(plain)
    for name, weight in before.items():
        if "_proj" in name:
            ours = merged_folder.through_four_bits(weight, torch.float32)
            torch.testing.assert_close(ours, after[name], rtol=0, atol=1e-7)


def test_a_folder_in_four_bits_is_tuned_and_merged_into_what_it_stands_for(
    tmp_path: Path, in_four_bits: Path, model: Path, chats: Path
) -> None:
    small = quantize.to_nf4(model, tmp_path / "nf4")
    made = tune.supervised(small, tmp_path / "out", texts=chats, base="nf4", **QUICK)
    report = report_of(made)
    assert report["merged_into"] == "dequantized"
    assert report["after"]["cross_entropy"] == pytest.approx(report["trained_after"], rel=1e-4)
    assert report["before"]["cross_entropy"] == pytest.approx(report["trained_before"], rel=1e-4)
    # The same codes were trained over as where a float model was quantized while it was loaded.
    assert report["trained_after"] == pytest.approx(
        report_of(in_four_bits)["trained_after"], rel=1e-3
    )
    assert open_folder(made).form == "model"


# --- interruption -------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of ours catches."""


def kill_when(
    patch: pytest.MonkeyPatch, home: Any, name: str, calls: int, after: bool = True
) -> None:
    original: Callable[..., Any] = getattr(home, name)
    count = 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls and not after:
            raise Killed
        result = original(*args, **options)
        if count == calls:
            raise Killed
        return result

    patch.setattr(home, name, dying)


SLOW = pytest.mark.slow
EVERYTHING = {**QUICK, "base": "nf4", "neftune": 5.0, "optimizer": "adamw_8bit"}
PISSA = {**QUICK, "lora_start": "pissa", "learning_rate": 1e-3, "gradient_checkpointing": True}
WHOLE = {**QUICK, "lora_rank": 0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, model: Path, chats: Path
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("undisturbed")
    ways = {"everything": EVERYTHING, "pissa": PISSA, "whole": WHOLE}
    return {
        name: tune.supervised(model, home / name, texts=chats, **options)
        for name, options in ways.items()
    }


def assert_same_run(resumed: Path, undisturbed: Path) -> None:
    names = sorted(str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(resumed)) for p in resumed.rglob("*") if p.is_file())
    for name in names:
        if name not in ("lineage.json", "metrics.jsonl", "README.md"):
            assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    timed = ("tokens_per_second", "seconds")
    lines = []
    for folder in (resumed, undisturbed):
        entries = (folder / "metrics.jsonl").read_text().splitlines()
        lines.append([{k: v for k, v in json.loads(e).items() if k not in timed} for e in entries])
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("way", "options", "home", "name", "calls"),
    [
        ("everything", EVERYTHING, trainer, "accumulate_gradients", 5),
        pytest.param("everything", EVERYTHING, trainer, "held_out_cost", 2, marks=SLOW),
        pytest.param("everything", EVERYTHING, merged_folder, "merge_adapters", 1, marks=SLOW),
        ("everything", EVERYTHING, tuned_folder, "publish", 1),
        pytest.param("pissa", PISSA, trainer, "accumulate_gradients", 1, marks=SLOW),
        ("pissa", PISSA, trainer, "accumulate_gradients", 5),
        ("whole", WHOLE, loop, "save_checkpoint", 2),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    chats: Path,
    undisturbed: dict[str, Path],
    way: str,
    options: dict[str, Any],
    home: Any,
    name: str,
    calls: int,
) -> None:
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_when(patch, home, name, calls, after=name != "publish")
        with pytest.raises(Killed):
            tune.supervised(model, target, texts=chats, **options)
    assert not target.exists()
    assert hidden_beside(tmp_path) == [".out.working"]
    steps = []
    original: Any = trainer.__dict__["accumulate_gradients"]

    def counting(*arguments: Any) -> Any:
        steps.append(1)
        return original(*arguments)

    monkeypatch.setattr(trainer, "accumulate_gradients", counting)
    tune.supervised(model, target, texts=chats, **options)
    assert_same_run(target, undisturbed[way])
    assert hidden_beside(tmp_path) == []
    if calls > 1:
        assert len(steps) < read_lineage(target)[-1]["steps"], "it began again"


def test_a_checkpoint_beside_frozen_weights_holds_what_is_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, chats: Path
) -> None:
    with monkeypatch.context() as patch:
        kill_when(patch, trainer, "accumulate_gradients", 4)
        with pytest.raises(Killed):
            tune.supervised(model, tmp_path / "out", texts=chats, **QUICK)
    (checkpoint,) = (tmp_path / ".out.working").glob("checkpoint-2")
    assert not list(checkpoint.glob("pytorch_model*"))
    trained = load_file(checkpoint / "trained-0.safetensors")
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERYTHING, PISSA], ids=["everything", "pissa"])
def test_ten_kills_at_random_moments_change_no_bit(
    tmp_path: Path, model: Path, chats: Path, undisturbed: dict[str, Path], options: dict[str, Any]
) -> None:
    import random

    way = "everything" if options is EVERYTHING else "pissa"
    program = """
import json, os, signal, sys, threading
import torch
torch.set_num_threads(1)
import tune
from mistill.training import loop
model, target, texts, options, seconds = sys.argv[1:]
original = loop.load_checkpoint
def loading(*args):
    threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return original(*args)
loop.load_checkpoint = loading
tune.supervised(model, target, texts=texts, **json.loads(options))
os._exit(0)
"""
    moments = random.Random(0)
    kills = finished = 0
    while kills < 10 or not finished:
        target = tmp_path / f"out-{finished}"
        words = [model, target, chats, json.dumps(options), moments.uniform(0, 1.0)]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert done.returncode == 0, done.stderr
        assert_same_run(target, undisturbed[way])
        finished += 1


def test_settings_that_do_not_change_the_result_do_not_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, chats: Path
) -> None:
    def interrupt(options: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            kill_when(patch, trainer, "accumulate_gradients", 4)
            with pytest.raises(Killed):
                tune.supervised(model, tmp_path / "out", texts=chats, **options)

    interrupt(QUICK)
    with pytest.raises(SettingsError, match="lora_rank is 8 and was 4"):
        tune.supervised(model, tmp_path / "out", texts=chats, **{**QUICK, "lora_rank": 8})
    # Neither how much is computed at once nor when it is judged changes what is learnt.
    interrupt({**QUICK, "micro_batch_size": 2, "evaluate_every": 3, "gradient_checkpointing": True})
    tune.supervised(model, tmp_path / "out", texts=chats, **QUICK)


# --- the model that is kept ---------------------------------------------------------------------


def test_the_best_of_all_evaluations_is_kept_and_patience_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, chats: Path
) -> None:
    verdicts = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9])
    seen: list[dict[str, torch.Tensor]] = []

    def scripted(module: Any, *_: Any) -> tuple[float, int]:
        named = module.model.named_parameters()
        seen.append({name: p.detach().clone() for name, p in named if p.requires_grad})
        return next(verdicts), 10

    monkeypatch.setattr(trainer, "held_out_cost", scripted)
    options = {**QUICK, "epochs": 3, "evaluate_every": 2, "patience": 2}
    made = tune.supervised(model, tmp_path / "out", texts=chats, **options)
    facts = read_lineage(made)[-1]
    assert facts["kept_step"] == 4
    assert facts["steps"] == 8
    assert len(seen) == 5
    saved = load_file(made / "adapter" / "adapter_model.safetensors")
    for name, value in saved.items():
        inner = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(value, seen[2][inner]), name
        assert not torch.equal(value, seen[4][inner]), name


def test_a_run_without_patience_goes_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, chats: Path
) -> None:
    verdicts = iter([5.0, 4.0, *[6.0] * 30])
    monkeypatch.setattr(trainer, "held_out_cost", lambda *_: (next(verdicts), 10))
    made = tune.supervised(model, tmp_path / "out", texts=chats, **QUICK)
    facts = read_lineage(made)[-1]
    assert facts["kept_step"] == 4
    assert facts["steps"] > 12


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (30.0, r"no better: .* before and \d.* lower learning_rate .now 30."),
        (1e30, r"step \d .*lower learning_rate .now 1e\+30. or raise warmup"),
    ],
    ids=["worse", "no number"],
)
def test_a_model_that_got_no_better_is_a_failure_and_leaves_nothing(
    tmp_path: Path, model: Path, chats: Path, rate: float, words: str
) -> None:
    options = {**QUICK, "lora_rank": 0, "learning_rate": rate, "warmup": 0.0, "evaluate_every": 0}
    with pytest.raises(TrainingError, match=words):
        tune.supervised(model, tmp_path / "out", texts=chats, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_that_is_none_is_a_failure_that_keeps_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, chats: Path
) -> None:
    def spoiled(info: Any, adapters: Any, target: Path, **options: Any) -> None:
        merge(info, adapters, target, **options)
        tensors = weights(target)
        tensors["lm_head.weight"] = -10 * tensors["lm_head.weight"]
        from safetensors.torch import save_file

        save_file(tensors, target / "model.safetensors", {"format": "pt"})

    merge = merged_folder.merge_adapters
    monkeypatch.setattr(merged_folder, "merge_adapters", spoiled)
    with pytest.raises(TrainingError, match=r"the merged model is none.*is kept in"):
        tune.supervised(model, tmp_path / "out", texts=chats, **QUICK)
    assert not (tmp_path / "out").exists()
    kept = list((tmp_path / ".out.working").glob("best-*"))
    assert kept
    assert all((best / "adapter_model.safetensors").is_file() for best in kept)


# --- text ---------------------------------------------------------------------------------------


def conversation(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def test_prompts_do_not_leak_from_the_text_into_what_it_is_judged_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.settings import SupervisedSettings
    from tune.supervision.reading import read_texts

    rows = tmp_path / "rows.jsonl"
    pairs = [(f"Question {n % 10}?", f"Answer {n}.") for n in range(40)]
    rows.write_text("".join(conversation(*pair) for pair in pairs))
    vocabulary = load_vocabulary(model)
    settings = SupervisedSettings(block_length=128, held_out_share=0.3)
    reading = read_texts(rows, None, vocabulary, settings)
    sides = []
    for blocks in (reading.training, reading.judged):
        text = vocabulary.decode(blocks.ids[blocks.documents >= 0].tolist())
        sides.append({n for n in range(10) if f"Question {n}?" in text})
    assert sides[0] | sides[1] == set(range(10))
    assert sides[0] & sides[1] == set()
    assert len(sides[1]) >= 2


def test_prompts_of_the_held_out_text_that_are_also_learnt_are_warned_of(
    tmp_path: Path, model: Path, chats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tune.supervised(model, tmp_path / "out", texts=chats, held_out=chats, **QUICK)
    assert "40 of 40 held-out documents have a prompt that is also in the texts" in caplog.text


def test_long_conversations_are_refused_left_out_or_split(
    tmp_path: Path, model: Path, chats: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(chats.read_text("utf-8") + conversation("Much?", "Yes, much. " * 60), "utf-8")
    options = {**QUICK, "epochs": None, "tokens": 500}
    with pytest.raises(TextError, match=r"1 of 41 conversations .* block of 128 tokens.*leave_out"):
        tune.supervised(model, tmp_path / "out", texts=rows, **options)
    made = tune.supervised(
        model, tmp_path / "less", texts=rows, long_conversations="leave_out", **options
    )
    assert report_of(made)["rows_left_out"] == 1
    assert report_of(made)["rows"] == 41
    made = tune.supervised(
        model, tmp_path / "split", texts=rows, long_conversations="split", **options
    )
    assert report_of(made)["rows_left_out"] == 0


def test_plain_text_is_split_and_every_token_of_it_counts(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 30), "utf-8")
    made = tune.supervised(model, tmp_path / "out", texts=text, **QUICK)
    facts = read_lineage(made)[-1]
    assert facts["kept_positions"] > 0.98 * facts["tokens"]
    assert report_of(made)["replies"] == []


# --- what is refused ----------------------------------------------------------------------------


def of_form(form: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, home: Path) -> Path:
        if form == "gptq":
            return quantize.to_rounding(folder, home / "gptq", group_size=32)
        if form == "nf4":
            return quantize.to_nf4(folder, home / "nf4")
        made = home / "onnx"
        made.mkdir()
        shutil.copyfile(folder / "config.json", made / "config.json")
        (made / "genai_config.json").write_text("{}")
        (made / "model.onnx").write_bytes(b"")
        return made

    return make


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (of_form("gptq"), {}, FolderError, "holds gptq weights.*mistill quantize dequantize"),
        (of_form("nf4"), {}, FolderError, "holds nf4 weights.*set base to nf4"),
        (of_form("nf4"), {"lora_rank": 0}, FolderError, "holds nf4 weights"),
        (lambda f, h: h / "nowhere", {}, MistillError, "nowhere"),
        (
            lambda f, h: tiny_model(h / "tied", tie_word_embeddings=True),
            {"lora_targets": ("q_proj", "lm_head")},
            SettingsError,
            "head of .* is its embedding.*leave lm_head out",
        ),
        (
            lambda f, h: tiny_model(h / "odd", intermediate_size=96),
            {"base": "nf4"},
            ArchitectureError,
            "rows of a multiple of 64",
        ),
        (lambda f, h: f, {"lora_rank": 65}, ArchitectureError, "above 64.*no low rank"),
        (lambda f, h: f, {"block_length": 1000}, SettingsError, "does not fit .* context of 512"),
        (
            lambda f, h: tiny_model(h / "qwen", model_type="qwen2"),
            {},
            ArchitectureError,
            "reads llama and mistral only",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_tuned_so_is_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    chats: Path,
    make: Callable[[Path, Path], Path],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    folder = make(model, tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(tuned_folder, "_train_in", never)
    with pytest.raises(error, match=words) as caught:
        tune.supervised(folder, tmp_path / "out", texts=chats, **{**QUICK, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert hidden_beside(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "rows.jsonl"),
        ("not json\n", "line 1"),
        (conversation("What?", ""), "empty turn"),
        (json.dumps({"messages": [{"role": "user", "content": "What?"}]}) + "\n", "assistant"),
    ],
    ids=["empty", "broken", "empty answer", "no answer"],
)
def test_text_that_cannot_be_learnt_is_refused_at_once(
    tmp_path: Path, model: Path, rows: str, words: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    with pytest.raises(TextError, match=words) as caught:
        tune.supervised(model, tmp_path / "out", texts=file, **QUICK)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_target_that_exists_and_one_that_is_the_model_are_refused(
    tmp_path: Path, tuned: Path, model: Path, chats: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetExistsError):
        tune.supervised(model, tmp_path / "out", texts=chats, **QUICK)
    with pytest.raises(FolderError, match="is its own source"):
        tune.supervised(tuned, tuned, texts=chats, overwrite=True, **QUICK)


def test_a_tuned_folder_is_ours_to_replace(
    tmp_path: Path, tuned: Path, model: Path, chats: Path
) -> None:
    target = tmp_path / "out"
    shutil.copytree(tuned, target)
    options = {**QUICK, "tokens": 500, "epochs": None}
    tune.supervised(model, target, texts=chats, overwrite=True, **options)
    assert read_lineage(target)[-1]["tokens"] < 900
    (target / "adapter" / "diary.txt").write_text("mine")
    with pytest.raises(FolderError, match="holds adapter, which no step of mistill wrote"):
        tune.supervised(model, target, texts=chats, overwrite=True, **options)
