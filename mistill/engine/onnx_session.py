"""Opening the graph of an ONNX folder on an execution provider, and checking its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnxruntime

from mistill.engine.key_value_cache import CACHE_TYPES
from mistill.engine.language_model import Provider
from mistill.errors import FolderError, MissingExtraError
from mistill.folders.folder import MANIFEST_FILE, read_json
from mistill.shown import one_line

# A program may have imported ONNX Runtime before mistill could tell it to report nothing.
onnxruntime.disable_telemetry_events()

# ONNX Runtime's names; an operator that one provider does not support runs on the next.
_PROVIDERS: dict[str, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    "coreml": ["CoreMLExecutionProvider", "CPUExecutionProvider"],
    "directml": ["DmlExecutionProvider", "CPUExecutionProvider"],
}

# What has to be installed for each, since two builds of ONNX Runtime exclude one another.
_BUILDS = {
    "cpu": "install onnxruntime again",
    "cuda": "install onnxruntime-gpu instead of onnxruntime",
    "tensorrt": "install onnxruntime-gpu instead of onnxruntime, and TensorRT's own libraries",
    "coreml": "only onnxruntime for macOS has it",
    "directml": "on Windows, install onnxruntime-directml instead of onnxruntime",
}


def check_provider(provider: str) -> None:
    """Refuse a provider that this installation does not have.

    Args:
        provider: One of ``Provider``.

    Raises:
        MissingExtraError: If ONNX Runtime was built without it.
    """
    full_name = _PROVIDERS[provider][0]
    available = onnxruntime.get_available_providers()
    if full_name not in available:
        raise MissingExtraError(
            f"ONNX Runtime {onnxruntime.__version__} has no {full_name} here, only "
            f"{', '.join(available)}; {_BUILDS[provider]}, or use provider cpu"
        )


def open_session(
    folder: Path, threads: int, provider: Provider, alone: bool = True
) -> onnxruntime.InferenceSession:
    """Open the graph of a folder.

    Args:
        folder: An ONNX folder.
        threads: Threads to compute with on the processor.
        provider: Execution provider.
        alone: Whether no other session runs in turn with this one: else its threads stop spinning
            when a run ends, where they would wait for the next one for some 35 ms.

    Returns:
        The session.

    Raises:
        FolderError: If the graph cannot be opened.
        MissingExtraError: If the provider is there but does not start.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # ONNX Runtime would keep a memory plan for every input shape, and each step has another shape.
    options.enable_mem_pattern = False
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=_PROVIDERS[provider]
        )
    except Exception as error:
        raise FolderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {folder / 'model.onnx'}: "
            f"{one_line(error)}"
        ) from error
    full_name = _PROVIDERS[provider][0]
    if full_name not in session.get_providers():
        # ONNX Runtime continues without a provider whose libraries it cannot load.
        raise MissingExtraError(
            f"{full_name} does not start, because its libraries or a driver are missing; install "
            "them, or use provider cpu"
        )
    return session


def check_graph(
    session: onnxruntime.InferenceSession, folder: Path, layers: int, vocabulary_size: int
) -> None:
    """Refuse a graph whose inputs and outputs are not those that the engine binds.

    Args:
        session: Session of the graph.
        folder: The folder of the graph, for messages.
        layers: Expected number of layers.
        vocabulary_size: Expected number of logits for each position, V.

    Raises:
        FolderError: If something is missing or not known; the message names it.
    """
    faults = graph_faults(
        {entry.name: entry.type for entry in session.get_inputs()},
        {entry.name for entry in session.get_overridable_initializers()},
        {entry.name: entry.shape for entry in session.get_outputs()},
        layers,
        vocabulary_size,
    )
    if faults:
        more = f" and {len(faults) - 4} more" if faults[4:] else ""
        raise FolderError(
            f"{folder / 'model.onnx'} is not a graph that this engine runs: "
            f"{', '.join(faults[:4])}{more}; make it with: mistill export"
        )


def graph_faults(
    inputs: Mapping[str, str],
    optional: Collection[str],
    outputs: Mapping[str, Sequence[int | str | None]],
    layers: int,
    vocabulary_size: int,
) -> list[str]:
    """What keeps this engine from running a graph.

    Args:
        inputs: The type of each input, such as ``tensor(int64)``.
        optional: Names of inputs that have a default.
        outputs: The shape of each output.
        layers: Expected number of layers.
        vocabulary_size: Expected number of logits for each position, V.

    Returns:
        A phrase for each fault.
    """
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    expected = {"input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)}
    faults = [f"the input {name} is missing" for name in sorted(expected - inputs.keys())]
    faults += [f"the input {name} is not known" for name in sorted(inputs.keys() - expected)]
    faults += [
        f"the input {name} is a {inputs[name]}"
        for name in sorted(expected & inputs.keys())
        if inputs[name] not in (CACHE_TYPES if name.startswith("past") else ("tensor(int64)",))
    ]
    if "first_logit" not in optional:
        faults.append("the optional input first_logit is missing")
    expected = {"logits", *(f"present.{part}" for part in parts)}
    faults += [f"the output {name} is missing" for name in sorted(expected - outputs.keys())]
    rows = (outputs.get("logits") or [None])[-1]
    if isinstance(rows, int) and rows != vocabulary_size:
        faults.append(f"it has {rows} logits where config.json has a vocab_size {vocabulary_size}")
    return faults


def run_bound(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
    """Run a graph on what is bound to it.

    Args:
        session: Session of the graph.
        binding: Its inputs and outputs.

    Raises:
        FolderError: If ONNX Runtime fails, as it does at a graph whose parts do not fit together.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        raise FolderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {one_line(error, 300)}"
        ) from error


def graph_fingerprint(folder: Path) -> str:
    """A name for the graph and the weights of an ONNX folder, from its manifest's checksums.

    Args:
        folder: Path of the folder.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(read_json(folder / MANIFEST_FILE)["files"].items()):
        if name.startswith("model.onnx"):
            digest.update(f"{name} {entry['sha256']}\n".encode())
    return digest.hexdigest()
