"""The rotary embedding of a GGUF file, as config.json would describe it.

llama.cpp divides the frequency of every pair by a factor that is the same for all (linear scaling),
and by those of a tensor where there is one. For models of Llama 3.1 its converter writes the tensor
alone, and not the parameters that its factors follow from; these are found again from the factors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import ArchitectureError, FolderError
from mistill.folders.json_text import parse_json
from mistill.sources.gguf_fields import GgufFile

ROPE_KEY = "mistill.rope_parameters"
"""Entries of config.json for a scaled rotary embedding, in files that mistill has written."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of factors."""

_DEFAULT_BASE = 10_000.0
# Positions that Llama 3.1 was trained on before its context was extended.
_TRAINED_POSITIONS = 8192
_TOLERANCE = 1e-4


def read_rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The parameters of the rotary embedding.

    Args:
        file: A GGUF file of a llama model.
        head_dim: Width of a head.

    Returns:
        What ``rope_parameters`` of config.json should say.

    Raises:
        FolderError: If a field is of another type than it should be.
        ArchitectureError: If the embedding is of a kind that mistill does not compute.
    """
    written = file.text(ROPE_KEY)
    if written is not None:
        return _own_parameters(written, f"{ROPE_KEY} of {file.name}")
    base = _shortest(file.number("llama.rope.freq_base", _DEFAULT_BASE))
    if base == 0:
        raise FolderError(f"llama.rope.freq_base of {file.name} is 0")
    factors = _scale(file) * _factors(file, head_dim)
    if np.allclose(factors, factors[0], rtol=1e-6):
        factor = _shortest(float(factors[0]))
        if factor == 1:
            return {"rope_type": "default", "rope_theta": base}
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    exponents = np.arange(0, head_dim, 2) / head_dim
    parameters = llama3_parameters(factors.astype(np.float64), base**-exponents)
    if parameters is None:
        raise ArchitectureError(
            f"{file.name} scales its rotary embedding by factors that no parameters of config.json "
            "give; use the model's safetensors folder"
        )
    return {"rope_type": "llama3", "rope_theta": base, **parameters}


def _own_parameters(text: str, origin: str) -> dict[str, Any]:
    parameters = parse_json(text, origin)
    if not isinstance(parameters, dict) or parameters.get("rope_type") not in (
        "default",
        "linear",
        "llama3",
    ):
        raise FolderError(f"{origin} does not describe a rotary embedding: {text!r:.80}")
    for name, value in parameters.items():
        if name != "rope_type" and type(value) not in (int, float):
            raise FolderError(f"{origin} says {name} {value!r:.80}, which is not a number")
    return parameters


def _scale(file: GgufFile) -> float:
    """The factor of linear scaling, as llama.cpp reads it; 0 is none."""
    kind = file.text("llama.rope.scaling.type") or "linear"
    if kind == "none":
        return 1.0
    attention = file.number("llama.rope.scaling.attn_factor", 1.0)
    if kind != "linear" or attention != 1:
        raise ArchitectureError(
            f"{file.name} scales its rotary embedding in the way {kind!r:.40}, which a GGUF file "
            "does not fully describe; use the model's safetensors folder"
        )
    older = file.number("llama.rope.scale_linear", 0.0)
    return file.number("llama.rope.scaling.factor", older) or 1.0


def _factors(file: GgufFile, head_dim: int) -> NDArray[np.float32]:
    if ROPE_FACTORS not in file.tensors:
        return np.ones(head_dim // 2, np.float32)
    factors = np.array(file.tensors[ROPE_FACTORS].data)
    if factors.dtype != np.float32 or factors.shape != (head_dim // 2,):
        raise FolderError(
            f"{ROPE_FACTORS} of {file.name} should hold {head_dim // 2} numbers of type float32, "
            f"not {factors.dtype} of the shape {factors.shape}"
        )
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise FolderError(f"{ROPE_FACTORS} of {file.name} holds a factor that is not above 0")
    return factors


def llama3_parameters(
    factors: NDArray[np.float64], frequencies: NDArray[np.float64]
) -> dict[str, float] | None:
    """The parameters of Llama 3.1's scaling that given factors follow from.

    With t turns of a pair within the positions that the model was first trained on, its frequency
    is divided by ``factor`` where t is below ``low``, kept where it is above ``high``, and in
    between a blend of both that is linear in t. The turns are known up to the number of positions,
    so that only two of ``low``, ``high`` and the positions matter.

    Args:
        factors: Shape (head_dim / 2,), what each frequency is divided by.
        frequencies: Shape (head_dim / 2,), radians per position, falling.

    Returns:
        ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
        ``original_max_position_embeddings``; None if the factors are of another kind.
    """
    factor = float(factors.max())
    if factor <= 1:
        return None
    turns = _TRAINED_POSITIONS * frequencies / (2 * math.pi)
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)  # 1 where a frequency is kept
    for low, high in ((1.0, 4.0), _bounds(kept, turns)):
        if not 0 <= low < high < math.inf:
            continue
        share = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / (share + (1 - share) / factor)
        if np.allclose(expected, factors, rtol=_TOLERANCE):
            return {
                "factor": _shortest(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": _TRAINED_POSITIONS,
            }
    return None


def _bounds(kept: NDArray[np.float64], turns: NDArray[np.float64]) -> tuple[float, float]:
    """The turns at which frequencies begin to be kept, and from which they are kept whole."""
    whole = turns[kept > 1 - 1e-6].min(initial=math.inf)
    none = turns[kept < 1e-6].max(initial=0.0)
    between = (kept <= 1 - 1e-6) & (kept >= 1e-6)
    shares, places = kept[between], turns[between]
    if len(shares) > 1:
        slope, intercept = np.polyfit(places, shares, 1)
    elif len(shares) == 1 and math.isfinite(whole):
        # The steepest of the lines that reach 0 and 1 before the neighbours do.
        steps = ((1 - shares[0]) / (whole - places[0]), shares[0] / (places[0] - none))
        slope = max(steps)
        intercept = shares[0] - slope * places[0]
    else:
        return float(none), float(whole)
    return float(-intercept / slope), float((1 - intercept) / slope)


def _shortest(value: float) -> float:
    """The shortest decimal of a float32, such as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
