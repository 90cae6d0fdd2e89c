"""``export.to_gguf``: from a model folder to a file for llama.cpp and Ollama."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from export.llama_cpp.gguf_tensors import BLOCK, BLOCKS
from export.llama_cpp.gguf_vocabulary import GgufVocabulary, read_gguf_vocabulary
from export.settings import GgufSettings, GgufType, OnnxSettings
from export.weights.architecture import EMBEDDING, HEAD, Architecture, read_architecture
from mistill.errors import ArchitectureError, missing_extra
from mistill.folders.folder import read_config
from mistill.folders.gptq_format import GptqFormat, read_quantization
from mistill.folders.lineage import lineage_after
from mistill.folders.publishing import creating_file
from mistill.progress import track
from mistill.settings import settings_from
from mistill.sources.gguf_model import CONTEXT_KEY
from mistill.sources.gguf_rope import ROPE_KEY
from mistill.sources.source import open_weights
from mistill.text.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from export.options import GgufOptions

LINEAGE_KEY = "mistill.lineage"

# llama.cpp's name of a model type, and whether the rows of q and k have llama.cpp's order.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
}
# The biases that llama.cpp's graph of an architecture has; that of llama has all.
_ATTENTION_BIASES = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v"))
_ALL_BIASES = (
    *_ATTENTION_BIASES,
    "self_attn.o_proj",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_BIASES = dict.fromkeys(("qwen2", "qwen3", "smollm3"), _ATTENTION_BIASES)
# Every how many layers llama.cpp leaves one of a SmolLM3 without rotary embedding.
_SMOLLM3_STEP = 4
_FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
_QUANTIZATION_VERSION = 2


def to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    settings: GgufSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[GgufOptions],
) -> Path:
    """Export a model to a GGUF file for llama.cpp and Ollama.

    The file holds the weights, the tokenizer, the chat template and the lineage. Weights are read
    and written one matrix at a time. llama.cpp has no sliding window for such models. If the model
    has one, the file allows as many positions as the window, within which the logits are equal.

    Args:
        source: A float, GPTQ or NF4 folder, or whatever else names a model.
        target: The file to make.
        settings: Types of the weights; or give the fields as keywords.
        overwrite: Replace the target if it exists.
        **options: Fields of ``GgufSettings``.

    Returns:
        The target.

    Raises:
        FolderError: If the source is broken or is an ONNX folder.
        ArchitectureError: If llama.cpp would compute something else.
        VocabularyError: If llama.cpp would cut text in another way.
        ExportError: If a weight does not fit its type.
    """
    chosen = settings_from(GgufSettings, settings, options)
    with creating_file(target, overwrite, [source]) as partial:
        info = open_weights(source)
        config = read_config(info.path)
        architecture = read_architecture(config)
        _require_known(architecture)
        types = matrix_types(info.path, chosen)
        vocabulary = load_vocabulary(info.path)
        described = read_gguf_vocabulary(info.path, vocabulary)
        if find_spec("gguf") is None:
            raise missing_extra("gguf", "compress")
        from gguf import GGUFWriter

        name, _ = _ARCHITECTURES[architecture.model_type]
        writer = GGUFWriter(partial, name)
        try:
            _describe(writer, info.path.name, architecture, types)
            _describe_vocabulary(writer, described, vocabulary, config)
            lineage = lineage_after(info.path, step="gguf", settings=chosen)
            writer.add_string(LINEAGE_KEY, json.dumps(lineage))
            _write_weights(writer, info.path, architecture, types)
        finally:
            writer.close()
    return Path(target).expanduser().absolute()


def matrix_types(folder: Path, settings: GgufSettings) -> dict[str, GgufType]:
    """The types of the matrices of a model folder, those of most weights first.

    Where none is asked for, each matrix has the smallest type whose blocks hold its codes as they
    are, float16 if it has none; beside such blocks, tables without codes become q8_0.

    Args:
        folder: A float, GPTQ or NF4 folder.
        settings: The types that are asked for.

    Returns:
        Types by the names of the modules.
    """
    config = read_config(folder)
    shapes = {
        module: shape
        for module, shape in read_architecture(config).shapes().items()
        if len(shape) == 2
    }
    layout = None if settings.dtype else read_quantization(config)
    types: dict[str, GgufType] = {}
    for module in shapes:
        table = module in (EMBEDDING, HEAD)
        usual = settings.tables if table else settings.matrices
        types[module] = usual if layout is None else _type_of_codes(layout, module) or usual
        if table and settings.table_dtype is not None:
            types[module] = settings.table_dtype
    blocks = layout is not None and any(one in BLOCKS for one in types.values())
    if blocks and settings.table_dtype is None:
        uncoded = [one for one in (EMBEDDING, HEAD) if types.get(one) == "float16"]
        types |= dict.fromkeys(uncoded, "q8_0")
    weights: Counter[GgufType] = Counter()
    for module, one in types.items():
        weights[one] += prod(shapes[module])
    return dict(sorted(types.items(), key=lambda entry: -weights[entry[1]]))


def _type_of_codes(layout: GptqFormat, module: str) -> GgufType | None:
    """The smallest type whose blocks hold the codes of a module; None where no type's do."""
    form = layout.format_of(module)
    if form is None and module == EMBEDDING:
        form = layout.format_of(HEAD)  # of a model whose head is its embedding
    if form is None or layout.activation_order:
        return None
    if form.group_size != -1 and form.group_size % BLOCK:
        return None
    if form.bits > 4:
        return "q8_0"
    return "q4_0" if form.symmetric else "q4_1"


def _require_known(architecture: Architecture) -> None:
    """Refuse a model that llama.cpp would compute differently."""
    model_type, layers = architecture.model_type, range(architecture.layers)
    if architecture.rotary.kind == "llama3" and _ARCHITECTURES[model_type][0] != "llama":
        raise ArchitectureError(
            f"llama.cpp does not support llama3 scaling of the rotary embedding in a {model_type} "
            "model"
        )
    name = _ARCHITECTURES[model_type][0]
    foreign = [part for part in architecture.biased if part not in _BIASES.get(name, _ALL_BIASES)]
    if foreign:
        raise ArchitectureError(
            f"llama.cpp's {name} models have no bias in {', '.join(foreign)}, and this model has"
        )
    width = architecture.heads * architecture.head_dim
    if name == "qwen2" and width != architecture.hidden_size:
        raise ArchitectureError(
            f"llama.cpp's qwen2 models have heads that are {architecture.hidden_size} wide "
            f"together, and those of this model are {width}"
        )
    without = {layer for layer in layers if (layer + 1) % _SMOLLM3_STEP == 0}
    if model_type == "smollm3" and architecture.unrotated_layers != without:
        raise ArchitectureError(
            f"llama.cpp leaves every {_SMOLLM3_STEP}th layer of a smollm3 model without rotary "
            "embedding, and this model leaves the layers "
            f"{sorted(architecture.unrotated_layers)} without"
        )


def _describe(
    writer: GGUFWriter, name: str, architecture: Architecture, types: Mapping[str, GgufType]
) -> None:
    from gguf import LlamaFileType, RopeScalingType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[next(iter(types.values()))]])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(architecture.vocabulary_size)
    window = architecture.sliding_window
    writer.add_context_length(min(architecture.max_positions, window or architecture.max_positions))
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_dimension_count(architecture.head_dim)
    rotary = architecture.rotary
    writer.add_rope_freq_base(rotary.base)
    if rotary.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary.parameters["factor"])
    if rotary.kind != "default":
        # llama.cpp needs only the factors; the parameters are for reading the file back.
        writer.add_string(ROPE_KEY, json.dumps(rotary.parameters))
    if window is not None:
        writer.add_sliding_window(window)
        writer.add_uint32(CONTEXT_KEY, architecture.max_positions)


def _describe_vocabulary(
    writer: GGUFWriter,
    described: GgufVocabulary,
    vocabulary: Vocabulary,
    config: dict[str, Any],
) -> None:
    writer.add_tokenizer_model(described.model)
    writer.add_token_list(described.pieces.texts)
    writer.add_token_types([int(kind) for kind in described.pieces.kinds])
    if described.cut is not None:
        writer.add_tokenizer_pre(described.cut)
        writer.add_token_merges(described.merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(described.pieces.scores)
        writer.add_add_space_prefix(bool(described.space_prefix))
    token_of_piece = {text: token for token, text in enumerate(described.pieces.texts)}
    specials = {kind: token_of_piece.get(text) for kind, text in vocabulary.special_tokens.items()}
    ends = list(vocabulary.end_ids)
    first_end = specials.get("eos_token")
    if first_end is not None:
        ends = [first_end, *(end for end in ends if end != first_end)]
    padding = specials.get("pad_token", config.get("pad_token_id"))
    added = {
        writer.add_bos_token_id: vocabulary.bos_id,
        writer.add_unk_token_id: specials.get("unk_token"),
        writer.add_pad_token_id: padding,
    }
    added |= dict(
        zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
            ends,
            strict=False,
        )
    )
    for add, token in added.items():
        if token is not None:
            add(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_weights(
    writer: GGUFWriter, folder: Path, architecture: Architecture, types: Mapping[str, GgufType]
) -> None:
    from export.llama_cpp.gguf_tensors import plan_tensors, read_values
    from export.weights.folder_weights import FolderWeights

    _, pairs = _ARCHITECTURES[architecture.model_type]
    with FolderWeights(folder, architecture, OnnxSettings(precision="float32")) as weights:
        tensors = plan_tensors(architecture, weights, types)
        for tensor in tensors:
            size = tensor.dtype.itemsize
            for length in tensor.stored_shape:
                size *= length
            raw = tensor.ggml_type if tensor.dtype == "uint8" else None
            writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.dtype, size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with track("gguf", len(tensors), "tensors") as progress:
            for values in read_values(tensors, architecture, weights, pairs=pairs):
                writer.write_tensor_data(values)
                progress.advance()
