"""The folder convention of transformers.js, which runs models in browsers and in Node.

    config.json             names the type of the weights and the number of data files
    generation_config.json  names every token at which a reply ends; nothing else ends one there
    tokenizer.json
    tokenizer_config.json   with the chat template inside
    onnx/model_q4.onnx      the graph; the name says the type: model.onnx float32, model_q4.onnx
                            4-bit, model_quantized.onnx 8-bit
    onnx/model_q4.onnx_data its weights; model_q4.onnx_data_1 and so on, if one file would be
                            larger than a browser reads

Names of inputs and outputs are those of a mistill folder. The graph computes the logits of the last
position only, unless it is portable, which is enough for a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.settings import DATA_FILE, MODEL_FILE
from mistill.folders.publishing import write_json
from mistill.folders.schemas import optional_json
from mistill.text.vocabulary import Vocabulary

GRAPH_FOLDER = "onnx"
_SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}
# Browsers hold a file in one buffer, which may not reach 2 GiB.
DATA_FILE_BYTES = 1 << 30
_COPY_BYTES = 1 << 20


def arrange_for_transformersjs(
    folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary, bits: int
) -> None:
    """Arrange the files of a finished folder as transformers.js expects them.

    Args:
        folder: The folder of the graph and its companion files.
        config: Content of config.json.
        vocabulary: Vocabulary of the model.
        bits: Bits of the layers, 32 if they are float.
    """
    dtype = "fp32" if bits == 32 else "q4" if bits <= 4 else "q8"
    name = f"model{_SUFFIXES[dtype]}.onnx"
    (folder / GRAPH_FOLDER).mkdir()
    data_files = _move_graph(folder, name)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    plain["head_dim"] = int(config.get("head_dim") or width // heads)
    plain["transformers.js_config"] = {
        "dtype": dtype,
        "use_external_data_format": {name: data_files},
        "kv_cache_dtype": "float32",
    }
    write_json(folder / "config.json", plain, ascii_only=False)
    if vocabulary.end_ids:
        file = folder / "generation_config.json"
        stored = optional_json(file)
        ends = list(vocabulary.end_ids)
        write_json(
            file, {**stored, "eos_token_id": ends if len(ends) > 1 else ends[0]}, ascii_only=False
        )
    if vocabulary.chat_template is not None:
        file = folder / "tokenizer_config.json"
        settings = optional_json(file)
        write_json(file, {**settings, "chat_template": vocabulary.chat_template}, ascii_only=False)


def _move_graph(folder: Path, name: str) -> int:
    """Rename the graph and split its data file; returns the number of data files."""
    import onnx_ir as ir

    model = ir.load(folder / MODEL_FILE)
    target = folder / GRAPH_FOLDER
    number, size = 0, 0
    moved: dict[tuple[int, int], tuple[str, int]] = {}  # two tensors may share their bytes
    output = (target / f"{name}_data").open("wb")
    try:
        with (folder / DATA_FILE).open("rb") as data:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if not isinstance(tensor, ir.ExternalTensor):
                    continue
                length, offset = int(tensor.length or 0), int(tensor.offset or 0)
                if (offset, length) not in moved:
                    if size and size + length > DATA_FILE_BYTES:
                        output.close()
                        number, size = number + 1, 0
                        output = (target / f"{name}_data_{number}").open("wb")
                    # Offsets in the first file stay as they are, aligned to pages and cache lines.
                    start = size + (offset - size) % 4096
                    output.seek(start)
                    data.seek(offset)
                    _copy(data, output, length)
                    size = start + length
                    moved[offset, length] = Path(output.name).name, start
                file, start = moved[offset, length]
                value.const_value = ir.ExternalTensor(
                    file,
                    start,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=str(tensor.name),
                    base_dir=target,
                )
    finally:
        output.close()
    ir.save(model, target / name)
    (folder / MODEL_FILE).unlink()
    (folder / DATA_FILE).unlink()
    return number + 1


def _copy(source: Any, target: Any, length: int) -> None:
    while length:
        content = source.read(min(length, _COPY_BYTES))
        target.write(content)
        length -= len(content)
