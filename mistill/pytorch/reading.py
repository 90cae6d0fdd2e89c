"""The tensors of a folder, read one at a time and refused if one is not a finite number.

One infinity or one value that is not a number spoils whatever is computed with it, and quantizing
hides it: its group becomes a scale that no longer tells. So each is looked at where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.folders.folder import weight_files
from mistill.folders.safetensors_file import read_header


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that is not a finite number: one spoils whatever is computed with it.

    Args:
        name: Name of the tensor, for the message.
        tensor: Any tensor; whole numbers pass.

    Raises:
        FolderError: If it holds an infinity or something that is not a number.
    """
    # The extremes are finite if all values are, and take no memory for a mask.
    if tensor.is_floating_point() and tensor.numel():
        least, greatest = torch.aminmax(tensor)
        if not (torch.isfinite(least) and torch.isfinite(greatest)):
            raise FolderError(
                f"{name} holds a value that is infinite or not a number: its file is damaged, or "
                "its training diverged; use another copy of the model"
            )


def require_finite_weights(folder: Path) -> None:
    """Refuse a folder with a weight that is not a finite number, before anything is begun.

    Reads every weight, one at a time.

    Args:
        folder: A float, GPTQ or NF4 folder.

    Raises:
        FolderError: If there is such a weight; the message names its tensor.
    """
    for _name, _tensor in stored_tensors(folder):
        pass  # each was looked at when it was read


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read some tensors of a folder, in the types they are stored in.

    Args:
        folder: A float, GPTQ or NF4 folder.
        prefix: How their names begin.

    Returns:
        Tensors by the rest of their names.

    Raises:
        FolderError: If one holds a value that is not a finite number.
    """
    with reading(folder) as (names, read):
        return {name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder as it is stored, one at a time.

    Args:
        folder: A float, GPTQ or NF4 folder.

    Yields:
        Names and tensors.

    Raises:
        FolderError: If one holds a value that is not a finite number.
    """
    with reading(folder) as (names, read):
        for name in names:
            yield name, read(name)


@contextmanager
def reading(folder: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """The tensors of a folder, to be read in any order.

    Args:
        folder: A float, GPTQ or NF4 folder.

    Yields:
        Names of all tensors, and a function that reads one.

    Raises:
        FolderError: If one that is read holds a value that is not a finite number.
    """
    from safetensors import safe_open

    homes = {name: file for file in weight_files(folder) for name in read_header(file).tensors}
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in set(homes.values())
        }

        def read(name: str) -> Tensor:
            tensor: Tensor = opened[homes[name]].get_tensor(name)
            if f"{name}.absmax" not in homes:  # else codes, of whatever type
                require_finite(name, tensor)
            return tensor

        yield list(homes), read
