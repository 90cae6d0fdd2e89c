"""Adapters for TRL's trainers, and the tokenizer that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mistill.text.vocabulary import Vocabulary
from tune.settings import TrainerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def adapter_config(model: nn.Module, settings: TrainerSettings, *, kind: str = "CAUSAL_LM") -> Any:
    """LoRA beside every matrix of the layers; None where all weights are trained.

    Args:
        model: A Llama or Mistral.
        settings: Rank and scale.
        kind: What peft calls the task; ``SEQ_CLS`` trains and saves a reward head too.

    Returns:
        A ``LoraConfig`` of peft.
    """
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.adapter_alpha,
        lora_dropout=0.0,
        # Not the head, which may be the embedding, nor a reward head, which is trained itself.
        target_modules=sorted(kinds - {"lm_head", "score"}),
        modules_to_save=["score"] if kind == "SEQ_CLS" else None,
        task_type=kind,
    )


def take_for_float(model: Any) -> None:
    """Let TRL take a model for one of float weights, in place.

    It would round the adapters and heads beside 4-bit weights to bfloat16, as they begin and as
    they are trained. To peft a layer of bitsandbytes is a linear layer then, which it is: the
    adapter adds to what comes out.

    Args:
        model: A model, with layers of bitsandbytes or without.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        model.is_loaded_in_4bit = False


def padding_id(vocabulary: Vocabulary, used: set[int]) -> int:
    """A token to pad with that ends no reply and stands in no row.

    A model that finds the end of a row by looking for what is not padding would miss an end token
    that pads too.

    Args:
        vocabulary: The tokens of the model.
        used: Ids that stand in the rows.

    Returns:
        The vocabulary's own padding token if it will do, else another special one, else any.
    """
    named = [vocabulary.special_tokens.get(name) for name in ("pad_token", "unk_token")]
    own = [entry["id"] for entry in vocabulary.added_tokens if entry["content"] in named]
    special = [entry["id"] for entry in vocabulary.added_tokens if entry.get("special")]
    ends = {*vocabulary.end_ids, vocabulary.bos_id}
    for token in (*own, *special, *range(vocabulary.size)):
        if token not in used and token not in ends and token < vocabulary.size:
            return int(token)
    return int(vocabulary.end_ids[0]) if vocabulary.end_ids else 0


def library_tokenizer(
    folder: Path, vocabulary: Vocabulary, padding: int
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder as transformers has it, of which trainers need ids of marks only.

    Args:
        folder: A model folder.
        vocabulary: Read from it.
        padding: The token to pad with.

    Returns:
        A tokenizer that is not written anywhere.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = vocabulary.eos_id if vocabulary.eos_id is not None else vocabulary.end_ids[0]
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=library.id_to_token(end),
        pad_token=library.id_to_token(padding),
    )
    return tokenizer
