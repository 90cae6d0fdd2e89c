"""A GGUF file of llama.cpp as a folder of safetensors.

Weights are turned back into float32, whatever they were quantized to; the tokenizer and the chat
template come from the file's metadata. llama.cpp calls Mistral 7B a llama too: the two differ in
a sliding window that such a file does not record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import ArchitectureError, FolderError
from mistill.folders.publishing import write_json
from mistill.folders.safetensors_file import NewTensor, write_safetensors
from mistill.sources.gguf_fields import GgufFile, open_gguf
from mistill.sources.gguf_rope import ROPE_FACTORS, read_rope
from mistill.sources.gguf_tokenizer import ends_of, special_ids, write_tokenizer

# llama.cpp's names for the tensors of a layer, those of transformers, and whether a Llama that has
# biases has one there, which llama.cpp leaves out where it is 0.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
SHARD_BYTES = 4 << 30

CONTEXT_KEY = "mistill.context_length"
"""The context of a model with a sliding window, in files that mistill has written; for llama.cpp
the window is the context."""


def convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file as float32 safetensors, config, tokenizer and template.

    Args:
        file: The GGUF file; of a model in several, the first.
        target: An empty folder.

    Raises:
        FolderError: If it is damaged, a field is of another type than it should be, or pieces of
            the model are missing.
        ArchitectureError: If it holds a model of another kind than Llama.
        VocabularyError: If its vocabulary is of a kind that mistill does not know.
    """
    opened = open_gguf(file)
    architecture = opened.text("general.architecture")
    if architecture != "llama" or opened.whole("llama.expert_count", 0, low=0):
        raise ArchitectureError(
            f"{opened.name} holds a model of the architecture {architecture}; mistill reads GGUF "
            "files of dense llama models, such as Mistral 7B"
        )
    ids = special_ids(opened)
    ends = ends_of(ids)
    if ids["eos"] is None:
        raise ArchitectureError(
            f"{opened.name} names no token that ends a text: tokenizer.ggml.eos_token_id is "
            "missing, or no token"
        )
    config = _config(opened, ids)
    shapes = _shapes(config)
    _check_tensors(opened, shapes)
    write_tokenizer(opened, target, ids, config["max_position_embeddings"])
    write_json(target / "config.json", config)
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    stops = ends if len(ends) > 1 else ends[0]
    write_json(target / "generation_config.json", {**generation, "eos_token_id": stops})
    _write_weights(opened, target, shapes, config)


def _config(file: GgufFile, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The config of transformers that a GGUF file's metadata stands for."""
    window_key = "llama.attention.sliding_window"
    model_type = "mistral" if window_key in file else "llama"
    hidden = file.whole("llama.embedding_length")
    heads = file.whole("llama.attention.head_count")
    kv_heads = file.whole("llama.attention.head_count_kv", heads)
    head_dim = file.whole("llama.attention.key_length", max(1, hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise ArchitectureError(
            f"{file.name} describes {heads} heads that are {head_dim} wide and share {kv_heads} "
            "keys and values, which no llama model has"
        )
    if file.whole("llama.rope.dimension_count", head_dim) != head_dim:
        raise ArchitectureError(
            f"{file.name} rotates only a part of each head, which mistill does not support"
        )
    layers = file.whole("llama.block_count")
    if layers > len(file.tensors):
        raise FolderError(
            f"llama.block_count of {file.name} says {layers} layers, and the file holds "
            f"{len(file.tensors)} tensors in all"
        )
    config = {
        "architectures": [f"{model_type.title()}ForCausalLM"],
        "model_type": model_type,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": file.whole("llama.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": file.whole(CONTEXT_KEY, file.whole("llama.context_length")),
        "rms_norm_eps": _shortest(file.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": read_rope(file, head_dim),
        **{name: _has_biases(file, name) for name in _BIASES},
        "vocab_size": len(file.items("tokenizer.ggml.tokens", str)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
    }
    if model_type == "mistral":
        config["sliding_window"] = file.whole(window_key)
    return config


def _has_biases(file: GgufFile, name: str) -> bool:
    return any(f"blk.0.{part}.bias" in file.tensors for part in _BIASES[name])


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by llama.cpp's names, in the order in which they are written."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    biased = [part for name, parts in _BIASES.items() if config[name] for part in parts]
    table = (config["vocab_size"], width)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": table}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{number}.{part}.weight": shape for part, shape in layer.items()}
        shapes |= {f"blk.{number}.{part}.bias": layer[part][:1] for part in biased}
    shapes["output_norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = table
    return shapes


def _check_tensors(file: GgufFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file whose tensors are not those of the model that its fields describe."""
    unknown = sorted(file.tensors.keys() - shapes.keys() - {ROPE_FACTORS})
    if unknown:
        raise ArchitectureError(
            f"{file.name} holds tensors that a llama model does not have: {', '.join(unknown[:3])}"
        )
    for name, shape in shapes.items():
        if name not in file.tensors:
            if name.endswith(".bias"):
                continue  # one of 0, which llama.cpp leaves out
            raise FolderError(f"{file.name} lacks the tensor {name}")
        in_file = tuple(int(size) for size in reversed(file.tensors[name].shape))
        if in_file != shape:
            raise FolderError(
                f"{name} of {file.name} has the shape {in_file}, and its fields describe {shape}"
            )


def _transformers_name(name: str) -> str:
    """The name that transformers has for a tensor of a GGUF file."""
    if name in _TABLES:
        return _TABLES[name]
    _, layer, part, last = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.{last}"


def _write_weights(
    file: GgufFile,
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> None:
    """Write float32 safetensors as a stream, in files of a bounded size."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    homes: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = shard if len(shards) > 1 else "model.safetensors"
        weights = {
            _transformers_name(name): NewTensor(
                "F32",
                shapes[name],
                4 * math.prod(shapes[name]),
                _chunks(file, name, shapes[name], config),
            )
            for name in names
        }
        write_safetensors(target / shard, weights)
        homes |= dict.fromkeys(weights, shard)
    if len(shards) > 1:
        total = sum(4 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        write_json(target / "model.safetensors.index.json", index)


def _chunks(
    file: GgufFile, name: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> Iterator[memoryview]:
    """The bytes of a weight, decoded when they are written."""
    if name not in file.tensors:
        yield np.zeros(shape, np.float32).data.cast("B")
        return
    values = _floats(file, name, shape)
    if ".attn_q." in name:
        values = split_halves(values, config["num_attention_heads"])
    if ".attn_k." in name:
        values = split_halves(values, config["num_key_value_heads"])
    yield np.ascontiguousarray(values).data.cast("B")


def _floats(file: GgufFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a GGUF tensor."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ArchitectureError(
            f"{name} of {file.name} is stored as {tensor.tensor_type.name}, which the gguf library "
            "does not decode; use a file of another type, such as Q8_0"
        ) from error
    floats: NDArray[np.float32] = values.astype(np.float32, copy=False).reshape(shape)
    if not np.isfinite(floats).all():
        raise FolderError(f"{name} of {file.name} holds a value that is infinite or not a number")
    return floats


def _shortest(value: float) -> float:
    """The shortest decimal of a float32, such as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def split_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put the rows of each head back in the order that transformers rotates them in.

    llama.cpp keeps the two numbers that are rotated together side by side; transformers keeps
    the first ones of all pairs in the first half of the head and the second ones in the other.

    Args:
        weight: Shape (heads * head_dim, D), or that of a bias without D; pairs side by side.
        heads: Heads of the projection.

    Returns:
        The same shape, halves.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
