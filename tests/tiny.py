"""Tiny real models and a tiny real tokenizer, made here and offline.

The architecture is the real one, with random weights: two layers, a vocabulary of a few hundred.
The weights are larger than an untrained model's, so that its predictions are far from uniform and
a mistake in a graph or a mask shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "The mistral is a strong, cold wind that blows from the north.",
    "A teacher knows more than its student, and a student is quicker.",
    "Small models answer sooner; large models answer better.",
    "What is the weather like today? It is sunny with a light breeze.",
    "Write the numbers from one to ten: 1 2 3 4 5 6 7 8 9 10.",
    "Caf\u00e9, na\u00efve, \ud55c\uad6d\uc5b4, \u65e5\u672c\u8a9e and \U0001f600 are not ASCII.",
)


def tiny_tokenizer(folder: Path, vocabulary_size: int = 384) -> Path:
    """Train a byte-level BPE tokenizer with a ChatML template and save it in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(SENTENCES) * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "unk_token": "<unk>",
                "pad_token": "</s>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def tiny_model(
    folder: Path, *, model_type: str = "mistral", seed: int = 0, scale: float = 0.15, **options: Any
) -> Path:
    """Save a tiny model folder: random weights, the real architecture, the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 2,
        **options,
    }
    if model_type == "mistral":
        settings.setdefault("sliding_window", None)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    model.generation_config.eos_token_id = [4, 2]
    model.save_pretrained(folder)
    return folder


def changed_config(folder: Path, target: Path, *removed: str, **changes: Any) -> Path:
    """A copy of a folder whose config.json lacks some entries and has others changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config = {name: value for name, value in config.items() if name not in removed} | changes
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def changed_tensors(folder: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a folder whose tensors, by name were changed in place."""
    from safetensors.torch import load_file, save_file

    if folder != target:
        shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
