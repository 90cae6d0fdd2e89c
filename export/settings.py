"""How a student is exported: the settings of ``export.to_onnx`` and ``export.to_gguf``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.settings import require

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
class OnnxSettings:
    """Settings of the ONNX export.

    Attributes:
        precision: ``auto`` keeps what the source holds: float weights as float32, GPTQ codes as
            they are (those of 3 bits, and of 2 where ONNX Runtime is slow, as codes of 4 bits
            that stand for the same weights), NF4 on an 8-bit grid that holds its 16 levels.
            ``float32`` decodes any source; ``int8`` and ``int4`` round a float source.
        head_bits: Bits of the output head, 4, 8 or 32 (float32). Left out, it is 8 beside
            quantized layers and 32 beside float ones. A head that the source holds as codes keeps
            them, or becomes float32.
        embedding_bits: Bits of the input embedding, as for the head. A tied head shares the
            embedding's table when both have the same bits.
        block_size: Most input columns that share a scale: 16, 32, 64, 128 or 256. Longer groups of
            the source are split, which changes no weight; smaller blocks cost bytes and time and
            make the rounding of activations finer. Left out, it is 64 for 4-bit codes and
            NF4, and 32 for 8-bit codes.
        accuracy_level: 4 multiplies in 8-bit integers, with activations rounded block by block;
            0 multiplies in float32, which is slow (at 8 bits a hundred times).
        float_columns: So many input columns of the products behind a norm are multiplied in float32
            beside the codes, those whose large activations make the rounding of all others coarse.
            Codes stay as they are. 8 take two thirds off the distance to PyTorch and up to a sixth
            of a small model's speed; they are found by reading 512 tokens with the graph. Left out,
            it is 8 for 8-bit codes, but 0 for models narrower than 512 or of more than 2 billion
            parameters, and for transformers.js; for 4-bit codes and NF4, which have lost much more
            already, it is 0.
        context_length: Most positions, prompt and answer together. Left out, it is the model's
            own but at most 4096, since runtimes reserve their cache for all of them.
        portable: Write a graph of standard operators only (ONNX opset 21), for runtimes other than
            ONNX Runtime; it is slower, and mistill's engine does not run it.
        layout: ``mistill`` for a folder that mistill and onnxruntime-genai open, or
            ``transformersjs`` for one that transformers.js does.
        parity_positions: Positions whose logits are compared with PyTorch's before the folder is
            declared done, if PyTorch is installed; 0 leaves the comparison out.
        cache: Type of the keys and values of a conversation: ``float32``, or ``int8`` with a scale
            for each channel, which takes a quarter of the memory and rounds a little more.
        cache_texts: Text by which the scales of an int8 cache are set, the first 2,048 tokens, and
            by which ``float_columns`` are found, the first 512.
        ring: Keep no keys and values beyond the model's sliding window, so that memory stops
            growing there. For models whose window is shorter than the context.
        tune_for: The machine that the graph is for: ``here`` times the kernels of this one for some
            seconds, and a file that ``mistill probe`` wrote stands for another. For each kind of
            matrix the fastest blocks are chosen of those that change no weight, and codes of 4
            bits are stored in 8 where that is faster. Left out, nothing is timed.
        memory_speed: GB per second that the memory of the laptop reads, from which the manifest
            predicts the most tokens per second. Left out, it is measured on this machine.
    """

    precision: Literal["auto", "float32", "int8", "int4"] = "auto"
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
        """Most columns that share a scale.

        Args:
            bits: Bits per code, 2, 4 or 8.

        Returns:
            A legal block size.
        """
        return self.block_size or DEFAULT_BLOCKS[bits]

    def __post_init__(self) -> None:
        require(
            self.precision in ("auto", "float32", "int8", "int4"),
            f"precision must be auto, float32, int8 or int4, got {self.precision!r}",
        )
        for name in ("head_bits", "embedding_bits"):
            bits = getattr(self, name)
            require(
                bits is None or bits in TABLE_BITS,
                f"{name} must be 4, 8 or 32, got {bits!r}",
            )
        require(
            self.block_size is None or self.block_size in LEGAL_BLOCKS,
            f"block_size must be one of {', '.join(map(str, LEGAL_BLOCKS))}, "
            f"got {self.block_size!r}",
        )
        require(
            self.accuracy_level in (0, 4),
            "accuracy_level must be 4 (8-bit activations) or 0 (float activations), "
            f"got {self.accuracy_level!r}",
        )
        require(
            self.float_columns is None or self.float_columns >= 0,
            f"float_columns must be 0 or more, got {self.float_columns!r}",
        )
        require(
            not self.float_columns or not (self.portable or self.accuracy_level == 0),
            "float_columns spares what accuracy_level 4 rounds, and nothing is rounded here; leave "
            "it out",
        )
        require(
            self.context_length is None or self.context_length >= 1,
            f"context_length must be at least 1, got {self.context_length!r}",
        )
        require(
            self.layout in ("mistill", "transformersjs"),
            f"layout must be mistill or transformersjs, got {self.layout!r}",
        )
        require(
            self.parity_positions == 0 or self.parity_positions >= 2,
            f"parity_positions must be 0 or at least 2, got {self.parity_positions!r}",
        )
        require(
            self.cache in ("float32", "int8"),
            f"cache must be float32 or int8, got {self.cache!r}",
        )
        require(
            self.cache == "float32" or not (self.portable or self.layout != "mistill"),
            "an int8 cache is kept by an operator of ONNX Runtime alone; leave cache at float32 "
            "for a portable graph or transformers.js",
        )
        require(
            not (self.ring and (self.portable or self.layout != "mistill")),
            "a cache of the size of a window is kept by an operator of ONNX Runtime alone; leave "
            "ring out for a portable graph or transformers.js",
        )
        require(bool(self.cache_texts), "cache_texts must name at least one text")
        require(
            self.tune_for is None or not self.portable,
            "tune_for times ONNX Runtime's own kernels, which a portable graph has none of; leave "
            "one of them out",
        )
        require(
            self.tune_for is None or self.accuracy_level == 4,
            "tune_for chooses among kernels that multiply in 8-bit integers; leave accuracy_level "
            "at 4",
        )
        require(
            self.memory_speed is None or self.memory_speed > 0,
            f"memory_speed must be above 0, in GB per second, got {self.memory_speed!r}",
        )


GgufType = Literal["float32", "float16", "q8_0", "q4_1", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class GgufSettings:
    """Settings of the GGUF export.

    Attributes:
        dtype: Type of the matrices: float32, float16, or llama.cpp's blocks of 32 weights with a
            scale, q8_0, q4_1 (which has an offset too) or q4_0. Codes of a GPTQ folder that fit
            such blocks go over as they are; other weights are rounded to the nearest.
        table_dtype: Type of the embedding and of the output head. Left out, it is that of the
            matrices, but q8_0 where they have 4 bits.
    """

    dtype: GgufType = "float16"
    table_dtype: GgufType | None = None

    @property
    def tables(self) -> GgufType:
        """Type of the embedding and of the output head, with the default filled in."""
        if self.table_dtype is not None:
            return self.table_dtype
        return "q8_0" if self.dtype in ("q4_0", "q4_1") else self.dtype

    def __post_init__(self) -> None:
        known = get_args(GgufType)
        for name in ("dtype", "table_dtype"):
            value = getattr(self, name)
            require(
                value in known or (value is None and name == "table_dtype"),
                f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}",
            )


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What a graph does not learn from the model.

    Attributes:
        context_length: Positions that the rotary tables reach.
        accuracy_level: 4 or 0, for every product of codes.
        head_bits: Bits of the output head.
        embedding_bits: Bits of the embedding.
        ring: Whether attention drops keys and values that have left the sliding window.
    """

    context_length: int
    accuracy_level: int
    head_bits: int
    embedding_bits: int
    ring: bool = False
