"""``export.to_onnx``: from a model folder to an ONNX folder."""

from __future__ import annotations

import hashlib
import logging
from copy import copy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from export.checks.parity import TEXT, can_compare, measure_parity, require_parity
from export.graph.outliers import CALIBRATION_TOKENS, Outliers, find_outliers, guarded_norms
from export.runtimes.genai import GENAI_FILE, genai_config
from export.runtimes.transformersjs import arrange_for_transformersjs
from export.settings import DEFAULT_CONTEXT, GraphOptions, OnnxSettings
from export.weights.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    read_architecture,
    require_graph,
)
from mistill.engine.sampling import FOR_SMALL_MODELS, GENERATION_FILE, OWN
from mistill.errors import FolderError, SettingsError, missing_extra
from mistill.folders.folder import (
    MANIFEST_FILE,
    FolderInfo,
    copy_companions,
    open_folder,
    read_config,
)
from mistill.folders.lineage import add_lineage
from mistill.folders.ownership import CARD_FILE
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.folders.schemas import optional_json
from mistill.folders.settled_config import says_tied
from mistill.settings import require, settings_from
from mistill.sources.source import resolve_model
from mistill.text.documents import read_documents
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from mistill.weights.gptq_layout import read_quantization

if TYPE_CHECKING:
    from export.options import OnnxOptions
    from export.weights.folder_weights import FolderWeights

_log = logging.getLogger(__name__)

CACHE_TOKENS = 2048
"""Tokens of calibration data for an int8 KV cache."""

FLOAT_COLUMNS = 8
"""Default number of float columns."""

_FLOATS = ("float32", "float16")

# The chat template for calibration data of a base model.
_PARAGRAPHS = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"

# Narrower models have no such outliers, and larger ones take long to read the calibration data.
_NARROWEST = 512
_MOST_PARAMETERS = 2_000_000_000


def to_onnx(
    source: str | Path,
    target: str | Path,
    *,
    settings: OnnxSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[OnnxOptions],
) -> Path:
    """Export a model to an ONNX folder that runs fast on a CPU.

    The folder holds the graph and its weights, the tokenizer and the chat template, and opens in
    ``mistill chat`` and in onnxruntime-genai. GPTQ codes stay unchanged. Weights
    are read and written one matrix at a time. If PyTorch is installed, the graph's logits are
    compared with PyTorch's on the same weights before the folder appears.

    Args:
        source: A float, GPTQ or NF4 folder, or whatever else names a model.
        target: The folder to make.
        settings: Settings of the graph; or give the fields as keywords.
        overwrite: Replace the target if it exists.
        **options: Fields of ``OnnxSettings``.

    Returns:
        The target.

    Raises:
        FolderError: If the source is broken or is an ONNX folder already.
        ArchitectureError: If the export does not support the model.
        ExportError: If the graph's logits are not PyTorch's.
    """
    chosen = settings_from(OnnxSettings, settings, options)
    path = refuse_existing(target, overwrite, [source])
    info = open_folder(resolve_model(source))
    if info.form == "onnx":
        raise FolderError(f"{source} is an ONNX folder already; give a model folder")
    config = read_config(info.path)
    architecture = read_architecture(config)
    if not chosen.portable:
        require_graph(architecture)
    resolved, graph = resolve(chosen, info)
    window = architecture.sliding_window
    require(
        not graph.ring or (window is not None and window < graph.context_length),
        "ring needs a sliding window that is shorter than the context, and this model has a "
        f"window of {window} and a context of {graph.context_length}: leave ring out, or give a "
        "longer context_length",
    )
    vocabulary = load_vocabulary(info.path)
    resolved = replace(resolved, float_columns=_float_columns(resolved, architecture, info))
    if find_spec("onnx_ir") is None:
        raise missing_extra("onnx-ir", "compress")
    with creating(path, overwrite) as folder:
        facts = _write(folder, info, architecture, vocabulary, resolved, graph)
        copy_companions(info.path, folder)
        if vocabulary.chat_template is not None:
            _say_how_to_sample(folder, vocabulary)
        write_json(folder / "config.json", config, ascii_only=False)
        if chosen.layout == "transformersjs":
            bits = _layer_bits(resolved, info)
            arrange_for_transformersjs(folder, config, vocabulary, bits)
        else:
            genai = genai_config(
                architecture,
                vocabulary,
                graph.context_length,
                config.get("pad_token_id"),
                in_place=not chosen.portable,
            )
            write_json(folder / GENAI_FILE, genai, ascii_only=False)
        add_lineage(folder, step="export", settings=chosen, source=info.path)
        manifest = {
            "format": 1,
            "parameters": info.parameters,
            "precision": resolved.precision,
            **asdict(graph),
            **facts,
            "files": checksums(folder),
        }
        write_json(folder / MANIFEST_FILE, manifest, ascii_only=False)
    return path


def _say_how_to_sample(folder: Path, vocabulary: Vocabulary) -> None:
    """Let the chatbot say how it is sampled, where its model says nothing of it."""
    file = folder / GENERATION_FILE
    config = optional_json(file)
    if config.get("do_sample") is None and not any(config.get(name) for name in OWN):
        ends = list(vocabulary.end_ids)
        config = config or ({"eos_token_id": ends} if ends else {})
        write_json(file, {**config, **FOR_SMALL_MODELS}, ascii_only=False)


def resolve(settings: OnnxSettings, info: FolderInfo) -> tuple[OnnxSettings, GraphOptions]:
    """The settings for a source, with all defaults filled in.

    Args:
        settings: Settings of the export.
        info: Description of the source folder.

    Returns:
        The settings, and the options of the graph.

    Raises:
        SettingsError: If they do not fit the source.
    """
    if settings.precision in ("int8", "int4") and info.form != "model":
        raise SettingsError(
            f"precision {settings.precision} rounds float weights, and {info.path} is a "
            f"{info.form} folder: leave precision at auto to keep its codes, or export the float "
            "folder that it was made from"
        )
    context_length = settings.context_length or min(info.context_length, DEFAULT_CONTEXT)
    require(
        context_length <= info.context_length,
        f"context_length is {context_length}, and the model's own context has "
        f"{info.context_length} positions",
    )
    floats = settings.precision in ("float32", "float16") or (
        settings.precision == "auto" and info.form == "model"
    )
    require(
        not (floats and settings.tune_for is not None),
        "tune_for chooses kernels for quantized weights, and a float32 graph has none; set "
        "precision to int8 or int4",
    )
    options = GraphOptions(
        context_length=context_length,
        accuracy_level=settings.accuracy_level,
        head_bits=_table_bits("head_bits", settings.head_bits, info, floats),
        embedding_bits=_table_bits("embedding_bits", settings.embedding_bits, info, floats),
        ring=settings.ring,
        activations=settings.activation_type,
    )
    resolved = replace(settings, activations=settings.activation_type)
    return replace(resolved, precision=settings.activation_type) if floats else resolved, options


def _float_columns(settings: OnnxSettings, architecture: Architecture, info: FolderInfo) -> int:
    """The number of float columns: as requested, or a default."""
    quantized = settings.precision not in _FLOATS
    requested, limit = settings.float_columns, architecture.hidden_size // 4
    if requested is not None:
        require(
            quantized or requested == 0,
            "float_columns is for products with quantized weights, and a float32 graph has none; "
            "leave it out, or set precision to int8 or int4",
        )
        require(
            requested <= limit,
            f"float_columns is {requested}, and the model is {architecture.hidden_size} wide; "
            f"give at most {limit}",
        )
        return requested
    rounds = quantized and settings.accuracy_level == 4 and not settings.portable
    rounds = rounds and settings.activation_type == "float32"
    small = architecture.hidden_size >= _NARROWEST and info.parameters <= _MOST_PARAMETERS
    # 4-bit codes and NF4 have lost far more already than float columns would restore.
    worthwhile = rounds and small and info.form != "nf4" and _layer_bits(settings, info) == 8
    return FLOAT_COLUMNS if worthwhile and settings.layout == "mistill" else 0


def _layer_bits(settings: OnnxSettings, info: FolderInfo) -> int:
    """Bits of most layers as the graph holds them."""
    if settings.precision != "auto":
        return {"float32": 32, "float16": 16, "int8": 8, "int4": 4}[settings.precision]
    gptq_format = read_quantization(read_config(info.path))
    return 8 if gptq_format is None else gptq_format.bits  # NF4 goes to an 8-bit grid


def _table_bits(name: str, requested: int | None, info: FolderInfo, floats: bool) -> int:
    """Bits of the head or the embedding: as requested, as stored, or a default."""
    config = read_config(info.path)
    gptq_format = read_quantization(config)
    tied = says_tied(config)
    module = HEAD if name == "head_bits" and not tied else EMBEDDING
    module_format = None if gptq_format is None else gptq_format.format_of(module)
    if module_format is None or floats:
        return requested or (32 if floats else 8)
    require(
        requested in (None, 32, module_format.bits),
        f"{name} is {requested}, and {info.path} stores that table in {module_format.bits}-bit "
        f"codes: leave {name} out to keep them, or set it to 32",
    )
    return requested or module_format.bits


def _write(
    folder: Path,
    info: FolderInfo,
    architecture: Architecture,
    vocabulary: Vocabulary,
    settings: OnnxSettings,
    options: GraphOptions,
) -> dict[str, Any]:
    """Write the graph, compare it with PyTorch, and return the entries of the manifest."""
    from export.checks.lint import lint_export
    from export.graph.decoder import write_decoder
    from export.graph.portable_decoder import write_portable_decoder
    from export.graph.writer import GraphWriter
    from export.kernels.choosing import tuning_for
    from export.weights.folder_weights import FolderWeights

    with FolderWeights(info.path, architecture, settings) as weights:
        tuning = None
        if settings.tune_for is not None:
            tuning = tuning_for(settings, architecture, weights, options)
            weights.use_kernels(tuning.choices)
        facts: dict[str, Any] = {
            "portable": settings.portable,
            "float_columns": settings.float_columns,
        }
        outliers: Outliers = {}
        if settings.float_columns:
            outliers = _outliers(folder, architecture, vocabulary, weights, settings, options)
            facts["outliers"] = {norm: columns.tolist() for norm, columns in outliers.items()}
        with GraphWriter(folder, standard=settings.portable) as writer:
            if settings.portable:
                write_portable_decoder(architecture, weights, writer, options)
            else:
                write_decoder(architecture, weights, writer, options, outliers)
        if settings.cache == "int8":
            facts["cache"] = _int8_cache(folder, architecture, vocabulary, settings, options)
        if not settings.portable:
            facts |= lint_export(folder, info.path, architecture, settings, options, tuning)
        parity = None
        if settings.parity_positions > 0 and can_compare():
            length = min(settings.parity_positions, options.context_length)
            ids = np.resize(np.array(vocabulary.encode(TEXT), np.int64), length)
            parity = measure_parity(folder, info.path, architecture, weights, ids, options)
            layer_bits = {**dict.fromkeys(_FLOATS, 32), "int4": 4}.get(settings.precision, 8)
            # Tables that the source stores as codes are not rounded, whatever their bits.
            coarsest = max(4, min(layer_bits, options.head_bits, options.embedding_bits))
            exact = coarsest == 32 or options.accuracy_level == 0 or settings.portable
            exact = exact and settings.cache == "float32"
            halves = options.activations == "float16"
            require_parity(parity, exact=exact, bits=coarsest, halves=halves)
        elif settings.parity_positions > 0:
            _log.warning(
                "PyTorch is not installed, so that the logits of the graph were not compared with "
                "it"
            )
    if tuning is not None:
        facts["tuning"] = tuning.to_dict()
    return {**facts, "parity": None if parity is None else asdict(parity)}


def _outliers(
    folder: Path,
    architecture: Architecture,
    vocabulary: Vocabulary,
    weights: FolderWeights,
    settings: OnnxSettings,
    options: GraphOptions,
) -> Outliers:
    """Write the graph without float columns, and read some text with it to find them."""
    from export.graph.decoder import write_decoder
    from export.graph.writer import GraphWriter

    ids = _calibration_ids(settings, vocabulary, CALIBRATION_TOKENS)
    with TemporaryDirectory(dir=folder) as name:
        plain = Path(name)
        with GraphWriter(plain) as writer:
            write_decoder(architecture, weights, writer, replace(options, ring=False))
        norms = guarded_norms(architecture, options.head_bits)
        block = settings.largest_block(4)
        return find_outliers(plain, architecture, norms, ids, settings.float_columns or 0, block)


def _int8_cache(
    folder: Path,
    architecture: Architecture,
    vocabulary: Vocabulary,
    settings: OnnxSettings,
    options: GraphOptions,
) -> dict[str, Any]:
    """Calibrate an int8 KV cache on some text, and measure it on held-out text."""
    from export.int8_cache import quantize_cache

    calibration = _calibration_ids(settings, vocabulary, CACHE_TOKENS)
    length = min(96, options.context_length)
    held_out = np.array(vocabulary.encode(TEXT), np.int64)[:length]
    return asdict(quantize_cache(folder, architecture, calibration, held_out))


def _calibration_ids(
    settings: OnnxSettings, vocabulary: Vocabulary, tokens: int
) -> NDArray[np.int64]:
    """Tokens of the calibration data of the settings.

    For a base model, which has no chat template, the messages become paragraphs.
    """
    if vocabulary.chat_template is None:
        vocabulary = copy(vocabulary)
        vocabulary.chat_template = _PARAGRAPHS
    documents = read_documents(
        settings.cache_texts, vocabulary, limit=tokens, skip_bad_rows=settings.skip_bad_rows
    )
    return np.concatenate([np.array(one.ids, np.int64) for one in documents])[:tokens]


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest itself and the card, which people edit.

    Args:
        folder: Path of the folder.

    Returns:
        File name to ``bytes`` and ``sha256``.
    """
    entries = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in (MANIFEST_FILE, CARD_FILE):
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            entries[file.relative_to(folder).as_posix()] = {
                "bytes": file.stat().st_size,
                "sha256": digest,
            }
    return entries
