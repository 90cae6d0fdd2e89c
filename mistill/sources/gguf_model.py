"""A GGUF file of llama.cpp as a folder of safetensors.

Weights are turned back into float32, whatever they were quantized to; the tokenizer and the chat
template come from the file's metadata. llama.cpp calls Mistral 7B a llama too: the two differ in
a sliding window that such a file does not record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mistill.errors import ArchitectureError, FolderError, VocabularyError
from mistill.sources.tokenizer_parts import (
    Pieces,
    TokenType,
    begin_with,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

# llama.cpp's names for the tensors of a layer.
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
_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
SHARD_BYTES = 4 << 30

# Metadata of mistill's export for what GGUF does not define.
ROPE_KEY = "mistill.rope_parameters"
"""Entries of config.json for a scaled rotary embedding."""

CONTEXT_KEY = "mistill.context_length"
"""The context of a model with a sliding window; for llama.cpp the window is the context."""


def convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file as float32 safetensors, config, tokenizer and template.

    Args:
        file: The GGUF file.
        target: An empty folder.

    Raises:
        FolderError: If it is damaged.
        ArchitectureError: If it holds a model of another kind than Llama.
        VocabularyError: If its vocabulary is of a kind that mistill does not know.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # gguf raises whatever numpy raises on a broken file
        raise FolderError(f"{file} is not a GGUF file, or is damaged: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file.name, metadata, tensors)
    tokenizer = _tokenizer(file.name, metadata)
    _write_tokenizer(target, tokenizer, metadata, config)
    ends = _ends(metadata)
    _write_json(target / "config.json", config)
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    stops = ends if len(ends) > 1 else ends[0]
    _write_json(target / "generation_config.json", {**generation, "eos_token_id": stops})
    _convert_weights(file.name, target, tensors, config)


def _config(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers that a GGUF file's metadata stands for."""
    if metadata.get("general.architecture") != "llama" or metadata.get("llama.expert_count"):
        raise ArchitectureError(
            f"{name} holds a model of the architecture {metadata.get('general.architecture')}; "
            "mistill reads GGUF files of dense llama models, such as Mistral 7B"
        )
    window = metadata.get("llama.attention.sliding_window")
    model_type = "llama" if window is None else "mistral"
    try:
        hidden = metadata["llama.embedding_length"]
        heads = metadata["llama.attention.head_count"]
        head_dim = metadata.get("llama.attention.key_length", hidden // heads)
        config = {
            "architectures": [f"{model_type.title()}ForCausalLM"],
            "model_type": model_type,
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": metadata["llama.feed_forward_length"],
            "num_hidden_layers": metadata["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": metadata.get(CONTEXT_KEY, metadata["llama.context_length"]),
            "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
            "rope_parameters": _rope(name, metadata, tensors),
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }
    except (KeyError, TypeError) as error:
        raise ArchitectureError(
            f"{name} does not describe a llama model: it lacks {error}"
        ) from error
    if window is not None:
        config["sliding_window"] = window
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ArchitectureError(
            f"{name} rotates only a part of each head, which mistill does not support"
        )
    return config


def _rope(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding for config.json."""
    if ROPE_KEY in metadata:
        return dict(json.loads(metadata[ROPE_KEY]))
    if metadata.get("llama.rope.scaling.type", "none") != "none" or _ROPE_FACTORS in tensors:
        raise ArchitectureError(
            f"{name} scales its rotary embedding, which a GGUF file does not fully describe; "
            "use the model's safetensors folder"
        )
    base = _shortest(metadata.get("llama.rope.freq_base", 10000.0))
    return {"rope_type": "default", "rope_theta": base}


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text and a turn, as the file names them."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(end) for end in named if end is not None))


def _shortest(value: float) -> float:
    """The shortest decimal of a float32, such as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _transformers_name(name: str) -> str | None:
    """The name that transformers has for a tensor of a GGUF file."""
    if name in _TABLES:
        return _TABLES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _convert_weights(
    name: str, target: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    from safetensors.numpy import save_file

    # The config holds the parameters that these factors follow from.
    tensors = {name: tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    unknown = sorted(tensor for tensor in tensors if _transformers_name(tensor) is None)
    if unknown:
        raise ArchitectureError(
            f"{name} holds tensors that a llama model does not have: {', '.join(unknown[:3])}"
        )
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for tensor in tensors.values():
        size = 4 * int(tensor.n_elements)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor.name)
        room -= size
    files: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        weights = {
            str(_transformers_name(member)): _floats(tensors[member], config) for member in members
        }
        save_file(weights, target / file, metadata={"format": "pt"})
        files |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        total = sum(4 * int(tensor.n_elements) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(target / "model.safetensors.index.json", index)


def _floats(tensor: Any, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The values of a GGUF tensor, rows in the order of transformers."""
    from gguf.quants import dequantize

    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    values = values.astype(np.float32, copy=False)
    if ".attn_q." in tensor.name:
        return split_halves(values, config["num_attention_heads"])
    if ".attn_k." in tensor.name:
        return split_halves(values, config["num_key_value_heads"])
    return np.ascontiguousarray(values)


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


def _tokenizer(name: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes."""
    tokenizer_model = metadata.get("tokenizer.ggml.model")
    try:
        texts = metadata["tokenizer.ggml.tokens"]
        pieces = Pieces(
            texts=texts,
            kinds=[
                TokenType(tokenizer_model)
                for tokenizer_model in metadata["tokenizer.ggml.token_type"]
            ],
            scores=metadata.get("tokenizer.ggml.scores", []),
        )
        if tokenizer_model == "gpt2":
            cut = str(metadata.get("tokenizer.ggml.pre"))
            return byte_level_tokenizer(pieces, metadata["tokenizer.ggml.merges"], cut, name)
        if tokenizer_model == "llama":
            prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            return sentencepiece_tokenizer(pieces, name, space_prefix=prefix)
    except (KeyError, ValueError) as error:
        raise VocabularyError(f"{name} does not describe its vocabulary: {error}") from error
    raise VocabularyError(
        f"{name} has a vocabulary of the kind {tokenizer_model}; mistill reads GGUF files with the "
        "vocabularies gpt2 (byte-level BPE) and llama (SentencePiece)"
    )


def _write_tokenizer(
    target: Path, tokenizer: Tokenizer, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    named = {
        "bos_token": config["bos_token_id"],
        "eos_token": config["eos_token_id"],
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": config["pad_token_id"],
    }
    specials = {
        name: tokenizer.id_to_token(token) for name, token in named.items() if token is not None
    }
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", sentencepiece))
    first = specials.get("bos_token")
    if adds_bos and first is not None:
        begin_with(tokenizer, first)
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    settings = {
        # A specific class would replace the pre-tokenizer; this one takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **specials,
    }
    _write_json(target / "tokenizer_config.json", settings)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (target / "chat_template.jinja").write_text(template, "utf-8")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
