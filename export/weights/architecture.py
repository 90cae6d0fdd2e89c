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

# Defaults of entries that config.json may omit, where they differ from those of a Llama.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
}


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
    config = {**_DEFAULTS.get(model_type, {}), **config}
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ArchitectureError(
            f"export supports the activation silu, and this model uses {activation!r}"
        )
    heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden_size // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ArchitectureError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    frequencies, rotary = _frequencies(config, head_dim)
    return Architecture(
        model_type=model_type,
        vocabulary_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=int(config["intermediate_size"]),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=int(config["max_position_embeddings"]),
        sliding_window=_sliding_window(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        frequencies=frequencies,
        rotary=rotary,
        head_norms=model_type == "qwen3",
        unrotated_layers=_unrotated_layers(config),
        biased=_biased(config),
    )


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
    model_type, window = config["model_type"], config.get("sliding_window")
    switched_off = model_type != "mistral" and not config.get("use_sliding_window", False)
    if window is None or model_type == "llama" or switched_off:
        return None
    if model_type != "mistral":
        full = int(config.get("max_window_layers", 0))
        layers = range(int(config["num_hidden_layers"]))
        kinds = config.get("layer_types") or [
            "sliding_attention" if layer >= full else "full_attention" for layer in layers
        ]
        if set(kinds) == {"full_attention"}:
            return None
        if set(kinds) != {"sliding_attention"}:
            raise ArchitectureError(
                "export does not support models with a sliding window in some layers only"
            )
    return int(window)


def _unrotated_layers(config: Mapping[str, Any]) -> frozenset[int]:
    if config["model_type"] != "smollm3":
        return frozenset()
    layers, every = int(config["num_hidden_layers"]), int(config.get("no_rope_layer_interval", 4))
    # Despite its name, the list has a 1 for each layer with rotary embedding.
    rotated = config.get("no_rope_layers") or [(n + 1) % every != 0 for n in range(layers)]
    return frozenset(number for number, turned in enumerate(rotated) if not turned)


def _biased(config: Mapping[str, Any]) -> tuple[str, ...]:
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v")]
    if config["model_type"] == "qwen2":
        return tuple(attention)
    biased = [*attention, "self_attn.o_proj"] if config.get("attention_bias") else []
    if config.get("mlp_bias"):
        biased += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return tuple(biased) if config["model_type"] != "mistral" else ()


def _frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[NDArray[np.float32], Rotary]:
    # transformers 5 writes rope_parameters; older files hold rope_theta and rope_scaling.
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ArchitectureError(
            "export does not support models that rotate only a part of each head"
        )
    frequencies = plain_frequencies(base, head_dim)
    kind = rope.get("rope_type", rope.pop("type", "default"))
    rotary = Rotary(kind, base, {**rope, "rope_type": kind, "rope_theta": base})
    if kind == "default":
        return frequencies, rotary
    if kind not in ("linear", "llama3"):
        raise ArchitectureError(
            "export supports the rotary embeddings default, linear and llama3, and this model uses "
            f"{kind!r}"
        )
    if kind == "llama3":
        return _llama3_frequencies(frequencies, rope), rotary
    return (frequencies / float(rope["factor"])).astype(np.float32), rotary


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
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    weights = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended = weights * frequencies + (1 - weights) * frequencies / float(rope["factor"])
    return np.asarray(blended, np.float32)
