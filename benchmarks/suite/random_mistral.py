"""A model folder of Mistral 7B's shapes with random weights, written a matrix at a time.

    python -m benchmarks.suite.random_mistral FOLDER --layers 18 --width 2048    # 1.1 billion

What quantization, export and a step take in time and memory depends on shapes alone, so a model
that nobody trained serves to measure it where no such model can be had.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mistill.folders.publishing import write_json
from mistill.text.spelling import byte_characters
from mistill.weights.tensor_writer import TensorWriter

# Mistral 7B; a width is divided by what its own is, so that smaller models keep its proportions.
WIDTH = 4096


def config_of(layers: int, width: int = WIDTH) -> dict[str, Any]:
    """The config of such a model.

    Args:
        layers: Decoder layers, 32 in Mistral 7B.
        width: Hidden size; a multiple of 512.

    Returns:
        What config.json holds.
    """
    return {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": width * 7 // 2,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": width // 128,
        "num_hidden_layers": layers,
        "num_key_value_heads": width // 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }


def make_folder(folder: Path, layers: int, width: int = WIDTH) -> int:
    """Write such a model, in bfloat16, with a tokenizer of bytes.

    Args:
        folder: Where; it is made.
        layers: Decoder layers.
        width: Hidden size; a multiple of 512.

    Returns:
        Its parameters.
    """
    config = config_of(layers, width)
    inner, keys, V = config["intermediate_size"], width // 4, config["vocab_size"]
    matrices = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    count = 0

    def noise(*shape: int) -> torch.Tensor:
        nonlocal count
        count += shape[0] * shape[1]
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def ones() -> torch.Tensor:
        nonlocal count
        count += width
        return torch.ones(width, dtype=torch.bfloat16)

    with TensorWriter(folder) as writer:
        writer.add("model.embed_tokens.weight", noise(V, width))
        for layer in range(layers):
            for name, shape in matrices.items():
                writer.add(f"model.layers.{layer}.{name}.weight", noise(*shape))
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{layer}.{name}.weight", ones())
        writer.add("model.norm.weight", ones())
        writer.add("lm_head.weight", noise(V, width))
    return count


def main() -> None:
    """Write a folder as the command line says, and print its parameters."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 512")
    args = parser.parse_args()
    if args.layers < 1 or args.width < 512 or args.width % 512:
        parser.error(
            "give at least one layer and a width that is a multiple of 512, not "
            f"--layers {args.layers} --width {args.width}"
        )
    if args.folder.exists():
        parser.error(f"{args.folder} is there already; name a folder that is to be made")
    count = make_folder(args.folder, args.layers, args.width)
    print(f"{args.folder}: {count:,} parameters")


def _write_tokenizer(folder: Path) -> None:
    characters = byte_characters()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[characters[byte]] = len(vocabulary)
    # llama.cpp opens no vocabulary without merges; this one leaves random_text a token a letter.
    space = characters[ord(" ")]
    vocabulary[2 * space] = len(vocabulary)
    special = [
        {
            "id": vocabulary[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<unk>", "<s>", "</s>")
    ]
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: Mapping[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": bytes_alone,
        "post_processor": None,
        "decoder": bytes_alone,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [[space, space]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")


def random_text(tokens: int) -> str:
    """Text of about as many tokens, for that tokenizer: letters at random.

    Args:
        tokens: How many, at least.

    Returns:
        One line.
    """
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (tokens + 1,), generator=generator)
    return "".join(map(chr, letters.tolist()))


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a process that is to compute with some threads.

    Args:
        threads: How many.

    Returns:
        This process' own, with the threads set.
    """
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


if __name__ == "__main__":
    main()
