"""The architecture of a decoder as config.json describes it, and what the export supports.

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are one decoder but for a sliding window, biases, norms of
heads and layers without rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import ArchitectureError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
NORM = "model.norm"

# What the config classes of transformers have for entries that config.json leaves out. None leaves
# a value to the others: as many key and value heads as heads, of the width that the hidden size
# allows.
_EVERYWHERE: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "smollm3": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
}


_MOST = {"num_hidden_layers": 10_000}


@dataclass(frozen=True)
class Rotary:
    """How the frequencies of the rotary embedding are made.

    Attributes:
        kind: ``default``, ``linear`` or ``llama3``.
        base: Base of the frequencies, theta.
        parameters: All that config.json says of it, under the newer names.
    """

    kind: str
    base: float
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A decoder of the Llama family, as far as a graph needs to know it.

    Attributes:
        model_type: One of ``ARCHITECTURES``.
        vocabulary_size: Rows of the embedding, V.
        hidden_size: Width of the residual stream, D.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads; each serves heads / kv_heads query heads.
        head_dim: Width of a head; need not be hidden_size / heads.
        intermediate_size: Width of the feed-forward layer.
        norm_epsilon: Epsilon of the RMSNorm layers.
        max_positions: Longest context that the model was made for.
        sliding_window: Positions that a query sees, itself included; None for all.
        tied: Whether the output head is the embedding.
        frequencies: Shape (head_dim / 2,), radians per position of each rotary pair.
        rotary: Parameters of the frequencies.
        head_norms: Whether queries and keys are normed head by head, as Qwen3's are.
        unrotated_layers: Layers whose attention knows no positions, as every fourth of SmolLM3's.
        biased: Linear layers of a decoder layer that must have a bias.
    """

    model_type: str
    vocabulary_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_epsilon: float
    max_positions: int
    sliding_window: int | None
    tied: bool
    frequencies: NDArray[np.float32]
    rotary: Rotary
    head_norms: bool = False
    unrotated_layers: frozenset[int] = frozenset()
    biased: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight that each module must have.

        Returns:
            Module name to the shape of its weight: (N, K) of a matrix, (D,) of a norm.
        """
        width, queries = self.hidden_size, self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (self.intermediate_size, width),
            "mlp.up_proj": (self.intermediate_size, width),
            "mlp.down_proj": (width, self.intermediate_size),
        }
        if self.head_norms:
            layer |= {f"self_attn.{part}_norm": (self.head_dim,) for part in ("q", "k")}
        table = (self.vocabulary_size, width)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, NORM: (width,)}
        if not self.tied:
            shapes[HEAD] = table
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return shapes


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json.

    Args:
        config: The whole document.

    Returns:
        The architecture.

    Raises:
        ArchitectureError: If the model computes something that the graph would not.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"export supports {', '.join(ARCHITECTURES[:-1])} and {ARCHITECTURES[-1]} models, and "
            f"this one is {model_type!r}"
        )
    config = {**_EVERYWHERE, **_DEFAULTS[str(model_type)], **config}
    activation = config["hidden_act"]
    if activation not in ("silu", "swish"):
        raise ArchitectureError(
            f"export supports the activation silu, and this model uses {activation!r}"
        )
    if config.get("per_layer_config"):
        raise ArchitectureError(
            "export does not support models whose layers differ in their config"
        )
    heads, hidden_size = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    given_head_dim, given_kv_heads = config["head_dim"], config["num_key_value_heads"]
    head_dim = hidden_size // heads if given_head_dim is None else _whole(config, "head_dim")
    kv_heads = heads if given_kv_heads is None else _whole(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ArchitectureError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    if head_dim % 2 or not head_dim:
        raise ArchitectureError(f"heads {head_dim} wide cannot be rotated in pairs")
    frequencies, rotary = _frequencies(config, head_dim)
    return Architecture(
        model_type=str(model_type),
        vocabulary_size=_whole(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=_whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_whole(config, "intermediate_size"),
        norm_epsilon=_number(config, "rms_norm_eps"),
        max_positions=_whole(config, "max_position_embeddings"),
        sliding_window=_sliding_window(config),
        tied=_flag(config, "tie_word_embeddings"),
        frequencies=frequencies,
        rotary=rotary,
        head_norms=model_type == "qwen3",
        unrotated_layers=_unrotated_layers(config),
        biased=_biased(config),
    )


def _whole(config: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 1."""
    value, most = config.get(name), _MOST.get(name, 2**31 - 1)
    if type(value) is not int or not 1 <= value <= most:
        raise ArchitectureError(
            f"{name} in config.json should be a whole number from 1 to {most}, not {value!r:.80}"
        )
    return value


def _number(entries: Mapping[str, Any], name: str) -> float:
    """A number of at least 0."""
    value = entries.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ArchitectureError(f"{name} in config.json should be a number, not {value!r:.80}")
    return float(value)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    if not isinstance(config[name], bool):
        raise ArchitectureError(
            f"{name} in config.json should be true or false, not {config[name]!r:.80}"
        )
    return bool(config[name])


def require_graph(architecture: Architecture) -> None:
    """Refuse a decoder that ONNX Runtime's operators do not support.

    Args:
        architecture: Architecture of the decoder.

    Raises:
        ArchitectureError: If the decoder is not supported; the message says why.
    """
    if architecture.head_dim % 16:
        raise ArchitectureError(
            "ONNX Runtime's attention needs a head width that is divisible by 16, and this model's "
            f"is {architecture.head_dim}"
        )


def rotary_tables(
    frequencies: NDArray[np.float32], positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every rotary angle (Su et al., 2021, https://arxiv.org/abs/2104.09864).

    The angle is a float32 product, as in the models' own code, so that late positions agree too.

    Args:
        frequencies: Shape (head_dim / 2,), radians per position.
        positions: Length of the tables.

    Returns:
        Two tables of shape (positions, head_dim / 2).
    """
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The sliding window; a Llama has none whatever its config says, others may disable it."""
    model_type = config["model_type"]
    if model_type == "llama" or config["sliding_window"] is None:
        return None
    window = _whole(config, "sliding_window")
    if model_type == "mistral":
        return window
    kinds = set(_layer_kinds(config))
    if kinds == {"full_attention"}:
        return None
    if window >= _whole(config, "max_position_embeddings"):
        return None  # a window of all positions is none, in whichever layers it is
    if kinds != {"sliding_attention"}:
        raise ArchitectureError(
            "export does not support models with a sliding window in some layers only"
        )
    return window


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of attention of each layer, ``full_attention`` or ``sliding_attention``."""
    count, has_window = _whole(config, "num_hidden_layers"), _flag(config, "use_sliding_window")
    is_smollm = config["model_type"] == "smollm3"
    if not has_window and not is_smollm:
        return ["full_attention"]
    listed = config.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != count:
            raise ArchitectureError(
                f"layer_types in config.json should name the attention of each of {count} layers"
            )
        return [str(kind) for kind in listed]
    if not has_window:
        return ["full_attention"]
    # The layers of SmolLM3 that know no positions are the ones with a window.
    windowed = (
        _unrotated_layers(config)
        if is_smollm
        else range(_whole_or_0(config, "max_window_layers"), count)
    )
    return ["sliding_attention" if n in windowed else "full_attention" for n in range(count)]


def _whole_or_0(config: Mapping[str, Any], name: str) -> int:
    return 0 if config[name] == 0 else _whole(config, name)


def _unrotated_layers(config: Mapping[str, Any]) -> frozenset[int]:
    if config["model_type"] != "smollm3":
        return frozenset()
    layers = _whole(config, "num_hidden_layers")
    # Despite its name, the list has a 1 for each layer with rotary embedding.
    rotated = config.get("no_rope_layers")
    if rotated is None:
        every = _whole(config, "no_rope_layer_interval")
        rotated = [(n + 1) % every != 0 for n in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers:
        raise ArchitectureError(
            f"no_rope_layers in config.json should say 1 or 0 for each of {layers} layers"
        )
    return frozenset(number for number, turned in enumerate(rotated) if not turned)


def _biased(config: Mapping[str, Any]) -> tuple[str, ...]:
    model_type = config["model_type"]
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v")]
    if model_type == "qwen2":
        return tuple(attention)
    if model_type == "mistral":
        return ()
    biased = [*attention, "self_attn.o_proj"] if _flag(config, "attention_bias") else []
    if model_type != "qwen3" and _flag(config, "mlp_bias"):
        biased += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return tuple(biased)


def _frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[NDArray[np.float32], Rotary]:
    # transformers 5 writes rope_parameters; older files hold rope_theta and rope_scaling, which
    # transformers prefers where there are both.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ArchitectureError(
            "export supports one rotary embedding for all layers, and config.json describes "
            f"{rope!r:.80}"
        )
    outer = ("rope_theta", "partial_rotary_factor")
    rope = {**{name: config[name] for name in outer}, **rope}
    base = _number(rope, "rope_theta")
    if _number(rope, "partial_rotary_factor") != 1.0:
        raise ArchitectureError(
            "export does not support models that rotate only a part of each head"
        )
    del rope["partial_rotary_factor"]
    frequencies = plain_frequencies(base, head_dim)
    kind = rope.get("rope_type", rope.pop("type", "default"))
    rotary = Rotary(kind, base, {**rope, "rope_type": kind, "rope_theta": base})
    if kind == "default":
        return frequencies, rotary
    if kind not in ("linear", "llama3"):
        raise ArchitectureError(
            "export supports the rotary embeddings default, linear and llama3, and this model uses "
            f"{kind!r:.80}"
        )
    if kind == "llama3":
        positions = config.get("original_max_position_embeddings")
        if positions is None:
            positions = rope.get("original_max_position_embeddings")
        if positions is None:
            positions = config["max_position_embeddings"]
        rope["original_max_position_embeddings"] = positions
        rotary.parameters["original_max_position_embeddings"] = positions
        return _llama3_frequencies(frequencies, rope), rotary
    return (frequencies / _factor(rope)).astype(np.float32), rotary


def _factor(rope: Mapping[str, Any]) -> float:
    factor = _number(rope, "factor")
    if factor == 0:
        raise ArchitectureError("factor of the rotary embedding in config.json is 0")
    return factor


def plain_frequencies(base: float, head_dim: int) -> NDArray[np.float32]:
    """The frequencies of a rotary embedding that is not scaled.

    Args:
        base: Base of the frequencies, theta.
        head_dim: Width of a head.

    Returns:
        Shape (head_dim / 2,), radians per position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.asarray(1.0 / np.float32(base) ** exponents, np.float32)


def _llama3_frequencies(
    frequencies: NDArray[np.float32], rope: Mapping[str, Any]
) -> NDArray[np.float32]:
    """Low frequencies are divided by a factor, high ones kept, others interpolated (Llama 3.1)."""
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        raise ArchitectureError(
            f"low_freq_factor {low:g} in config.json should be below high_freq_factor {high:g}"
        )
    turns = _number(rope, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    weights = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended = weights * frequencies + (1 - weights) * frequencies / _factor(rope)
    return np.asarray(blended, np.float32)
