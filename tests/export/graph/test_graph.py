"""The graph computes what PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checks.parity import mean_kl
from export.onnx_folder import to_onnx
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import QuantizedWeight
from tests.export.sources import gptq_folder, nf4_folder
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import tiny_model

# One key/value head for each query head, for two, for all; a head width that is not
# hidden_size / heads; a window shorter than the prompt; biases everywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
    "more heads than fit": {"head_dim": 16, "num_attention_heads": 6},
    "window": {"sliding_window": 7},
    "llama": {"model_type": "llama"},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "linear rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    },
    "llama 3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "one layer": {"num_hidden_layers": 1},
}


def random_ids(batch: int, length: int, vocabulary: int = 380) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(5, vocabulary, (batch, length))


def torch_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def largest(left: NDArray[Any], right: NDArray[Any]) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


@pytest.fixture(scope="module", params=[(s, t) for s in SHAPES for t in (False, True)], ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, OnnxRunner]:
    """A float folder and its float32 graph."""
    shape, tied = request.param
    folder = tmp_path_factory.mktemp("pair")
    source = tiny_model(folder / "model", tie_word_embeddings=tied, **SHAPES[shape])
    return source, OnnxRunner(to_onnx(source, folder / "onnx", parity_positions=0))


def test_float_logits_are_pytorchs(pair: tuple[Path, OnnxRunner]) -> None:
    source, runner = pair
    ids = random_ids(2, 40)
    # Both add in float32 in another order: a few times 1e-6 of logits of about 5.
    assert largest(runner.logits(ids), torch_logits(load_pytorch(source), ids)) < 3e-5


def test_a_prompt_in_pieces_is_the_prompt_as_a_whole(pair: tuple[Path, OnnxRunner]) -> None:
    _, runner = pair
    ids = random_ids(1, 40)
    whole, whole_cache = runner.run(ids)
    cache, pieces = None, []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 30), (30, 40)):
        logits, cache = runner.run(ids[:, start:end], cache)
        pieces.append(logits)
    assert largest(np.concatenate(pieces, axis=1), whole) < 3e-5
    assert cache is not None
    assert all(largest(cache[name], whole_cache[name]) < 3e-5 for name in cache)


def test_the_last_position_alone_is_the_last_of_all(pair: tuple[Path, OnnxRunner]) -> None:
    _, runner = pair
    ids = random_ids(2, 20)
    everything = runner.logits(ids)
    unasked, cache = runner.run(ids, first_logit=None)
    assert largest(unasked, everything[:, -1:]) < 3e-5
    assert largest(runner.run(ids, first_logit=12)[0], everything[:, 12:]) < 3e-5
    assert cache["0.key"].shape[2] == 20


@pytest.mark.parametrize("shape", ["plain", "window", "llama 3 rope"])
def test_greedy_text_is_pytorchs_over_200_tokens(shape: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", **SHAPES[shape])
    runner = OnnxRunner(to_onnx(source, tmp_path / "onnx", parity_positions=0))
    prompt = random_ids(1, 12)
    model = load_pytorch(source)
    with torch.inference_mode():
        expected = model.generate(  # type: ignore[operator]
            torch.from_numpy(prompt),
            attention_mask=torch.ones(1, 12, dtype=torch.long),
            max_new_tokens=200,
            min_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
        )
    assert runner.greedy(prompt[0].tolist(), 200) == expected[0, 12:].tolist()


def test_a_window_hides_what_lies_before_it(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", num_hidden_layers=1, sliding_window=7)
    runner = OnnxRunner(to_onnx(source, tmp_path / "onnx", parity_positions=0))
    ids = random_ids(1, 20)
    other = ids.copy()
    other[0, 12] = 99
    left, right = runner.logits(ids)[0], runner.logits(other)[0]
    assert largest(left[:12], right[:12]) == 0
    assert largest(left[18], right[18]) > 1e-3  # six positions later it is still seen
    assert largest(left[19], right[19]) == 0  # seven positions later it is not


# --- codes --------------------------------------------------------------------------------------


def dequantized(source: Path, runner_of: Path) -> Any:
    """The source in PyTorch, with embedding and head as the graph holds them."""
    from export.checks.parity import _rounded
    from export.settings import GraphOptions, OnnxSettings
    from export.weights.architecture import read_architecture
    from export.weights.folder_weights import FolderWeights

    manifest = json.loads((runner_of / "manifest.json").read_text())
    options = GraphOptions(
        **{
            name: manifest[name]
            for name in ("context_length", "accuracy_level", "head_bits", "embedding_bits")
        }
    )
    settings = OnnxSettings(precision=manifest["precision"])
    architecture = read_architecture(json.loads((source / "config.json").read_text()))
    model = load_pytorch(source)
    with FolderWeights(source, architecture, settings) as weights:
        for name, module in model.named_modules():
            rounded = _rounded(name, architecture, weights, options)
            if rounded is not None:
                module.weight = torch.nn.Parameter(torch.from_numpy(rounded.dequantize()))
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        {"group_size": 32},
        {"group_size": -1},
        {"group_size": 16, "act_order": True},
        {"group_size": 32, "act_order": True, "shared_order": False},
        {"group_size": 64, "act_order": True, "block_size": 16},
    ],
    ids=str,
)
def test_gptq_logits_are_pytorchs_on_the_dequantized_codes(
    bits: int, symmetric: bool, form: dict[str, Any], tmp_path: Path
) -> None:
    form = dict(form)
    options = {"block_size": form.pop("block_size", None)}
    model = tiny_model(tmp_path / "model", model_type="llama", attention_bias=True, mlp_bias=True)
    source, _ = gptq_folder(model, tmp_path / "gptq", bits=bits, symmetric=symmetric, **form)
    ids = random_ids(1, 24)
    exact = to_onnx(
        source, tmp_path / "exact", accuracy_level=0, parity_positions=0, head_bits=32,
        embedding_bits=32, **options,
    )  # fmt: skip
    expected = torch_logits(load_pytorch(source), ids)
    assert largest(OnnxRunner(exact).logits(ids), expected) < 5e-5
    rounded = to_onnx(source, tmp_path / "rounded", parity_positions=0, **options)
    expected = torch_logits(dequantized(source, rounded), ids)
    # Activations are rounded to 8 bits, an error of about 1 in 200 of each product.
    assert mean_kl(expected[0], OnnxRunner(rounded).logits(ids)[0]) < 5e-3


def test_a_layer_left_in_floats_stays_in_floats(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    skip = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    source, _ = gptq_folder(model, tmp_path / "gptq", bits=4, act_order=True, skip=skip)
    exact = to_onnx(source, tmp_path / "exact", accuracy_level=0, parity_positions=0, head_bits=32)
    ids = random_ids(1, 24)
    expected = torch_logits(dequantized(source, exact), ids)
    assert largest(OnnxRunner(exact).logits(ids), expected) < 5e-5


@pytest.mark.parametrize("double", [True, False])
def test_nf4_logits_are_near_bitsandbytes_own(double: bool, tmp_path: Path) -> None:
    source = nf4_folder(
        tiny_model(tmp_path / "model"), tmp_path / "nf4", double_quantization=double
    )
    exported = to_onnx(
        source, tmp_path / "onnx", accuracy_level=0, parity_positions=0, head_bits=32,
        embedding_bits=32,
    )  # fmt: skip
    ids = random_ids(1, 24)
    expected = torch_logits(load_pytorch(source), ids)
    found = OnnxRunner(exported).logits(ids)
    assert mean_kl(expected[0], found[0]) < 1e-3  # levels move by 0.5 %
    decoded = to_onnx(source, tmp_path / "float", precision="float32", parity_positions=0)
    assert largest(OnnxRunner(decoded).logits(ids), expected) < 5e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("precision", "head", "embedding"),
    [("int8", 8, 8), ("int4", 4, 4), ("int4", 8, 4), ("float32", 8, 32), ("float32", 32, 4)],
)
@pytest.mark.parametrize("width", [64, 72])
def test_rounded_logits_are_pytorchs_on_the_rounded_weights(
    tied: bool, precision: Any, head: Any, embedding: Any, width: int, tmp_path: Path
) -> None:
    source = tiny_model(
        tmp_path / "model", tie_word_embeddings=tied, hidden_size=width, head_dim=16
    )
    exported = to_onnx(
        source, tmp_path / "onnx", precision=precision, head_bits=head, embedding_bits=embedding,
        accuracy_level=0, parity_positions=0,
    )  # fmt: skip
    ids = random_ids(2, 24)
    expected = torch_logits(dequantized(source, exported), ids)
    assert largest(OnnxRunner(exported).logits(ids), expected) < 5e-5


# --- what is in the file ------------------------------------------------------------------------


def initializers(folder: Path) -> dict[str, NDArray[Any]]:
    import onnx_ir as ir

    graph = ir.load(folder / "model.onnx").graph
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def words_as_bytes(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Codes (N, K) as the bytes of a checkpoint, first code lowest."""
    if weight.bits == 8:
        return weight.codes
    return weight.codes[:, ::2] + 16 * weight.codes[:, 1::2]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_in_the_file_are_the_sources_bytes(
    bits: int, symmetric: bool, model: Path, tmp_path: Path
) -> None:
    source, weights = gptq_folder(model, tmp_path / "gptq", bits=bits, symmetric=symmetric)
    stored = initializers(to_onnx(source, tmp_path / "onnx", parity_positions=0))
    for layer in range(2):
        parts = {
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "o": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }
        for name, modules in parts.items():
            sources = [weights[f"model.layers.{layer}.{module}"] for module in modules]
            codes = np.concatenate([words_as_bytes(weight) for weight in sources])
            scales = np.concatenate([weight.scales for weight in sources]).astype(np.float32)
            place = f"layers.{layer}.{name}"
            assert stored[f"{place}.codes"].tobytes() == codes.tobytes()
            groups = scales.shape[1]
            in_file = stored[f"{place}.scales.stored"]
            assert in_file.dtype == np.float16, "the scales of a GPTQ folder are float16"
            assert in_file.shape[1] <= groups, "blocks that split a group share its scale"
            assert np.array_equal(in_file[:, :: in_file.shape[1] // groups], scales)
            zeros = {f"{place}.zeros", f"{place}.zeros.stored"} & stored.keys()
            assert bool(zeros) == (not symmetric)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_tied_table_is_stored_once(bits: Any, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    exported = to_onnx(
        source, tmp_path / "onnx", head_bits=bits, embedding_bits=bits, parity_positions=0
    )
    import onnx_ir as ir

    what = "weight" if bits == 32 else "codes"
    stored = ir.load(exported / "model.onnx").graph.initializers
    embedding, head = (stored[f"{name}.{what}"].const_value for name in ("embedding", "logits"))
    assert isinstance(embedding, ir.ExternalTensor)
    assert isinstance(head, ir.ExternalTensor)
    assert (head.offset, head.length) == (embedding.offset, embedding.length)
    uses = [
        {use.node.op_type for use in stored[f"{name}.{what}"].uses()}
        for name in ("embedding", "logits")
    ]
    product = "FusedMatMul" if bits == 32 else "MatMulNBits"
    assert uses == [{"Gather" if bits == 32 else "GatherBlockQuantized"}, {product}]


def test_no_slow_kernel_is_asked_for(model: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    source, _ = gptq_folder(model, tmp_path / "gptq", act_order=True)
    exported = to_onnx(source, tmp_path / "onnx", parity_positions=0)
    nodes = list(ir.load(exported / "model.onnx").graph)
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 9
    for node in products:
        assert node.attributes["accuracy_level"].as_int() == 4
        assert len(node.inputs) < 5 or node.inputs[4] is None  # no g_idx
    gathers = [node for node in nodes if node.op_type == "Gather"]
    # Per layer one for q, k and v, one for o, one for gate and up; down's is in the rows above it.
    assert len(gathers) == 3 * 2
    assert not any(node.op_type in ("MatMul", "MatMulBnb4") for node in nodes)
