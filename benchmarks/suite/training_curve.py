"""How far training brings a student that was cut and healed, and a rival from the same cut.

    python -m benchmarks.suite.training_curve TEACHER --layers 22 --heal-texts TEXT ...

A student is cut once, and once healed in closed form. From the healed start it learns from each
number of tokens, every run with a learning-rate schedule of its own; those that ``--more-seeds``
names with other seeds too. From the start that was not healed TRL's GKDTrainer (off-policy,
forward KL, its own collator) learns for as many seconds of processor time as the longest of these
runs took, healing included, and with ``--unhealed`` mistill from as many tokens, with as many
seeds as it says. All are judged on the same held-out texts, of which some should be of a kind that
nobody was healed or trained on. Every run is a process of its own, whose processor time is counted
from its first step on, the reading of models left out; a run whose record lies in ``--work``
already is not done again. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import distill
from benchmarks.suite.healing import figures_of, held_out_blocks, predictions_of
from mistill.errors import SettingsError
from mistill.folders.json_text import read_json_file
from mistill.folders.publishing import write_json
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import load_vocabulary

_WARMUP = 0.1
# TRL's rate, and ours from a start that was not healed.
_RATE = 3e-4
_ROWS_OF_A_STEP = 4


def learning_rate(share: float, peak: float) -> float:
    """The learning rate of a schedule that is measured in shares of a budget.

    Args:
        share: Share of the budget that is spent, 0 to 1.
        peak: The highest rate.

    Returns:
        It rises for a tenth of the budget and falls along half a cosine, as ours does.
    """
    if share < _WARMUP:
        return peak * max(share, 0.01) / _WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - _WARMUP) / (1 - _WARMUP))))


def train_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Train with mistill.

    Args:
        args: The command line of a child.

    Returns:
        Tokens, and seconds of processor time.
    """
    started = time.process_time()
    trained = distill.train(
        args.student,
        args.target,
        teacher=args.teacher,
        texts=args.texts,
        held_out=args.held_out[0],
        tokens=args.tokens[0],
        block_length=args.block_length,
        batch_size=1,
        held_out_tokens=4 * args.block_length,
        evaluate_every=0,
        checkpoint_every=0,
        seed=args.seed,
    )
    assert trained == Path(args.target)
    return {"tokens": args.tokens[0], "processor_seconds": time.process_time() - started}


def train_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL until the processor time is spent.

    Args:
        args: The command line of a child.

    Returns:
        Tokens of text that were read, and seconds of processor time.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from mistill.pytorch.loading import load_pytorch
    from mistill.text.rows import read_rows

    spent = {"begun": 0.0, "tokens": 0.0}
    budget = float(args.processor_seconds)

    def share() -> float:
        return (time.process_time() - spent["begun"]) / budget

    class Budget(TrainerCallback):
        """Sets the rate by the processor time that is spent, and stops when all of it is."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            spent["begun"] = time.process_time()

        def on_step_begin(self, *_: Any, **of: Any) -> None:
            for group in of["optimizer"].param_groups:
                group["lr"] = learning_rate(share(), _RATE)

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            control.should_training_stop = share() >= 1

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # TRL ends where an answer leaves no room for its prompt.
    rows = [
        {"messages": row.value["messages"]}
        for row in read_rows(args.texts[0])
        if "messages" in row.value
        and len(tokenizer.apply_chat_template(row.value["messages"], return_dict=False))
        <= args.block_length
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            learning_rate=_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            max_length=args.block_length,
            per_device_train_batch_size=_ROWS_OF_A_STEP,
            num_train_epochs=100,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=args.seed,
        )
        student = load_pytorch(args.student)
        trainer = GKDTrainer(
            model=student,
            teacher_model=load_pytorch(args.teacher),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Budget()],
        )
        collate = trainer.data_collator

        def counted(batch: Any) -> Any:
            found = collate(batch)
            spent["tokens"] += int(found["attention_mask"].sum())
            return found

        trainer.data_collator = counted
        trainer.train()
    seconds = time.process_time() - spent["begun"]
    _save(student, Path(args.student), Path(args.target))
    return {"tokens": int(spent["tokens"]), "processor_seconds": seconds}


def _save(model: Any, like: Path, target: Path) -> None:
    """Write a trained model as a folder with the tokenizer of the one that it came from."""
    from mistill.folders.folder import copy_companions

    model.float().save_pretrained(target)
    copy_companions(like, target)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the starts, train from them, and judge.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    teacher = resolve_model(args.teacher)
    held_out = held_out_blocks(
        args.held_out, load_vocabulary(teacher), args.scored_tokens, args.block_length
    )
    references = predictions_of(teacher, held_out)

    def judged(folder: Path) -> dict[str, Any]:
        return figures_of(references, predictions_of(folder, held_out), held_out)

    def recorded(name: str, **more: Any) -> dict[str, Any]:
        file = work / f"{name}.json"
        inputs = _inputs(args, name, **more)
        if not file.is_file():
            made = _in_a_child(args, inputs)
            made["held_out"] = judged(work / name)
            write_json(file, {**made, "inputs": inputs})
        found = _made_from(file, inputs)
        print(json.dumps({"run": name, **found}), file=sys.stderr, flush=True)
        return found

    cut = recorded("cut", do="cut")
    healed = recorded("healed", do="heal")
    most = max(args.tokens)

    def trained(start: str, tokens: int, seed: int) -> dict[str, Any]:
        name = f"{start}-{tokens}-{seed}"
        made = recorded(name, do="ours", start=start, tokens=tokens, seed=seed)
        return {"start": start, "seed": seed, **made}

    # What takes longest and decides most comes first; the order of the document is another one.
    runs = [trained("healed", most, 0)]
    budget = healed["processor_seconds"] + runs[0]["processor_seconds"]
    if args.rivals_python:
        rival = recorded("trl", do="trl", start="cut", processor_seconds=budget)
        runs.append({"start": "cut", "seed": 0, "trainer": "TRL GKDTrainer", **rival})
    runs += [trained("cut", most, seed) for seed in range(args.unhealed)]
    seeds = {tokens: args.seeds if tokens in args.more_seeds else 1 for tokens in args.tokens}
    for seed in range(args.seeds):
        for tokens in args.tokens:
            if seed < seeds[tokens] and (tokens, seed) != (most, 0):
                runs.append(trained("healed", tokens, seed))
    runs.sort(key=lambda one: ("trainer" in one, one["start"] == "cut", one["tokens"], one["seed"]))
    runs = [{"start": "cut", "seed": 0, **cut}, {"start": "healed", "seed": 0, **healed}, *runs]
    return {
        "teacher": Path(args.teacher).name,
        "layers": args.layers,
        "threads": args.threads,
        "texts": [Path(text).name for text in args.texts],
        "heal_texts": [Path(text).name for text in args.heal_texts],
        "scored_tokens": {name: int(blocks.kept.sum()) for name, blocks in held_out.items()},
        "rival_processor_seconds": budget if args.rivals_python else None,
        "runs": runs,
    }


def _made_from(file: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A record of what was made from these inputs; an earlier run may have had others."""
    found: dict[str, Any] = read_json_file(file)
    if found.pop("inputs", None) != inputs:
        raise SettingsError(f"{file} was made from other inputs; give another folder for work")
    return found


def _inputs(args: argparse.Namespace, name: str, **more: Any) -> dict[str, Any]:
    """What a child is told."""
    values = {
        "texts": args.texts,
        "heal-texts": args.heal_texts,
        "held-out": args.held_out,
        "layers": [args.layers],
        "choose": [args.choose],
        "block-length": [args.block_length],
        "threads": [args.threads],
        "heal-tokens": [args.heal_tokens],
        "work": [args.work],
        "target": [str(Path(args.work) / name)],
        "tokens": [more.get("tokens", 1)],
        "seed": [more.get("seed", 0)],
        "processor-seconds": [more.get("processor_seconds", 0)],
        "student": [str(Path(args.work) / more["start"])] if "start" in more else ["none"],
    }
    return {"child": more["do"], **{name: list(map(str, value)) for name, value in values.items()}}


def _in_a_child(args: argparse.Namespace, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make a folder in a process of its own, and return what that process printed last."""
    words = [str(resolve_model(args.teacher)), "--child", inputs["child"]]
    for option, arguments in inputs.items():
        if option != "child":
            words += [f"--{option}", *arguments]
    return run_child(args.rivals_python if inputs["child"] == "trl" else sys.executable, words)


def run_child(python: str, words: Sequence[str]) -> dict[str, Any]:
    """Run this program as a child.

    Args:
        python: The Python to run it with.
        words: Its command line.

    Returns:
        What it printed last.
    """
    done = subprocess.run(
        [python, "-m", "benchmarks.suite.training_curve", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def work_as_child(args: argparse.Namespace) -> dict[str, Any]:
    """Cut, heal or train, as a child is told to.

    Args:
        args: The command line of a child.

    Returns:
        Tokens, and seconds of processor time.
    """
    if args.child == "ours":
        return train_ours(args)
    if args.child == "trl":
        return train_trl(args)
    started = time.process_time()
    options: Mapping[str, Any] = (
        {"heal": True, "heal_tokens": args.heal_tokens} if args.child == "heal" else {"heal": False}
    )
    distill.new_student(
        args.teacher,
        args.target,
        texts=args.heal_texts,
        layers=args.layers,
        choose=args.choose,
        block_length=args.block_length,
        **options,
    )
    return {"tokens": 0, "processor_seconds": time.process_time() - started}


def main(words: Sequence[str] | None = None) -> None:
    """Train, judge, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    args = arguments(words)
    torch.set_num_threads(args.threads)
    print(json.dumps(work_as_child(args) if args.child else run(args)))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line.

    Args:
        words: The words; None for this process's own.

    Returns:
        What they say.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--choose", default="influence")
    parser.add_argument("--texts", nargs="+", default=["@demo-train"], help="to learn from")
    parser.add_argument("--heal-texts", nargs="+", default=["@demo-train"])
    parser.add_argument("--heal-tokens", type=int, default=16_384, help="of each text")
    parser.add_argument("--held-out", nargs="+", default=["@demo-held-out"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[5_120, 20_480, 61_440])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--more-seeds", nargs="*", type=int, default=[20_480], help="of --tokens")
    parser.add_argument("--scored-tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", required=True, help="a folder for the students, which stay")
    parser.add_argument(
        "--unhealed",
        nargs="?",
        type=int,
        const=1,
        default=0,
        help="also learn from the start that was not healed, with so many seeds",
    )
    parser.add_argument("--rivals-python", help="Python that has trl")
    for name, kind in (("--child", str), ("--student", str), ("--target", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--processor-seconds", type=float, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
