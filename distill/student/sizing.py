"""How large a model of some shape is, and how many layers fit into a size.

Parameters count each weight once, a tied head not at all. Megabytes at 4 bits are those that the
weights take in the ONNX folder that ``export.to_onnx`` makes of a 4-bit model with its defaults:

- matrices of the layers: 4-bit codes, and a float16 scale for each block of at most 64 columns;
- embedding and head: 8-bit codes in blocks of at most 32, each with such a scale (one table where
  they are tied);
- norms and biases in float32;
- tables of rotary positions in float32, of 4,096 positions or the model's own if it has fewer.

A megabyte is 10**6 bytes. The file itself is larger by the gaps that align its tensors, under 1 %
of a model of 100 megabytes, and the graph, some 0.1 megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mistill.settings import require

if TYPE_CHECKING:
    from distill.settings import StudentSettings

_LEGAL_BLOCKS = (16, 32, 64)
_LAYER_BITS, _LAYER_BLOCK = 4, 64
_TABLE_BITS, _TABLE_BLOCK = 8, 32
_POSITIONS = 4096
_FLOAT_BYTES = 4
_SCALE_BYTES = 2
_MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape of a Llama or Mistral model.

    Attributes:
        vocabulary_size: Rows of the embedding, V.
        hidden_size: Width of the hidden state, D.
        intermediate_size: Feed-forward neurons of a layer.
        layers: Decoder layers.
        attention_heads: Query heads.
        key_value_heads: Key and value heads.
        head_dim: Width of a head.
        tied: Whether the head is the embedding.
        attention_bias: Whether the matrices of attention have biases.
        mlp_bias: Whether those of the feed-forward part have.
        positions: Most positions.
    """

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    positions: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read the shape of a model.

        Args:
            config: Its config.json.

        Returns:
            Its shape.
        """
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        llama = config["model_type"] == "llama"
        return cls(
            vocabulary_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            attention_heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=llama and bool(config.get("attention_bias", False)),
            mlp_bias=llama and bool(config.get("mlp_bias", False)),
            positions=int(config["max_position_embeddings"]),
        )

    @property
    def parameters(self) -> int:
        """All weights."""
        tables = self._tables * self.vocabulary_size * self.hidden_size
        matrices = sum(rows * columns for rows, columns in self._matrices)
        return tables + self.hidden_size + self.layers * (matrices + self._vectors)

    @property
    def megabytes_at_4_bits(self) -> float:
        """What the weights take in a 4-bit chatbot, in 10**6 bytes."""
        table = _rounded_bytes(self.vocabulary_size, self.hidden_size, _TABLE_BITS, _TABLE_BLOCK)
        rotary = min(_POSITIONS, self.positions) * self.head_dim * _FLOAT_BYTES
        layer = self._vectors * _FLOAT_BYTES + sum(
            _rounded_bytes(rows, columns, _LAYER_BITS, _LAYER_BLOCK)
            for rows, columns in self._matrices
        )
        norm = self.hidden_size * _FLOAT_BYTES
        return (self._tables * table + rotary + norm + self.layers * layer) / _MEGABYTE

    @property
    def _tables(self) -> int:
        return 1 if self.tied else 2

    @property
    def _matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices of a layer."""
        D, F = self.hidden_size, self.intermediate_size
        queries = self.attention_heads * self.head_dim
        keys = self.key_value_heads * self.head_dim
        return (queries, D), (keys, D), (keys, D), (D, queries), (F, D), (F, D), (D, F)

    @property
    def _vectors(self) -> int:
        """Weights of a layer's norms and biases."""
        rows = [rows for rows, _ in self._matrices]
        biases = self.attention_bias * sum(rows[:4]) + self.mlp_bias * sum(rows[4:])
        return 2 * self.hidden_size + biases


def fitting_layers(sizes: Sizes, settings: StudentSettings) -> int | None:
    """The most layers that fit into the size that is asked for.

    Args:
        sizes: The shape of the student; its layers do not matter.
        settings: With ``parameters`` or ``megabytes_at_4_bits``.

    Returns:
        Layers, 1 or more; None if no size is asked for.

    Raises:
        SettingsError: If not even one layer fits.
    """
    for measure in ("parameters", "megabytes_at_4_bits"):
        limit = getattr(settings, measure)
        if limit is not None:
            fitting = most_layers(sizes, measure, limit)
            least = getattr(replace(sizes, layers=1), measure)
            none = getattr(replace(sizes, layers=0), measure)
            require(
                fitting >= 1,
                f"no student of this width fits {measure} {limit:,}: one layer makes it "
                f"{least:,}, of which {none:,} are no layer's; allow more, or choose a smaller "
                "hidden_size",
            )
            return fitting
    return None


def most_layers(sizes: Sizes, measure: str, limit: float) -> int:
    """The most layers with which a model stays within a size.

    Args:
        sizes: Its shape; its own layers do not matter.
        measure: ``parameters`` or ``megabytes_at_4_bits``.
        limit: The most that it may be.

    Returns:
        Layers; 0 or fewer if not even one fits.
    """
    none = getattr(replace(sizes, layers=0), measure)
    one = getattr(replace(sizes, layers=1), measure)
    layers = int((limit - none) // (one - none))
    # Megabytes are fractions: a quotient may be a hair off where the limit is met exactly.
    while getattr(replace(sizes, layers=layers + 1), measure) <= limit:
        layers += 1
    return layers


def _rounded_bytes(rows: int, columns: int, bits: int, largest_block: int) -> int:
    """Codes and scales of a matrix, each row filled up to whole blocks."""
    legal = [block for block in _LEGAL_BLOCKS if block <= largest_block]
    block = min(legal, key=lambda size: (-columns % size, -size))
    blocks = -(-columns // block)
    return rows * blocks * (block * bits // 8 + _SCALE_BYTES)
