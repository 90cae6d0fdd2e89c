"""A model that learns through low-rank adapters, and becomes a plain model again.

Beside a frozen matrix W stand B and A of rank r; the layer computes W x + s B A x and only B and A
are trained (LoRA, Hu et al., 2021, https://arxiv.org/abs/2106.09685). What is saved is W + s B A.
Three variants are known by name:

- rsLoRA (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732) has s = alpha / sqrt(r).
- DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353) trains the lengths m of the rows of the
  sum too: diag(m / |W + s B A|) (W + s B A), the norm taken of each row.
- PiSSA (Meng et al., 2024, https://arxiv.org/abs/2404.02948) starts B and A at the r largest
  singular values of W, and freezes the rest, W - s B A, in its place.

peft computes with the adapters; what they come to, and how they start where they do not start at 0,
is written here, because a run that resumes must start from the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistill.errors import FolderError, missing_extra
from mistill.folders.folder import read_json
from mistill.folders.publishing import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer of Llama or Mistral."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

SCALE = 2.0
"""s where nothing else is asked for: the usual alpha of twice the rank, divided by the rank."""

_NAME = "default"
_BASE = ".base_layer."
# How peft calls both copies of a module that is trained as a whole.
_UNTRAINED, _TRAINED = ".original_module.", f".modules_to_save.{_NAME}."


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """Which adapters a model gets.

    Attributes:
        rank: r.
        alpha: Divided by r, or by its square root, it is s; twice the rank if None.
        targets: Kinds of matrices with adapters; None for all of the layers, and the head where it
            is not the embedding.
        ranks: Ranks of some kinds, in place of r; alpha grows with them.
        rslora: Whether s is divided by the square root of the rank.
        dora: Whether the lengths of rows are trained too.
        pissa: Whether the adapters start at the largest singular values.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    pissa: bool = False

    def alpha_of(self, rank: int) -> float:
        """Alpha of a matrix whose adapter has some rank."""
        alpha = SCALE * self.rank if self.alpha is None else self.alpha
        return alpha * rank / self.rank


@dataclass(frozen=True)
class Adapter:
    """What stands beside one matrix, of shape (N, K).

    Attributes:
        down: A, shape (r, K).
        up: B, shape (N, r).
        scale: s.
        magnitude: m, shape (N,), of DoRA; None without.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def merged_into(self, weight: Tensor) -> Tensor:
        """The matrix that computes what it and the adapter do together.

        Args:
            weight: W, shape (N, K), in float32 for a sum in float32.

        Returns:
            The matrix, of the dtype that the sum has.
        """
        total = weight + self.scale * (self.up @ self.down)
        if self.magnitude is None:
            return total
        length = torch.linalg.vector_norm(total, dim=1)
        scaled: Tensor = total * (self.magnitude / length)[:, None]
        return scaled

    def since(self, start: Adapter) -> Adapter:
        """The adapter on W that is this one on what PiSSA left of W: [B, -B0] and [A; A0].

        Args:
            start: Where it started.

        Returns:
            An adapter of twice the rank.
        """
        return replace(
            self,
            down=torch.cat([self.down, start.down]),
            up=torch.cat([self.up, -start.up], dim=1),
        )


def require_peft() -> None:
    """Refuse to make adapters without the library for them.

    Raises:
        MissingExtraError: If peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "tune") from error


def add_adapters(model: PreTrainedModel, rank: int, plan: AdapterPlan | None = None) -> None:
    """Put adapters beside the matrices of a model, in place, and freeze all else.

    A begins at random, from PyTorch's global generator, and B at 0: nothing changes at first. They
    are float32, whatever the model is: in bfloat16 an entry stays where it is while a step is less
    than a 512th of it.

    Args:
        model: A Llama or Mistral, with float or four-bit weights.
        rank: r.
        plan: Everything else; a plain LoRA if None. PiSSA's start is ``start_at``'s to set.
    """
    from peft import LoraConfig, inject_adapter_in_model

    plan = plan or AdapterPlan(rank=rank)
    targets = plan.targets or _all_kinds(model)
    ranks = {kind: plan.ranks[kind] for kind in targets if kind in plan.ranks}
    config = LoraConfig(
        r=rank,
        lora_alpha=_whole(plan.alpha_of(rank)),
        lora_dropout=0.0,
        target_modules=sorted(targets),
        rank_pattern=ranks,
        alpha_pattern={kind: _whole(plan.alpha_of(ranks[kind])) for kind in ranks},
        use_rslora=plan.rslora,
        use_dora=plan.dora,
    )
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _all_kinds(model: PreTrainedModel) -> set[str]:
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if model.config.tie_word_embeddings:
        kinds.discard("lm_head")
    return kinds


# --- what adapters hold -------------------------------------------------------------------------


def scales_of(model: nn.Module) -> dict[str, float]:
    """S of every matrix with an adapter.

    Args:
        model: With adapters or without.

    Returns:
        By the name of the matrix' module.
    """
    return {
        name: float(module.scaling[_NAME])
        for name, module in _adapted(model).items()
        if _NAME in module.scaling
    }


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def adapters_in(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Adapter]:
    """The adapters in a state dict.

    Args:
        weights: Of a model with adapters.
        scales: From ``scales_of``.

    Returns:
        By the name of the matrix' module.
    """
    return {
        module: Adapter(
            down=weights[f"{module}.lora_A.{_NAME}.weight"],
            up=weights[f"{module}.lora_B.{_NAME}.weight"],
            scale=scale,
            magnitude=weights.get(f"{module}.lora_magnitude_vector.{_NAME}.weight"),
        )
        for module, scale in scales.items()
    }


def merged(
    weights: Mapping[str, Tensor], scales: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """The weights of a model with its adapters added to the matrices beside which they stand.

    Args:
        weights: A state dict, with adapters or without; its matrices are floats.
        scales: From ``scales_of``; ``SCALE`` for every adapter if None.

    Returns:
        The state dict of the plain architecture.
    """
    if scales is None:
        with_adapters = (name.partition(".lora_A.")[0] for name in weights if ".lora_A." in name)
        scales = dict.fromkeys(with_adapters, SCALE)
    return dict(_merged_one_by_one(weights, scales))


def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model that a model and its adapters are together.

    Args:
        model: A model, with adapters or without, or one of peft; its matrices are floats.

    Yields:
        Names and tensors of the plain architecture, each merged when its turn comes. What was
        trained as a whole beside the adapters, such as the head of a reward model, has its trained
        values.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    parameters = {name: one.detach() for name, one in plain.named_parameters()}
    yield from _merged_one_by_one(parameters, scales_of(plain))


def _merged_one_by_one(
    weights: Mapping[str, Tensor], scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    adapters = adapters_in(weights, scales)
    for name, tensor in weights.items():
        if ".lora_" in name or _UNTRAINED in name:
            continue
        if _BASE in name:
            module, _, last = name.partition(_BASE)
            if last == "weight":
                tensor = adapters[module].merged_into(tensor)
            name = f"{module}.{last}"
        yield name.replace(_TRAINED, "."), tensor


# --- PiSSA's start ------------------------------------------------------------------------------


def principal_start(weight: Tensor, rank: int, scale: float) -> Adapter:
    """The adapter that holds the largest singular values of a matrix (PiSSA, equations 2 and 3).

    Args:
        weight: W, shape (N, K).
        rank: r, at most the smaller of N and K.
        scale: s.

    Returns:
        s B A is the best approximation of W with rank r.
    """
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return Adapter(down=root[:, None] * V[:rank], up=U[:, :rank] * root, scale=scale)


def principal_starts(model: nn.Module) -> dict[str, Adapter]:
    """Where PiSSA starts the adapters of a model.

    Args:
        model: With adapters, its matrices as they came.

    Returns:
        By the name of the matrix' module.
    """
    return {
        name: principal_start(
            module.base_layer.weight.data, module.r[_NAME], float(module.scaling[_NAME])
        )
        for name, module in _adapted(model).items()
    }


def start_at(model: nn.Module, starts: Mapping[str, Adapter]) -> None:
    """Start adapters somewhere, and take as much from the matrices beside which they stand.

    Args:
        model: With adapters, its matrices as they came; changed in place.
        starts: By the name of the matrix' module.
    """
    for name, module in _adapted(model).items():
        start = starts[name]
        weight = module.base_layer.weight
        device = weight.device
        down, up = start.down.to(device), start.up.to(device)
        module.lora_A[_NAME].weight.data = down.clone()
        module.lora_B[_NAME].weight.data = up.clone()
        rest = weight.data.float() - start.scale * (up @ down)
        weight.data = rest.to(weight.dtype)


# --- on disk ------------------------------------------------------------------------------------


def save_adapters(adapters: Mapping[str, Adapter], folder: Path, base: str, *, dora: bool) -> None:
    """Save adapters as peft does, so that peft loads them onto the model that they were made for.

    Args:
        adapters: By the name of the matrix' module; at least one.
        folder: The folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.
        base: The model that they belong to, by name or path.
        dora: Whether they have magnitudes.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors = {}
    for name, adapter in adapters.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = adapter.down
        tensors[f"{stem}.lora_B.weight"] = adapter.up
        if adapter.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = adapter.magnitude
    kinds = {name.rpartition(".")[2]: adapter for name, adapter in adapters.items()}
    ranks = {kind: len(adapter.down) for kind, adapter in kinds.items()}
    alphas = {kind: adapter.scale * ranks[kind] for kind, adapter in kinds.items()}
    rank = _commonest(list(ranks.values()))
    alpha = _commonest([alphas[kind] for kind in kinds if ranks[kind] == rank])
    config = LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=0.0,
        target_modules=sorted(kinds),
        rank_pattern={kind: ranks[kind] for kind in kinds if ranks[kind] != rank},
        alpha_pattern={kind: _whole(alphas[kind]) for kind in kinds if alphas[kind] != alpha},
        use_dora=dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS_FILE, {"format": "pt"})
    values = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    write_atomically(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _commonest(values: Sequence[Any]) -> Any:
    return max(values, key=values.count)


def _whole(number: float) -> Any:
    """A whole number as an int, as peft writes alpha."""
    return int(number) if number == int(number) else number


def load_adapters(folder: Path) -> dict[str, Adapter]:
    """Read the adapters that ``save_adapters`` wrote.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        By the name of the matrix' module.

    Raises:
        FolderError: If a file is missing or damaged.
    """
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FolderError(f"{folder} is not a peft adapter: it has no {WEIGHTS_FILE}")
    tensors = load_file(folder / WEIGHTS_FILE)
    adapters = {}
    for name, down in tensors.items():
        stem, ending, _ = name.partition(".lora_A.weight")
        if not ending:
            continue
        module = stem.removeprefix("base_model.model.")
        kind = module.rpartition(".")[2]
        alpha = config["alpha_pattern"].get(kind, config["lora_alpha"])
        adapters[module] = Adapter(
            down=down,
            up=tensors[f"{stem}.lora_B.weight"],
            scale=alpha / len(down),
            magnitude=tensors.get(f"{stem}.lora_magnitude_vector"),
        )
    return adapters
