"""The output head of a model, in every form that a loss can be computed through.

A head is usually one matrix, often shared with the embedding. It may have a bias, a low-rank
adapter on top (LoRA, Hu et al., 2021, https://arxiv.org/abs/2106.09685), or weights in four bits;
its logits may be scaled or capped. What a loss must not do is read such a head as a plain matrix
and leave the rest out; so heads are read here, and those of other kinds are refused by name.

n is rows, V vocabulary, D width, r the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mistill.errors import ArchitectureError
from mistill.pytorch.four_bit import require_as_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLICE_BYTES = 32 * 2**20


class HeadWeight(Protocol):
    """A matrix (V, D) that is read some rows at a time."""

    @property
    def shape(self) -> torch.Size:
        """(V, D)."""

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the matrix in a dtype, all of them in order.

        Args:
            dtype: Of the tensors.

        Returns:
            Which rows, and their values.
        """


@dataclass(frozen=True)
class PlainWeight:
    """A float matrix.

    Attributes:
        values: Shape (V, D).
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(V, D)."""
        return self.values.shape

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The whole matrix at once; see ``HeadWeight.slices``."""
        yield slice(0, len(self.values)), self.values.to(dtype)


@dataclass(frozen=True)
class FourBitWeight:
    """A matrix that bitsandbytes holds in four bits; floats exist for a few rows at a time.

    Attributes:
        packed: Two codes a byte, row after row.
        state: bitsandbytes' quantization state: scales, block size, code.
        width: D, a multiple of the block size.
    """

    packed: Tensor
    state: Any
    width: int

    @property
    def shape(self) -> torch.Size:
        """(V, D)."""
        return torch.Size(self.state.shape)

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Dequantize some rows, then the next; see ``HeadWeight.slices``."""
        from bitsandbytes import functional
        from bitsandbytes.functional import QuantState

        state = self.state
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        blocks_per_row = self.width // state.blocksize
        rows, step = self.shape[0], max(1, _SLICE_BYTES // (self.width * 4))
        codes = self.packed.reshape(-1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = QuantState(
                absmax=absmax[start * blocks_per_row : stop * blocks_per_row].contiguous(),
                shape=torch.Size((stop - start, self.width)),
                code=state.code,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                dtype=state.dtype,
            )
            few = codes[start * self.width // 2 : stop * self.width // 2].reshape(-1, 1)
            yield slice(start, stop), functional.dequantize_4bit(few, part).to(dtype)


@dataclass(frozen=True)
class Head:
    """What turns a last hidden state h into logits: cap(scale * (W h + b + s B A h)).

    Attributes:
        weight: W, shape (V, D).
        bias: b, shape (V,), or None.
        adapter: A of shape (r, D), B of shape (V, r) and s of a low-rank adapter, or None.
        scale: Factor of all logits.
        soft_cap: c in c * tanh(logits / c), or None.
    """

    weight: HeadWeight
    bias: Tensor | None = None
    adapter: tuple[Tensor, Tensor, float] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def plain(self) -> Tensor | None:
        """W itself, where it is a float matrix."""
        return self.weight.values if isinstance(self.weight, PlainWeight) else None

    def frozen(self, dtype: torch.dtype) -> Head:
        """The same head as numbers to compute with.

        Args:
            dtype: Of its float tensors.

        Returns:
            A head that takes no gradient.
        """
        weight = self.weight
        if isinstance(weight, PlainWeight):
            weight = PlainWeight(weight.values.detach().to(dtype))
        bias = None if self.bias is None else self.bias.detach()
        adapter = None
        if self.adapter is not None:
            down, up, size = self.adapter
            adapter = down.detach().to(dtype), up.detach().to(dtype), size
        return replace(self, weight=weight, bias=bias, adapter=adapter)

    def logits(self, hidden: Tensor, out: Tensor, low: Tensor | None = None) -> Tensor:
        """Project some hidden states.

        Args:
            hidden: Shape (n, D).
            out: Shape (n, V), float32 or better; filled with the logits.
            low: s A h for each row, shape (n, r), where it is known already.

        Returns:
            ``out``.
        """
        for rows, W in self.weight.slices(hidden.dtype):
            if len(W) == self.vocabulary_size:
                multiply(hidden, W.t(), out=out)
            else:
                out[:, rows] = hidden.to(out.dtype) @ W.t().to(out.dtype)
        if self.adapter is not None:
            down, up, size = self.adapter
            if low is None:
                low = (hidden @ down.t().to(hidden.dtype)).mul_(size)
            out.addmm_(low.to(out.dtype), up.t().to(out.dtype))
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.soft_cap is not None:
            out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return out

    def pull_back(self, gradient: Tensor, out: Tensor) -> Tensor:
        """The gradient of hidden states, as far as it comes through W.

        Args:
            gradient: Of W h, shape (n, V), in the dtype to compute in.
            out: Shape (n, D), float32 or better; filled.

        Returns:
            ``out``.
        """
        for rows, W in self.weight.slices(gradient.dtype):
            if len(W) == self.vocabulary_size:
                return multiply(gradient, W, out=out)
            if rows.start == 0:
                out.zero_()
            out.addmm_(gradient[:, rows].to(out.dtype), W.to(out.dtype))
        return out


def as_head(head: Head | Tensor) -> Head:
    """A head of one plain matrix.

    Args:
        head: The matrix, shape (V, D); or a head, which is left as it is.

    Returns:
        A head.
    """
    return head if isinstance(head, Head) else Head(PlainWeight(head))


def read_head(model: PreTrainedModel) -> Head:
    """Read the output head of a model, with everything that acts on its logits.

    Args:
        model: A causal language model, bare or with LoRA adapters from peft.

    Returns:
        The head; its tensors are the model's own parameters, so that gradients reach them.

    Raises:
        ArchitectureError: If the head is of a kind that is not known here.
    """
    config = model.config
    module = model.get_output_embeddings()
    adapter = None
    if hasattr(module, "base_layer"):
        adapter = _adapter(module)
        module = module.base_layer
    if type(module).__name__ == "Linear4bit":
        weight: HeadWeight = _four_bit(module)
    elif isinstance(module, torch.nn.Linear) and module.weight.is_floating_point():
        weight = PlainWeight(module.weight)
    else:
        raise ArchitectureError(
            f"the head of {config.model_type} is a {type(module).__name__}; distillation reads "
            "float matrices, bitsandbytes' four bits and LoRA on top of either"
        )
    for name in _OTHER_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ArchitectureError(
                f"{config.model_type} changes its logits by {name} = {getattr(config, name)}, "
                "which distillation does not know; choose a Llama or Mistral model"
            )
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        weight=weight,
        bias=module.bias,
        adapter=adapter,
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


_OTHER_SCALES = ("lm_head_multiplier", "output_multiplier_scale", "mup_width_multiplier")


def _adapter(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the scaling of the one active LoRA adapter of a peft layer."""
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", {})]
    if module.merged or module.disable_adapters or not active:
        return None
    name = active[0]
    dropout = module.lora_dropout[name]
    plain = isinstance(dropout, torch.nn.Identity) or getattr(dropout, "p", 0) == 0
    if len(active) > 1 or not plain or getattr(module, "use_dora", {}).get(name):
        raise ArchitectureError(
            "the head carries several LoRA adapters, DoRA or adapter dropout; distillation reads "
            "one plain LoRA adapter there"
        )
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def _four_bit(module: Any) -> FourBitWeight:
    state = getattr(module.weight, "quant_state", None)
    width = module.in_features
    require_as_stored(module)
    if state is None:
        raise ArchitectureError("the head is to be in four bits and is not quantized yet; load it")
    if width % state.blocksize:
        raise ArchitectureError(
            f"the head is in four bits with blocks of {state.blocksize} that do not divide its "
            f"width of {width}; leave the head in float"
        )
    return FourBitWeight(module.weight.data, state, width)


def compute_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype that hidden states and a head are multiplied in.

    Args:
        hidden: Hidden states.
        head: The head they go through.

    Returns:
        That of autocast where it is on, else the wider of their own.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if head.plain is None:
        return hidden.dtype
    return torch.promote_types(hidden.dtype, head.plain.dtype)


def soften(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Log-probabilities of softened logits.

    Args:
        logits: Shape (n, V), float32 or better; divided in place.
        temperature: Above 0.
        out: Shape (n, V); filled with the answer.

    Returns:
        ``out``.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, dim=-1, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Matrix product whose sums and result are float32 or better, whatever the factors are.

    Args:
        a: Shape (n, k).
        b: Shape (k, m), of the same dtype.
        out: Shape (n, m), float32 or float64; filled with the product.

    Returns:
        ``out``.
    """
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype == b.dtype and a.is_cuda:
        return out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
