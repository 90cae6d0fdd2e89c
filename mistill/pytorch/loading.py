"""Load a model folder as a transformers model.

Float, GPTQ and NF4 folders all become a model of the plain Llama or Mistral architecture. The
tensors of a folder are compared with those that its config.json describes from the headers of the
files alone, so that a damaged folder is refused before its gigabytes are read, and no tensor keeps
its random initial values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistill.errors import (
    ArchitectureError,
    FolderError,
    MissingExtraError,
    missing_extra,
)
from mistill.folders.folder import (
    FolderInfo,
    open_folder,
    read_config,
    tensor_headers,
)
from mistill.folders.safetensors_file import FLOAT_TYPES, StoredTensor
from mistill.pytorch.four_bit import keep_as_stored
from mistill.pytorch.reading import read_tensors as read_tensors
from mistill.pytorch.reading import require_finite
from mistill.pytorch.reading import require_finite_weights as require_finite_weights
from mistill.pytorch.reading import stored_tensors as stored_tensors
from mistill.shown import one_line
from mistill.weights.gptq_doctor import require_sound
from mistill.weights.gptq_layout import TENSOR_NAMES, read_quantization
from mistill.weights.nf4_doctor import nf4_states
from mistill.weights.plain_weights import PlainWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)

READABLE = ("llama", "mistral")

# Tables that older files hold and newer code works out.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")


# --- architecture -------------------------------------------------------------------------------


def require_readable(info: FolderInfo) -> None:
    """Refuse an architecture that mistill does not read.

    Args:
        info: What the folder holds.

    Raises:
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    if info.architecture not in READABLE:
        raise ArchitectureError(
            f"{info.path} is a model of type {info.architecture!r}; mistill reads "
            f"{' and '.join(READABLE)} only; give a model of one of these types"
        )


def plain_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder as that of a float model, whatever form its weights have.

    Args:
        folder: A folder of a readable architecture.

    Returns:
        The transformers config, without ``quantization_config``.

    Raises:
        FolderError: If the values in config.json contradict one another.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, MistralConfig

    values = read_config(folder)
    for name in ("quantization_config", "auto_map"):
        values.pop(name, None)
    kinds: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig}
    kind = kinds[values.pop("model_type")]
    try:
        config = kind.from_dict(values, attn_implementation="sdpa")
        empty_model(config)
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = one_line(error)
        if isinstance(error, KeyError):
            reason = f"{reason} is not a value that transformers knows"
        raise FolderError(f"config.json of {folder} does not describe a model: {reason}") from error
    return config


def completed_config(folder: Path) -> dict[str, Any]:
    """The config of a folder with the sizes that it leaves to the classes of transformers.

    Args:
        folder: A folder of a readable architecture.

    Returns:
        The config as ``read_config`` reads it, and the number of heads and the width of the
        feed-forward layer, which differ among the classes.

    Raises:
        FolderError: If the values in config.json contradict one another.
    """
    config, plain = read_config(folder), plain_config(folder)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        config[name] = getattr(plain, name)
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The modules of a model, without memory for their weights.

    Args:
        config: Of Llama or Mistral.

    Returns:
        A model on the ``meta`` device.
    """
    with torch.device("meta"):
        return _model_class(config)(config)


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    from transformers import LlamaForCausalLM, MistralForCausalLM

    classes: dict[str, type[PreTrainedModel]] = {
        "llama": LlamaForCausalLM,
        "mistral": MistralForCausalLM,
    }
    return classes[config.model_type]


# --- checking -----------------------------------------------------------------------------------


def check_weights(folder: Path, config: PreTrainedConfig | None = None) -> None:
    """Refuse a folder whose tensors are not those that its config asks for.

    Reads the headers of the files, and of NF4 folders what is stored about each weight; never the
    weights.

    Args:
        folder: A float, GPTQ or NF4 folder of a readable architecture.
        config: Its plain config, if it is at hand.

    Raises:
        FolderError: If a tensor is missing, left over, or of another shape or type.
    """
    config = config or plain_config(folder)
    present = tensor_headers(folder)
    coded_shapes = _coded_shapes(folder, present)
    expected = {
        name: tuple(tensor.shape) for name, tensor in empty_model(config).named_parameters()
    }
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    owners, other_shapes, other_types = set(), [], []
    for name, stored in present.items():
        owner = _weight_of(name, present, expected)
        if owner is None:
            continue
        if owner in owners:
            continue
        owners.add(owner)
        is_plain = name == owner and owner not in coded_shapes
        shape = stored.shape if is_plain else coded_shapes.get(owner)
        if owner in expected and shape not in (None, expected[owner]):
            other_shapes.append(f"{owner} {shape} instead of {expected[owner]}")
        if owner in expected and is_plain and stored.dtype not in FLOAT_TYPES:
            other_types.append(f"{owner} as {stored.dtype}, which is no type of floats")
    problems = [
        *_listed("it lacks", sorted(expected.keys() - owners - optional)),
        *_listed("it also holds", sorted(owners - expected.keys() - optional)),
        *_listed("it holds", other_shapes),
        *_listed("it holds", other_types),
    ]
    if problems:
        raise FolderError(
            f"the weights in {folder} are not those of its config.json: {'; '.join(problems)}"
        )


def _coded_shapes(folder: Path, present: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are stored as codes, by the names of the weights."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{module}.weight": state.shape for module, state in nf4_states(folder).items()
    }
    layout = read_quantization(read_config(folder))
    for name, stored in present.items():
        module, _, last = name.rpartition(".")
        form = None if layout is None or last != "qweight" else layout.format_of(module)
        if form is not None and len(stored.shape) == 2:
            shapes[f"{module}.weight"] = (stored.shape[1], stored.shape[0] * 32 // form.bits)
    return shapes


def _weight_of(name: str, present: Container[str], expected: Container[str]) -> str | None:
    """The parameter that a stored tensor belongs to; None for what newer code works out."""
    module, _, last = name.rpartition(".")
    if last in TENSOR_NAMES:
        return f"{module}.weight"
    if last == "bias" and f"{module}.qweight" in present and name not in expected:
        return None  # checked when it is read: AutoGPTQ writes zeros where the model has no bias
    if ".weight." in name:  # bitsandbytes: weight.absmax, weight.quant_state.bitsandbytes__nf4, ...
        return name[: name.index(".weight.")] + ".weight"
    return None if _DERIVED.search(name) else name


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{rest}"]


# --- loading ------------------------------------------------------------------------------------


def load_pytorch(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a float, GPTQ or NF4 folder as a transformers model, in eval mode on the CPU.

    GPTQ codes are decoded into float weights of the plain architecture.
    NF4 weights stay in bitsandbytes' own layers.

    Args:
        folder: A model folder.
        dtype: What to hold float weights in and to compute in, whatever the folder's own type.

    Returns:
        A LlamaForCausalLM or MistralForCausalLM.

    Raises:
        FolderError: If the folder is broken, holds an ONNX graph, or a weight that is not a finite
            number.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    info = open_folder(folder)
    if info.form == "onnx":
        raise FolderError(
            f"{folder} is an ONNX folder; PyTorch needs the model folder it was exported from"
        )
    require_readable(info)
    config = plain_config(info.path)
    check_weights(info.path, config)
    with quiet_transformers():
        model = _load(info, config, dtype)
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "quant_state"):  # else codes of bitsandbytes, of whatever type
            require_finite(name, parameter.detach())
    # padding_idx would stop gradients at the padding token's row, and that token may be the end of
    # turn.
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    return model


def _load(info: FolderInfo, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if info.form == "nf4":
        try:
            return _load_nf4(info.path, config, dtype)
        except MissingExtraError as error:
            _log.warning(
                "%s; until then the NF4 weights are decoded and take the memory of float weights",
                error,
            )
    if info.form != "model":
        return _load_decoded(info, config, dtype)
    return _model_class(config).from_pretrained(
        info.path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars while the body runs.

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _load_decoded(
    info: FolderInfo, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the floats that a folder's codes stand for."""
    weights = {name: weight.to(dtype) for name, weight in decoded(info, config)}
    return _model_class(config).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )


def decoded(info: FolderInfo, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Read the weights that an architecture asks for from codes, one at a time.

    Args:
        info: A GPTQ or NF4 folder.
        config: Its config, from ``plain_config``.

    Yields:
        Names and tensors: float32 of those stored as codes or in bfloat16, the others as they are
        stored.

    Raises:
        FolderError: If the codes contradict config.json, a matrix has a bias that the
            architecture does not have, or a weight is not a finite number.
    """
    if info.form == "gptq":
        require_sound(info.path)
    expected = dict(empty_model(config).named_parameters())
    weights = PlainWeights(info.path)
    for name in weights:
        if name in expected:
            weight = torch.from_numpy(weights.read(name))
            require_finite(name, weight)
            yield name, weight
        elif name.endswith(".bias") and weights.read(name).any():
            raise FolderError(
                f"{info.path} holds {name}, a bias that its architecture does not have"
            )


def _load_nf4(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ModuleNotFoundError as error:
        raise missing_extra("bitsandbytes", "compress") from error

    config = copy(config)
    config.quantization_config = read_config(folder)["quantization_config"]
    model: PreTrainedModel = _model_class(config).from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    # transformers leaves everything in the types of the file.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    keep_as_stored(model)
    for parameter in model.parameters():
        # Codes may be stored as floats, of which only the bits count.
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
    return model
