"""Parity: how far the logits of the exported graph are from PyTorch's.

The graph and PyTorch read the same text with the same weights: if the export rounded a matrix,
PyTorch gets the rounded one, so that the difference is due to the graph alone. The graph reads the
text once as a whole, and once with half of it as prefill and the rest decoded token by token,
because these use different kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.settings import MODEL_FILE, GraphOptions
from export.weights.architecture import EMBEDDING, HEAD, Architecture
from export.weights.blocks import BlockWeight
from export.weights.folder_weights import FolderWeights, Weight
from mistill.cost_model.processors import usable_threads
from mistill.errors import ExportError
from mistill.folders.folder import read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MOST_DIFFERENCE = 1e-3
"""Largest difference of a logit when everything is computed in float32."""

MOST_HALF_DIVERGENCE = 0.002
"""Largest mean KL in nats when everything is computed in float16, which has 11 binary digits.

Codes of 8 bits have 7 digits beside the sign, so that float16 rounds a sixteenth as much, and KL
grows with the square of an error: that is 1/256 of what is granted to 8 bits. A tenth of it leaves
room for sums, which are rounded too, and for values below 6e-5, which have fewer digits."""

MOST_DIVERGENCE = 0.02
"""Largest mean KL in nats when activations are rounded to 8 bits (accuracy level 4)."""

MOST_ROUNDING = {8: 0.02, 4: 0.25}
"""Largest relative error of a rounded matrix, by bits."""

TEXT = (
    "A mistral is a strong, cold wind that blows from the north into the Gulf of Lion. It may "
    "last for 3 days or for 12, clears the sky, and is said to drive people mad. "
    'What would you do, I asked, if it never stopped? "Build a mill," she said; "grind flour, '
    'pump water, light the house, and sell what is left over." In 1888 Vincent van Gogh tied '
    "his easel to stakes and painted on. def wind(speed: float) -> str: return 'storm' if "
    "speed > 24.5 else 'breeze'. Wind is free, and whoever can use it is rich."
)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from PyTorch with the same weights.

    Attributes:
        positions: Positions compared.
        max_difference: Largest difference of a logit.
        mean_kl: Mean of KL(PyTorch || graph) per position, in nats.
        same_top: Share of positions with the same most probable token.
        pieces_difference: Largest difference of a logit between the text as a whole and in pieces.
        max_rounding: Largest relative error of a matrix that the export rounded, as a root mean
            square; 0 if it rounded none.
    """

    positions: int
    max_difference: float
    mean_kl: float
    same_top: float
    pieces_difference: float
    max_rounding: float


def can_compare() -> bool:
    """Whether PyTorch and transformers are installed."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def measure_parity(
    folder: Path,
    source: Path,
    architecture: Architecture,
    weights: FolderWeights,
    ids: NDArray[np.int64],
    options: GraphOptions,
) -> Parity:
    """Run a text through the graph and through PyTorch.

    Args:
        folder: The folder of the graph.
        source: The folder that it was exported from.
        architecture: Architecture of the decoder.
        weights: The weights that the export read.
        ids: Shape (T,), at least 2 tokens.
        options: Bits of the tables.

    Returns:
        The distance between the two.
    """
    model, max_rounding = reference_model(source, architecture, weights, options)
    reference = model_logits(model, ids)
    del model
    run = text_runner(folder, architecture)
    at_once, _ = run(ids, None)
    half = len(ids) // 2
    logits, cache = run(ids[:half], None)
    pieces = [logits]
    for token in ids[half:]:
        logits, cache = run(np.array([token]), cache)
        pieces.append(logits)
    return Parity(
        positions=len(ids),
        max_difference=float(np.abs(at_once - reference).max()),
        mean_kl=mean_kl(reference, at_once),
        same_top=float((at_once.argmax(-1) == reference.argmax(-1)).mean()),
        pieces_difference=float(np.abs(np.concatenate(pieces) - at_once).max()),
        max_rounding=max_rounding,
    )


def require_parity(parity: Parity, *, exact: bool, bits: int, halves: bool = False) -> None:
    """Refuse a graph whose logits are too far from PyTorch's.

    Args:
        parity: The measured differences.
        exact: Whether everything is computed in float32, or in float16.
        bits: Bits of the coarsest rounding that the export did; 32 if it did none.
        halves: Whether that is float16.

    Raises:
        ExportError: If the distance is larger than rounding explains.
    """
    figures = (
        f"over {parity.positions} positions: largest difference {parity.max_difference:.2g}, "
        f"mean KL {parity.mean_kl:.2g} nats, same first token {parity.same_top:.0%}, largest "
        f"difference in pieces {parity.pieces_difference:.2g}"
    )
    if exact and not halves:
        apart = max(parity.max_difference, parity.pieces_difference)
        good, bound = apart <= MOST_DIFFERENCE, f"a difference of {MOST_DIFFERENCE:g}"
    else:
        most_kl = MOST_HALF_DIVERGENCE if exact else MOST_DIVERGENCE
        good, bound = parity.mean_kl <= most_kl, f"{most_kl:g} nats"
    if not good:
        raise ExportError(
            f"the logits of the graph differ by more than {bound} from PyTorch's with the same "
            f"weights, {figures}; nothing was written: this is a fault of the export or of its "
            "libraries"
        )
    most = MOST_ROUNDING.get(bits)
    if most is not None and parity.max_rounding > most:
        raise ExportError(
            f"rounding to {bits} bits changed a matrix by {parity.max_rounding:.0%}, more than "
            f"{most:.0%}; nothing was written: export with more bits"
        )


def mean_kl(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean KL(reference || logits) per position.

    Args:
        reference: Shape (T, V).
        logits: Shape (T, V).

    Returns:
        Nats.
    """
    import torch

    from mistill.measures.kl import kl_sum

    total = kl_sum(torch.from_numpy(reference).double(), torch.from_numpy(logits).double())
    return total.item() / len(reference)


# --- the graph ----------------------------------------------------------------------------------

Cache = dict[str, NDArray[Any]]


class TextRunner(Protocol):
    """A function that reads a text with a graph."""

    def __call__(
        self, ids: NDArray[np.int64], cache: Cache | None, *, last: bool = False
    ) -> tuple[NDArray[np.float32], Cache]:
        """From (T,) token ids and a cache to (T, V) logits, or the last, and the longer cache."""
        ...


def text_runner(folder: Path, architecture: Architecture) -> TextRunner:
    """Open a graph to read texts.

    Args:
        folder: The folder of the graph.
        architecture: Architecture of the decoder.

    Returns:
        A function from (T,) token ids and a cache to (T, V) logits and the longer cache.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    from mistill.engine.key_value_cache import CACHE_TYPES, window_of

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_threads()
    options.log_severity_level = 3
    # A portable graph has no accuracy level; without this, ONNX Runtime would round activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        folder / MODEL_FILE, options, providers=["CPUExecutionProvider"]
    )
    # A portable graph always gives the logits of all positions.
    selects_positions = any(
        entry.name == "first_logit" for entry in session.get_overridable_initializers()
    )
    names = [f"{layer}.{part}" for layer in range(architecture.layers) for part in ("key", "value")]
    types = {entry.name: entry.type for entry in session.get_inputs()}
    dtype = CACHE_TYPES[types["past_key_values.0.key"]]
    empty_cache = np.zeros((1, architecture.kv_heads, 0, architecture.head_dim), dtype)
    outputs = ["logits", *(f"present.{name}" for name in names)]

    window = window_of(session)
    if window is not None:
        empty_cache = np.zeros((1, empty_cache.shape[1], window, empty_cache.shape[3]), dtype)

    def run(
        ids: NDArray[np.int64], cache: Cache | None, *, last: bool = False
    ) -> tuple[NDArray[np.float32], Cache]:
        past = dict.fromkeys(names, empty_cache) if cache is None else cache
        # Buffers of the size of a window do not show how many tokens were read.
        tokens_read = (
            0 if cache is None else int(past.get("tokens", np.array(past["0.key"].shape[2])))
        )
        total = len(ids) + tokens_read
        feeds: dict[str, Any] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            **{f"past_key_values.{name}": past[name] for name in names},
        }
        if selects_positions:
            feeds["first_logit"] = np.array([-1 if last else 0], np.int64)
        logits, *present = session.run(outputs, feeds)
        longer = dict(zip(names, present, strict=True))
        return logits[0], longer if window is None else {**longer, "tokens": np.array(total)}

    return run


# --- PyTorch ------------------------------------------------------------------------------------


def reference_model(
    source: Path, architecture: Architecture, weights: FolderWeights, options: GraphOptions
) -> tuple[PreTrainedModel, float]:
    """PyTorch's model with the weights that a graph holds.

    Args:
        source: The folder that it was exported from.
        architecture: Architecture of the decoder.
        weights: The weights that the export read.
        options: Bits of the tables.

    Returns:
        The model, and the largest relative error of a matrix that the export rounded.
    """
    import torch

    from mistill.pytorch.loading import READABLE, load_pytorch

    readable = architecture.model_type in READABLE
    model = load_pytorch(source) if readable else _load_exact(source, weights)
    rounding = [0.0]
    for name, module in list(model.named_modules()):
        rounded = _rounded(name, architecture, weights, options)
        if rounded is None:
            continue
        matrix = torch.from_numpy(rounded.dequantize())
        rounding.append(_relative_error(module, matrix))
        if isinstance(module, torch.nn.Embedding):
            module.weight = torch.nn.Parameter(matrix, requires_grad=False)
        else:
            linear = torch.nn.Linear(rounded.columns, rounded.rows, bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model, max(rounding)


def model_logits(model: PreTrainedModel, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of a text.

    Args:
        model: A model of transformers.
        ids: Shape (T,).

    Returns:
        Shape (T, V).
    """
    import torch

    with torch.inference_mode():
        logits = model(torch.from_numpy(ids[None]), use_cache=False).logits[0]
    return np.asarray(logits.numpy())


def _load_exact(source: Path, weights: FolderWeights) -> PreTrainedModel:
    """A float model of an architecture that only the export reads, with the source's weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = read_config(source)
    entries.pop("quantization_config", None)
    config = AutoConfig.for_model(**entries)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, part = name.rpartition(".")
            matrix = part == "weight" and parameter.dim() == 2
            values = weights.exact(module) if matrix else weights.floats(name)
            parameter.copy_(torch.from_numpy(values))
    model.eval()
    return model


def _rounded(
    name: str, architecture: Architecture, weights: FolderWeights, options: GraphOptions
) -> BlockWeight | None:
    """The weight of a module as the export rounded it; None if it is not rounded."""
    weight: Weight | None = None
    if name == EMBEDDING:
        weight = weights.table(EMBEDDING, options.embedding_bits)
    elif name == HEAD:
        weight = weights.table(EMBEDDING if architecture.tied else HEAD, options.head_bits)
    elif name.endswith("_proj") and weights.changes(name):
        weight = weights.linear(name).weight
    return weight if isinstance(weight, BlockWeight) else None


def _relative_error(module: torch.nn.Module, matrix: torch.Tensor) -> float:
    import torch

    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    original = weight.detach()
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        original = dequantize_4bit(original, state)
    original = original.float()
    return float((matrix - original).norm() / original.norm().clamp_min(1e-30))
