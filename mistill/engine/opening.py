"""Any folder opened as a running language model."""

from __future__ import annotations

from pathlib import Path

from mistill.cost_model.processors import MOST_THREADS
from mistill.engine.language_model import LanguageModel, Provider
from mistill.errors import MissingExtraError
from mistill.folders.folder import open_folder
from mistill.settings import require, require_range


def open_model(
    folder: str | Path,
    *,
    threads: int | None = None,
    provider: Provider = "cpu",
    alone: bool = True,
) -> LanguageModel:
    """Open a model folder of any form as a running model.

    Args:
        folder: A model folder (float, GPTQ or NF4) or an ONNX folder.
        threads: Number of threads; None takes one for each processor that may be used.
        provider: Execution provider of an ONNX folder: ``cpu``, ``cuda``, ``tensorrt``, ``coreml``
            or ``directml``.
        alone: Whether no other model computes in turn with this one, token by token; of an ONNX
            folder, as ``OnnxModel`` takes it.

    Returns:
        The running model: ONNX Runtime for an ONNX folder, PyTorch for the others.

    Raises:
        SettingsError: If a provider is named for another form of folder.
        MissingExtraError: If the folder needs PyTorch and it is not installed.
    """
    require_range("threads", threads, 1, MOST_THREADS)
    info = open_folder(folder)
    if info.form == "onnx":
        from mistill.engine.onnx_model import OnnxModel

        return OnnxModel(info.path, threads=threads, provider=provider, alone=alone)
    require(
        provider == "cpu",
        f"provider is for ONNX folders, and {info.path} is {info.kind}; leave it at cpu",
    )
    try:
        from mistill.engine.pytorch_model import PytorchModel
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{info.path} is {info.kind}, which needs PyTorch; install it with: "
            "pip install 'mistill[compress]', or give an ONNX folder"
        ) from error
    return PytorchModel(info.path, threads=threads)
