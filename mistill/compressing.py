"""One call from a model to a chatbot for a CPU, within a size or at a speed.

It runs three steps that exist on their own: bits and groups chosen for every matrix within the
size, rounded by GPTAQ; scales and norms tuned to the float model; an ONNX folder made of the codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from mistill.cost_model.step_time import TimedSize, size_for_speed, time_steps
from mistill.errors import MistillError, TrainingError
from mistill.folders.folder import MANIFEST_FILE, describe, read_config, read_json
from mistill.folders.lineage import fingerprint, installed_versions
from mistill.folders.publishing import (
    publish,
    refuse_existing,
    working,
    write_json,
)
from mistill.folders.renaming import remove_work
from mistill.progress import track
from mistill.recipe import step_kinds
from mistill.settings import (
    TextSettings,
    require,
    require_range,
    result_settings,
    settings_from,
)
from mistill.sources.source import resolve_model
from mistill.text.rows import Texts, check_texts, find_file, sources_of

_log = logging.getLogger(__name__)

# The two chatbots that are timed where a speed is asked for.
_TIMED = ("timed-4", "timed-8", "timed-4-codes", "timed-8-codes")

# The export splits long groups, and stores what their parts share once, as the codes do.
_FORMATS = (
    "bits=4, group_size=128",
    "bits=4, group_size=64",
    "bits=4, group_size=32",
    "bits=8, group_size=128",
    "bits=8, group_size=64",
)

_SIZES = ("size_mb", "bits_per_weight", "tokens_per_second")

# Groups of the two chatbots that are timed, the largest that divides all inputs first.
_GROUPS = (128, 64, 32)
_SPEEDS_FILE = "speeds.json"

# At the usual rate of 1e-3 the noise of single blocks moves scales farther than they are wrong.
_TUNING_RATE = 1e-4

# Conversations and plain text: codes that saw one kind alone lose more on the other.
DEFAULT_TEXTS = ("@demo-train", "@demo-plain")

# What a layer takes in the chatbot beyond what it takes in the quantized folder, its nodes and the
# gaps between tensors that begin at a page; and the context that the export gives by default.
_GRAPH_BYTES = 16_000
_USUAL_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class CompressSettings(TextSettings):
    """How small a chatbot is, and how much work goes into it.

    Attributes:
        size_mb: Largest size of weights, scales and tables together, in megabytes; give this,
            bits_per_weight or tokens_per_second. If none is given, what llama.cpp's Q4_K_M would
            take.
        bits_per_weight: Largest size in bits for each weight of the model, everything counted.
        tokens_per_second: Speed at which the chatbot must write on this processor: the largest
            size is taken that is predicted to, from two chatbots that are made and timed first.
        samples: Number of blocks of calibration text, as many of each text as it has.
        tuning_steps: Steps, of a block each, in which scales and norms are tuned to the source; 24
            took 2% off the KL of SmolLM2 near 4.5 bits, and more where fewer bits cost more.
        block_length: Tokens of a block of text.
        context_length: The most tokens of prompt and reply together. By default that of the model,
            but at most 4,096.
        seed: Seed of every random choice.
    """

    size_mb: float | None = None
    bits_per_weight: float | None = None
    tokens_per_second: float | None = None
    samples: int = 96
    tuning_steps: int = 0
    block_length: int = 512
    context_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        require(
            len(sizes) < 2,
            f"give either size_mb, bits_per_weight or tokens_per_second, not both "
            f"{' and '.join(sizes)}",
        )
        for name in sizes:
            require_range(name, getattr(self, name), 0, exclusive=True)
        require_range("samples", self.samples, 1)
        require_range("tuning_steps", self.tuning_steps, 0)
        require_range("block_length", self.block_length, 2)
        require_range("context_length", self.context_length, 1)
        require(
            self.tokens_per_second is None or (self.context_length or 3) >= 3,
            f"context_length is {self.context_length}, and a speed takes 3 positions to be timed",
        )
        require_range("seed", self.seed, 0)


class CompressOptions(TypedDict, total=False):
    """Fields of ``CompressSettings``."""

    skip_bad_rows: bool
    size_mb: float | None
    bits_per_weight: float | None
    tokens_per_second: float | None
    samples: int
    tuning_steps: int
    block_length: int
    context_length: int | None
    seed: int


def compress(
    source: str | Path,
    target: str | Path,
    *,
    texts: Texts = DEFAULT_TEXTS,
    held_out: Texts = "@demo-held-out",
    settings: CompressSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[CompressOptions],
) -> Path:
    """Make a chatbot for a CPU of a model.

    The same call resumes after an interruption.

    Args:
        source: A float model folder, a Hub id, or whatever else names a model.
        target: The ONNX folder to make.
        texts: Text to calibrate and to tune on, best of several kinds; conversations and plain
            text that mistill ships if not given.
        held_out: Other text, on which the chatbot is compared with its source.
        settings: How small it is; or give the fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``CompressSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or the model cannot be as small or as fast as
            asked for.
        FolderError: If the source is broken or quantized already.
        TextError: If there is no text.
        VocabularyError: If there are conversations and the model has no chat template.
    """
    settings = settings_from(CompressSettings, settings, options)
    path = refuse_existing(target, overwrite, [source])
    for each in (texts, held_out):
        check_texts(each, skip_bad_rows=settings.skip_bad_rows)
    folder = resolve_model(source)
    size_mb = _megabytes_of_codes(folder, settings, settings.size_mb)
    key = {
        "step": "compress",
        "source": fingerprint(folder),
        "settings": result_settings(settings),
        "versions": installed_versions(),
        "texts": _contents_of(texts),
        "held_out": _contents_of(held_out),
    }
    with working(path, key, anew=overwrite) as work:
        inputs = {"source": folder, "texts": texts, "held_out": held_out}
        try:
            if settings.tokens_per_second is None:
                _make(work, inputs, size_mb, settings)
            else:
                _make_for_speed(work, inputs, settings)
        except MistillError:
            # Refused before anything was made, it leaves nothing that another call would meet.
            if not any(item.is_dir() and item.name not in _TIMED for item in work.iterdir()):
                remove_work(work)
            raise
        publish(work, path, overwrite)
    return path


def _make_for_speed(work: Path, inputs: Mapping[str, Any], settings: CompressSettings) -> None:
    """Make the largest chatbot that writes as fast as asked for, and tell how fast it does."""
    requested_speed = settings.tokens_per_second
    assert requested_speed is not None
    speeds = work / _SPEEDS_FILE
    if not speeds.is_file():
        with track("timing chatbots", 2, "sizes") as bar:
            folders = []
            for name, bits in zip(_TIMED[:2], (4, 8), strict=True):
                folders.append(_rounded_chatbot(work, name, inputs["source"], bits, settings))
                bar.advance()
        pairs = zip(folders, _time_chatbots(folders), strict=True)
        timed = [TimedSize(describe(folder).weight_bytes, seconds) for folder, seconds in pairs]
        size_bytes, predicted = size_for_speed(requested_speed, *timed)
        facts = {"size_mb": round(size_bytes / 1e6, 3), "predicted": round(predicted, 2)}
        write_json(speeds, facts)
    facts = read_json(speeds)
    _log.info(
        "%.1f MB are predicted to write %.0f tokens a second", facts["size_mb"], facts["predicted"]
    )
    result = work / "result"
    if not result.exists():
        size_mb = _megabytes_of_codes(inputs["source"], settings, facts["size_mb"])
        _make(work, inputs, size_mb, settings)
    (seconds,) = _time_chatbots([result])
    # The manifest has the checksums of all other files, and none of its own.
    manifest = read_json(result / MANIFEST_FILE)
    manifest["speed"] = {
        "wanted": requested_speed,
        "predicted": facts["predicted"],
        "measured": round(1 / seconds, 2),
    }
    write_json(result / MANIFEST_FILE, manifest)
    if seconds > 1 / requested_speed:
        _log.warning(
            "the chatbot writes %.0f tokens a second, and not the %g that were asked for: %.0f "
            "were predicted, and the machine may be busy",
            1 / seconds,
            requested_speed,
            facts["predicted"],
        )


def _time_chatbots(folders: Sequence[Path]) -> list[float]:
    """Seconds of a step of each, on all processors that this process may use."""
    from mistill.engine.onnx_model import OnnxModel

    return time_steps([OnnxModel(folder) for folder in folders])


def _rounded_chatbot(
    work: Path, name: str, source: Path, bits: int, settings: CompressSettings
) -> Path:
    """A chatbot that is made without calibration, as large as one with so many bits."""
    from quantize.folders.float_model import open_float

    inputs = {columns for columns, _ in open_float(source).matrices.values()}
    fitting = (size for size in _GROUPS if not any(columns % size for columns in inputs))
    group = next(fitting, _GROUPS[-1])
    rounded = _step(
        "rounding",
        work / f"{name}-codes",
        {"source": source},
        bits=bits,
        group_size=group,
        head_bits=bits,
        embedding_bits=bits,
        symmetric=False,
    )
    return _step(
        "export",
        work / name,
        {"source": rounded},
        context_length=settings.context_length,
        float_columns=0,
    )


def _make(
    work: Path, inputs: Mapping[str, Any], size_mb: float, settings: CompressSettings
) -> None:
    """Make the chatbot as the folder ``result``; what is there already is not made again."""
    shared = {
        "skip_bad_rows": settings.skip_bad_rows,
        "block_length": settings.block_length,
        "seed": settings.seed,
    }
    quantized = _step(
        "mixed",
        work / "quantized",
        inputs,
        size_mb=size_mb,
        samples=settings.samples,
        method="gptaq",
        formats=_FORMATS,
        fused=True,
        symmetric=False,
        **shared,
    )
    if settings.tuning_steps:
        try:
            quantized = _step(
                "tune",
                work / "tuned",
                {**inputs, "source": quantized, "teacher": inputs["source"]},
                steps=settings.tuning_steps,
                batch_size=1,
                learning_rate=_TUNING_RATE,
                # Other blocks than those that the codes were calibrated on, as far as text goes.
                **{**shared, "seed": settings.seed + 1},
            )
        except TrainingError as error:
            _log.warning("the chatbot is made without tuning: %s", error)
    # Columns in float32 take more bytes than they are worth within a size.
    _step(
        "export",
        work / "result",
        {"source": quantized},
        context_length=settings.context_length,
        float_columns=0,
    )


def _contents_of(texts: Texts) -> list[str]:
    """What a run depends on of its texts: the content of files, the names of datasets."""
    files = [(name, find_file(name)) for name in sources_of(texts)]
    return [name if file is None else fingerprint(file) for name, file in files]


def _megabytes_of_codes(folder: Path, settings: CompressSettings, size_mb: float | None) -> float:
    """What a quantized folder may have, so that the chatbot made of it has the size asked for."""
    from quantize import MixedSettings
    from quantize.folders.float_model import open_float
    from quantize.mixed.mixed_folder import size_limit

    model = open_float(folder)
    size = MixedSettings(size_mb=size_mb, bits_per_weight=settings.bits_per_weight)
    info = describe(folder)
    context = settings.context_length or min(info.context_length, _USUAL_CONTEXT)
    require(
        context <= info.context_length,
        f"context_length is {context}, and the model's own context has {info.context_length} "
        "positions",
    )
    head_dim = read_config(folder).get("head_dim") or (
        model.config.hidden_size // model.config.num_attention_heads
    )
    # A float32 cosine and sine for every position and half of the dimensions of a head.
    rotary = 2 * context * int(head_dim) // 2 * 4
    bytes_left = size_limit(model, size) - rotary - _GRAPH_BYTES * (info.layers + 1)
    return max(bytes_left, 1) / 1e6


def _step(kind: str, target: Path, inputs: Mapping[str, Any], **options: Any) -> Path:
    """Make a step's folder, unless it is there; each appears whole or not at all."""
    if not target.exists():
        step = step_kinds()[kind]
        assert step.settings is not None
        step.run(inputs, step.settings(**options), target, False)
    return target
