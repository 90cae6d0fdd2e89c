"""How a student is exported: the settings of ``export.to_onnx`` and ``export.to_gguf``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.settings import TextSettings, require, require_choice, require_range

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

LEGAL_BLOCKS = (16, 32, 64, 128, 256)
TABLE_BITS = (4, 8, 32)
DEFAULT_CONTEXT = 4096

# Activations are rounded in the same blocks; docs/decisions/0008-blocks-of-the-onnx-graph.md holds
# what each size costs in KL and in speed.
DEFAULT_BLOCKS = {2: 64, 4: 64, 8: 32}
# ONNX Runtime 1.31 multiplies 2-bit codes fast only in 8-bit integers and in blocks of at least 32;
# otherwise it takes 60 times as long as for 4-bit ones.
FAST_2_BIT_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class OnnxSettings(TextSettings):
    """Settings of the ONNX export.

    Attributes:
        precision: ``auto`` keeps the weights of the source: float weights become float32, GPTQ
            codes stay as they are, and NF4 codes move to an 8-bit grid that represents the 16
            levels. GPTQ codes of 3 bits, and of 2 bits where ONNX Runtime is slow, are stored in 4
            bits with the same values. ``float32`` and ``float16`` dequantize any source, the latter
            with activations of that type. ``int8`` and ``int4`` round float weights to the nearest
            code.
        activations: Type of activations, of the KV cache and of float weights: ``float32``, the
            fastest on a CPU, or ``float16``, which GPUs multiply, at half the bytes. Weights in
            codes stay codes. By default float32, or float16 with precision float16.
        head_bits: Bits of the output head: 4, 8 or 32 (float32). By default 8 if the layers are
            quantized, else 32. A head that the source stores as codes keeps them, or becomes
            float32 with 32.
        embedding_bits: Bits of the input embedding, with the same default as the head. With tied
            embeddings, both share one table if their bits are equal.
        block_size: The most input columns that share a scale: 16, 32, 64, 128 or 256. Longer groups
            of the source are split, which changes no weight. Smaller blocks round activations
            less, and cost bytes and time. By default 64 for 4-bit codes and NF4, 32 for 8-bit
            codes.
        accuracy_level: 4 multiplies in 8-bit integers and rounds activations block by block. 0
            multiplies in float32, which is slow: at 8 bits about a hundred times slower.
        float_columns: Number of outlier columns that each product behind a norm multiplies in
            float32, because their large activations make the rounding of the others coarse. The
            codes do not change. 8 columns remove two thirds of the difference from PyTorch and
            cost up to a sixth of a small model's speed; 512 tokens of cache_texts are read to find
            them. By default 8 for 8-bit codes in models of width 512 or more and at most 2 billion
            parameters, and 0 for all others and for transformers.js.
        context_length: The most tokens of prompt and reply together. By default that of the model,
            but at most 4,096, because runtimes reserve a KV cache for all of them.
        portable: Write a portable graph of standard operators only (ONNX opset 21), for runtimes
            other than ONNX Runtime. It is slower, and mistill chat does not run it.
        layout: ``mistill`` writes a folder for mistill and onnxruntime-genai, ``transformersjs``
            one for transformers.js.
        parity_positions: Positions at which the logits are compared with those of PyTorch before
            the folder is complete, if PyTorch is installed. 0 skips the comparison.
        cache: Type of the KV cache: ``float32``, or ``int8`` with a scale per channel, which takes
            a quarter of the memory and rounds keys and values. With activations of float16 the
            cache has that type.
        cache_texts: Calibration data. Its first 2,048 tokens set the scales of an int8 KV cache,
            and its first 512 tokens find the outlier columns of float_columns.
        ring: Drop keys and values that have left the model's sliding window from the KV cache, so
            that its memory stops growing. For models whose window is shorter than the context.
        tune_for: The machine that the graph is tuned for: ``here`` times matrix products on this
            one for some seconds; a file that ``mistill probe`` wrote stands for another one. For
            each kind of matrix the fastest block size is chosen of those that change no weight,
            and codes of 4 bits are stored in 8 bits if that is faster. By default nothing is
            timed.
        memory_speed: Memory bandwidth of the laptop in GB per second, from which the manifest
            predicts an upper bound of the tokens per second. By default it is measured on this
            machine.
    """

    precision: Literal["auto", "float32", "float16", "int8", "int4"] = "auto"
    activations: Literal["float32", "float16"] | None = None
    head_bits: Literal[4, 8, 32] | None = None
    embedding_bits: Literal[4, 8, 32] | None = None
    block_size: int | None = None
    accuracy_level: Literal[0, 4] = 4
    float_columns: int | None = None
    context_length: int | None = None
    portable: bool = False
    layout: Literal["mistill", "transformersjs"] = "mistill"
    parity_positions: int = 48
    cache: Literal["float32", "int8"] = "float32"
    cache_texts: tuple[str, ...] = ("@demo-train",)
    ring: bool = False
    tune_for: str | None = None
    memory_speed: float | None = None

    def largest_block(self, bits: int) -> int:
        """The most columns that share a scale.

        Args:
            bits: Bits per code, 2, 4 or 8.

        Returns:
            A legal block size.
        """
        return self.block_size or DEFAULT_BLOCKS[bits]

    @property
    def activation_type(self) -> Literal["float32", "float16"]:
        """Type of the activations, with the default filled in."""
        return self.activations or ("float16" if self.precision == "float16" else "float32")

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, ("auto", "float32", "float16", "int8", "int4"))
        self._check_activations()
        for name in ("head_bits", "embedding_bits"):
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), TABLE_BITS)
        if self.block_size is not None:
            require_choice("block_size", self.block_size, LEGAL_BLOCKS)
        require(
            self.accuracy_level in (0, 4),
            "accuracy_level must be 4 (8-bit activations) or 0 (float activations), "
            f"got {self.accuracy_level!r}",
        )
        require_range("float_columns", self.float_columns, 0)
        require(
            not self.float_columns or not (self.portable or self.accuracy_level == 0),
            "float_columns needs activations that are rounded, as accuracy_level 4 rounds them; "
            "leave float_columns out",
        )
        require_range("context_length", self.context_length, 1)
        require_choice("layout", self.layout, ("mistill", "transformersjs"))
        require(
            self.parity_positions == 0 or self.parity_positions >= 2,
            f"parity_positions must be 0 or at least 2, got {self.parity_positions!r}",
        )
        require_choice("cache", self.cache, ("float32", "int8"))
        require(
            self.cache == "float32" or not (self.portable or self.layout != "mistill"),
            "only ONNX Runtime has an operator with an int8 KV cache; leave cache at float32 for a "
            "portable graph or transformers.js",
        )
        require(
            not (self.ring and (self.portable or self.layout != "mistill")),
            "only ONNX Runtime has an operator that drops keys and values outside a window; "
            "leave ring out for a portable graph or transformers.js",
        )
        require(bool(self.cache_texts), "cache_texts must name at least one text")
        require(
            self.tune_for is None or not self.portable,
            "tune_for chooses among operators of ONNX Runtime, and a portable graph has none of "
            "them; leave tune_for or portable out",
        )
        require(
            self.tune_for is None or self.accuracy_level == 4,
            "tune_for chooses among kernels that multiply in 8-bit integers; leave accuracy_level "
            "at 4",
        )
        require_range("memory_speed", self.memory_speed, 0, exclusive=True)

    def _check_activations(self) -> None:
        """Refuse float16 beside what is made for a CPU, or for runtimes without these operators."""
        if self.activations is not None:
            require_choice("activations", self.activations, ("float32", "float16"))
        types = (self.precision, self.activations)
        require(
            types not in (("float16", "float32"), ("float32", "float16")),
            f"precision {self.precision} has activations of the same type, not "
            f"{self.activations}; leave activations out",
        )
        if self.activation_type == "float32":
            return
        for name, fits, instead in (
            ("portable", not self.portable, "leave it out"),
            ("layout", self.layout == "mistill", "leave it at mistill"),
            ("cache", self.cache == "float32", "leave it out: the KV cache becomes float16"),
            ("float_columns", not self.float_columns, "leave it out"),
            ("tune_for", self.tune_for is None, "leave it out, for it times kernels of float32"),
        ):
            require(fits, f"activations of float16 do not go with {name}; {instead}")


GgufType = Literal["float32", "float16", "q8_0", "q4_1", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class GgufSettings:
    """Settings of the GGUF export.

    Attributes:
        dtype: Type of the matrices: float32, float16, or q8_0, q4_1 or q4_0, llama.cpp's blocks of
            32 codes with a scale (and an offset in q4_1). GPTQ codes that fit such blocks stay as
            they are; other weights are rounded to the nearest code. By default each matrix has the
            smallest type that its codes fit, or float16 where it has none.
        table_dtype: Type of the embedding and of the output head. By default the type that their
            codes fit, q8_0 where they have none and the matrices have blocks, or that of the
            matrices.
    """

    dtype: GgufType | None = None
    table_dtype: GgufType | None = None

    @property
    def matrices(self) -> GgufType:
        """Type of the matrices of a source without codes."""
        return self.dtype or "float16"

    @property
    def tables(self) -> GgufType:
        """Type of the embedding and of the output head, with the default filled in."""
        if self.table_dtype is not None:
            return self.table_dtype
        return "q8_0" if self.matrices in ("q4_0", "q4_1") else self.matrices

    def __post_init__(self) -> None:
        types = get_args(GgufType)
        for name in ("dtype", "table_dtype"):
            value = getattr(self, name)
            require(
                value is None or value in types,
                f"{name} must be {', '.join(types[:-1])} or {types[-1]}, got {value!r}",
            )


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """The settings of a graph with all defaults filled in.

    Attributes:
        context_length: Positions in the tables of the rotary position embedding.
        accuracy_level: 4 or 0, for every product with quantized weights.
        head_bits: Bits of the output head.
        embedding_bits: Bits of the embedding.
        ring: Whether attention drops keys and values that have left the sliding window.
        activations: Type of activations, float weights and the KV cache.
    """

    context_length: int
    accuracy_level: int
    head_bits: int
    embedding_bits: int
    ring: bool = False
    activations: Literal["float32", "float16"] = "float32"
