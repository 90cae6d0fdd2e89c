"""What the JSON documents of a folder may hold: types and bounds of every value that is read.

Files of strangers may hold more, and anything under other keys. What is named here has been
checked before anything else sees it. Bounds are far beyond any model that exists: they keep a
number in a small file from asking for years of work or all memory.

It is one file because the documents share their types and bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from mistill.errors import FolderError
from mistill.folders.json_text import check, read_json_file

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Width = Annotated[int, Meta(ge=1, le=2**24)]
_Layers = Annotated[int, Meta(ge=1, le=100_000)]
_Token = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
_Positive = Annotated[float, Meta(gt=0, le=1e30)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Figure = Annotated[float, Meta(ge=-1e308, le=1e308)]
_Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
_Tokens = _Token | list[_Token]
_Fields = dict[str, Any]


class Rope(Struct, kw_only=True):
    """Parameters of the rotary embedding, under ``rope_parameters`` or ``rope_scaling``."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: Annotated[float, Meta(ge=1, le=1e30)] | None = None
    partial_rotary_factor: _Positive | None = None

    def __post_init__(self) -> None:
        """Refuse a scaled embedding that lacks what it is scaled by."""
        kind = self.rope_type or self.type
        required: tuple[str, ...] = {
            "linear": ("factor",),
            "llama3": (
                *("factor", "low_freq_factor", "high_freq_factor"),
                "original_max_position_embeddings",
            ),
        }.get(str(kind), ())
        missing = [name for name in required if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a rotary embedding of type {kind} needs {', '.join(missing)}")
        if kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ValueError("low_freq_factor and high_freq_factor must differ")


class Config(Struct, kw_only=True):
    """config.json; keys may be missing, and null where transformers writes null."""

    model_type: str | None = None
    vocab_size: _Size | None = None
    num_hidden_layers: _Layers | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    num_attention_heads: _Width | None = None
    num_key_value_heads: _Width | None = None
    head_dim: _Width | None = None
    max_position_embeddings: _Size | None = None
    sliding_window: _Size | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: _Layers | None = None
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)] | None = None
    initializer_range: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    attention_dropout: _Share | None = None
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    dtype: _Dtype | None = None
    torch_dtype: _Dtype | None = None
    rope_theta: _Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: _Positive | None = None
    bos_token_id: _Tokens | None = None
    eos_token_id: _Tokens | None = None
    pad_token_id: _Tokens | None = None
    quantization_config: _Fields | None = None
    auto_map: _Fields | str | None = None

    def __post_init__(self) -> None:
        """Refuse heads that cannot be shared."""
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads is not None and shared is not None and heads % shared:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}"
            )


class GenerationConfig(Struct, kw_only=True):
    """generation_config.json."""

    bos_token_id: _Tokens | None = None
    eos_token_id: _Tokens | None = None
    pad_token_id: _Tokens | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_allowed_length: int | None = None


class SpecialToken(Struct, kw_only=True):
    """A special token that is written with its options."""

    content: str


class ListedToken(Struct, kw_only=True):
    """An entry of ``added_tokens_decoder``."""

    content: str
    special: bool = False


class NamedTemplate(Struct, kw_only=True):
    """One of several chat templates."""

    name: str
    template: str


class SpecialTokens(Struct, kw_only=True):
    """special_tokens_map.json, and the same keys of tokenizer_config.json."""

    bos_token: str | SpecialToken | None = None
    eos_token: str | SpecialToken | None = None
    unk_token: str | SpecialToken | None = None
    sep_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None
    cls_token: str | SpecialToken | None = None


class TokenizerConfig(SpecialTokens, kw_only=True):
    """tokenizer_config.json."""

    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    added_tokens_decoder: _Fields = {}
    additional_special_tokens: list[Any] | None = None
    extra_special_tokens: list[Any] | _Fields | None = None


class StoredFile(Struct, kw_only=True):
    """Size and checksum of a file."""

    bytes: _Count
    sha256: str


class Parity(Struct, kw_only=True):
    """How far a graph's logits are from PyTorch's."""

    positions: _Count
    max_difference: _Figure
    mean_kl: _Figure
    same_top: _Figure


class Codes(Struct, kw_only=True):
    """How many codes went over unchanged."""

    codes: _Count
    matrices: _Count
    decoded: _Count | None = None


class TunedRow(Struct, kw_only=True):
    """Times of one kernel."""

    kind: str
    bits: _Count
    kernel: str
    allowed: bool
    chosen: bool
    token_ms: _Figure
    prompt_ms: _Figure | None = None


class Tuning(Struct, kw_only=True):
    """The kernels that an export chose, and their times."""

    machine: str
    threads: _Count
    choices: dict[str, str]
    table: list[TunedRow] = []


class Speed(Struct, kw_only=True):
    """Tokens a second of a chatbot that was made for a speed."""

    wanted: _Figure
    predicted: _Figure
    measured: _Figure


class OnnxManifest(Struct, kw_only=True):
    """manifest.json of an ONNX folder."""

    parameters: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    files: dict[str, StoredFile]
    context_length: _Size | None = None
    bytes_per_token: _Count | None = None
    packed_bytes_per_token: _Count | None = None
    cache_bytes_per_position: _Count | None = None
    memory_bytes_per_second: _Figure | None = None
    ceiling_tokens_per_second: _Figure | None = None
    float_columns: _Count | None = None
    parity: Parity | None = None
    codes: Codes | None = None
    tuning: Tuning | None = None
    speed: Speed | None = None

    def __post_init__(self) -> None:
        """Refuse names that lead out of the folder, and one half of a pair."""
        _require_inside(self.files)
        if self.ceiling_tokens_per_second and self.memory_bytes_per_second is None:
            raise ValueError("ceiling_tokens_per_second needs memory_bytes_per_second beside it")
        steps = (self.bytes_per_token, self.packed_bytes_per_token, self.cache_bytes_per_position)
        if any(step is None for step in steps) and any(step is not None for step in steps):
            raise ValueError("of the bytes that a step reads only a part is given")


class GenaiModel(Struct, kw_only=True):
    """The entry ``model`` of genai_config.json."""

    context_length: _Size


class GenaiConfig(Struct, kw_only=True):
    """genai_config.json."""

    model: GenaiModel


class HeldOut(Struct, kw_only=True):
    """Figures of a student on held-out text; some may not have been measured."""

    kl: _Figure | None = None
    kl_p99: _Figure | None = None
    agreement: _Figure | None = None
    acceptance: _Figure | None = None
    perplexity: _Figure | None = None
    calibration_error: _Figure | None = None


class Trained(Struct, kw_only=True):
    """A student of a fidelity card."""

    held_out: HeldOut
    tokens: _Count = 0


class FidelityCard(Struct, kw_only=True):
    """fidelity.json."""

    before: HeldOut
    student: Trained
    twin_of_equal_tokens: Trained | None = None
    twin_of_equal_time: Trained | None = None


class FidelityFigures(Struct, kw_only=True):
    """Figures between two models."""

    tokens: _Count
    kl: _Figure
    kl_standard_error: _Figure | None
    kl_p99: _Figure
    agreement: _Figure
    perplexity: _Figure
    reference_perplexity: _Figure


class Measured(Struct, kw_only=True):
    """How close a quantized folder is to its source, and both to a teacher."""

    source: FidelityFigures | None = None
    teacher: FidelityFigures | None = None
    source_to_teacher: FidelityFigures | None = None


class QuantizeReport(Struct, kw_only=True):
    """quantize_report.json."""

    measured: Measured | None = None


class LineageStep(Struct, kw_only=True):
    """An entry of lineage.json."""

    step: str
    settings: _Fields | None = None
    changed_settings: list[str] | None = None
    source: str | None = None
    source_fingerprint: str | None = None
    versions: dict[str, str] | None = None
    date: str | None = None


class TargetsTeacher(Struct, kw_only=True):
    """The model that targets come from."""

    name: str
    form: str
    dtype: str
    fingerprint: str


class TargetsVocabulary(Struct, kw_only=True):
    """The vocabulary of targets."""

    size: _Size


class TargetsSettings(Struct, kw_only=True):
    """Settings of targets, as far as they are read."""

    method: str
    draws: _Count
    top_k: _Count
    temperature: _Positive
    codec: str
    block_length: _Size


class TargetsManifest(Struct, kw_only=True):
    """manifest.json of a folder of targets."""

    teacher: TargetsTeacher
    vocabulary: TargetsVocabulary
    settings: TargetsSettings
    pieces: _Count
    tokens: _Count
    positions: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    stored_tokens: _Count
    mean_entropy: _Figure | None
    files: dict[str, StoredFile]

    def __post_init__(self) -> None:
        """Refuse names that lead out of the folder."""
        _require_inside(self.files)


class AdapterConfig(Struct, kw_only=True):
    """adapter_config.json of peft."""

    peft_type: str
    r: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    lora_alpha: _Figure | None = None
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Meta(ge=1, le=2**20)]] | None = None
    alpha_pattern: dict[str, _Figure] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None


_BY_NAME: dict[str, Any] = {
    "adapter_config.json": AdapterConfig,
    "config.json": Config,
    "fidelity.json": FidelityCard,
    "genai_config.json": GenaiConfig,
    "generation_config.json": GenerationConfig,
    "manifest.json": OnnxManifest,
    "quantize_report.json": QuantizeReport,
    "special_tokens_map.json": SpecialTokens,
    "tokenizer_config.json": TokenizerConfig,
}


def check_document(value: Mapping[str, Any], file: Path) -> None:
    """Hold a document of a model folder against the schema that goes with its name.

    Args:
        value: The parsed document.
        file: Its path.

    Raises:
        FolderError: If a value is of another type or out of bounds; the message names the key,
            what was expected and what it holds.
    """
    if file.name in _BY_NAME:
        check(value, _BY_NAME[file.name], file)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; what its name has a schema for is held against it.

    Args:
        file: Path of the file.

    Returns:
        The object.

    Raises:
        FolderError: If the file is missing or is not a JSON object, or if a value is of another
            type or out of bounds.
    """
    value = read_json_file(file)
    if not isinstance(value, dict):
        raise FolderError(f"{file} should hold a JSON object, not a {type(value).__name__}")
    check_document(value, file)
    return value


def optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON document, or an empty one where there is no such file.

    Args:
        file: Path of the file.

    Returns:
        The document.

    Raises:
        FolderError: If the file is not what its schema asks for.
    """
    return read_json(file) if file.is_file() else {}


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and nothing that leads elsewhere.

    Args:
        name: Any text.

    Returns:
        False for an empty or very long name, and for one with a separator or a null byte.
    """
    return 0 < len(name.encode(errors="replace")) <= 255 and not (
        name in (".", "..") or any(mark in name for mark in "/\\\0")
    )


def _require_inside(files: Mapping[str, Any]) -> None:
    """Names of files, which may stand in folders of the folder."""
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or not all(map(is_plain_name, parts)):
            raise ValueError(f"files names {name!r:.80}, which is no file of the folder")
