"""Mistakes of supervised tuning that raise no error: which mistill makes, and two other ways.

    python -m benchmarks.suite.tuning_traps

The questions are put to mistill, to TRL's ``SFTTrainer`` at its defaults, and to the way that
guides show: transformers' ``Trainer`` on rendered text with ``DataCollatorForLanguageModeling``,
the padding token set to the end token, peft's defaults, and the adapter merged on the 4-bit model.
The model is tiny and has random weights, and every answer is counted or worked out, none judged.
What cannot be asked is "n/a", and is no pass. Before the last line, one JSON document, comes a
table.

B is batch, T positions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Way = Literal["mistill", "trl", "guides"]
WAYS: tuple[Way, ...] = ("mistill", "trl", "guides")
LENGTH = 96
"""Most tokens of a row."""

_CHATS = [
    [
        ("user", "What blows?"),
        ("assistant", "The mistral."),
        ("user", "And?"),
        ("assistant", "Wind."),
    ],
    [("user", "Who knows more?"), ("assistant", "A teacher knows more than its student.")],
    [("user", "Count."), ("assistant", "1 2 3 4 5 6 7 8 9 10.")],
    [("user", "Hm."), ("assistant", "So it is: small models answer sooner.")],
]
_BEGINNING = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + "
    "message['content'] + ('' if message['role'] == 'user' else eos_token) }}{% endfor %}"
)


@dataclass(frozen=True)
class Place:
    """Where the questions are put.

    Attributes:
        folder: An empty folder.
        model: A tiny model folder whose end token is also the padding token of the guides.
    """

    folder: Path
    model: Path

    def rows(self, name: str, chats: Sequence[Any] = _CHATS) -> Path:
        """Conversations as a file."""
        file = self.folder / f"{name}.jsonl"
        turns = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
        file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
        return file


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        passed: Whether it is the right one; None where the question cannot be asked.
        detail: What was counted.
    """

    passed: bool | None
    detail: str


# --- what each way learns from rows ---------------------------------------------------------------


def library_tokenizer(model: Path) -> Any:
    """The tokenizer as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model)


def tiny(model: Path) -> Any:
    """The model as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def trl_trainer(
    place: Place, rows: Path, *, model: Any = None, text: bool = False, **more: Any
) -> Any:
    """TRL's trainer at its defaults, on conversations or on their rendered text."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tune.trainers.library import quiet_class

    tokenizer = library_tokenizer(place.model)
    chats = [json.loads(line)["messages"] for line in rows.read_text("utf-8").splitlines()]
    data: list[dict[str, Any]] = [{"messages": chat} for chat in chats]
    if text:
        data = [{"text": tokenizer.apply_chat_template(chat, tokenize=False)} for chat in chats]
    config = {"max_length": LENGTH, **_arguments(place), **more}
    peft = config.pop("peft_config", None)
    return quiet_class(SFTTrainer)(
        model=tiny(place.model) if model is None else model,
        args=SFTConfig(**config),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=peft,
    )


def guide_trainer(place: Place, rows: Path, *, model: Any = None, **more: Any) -> Any:
    """Transformers' trainer as guides set it up."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = library_tokenizer(place.model)
    tokenizer.pad_token = tokenizer.eos_token
    chats = [json.loads(line)["messages"] for line in rows.read_text("utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    data = [tokenizer(text, truncation=True, max_length=LENGTH).data for text in texts]
    return Trainer(
        model=tiny(place.model) if model is None else model,
        args=TrainingArguments(**_arguments(place), **more),
        train_dataset=Dataset.from_list(data),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def _arguments(place: Place) -> dict[str, Any]:
    return {
        "output_dir": str(place.folder / "scratch"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }


def learned_by(way: Way, place: Place, rows: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of each row and, of those, the ones that are learned."""
    if way == "mistill":
        from mistill.text.documents import read_documents
        from mistill.text.vocabulary import load_vocabulary

        documents = read_documents(rows, load_vocabulary(place.model))
        return [(one.ids.tolist(), one.ids[one.mask].tolist()) for one in documents]
    trainer = trl_trainer(place, rows) if way == "trl" else guide_trainer(place, rows)
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        # The first token of a row has none before it to be predicted from.
        found.append((ids.tolist(), [int(label) for label in labels[1:] if label != -100]))
    return found


# --- questions ------------------------------------------------------------------------------------

Question = Callable[[Way, Place], Answer]
QUESTIONS: dict[str, Question] = {}


def question(name: str) -> Callable[[Question], Question]:
    """Put a function into the list of questions."""

    def put(ask: Question) -> Question:
        QUESTIONS[name] = ask
        return ask

    return put


@question("only the answers and their end are learned")
def answers_alone(way: Way, place: Place) -> Answer:
    """Counted against the answers' own tokens, without the end, which has its own question."""
    rows = place.rows("alone")
    tokenizer = library_tokenizer(place.model)
    wanted = sum(
        len(tokenizer(text, add_special_tokens=False).input_ids)
        for chat in _CHATS
        for role, text in chat
        if role == "assistant"
    )
    learned = [ids for _, ids in learned_by(way, place, rows)]
    tokens = sum(len([one for one in ids if one != tokenizer.eos_token_id]) for ids in learned)
    return Answer(tokens == wanted, f"{tokens} tokens, where {wanted} count")


@question("the token that ends an answer is learned")
def end_is_learned(way: Way, place: Place) -> Answer:
    """The end token is what guides pad with."""
    end = library_tokenizer(place.model).eos_token_id
    learned = [ids for _, ids in learned_by(way, place, place.rows("ends"))]
    answers = sum(role == "assistant" for chat in _CHATS for role, _ in chat)
    ends = sum(ids.count(end) for ids in learned)
    return Answer(ends >= answers, f"{ends} ends of {answers} answers")


@question("a conversation begins once")
def begins_once(way: Way, place: Place) -> Answer:
    """The template writes a beginning, and so does the tokenizer."""
    from tokenizers import Tokenizer, processors

    folder = place.folder / f"beginning-{way}"
    shutil.copytree(place.model, folder)
    (folder / "chat_template.jinja").write_text(_BEGINNING)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    there = Place(place.folder, folder)
    rows = place.rows("beginnings")
    if way == "trl":
        ids = [list(row["input_ids"]) for row in trl_trainer(there, rows, text=True).train_dataset]
    else:
        ids = [row for row, _ in learned_by(way, there, rows)]
    most = max(row.count(tokenizer.token_to_id("<s>")) for row in ids)
    return Answer(most == 1, f"{most} at most" + (", of rendered text" if way == "trl" else ""))


@question("a row that is too long is refused, not cut")
def long_rows(way: Way, place: Place) -> Answer:
    """Two rows of three are longer than a row may be."""
    chats = [_CHATS[0], *([("user", "Count."), ("assistant", "1 2 3 " * 60)] for _ in range(2))]
    rows = place.rows("long", chats)
    if way == "mistill":
        from mistill.errors import TextError
        from mistill.text.vocabulary import load_vocabulary
        from tune.settings import SupervisedSettings
        from tune.supervision.reading import read_texts

        try:
            read_texts(
                rows, rows, load_vocabulary(place.model), SupervisedSettings(block_length=LENGTH)
            )
        except TextError:
            return Answer(True, "refused, with their number")
        return Answer(False, "read")
    tokens = sum(len(ids) for ids, _ in learned_by(way, place, rows))
    tokenizer = library_tokenizer(place.model)
    whole = sum(
        len(tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in chat], return_dict=False
        ))
        for chat in chats
    )  # fmt: skip
    return Answer(tokens >= whole, f"{tokens} of {whole} tokens are left, without a word")


@question("a step has the same gradient however it is divided")
def divided_step(way: Way, place: Place) -> Answer:
    """Four rows at once, and one by one."""
    rows = place.rows("divided")
    whole, parts = (_gradient(way, place, rows, at_once) for at_once in (4, 1))
    apart = float((parts - whole).norm() / whole.norm())
    return Answer(apart < 1e-4, f"{apart:.0e} apart")


def _gradient(way: Way, place: Place, rows: Path, at_once: int) -> Tensor:
    """The gradient of one step, flat."""
    if way != "mistill":
        from transformers import TrainerCallback

        seen: list[Tensor] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *words: Any, model: Any = None, **more: Any) -> None:
                seen.append(_flat(model))

        make = trl_trainer if way == "trl" else guide_trainer
        trainer = make(
            place,
            rows,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=4 // at_once,
            max_steps=1,
            max_grad_norm=1e9,
            gradient_checkpointing=False,
        )
        trainer.add_callback(Watch())
        trainer.train()
        return seen[0]
    from mistill.text.blocks import pack
    from mistill.text.documents import read_documents
    from mistill.text.vocabulary import load_vocabulary
    from mistill.training.processes import accelerating
    from tune.settings import SupervisedSettings
    from tune.supervision.step import SupervisedStep, accumulate_gradients

    documents = read_documents(rows, load_vocabulary(place.model))
    blocks = pack(list(documents), 48)
    blocks = blocks[: len(blocks) // 4 * 4]
    settings = SupervisedSettings(
        block_length=48, batch_size=len(blocks), micro_batch_size=len(blocks) * at_once // 4
    )
    model = tiny(place.model)
    with accelerating(settings, place.folder) as accelerator:
        module = accelerator.prepare(SupervisedStep(model, settings))
        accumulate_gradients(module, blocks, settings, accelerator, 0)
    return _flat(model)


def _flat(model: Any) -> Tensor:
    gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return torch.cat(gradients).clone()


@question("LoRA stands beside all seven kinds of matrices")
def seven_kinds(way: Way, place: Place) -> Answer:
    """Where nothing is said of targets."""
    model = tiny(place.model)
    if way == "mistill":
        from mistill.training.adapters import add_adapters
        from tune.settings import SupervisedSettings
        from tune.supervision.trainer import adapter_plan

        add_adapters(model, 4, adapter_plan(SupervisedSettings(lora_rank=4)))
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM"))
    kinds = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }
    return Answer(len(kinds) == 7, ", ".join(sorted(kinds)) if len(kinds) < 7 else "all seven")


def over_four_bits(way: Way, place: Place) -> Any:
    """A model in NF4 with adapters, ready to be trained."""
    from mistill.folders.folder import open_folder
    from mistill.pytorch.spread import load_spread

    if way == "mistill":
        from mistill.training.adapters import add_adapters

        model: Any = load_spread(open_folder(place.model), torch.float32, {"": "cpu"}, nf4=True)
        add_adapters(model, 4)
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        place.model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=given
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if way == "trl":
        return trl_trainer(place, place.rows("bits"), model=model, peft_config=lora).model
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, lora)


@question("adapters over 4 bits are float32")
def adapters_in_float32(way: Way, place: Place) -> Answer:
    """In bfloat16 an entry moves only by steps of more than a 512th of it."""
    model = over_four_bits(way, place)
    dtypes = {
        str(one.dtype).removeprefix("torch.") for one in model.parameters() if one.requires_grad
    }
    return Answer(dtypes == {"float32"}, ", ".join(sorted(dtypes)))


@question("an adapter over 4 bits survives its merge")
def survives_merge(way: Way, place: Place) -> Answer:
    """The share of a small change that the merged weights have, in its own direction."""
    from bitsandbytes.functional import dequantize_4bit

    model = over_four_bits(way, place)
    layer = next(
        module
        for name, module in model.named_modules()
        if name.endswith("layers.0.mlp.up_proj") and hasattr(module, "base_layer")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shape = layer.lora_B["default"].weight.shape
        layer.lora_B["default"].weight.data = 2e-3 * torch.randn(shape, generator=generator)
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.float()
    codes = layer.base_layer.weight
    before = dequantize_4bit(codes.data, codes.quant_state).float().clone()
    change = layer.get_delta_weight("default").detach().float()
    if way == "mistill":
        from mistill.training.adapters import adapters_in, scales_of

        (adapter,) = (
            one
            for name, one in adapters_in(model.state_dict(), scales_of(model)).items()
            if name.endswith("layers.0.mlp.up_proj")
        )
        after = adapter.merged_into(before)
    else:
        layer.merge()
        codes = layer.base_layer.weight
        after = dequantize_4bit(codes.data, codes.quant_state).float()
    share = float(((after - before) * change).sum() / change.square().sum())
    size = float(change.norm() / before.norm())
    return Answer(share > 0.5, f"{share:.2f} of a change of {size:.4f} of the weights")


@question("an evaluation changes no later gradient (NF4)")
def evaluation_is_harmless(way: Way, place: Place) -> Answer:
    """On processors with AVX512-BF16, where bitsandbytes repacks; n/a elsewhere."""
    from bitsandbytes.functional import has_avx512bf16

    if way != "mistill" and not has_avx512bf16():
        return Answer(None, "not on this processor")
    model = over_four_bits(way, place)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            parameter.data = 0.05 * torch.randn(parameter.shape)
        elif "lora_A" in name:
            parameter.data = parameter.data.float()
    ids = torch.arange(40)[None] % 300 + 5

    def gradient() -> Tensor:
        model.train()
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found = [
            one.grad.flatten().float()
            for name, one in model.named_parameters()
            if ".lora_" in name and one.grad is not None
        ]
        return torch.cat(found)

    one = gradient()
    model.eval()
    with torch.no_grad():
        model(ids, use_cache=False)
    other = gradient()
    if one.shape != other.shape:
        return Answer(False, "gradients are missing")
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return Answer(cosine > 0.9999, f"cosine {cosine:.4f}")


# --- the table ------------------------------------------------------------------------------------


def asked(places: Path) -> list[dict[str, Any]]:
    """Put every question to every way."""
    from tests.tiny import tiny_model
    from tune.trainers.library import quiet_trl

    model = tiny_model(places / "model", seed=1)
    found: list[dict[str, Any]] = []
    for name, ask in QUESTIONS.items():
        for way in WAYS:
            folder = places / f"{len(found)}"
            folder.mkdir()
            # Trainers print their logs, and warn of what the table tells.
            with warnings.catch_warnings(), quiet_trl(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                answer = ask(way, Place(folder, model))
            status = "n/a" if answer.passed is None else "pass" if answer.passed else "fail"
            found.append({"trap": name, "way": way, "status": status, "detail": answer.detail})
    return found


_SHOWN = {"fail": "**fail**"}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The answers as Markdown, a row for each question."""
    lines = ["| | mistill | TRL's SFTTrainer | the guides' way |", "|---|---|---|---|"]
    for name in dict.fromkeys(one["trap"] for one in found):
        row = {one["way"]: one for one in found if one["trap"] == name}
        cells = [
            f"{_SHOWN.get(row[way]['status'], row[way]['status'])}: {row[way]['detail']}"
            for way in WAYS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Ask, and print who passes what."""
    from importlib.metadata import version

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asked(Path(folder))
    print("\n".join(table(found)))
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    print(json.dumps({"answers": found, "versions": {name: version(name) for name in packages}}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
