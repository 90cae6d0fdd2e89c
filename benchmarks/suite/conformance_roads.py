"""What surrounds a loss in a trainer: models are opened, text becomes labels, steps are cut.

Each road is walked with the project's own classes, on tiny real models and tokenizers that are
made here: mistill's functions, and the trainers and the collator of TRL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Messages = Sequence[dict[str, str]]


class Road(Protocol):
    """What is asked of a trainer around its loss."""

    def open(self, student: Path, teacher: Path, out: Path, *, lora_head: bool = False) -> None:
        """Get ready to train, or refuse to."""

    def labelled(self, folder: Path, messages: Messages) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and their labels, -100 where nothing is learnt."""

    def whole_step(
        self, student: Path, teacher: Path, conversations: Sequence[Messages], size: int, out: Path
    ) -> Tensor:
        """The gradient of one optimizer step in micro-batches of some size, flat."""


# --- what the roads are walked with --------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Makes tiny models, tokenizers and conversations in a folder.

    Attributes:
        folder: Where.
    """

    folder: Path

    def models(self, *, teacher_rows: int = 0, exchange: bool = False) -> tuple[Path, Path]:
        """A student and a teacher.

        Args:
            teacher_rows: Rows that the teacher's embedding has more.
            exchange: Whether two tokens of the teacher have changed places.

        Returns:
            Their folders.
        """
        from tests.tiny import tiny_model

        student = tiny_model(self.folder / "student", num_hidden_layers=1, seed=1)
        rows = json.loads((student / "config.json").read_text())["vocab_size"]
        teacher = tiny_model(
            self.folder / "teacher", num_hidden_layers=1, seed=2, vocab_size=rows + teacher_rows
        )
        if exchange:
            file = teacher / "tokenizer.json"
            definition = json.loads(file.read_text("utf-8"))
            entries = definition["model"]["vocab"]
            entries["a"], entries["b"] = entries["b"], entries["a"]
            file.write_text(json.dumps(definition), "utf-8")
        return student, teacher

    def tokenizer(self, *, template_bos: bool = False, pad_is_end: bool = False) -> Path:
        """A byte-level tokenizer with a ChatML template.

        Args:
            template_bos: Whether both the template and the tokenizer begin with a mark.
            pad_is_end: Whether the end of a turn is the padding token too.

        Returns:
            Its folder.
        """
        from tests.tiny import CHATML, tiny_tokenizer

        folder = tiny_tokenizer(self.folder / "tokenizer")
        if template_bos:
            (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
            file = folder / "tokenizer.json"
            definition = json.loads(file.read_text("utf-8"))
            begin, text = (
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            )
            definition["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [begin, text],
                "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
            file.write_text(json.dumps(definition), "utf-8")
        if pad_is_end:
            file = folder / "tokenizer_config.json"
            settings = json.loads(file.read_text())
            file.write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))
        return folder

    def sentencepiece(self) -> Path:
        """A SentencePiece tokenizer with Mistral's first template.

        Returns:
            Its folder.
        """
        from mistill.sources.source import resolve_model
        from tests.mistill.made import sentencepiece_folder

        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        try:
            return resolve_model(sentencepiece_folder(self.folder / "sentencepiece"))
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before

    def conversations(self) -> list[list[dict[str, str]]]:
        """Four, whose answers are of very different lengths.

        Returns:
            Conversations of two turns.
        """
        answers = ("A cold wind.", "No.", "Yes, " + "and again, " * 12 + "yes.", "12")
        return [
            [
                {"role": "user", "content": "What is a mistral?"},
                {"role": "assistant", "content": answer},
            ]
            for answer in answers
        ]


@contextmanager
def workshop() -> Iterator[Place]:
    """A place that is gone afterwards.

    Yields:
        The place.
    """
    with TemporaryDirectory() as folder:
        yield Place(Path(folder))


# --- mistill ------------------------------------------------------------------------------------


class MistillRoad:
    """``distill.train`` and what it is made of."""

    def open(self, student: Path, teacher: Path, out: Path, *, lora_head: bool = False) -> None:
        """Train a little."""
        import distill

        texts = out / "chats.jsonl"
        rows = [{"messages": messages} for messages in Place(out).conversations() * 10]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        distill.train(
            student,
            out / "trained",
            overwrite=True,
            teacher=teacher,
            texts=texts,
            tokens=200,
            block_length=64,
            lora_rank=2 if lora_head else 0,
        )

    def labelled(self, folder: Path, messages: Messages) -> tuple[list[int], list[int]]:
        """As the trainer reads conversations."""
        from mistill.text.answers import conversation_documents
        from mistill.text.vocabulary import load_vocabulary

        [document] = conversation_documents(messages, load_vocabulary(folder))
        labels = np.where(document.mask, document.ids, -100)
        return document.ids.tolist(), labels.tolist()

    def whole_step(
        self, student: Path, teacher: Path, conversations: Sequence[Messages], size: int, out: Path
    ) -> Tensor:
        """One step of the trainer, each conversation in a block of its own."""
        from distill.settings import TrainSettings
        from distill.teacher.teacher import LiveTeacher
        from distill.training.step import DistillationStep, accumulate_gradients
        from mistill.pytorch.loading import load_pytorch
        from mistill.text.answers import conversation_documents
        from mistill.text.blocks import TokenBlocks, pack
        from mistill.text.vocabulary import load_vocabulary
        from mistill.training.processes import accelerating

        vocabulary = load_vocabulary(student)
        documents = [conversation_documents(each, vocabulary)[0] for each in conversations]
        longest = max(len(document.ids) for document in documents)
        packed = [pack([document], longest) for document in documents]
        blocks = TokenBlocks(
            *(np.concatenate([getattr(block, name) for block in packed])
              for name in ("ids", "mask", "documents"))
        )  # fmt: skip
        settings = TrainSettings(batch_size=len(blocks), micro_batch_size=size)
        model, live = load_pytorch(student), LiveTeacher(load_pytorch(teacher))
        with accelerating(settings, out) as accelerator:
            module = accelerator.prepare(DistillationStep(model, settings))
            accumulate_gradients(module, live, blocks, settings, accelerator)
        return _flat(parameter.grad for parameter in model.parameters())


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


# --- TRL ----------------------------------------------------------------------------------------

_QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _adapter_of_the_head(is_there: bool) -> Any:
    if not is_there:
        return None
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")


class GkdRoad:
    """TRL's GKDTrainer and its collator."""

    def _trainer(
        self, student: Path, teacher: Path, rows: Sequence[Messages], out: Path, **options: Any
    ) -> Any:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        peft_config = options.pop("peft_config", None)
        return GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            teacher_model=str(teacher),
            args=GKDConfig(
                output_dir=str(out / "gkd"),
                lmbda=0.0,
                beta=0.0,
                max_length=512,
                **_QUIET,
                **options,
            ),
            train_dataset=Dataset.from_list([{"messages": list(messages)} for messages in rows]),
            processing_class=_tokenizer(student),
            peft_config=peft_config,
        )

    def open(self, student: Path, teacher: Path, out: Path, *, lora_head: bool = False) -> None:
        """Construct it, its teacher named by its folder, and train for a step."""
        peft_config = _adapter_of_the_head(lora_head)
        rows = Place(out).conversations()
        self._trainer(student, teacher, rows, out, peft_config=peft_config).train()

    def labelled(self, folder: Path, messages: Messages) -> tuple[list[int], list[int]]:
        """As its collator does it."""
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.utils import DataCollatorForChatML

        collated = DataCollatorForChatML(_tokenizer(folder))([{"messages": list(messages)}])
        return collated["input_ids"][0].tolist(), collated["labels"][0].tolist()

    def whole_step(
        self, student: Path, teacher: Path, conversations: Sequence[Messages], size: int, out: Path
    ) -> Tensor:
        """What one step of plain gradient descent takes away from the weights."""
        trainer = self._trainer(
            student, teacher, conversations, out,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(conversations) // size,
        )  # fmt: skip
        before = _flat(trainer.model.parameters())
        trainer.train()
        return before - _flat(trainer.model.parameters())


class DistillationRoad:
    """TRL's DistillationTrainer, as far as its constructor."""

    def open(self, student: Path, teacher: Path, out: Path, *, lora_head: bool = False) -> None:
        """Construct it, its teacher named by its folder."""
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl import DistillationConfig, DistillationTrainer

        rows = [{"prompt": list(messages[:1])} for messages in Place(out).conversations()]
        DistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            teacher_model=str(teacher),
            args=DistillationConfig(output_dir=str(out / "distillation"), **_QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(student),
            peft_config=_adapter_of_the_head(lora_head),
        )

    def labelled(self, folder: Path, messages: Messages) -> tuple[list[int], list[int]]:
        """It trains on what the student writes."""
        raise NotImplementedError

    def whole_step(
        self, student: Path, teacher: Path, conversations: Sequence[Messages], size: int, out: Path
    ) -> Tensor:
        """It trains on what the student writes."""
        raise NotImplementedError


ROADS: dict[str, Road] = {
    "mistill": MistillRoad(),
    "TRL GKDTrainer": GkdRoad(),
    "TRL DistillationTrainer": DistillationRoad(),
}
