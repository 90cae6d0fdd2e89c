"""Model folders as PyTorch models."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.engine.language_model import LanguageModel
from mistill.engine.opening import open_model
from mistill.engine.pytorch_model import PytorchModel
from mistill.errors import ArchitectureError, ContextError, FolderError
from mistill.pytorch.loading import check_weights, load_pytorch, read_tensors
from mistill.weights.gptq_layout import GptqFormat, QuantizedWeight, pack
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 5},
    "mistral with wide heads": {"head_dim": 24},
    "tied mistral": {"tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "tied llama with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
IDS = np.random.default_rng(0).integers(0, 384, (3, 17))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change values in config.json; a value of None goes."""
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace, add or (None) drop tensors; the names have __ for dots."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file, {"format": "pt"})
    return folder


def as_gptq(folder: Path, *, symmetric: bool, zero_bias: bool = False) -> dict[str, torch.Tensor]:
    """Round a folder's linear layers onto a grid of 4 bits, in place; the weights they mean."""
    layout = GptqFormat(
        activation_order=True,
        bits=4,
        group_size=16,
        symmetric=symmetric,
        checkpoint_format="gptq" if symmetric else "gptq_v2",
    )
    rng = np.random.default_rng(1)
    stored: dict[str, torch.Tensor] = {}
    meant = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight"):
            stored[name] = meant[name] = tensor
            continue
        outputs, columns = tensor.shape
        weight = QuantizedWeight(
            codes=rng.integers(0, 16, (outputs, columns)).astype(np.uint8),
            scales=rng.uniform(0.01, 0.05, (outputs, columns // 16)).astype(np.float16),
            zeros=np.full((outputs, columns // 16), 8, np.uint8)
            if symmetric
            else rng.integers(0, 16, (outputs, columns // 16)).astype(np.uint8),
            g_idx=rng.permutation(np.arange(columns, dtype=np.int32) // 16).astype(np.int32),
            bits=4,
            group_size=16,
        )
        meant[name] = torch.from_numpy(weight.dequantize())
        for part, array in pack(weight, layout.checkpoint_format).items():
            stored[f"{module}.{part}"] = torch.from_numpy(np.ascontiguousarray(array))
        if zero_bias:
            stored[f"{module}.bias"] = torch.zeros(outputs)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=layout.to_config())
    return meant


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("kinds") / "model", **KINDS[request.param])


def test_a_float_folder_gives_the_logits_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(IDS)).logits.numpy()

    ours = PytorchModel(folder).logits(IDS)

    assert ours.dtype == np.float32
    # sdpa against eager attention: the order of a float32 sum
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_greedy_text_is_that_of_generate(folder: Path) -> None:
    model: Any = load_pytorch(folder)
    prompt = IDS[0, :7]
    expected = model.generate(
        torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, 7, dtype=torch.long),
        do_sample=False,
        min_new_tokens=30,
        max_new_tokens=30,
        eos_token_id=None,
    )[0, 7:].tolist()

    assert list(islice(PytorchModel(folder).stream(prompt.tolist()), 30)) == expected


def test_every_token_is_chosen_from_the_logits_of_the_whole_text(folder: Path) -> None:
    model = PytorchModel(folder)
    seen = []

    def choose(logits: np.ndarray[Any, np.dtype[np.float32]]) -> int:
        seen.append(logits.copy())
        return int(logits.argsort()[-3])

    text = [5, 9, 200]
    text += islice(model.stream(text, choose), 12)

    expected = model.logits(np.array([text]))[0, 2:-1]
    np.testing.assert_allclose(np.stack(seen), expected, atol=1e-4)


def test_a_batch_gives_the_logits_of_its_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = PytorchModel(model)
    apart = np.concatenate([running.logits(row[None]) for row in IDS])

    monkeypatch.setattr("mistill.engine.pytorch_model.POSITIONS_AT_ONCE", 34)
    np.testing.assert_allclose(running.logits(IDS), apart, atol=1e-4)


def test_the_stream_ends_when_the_context_is_full(tmp_path: Path) -> None:
    running = open_model(tiny_model(tmp_path / "short", max_position_embeddings=12))

    assert running.context_length == 12
    assert len(list(running.stream([1, 2, 3]))) == 9
    assert list(running.stream([1] * 12)) == []
    with pytest.raises(ContextError, match="13 tokens do not fit the model's context of 12"):
        running.stream([1] * 13)
    with pytest.raises(ContextError, match="13 tokens"):
        running.logits(np.ones((1, 13), np.int64))


def test_a_stream_leaves_the_callers_gradients_alone(model: Path) -> None:
    stream = PytorchModel(model).stream([1, 2, 3])
    next(stream)

    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_two_streams_do_not_disturb_one_another(model: Path) -> None:
    running = PytorchModel(model)
    alone = [list(islice(running.stream(prompt), 8)) for prompt in ([1, 2, 3], [9, 8])]

    together = zip(running.stream([1, 2, 3]), running.stream([9, 8]), strict=True)

    assert list(map(list, zip(*islice(together, 8), strict=True))) == alone


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "empty"), ([1, 384], "between 0 and 383, got 1 to 384"), ([-1], "got -1 to -1")],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(
    model: Path, ids: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PytorchModel(model).stream(ids)


def test_ids_need_two_axes(model: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        PytorchModel(model).logits(np.array([1, 2]))


def test_it_is_a_language_model(model: Path) -> None:
    running: LanguageModel = PytorchModel(model)

    assert (running.vocabulary_size, running.context_length) == (384, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_held_in_the_type_asked_for(model: Path, dtype: torch.dtype) -> None:
    loaded = load_pytorch(model, dtype)

    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert not loaded.training
    assert PytorchModel(model, dtype=dtype).logits(IDS).dtype == np.float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "tied llama with biases"])
def test_gptq_codes_become_the_weights_that_they_mean(
    tmp_path: Path, kind: str, symmetric: bool
) -> None:
    folder = tiny_model(tmp_path / "gptq", **KINDS[kind])
    plain = tiny_model(tmp_path / "plain", **KINDS[kind])
    meant = as_gptq(folder, symmetric=symmetric)
    save_file(meant, plain / "model.safetensors", {"format": "pt"})

    loaded = load_pytorch(folder)

    weights = dict(loaded.named_parameters())
    for name, weight in meant.items():
        assert torch.equal(weights[name], weight), name
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert getattr(loaded.config, "quantization_config", None) is None
    np.testing.assert_array_equal(PytorchModel(folder).logits(IDS), PytorchModel(plain).logits(IDS))


def test_the_zero_biases_of_autogptq_are_left_out_and_others_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "gptq")
    meant = as_gptq(folder, symmetric=True, zero_bias=True)

    assert len(dict(load_pytorch(folder).named_parameters())) == len(meant)

    edit_weights(folder, model__layers__0__mlp__up_proj__bias=torch.full((128,), 0.5))
    with pytest.raises(
        FolderError, match=r"up_proj\.bias, a bias that its architecture does not have"
    ):
        load_pytorch(folder)


def test_a_gptq_folder_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "gptq")
    as_gptq(folder, symmetric=True)
    edit_weights(folder, model__layers__1__mlp__up_proj__scales=None)

    with pytest.raises(FolderError, match=r"up_proj\.scales is missing"):
        load_pytorch(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_nf4_folder_computes_in_the_type_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tiny_model(tmp_path / "plain", hidden_size=128, tie_word_embeddings=True)
    folder = tmp_path / "nf4"
    way = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized = AutoModelForCausalLM.from_pretrained(plain, quantization_config=way, dtype=stored)
    quantized.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((plain / name).read_bytes())

    running = PytorchModel(folder)
    floats = {weight.dtype for weight in running.model.parameters() if weight.is_floating_point()}
    assert floats == {torch.float32}

    meant = load_file(plain / "model.safetensors")
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.dtype = torch.float32  # else it rounds to the stored type
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            meant[f"{name}.weight"] = weight.float().contiguous()
        elif f"{name}.weight" in meant:
            meant[f"{name}.weight"] = module.weight.detach().float()
    edit_config(plain, dtype="float32")
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    # float32 all through; bfloat16 arithmetic would be off by 1e-2
    np.testing.assert_allclose(running.logits(IDS), PytorchModel(plain).logits(IDS), atol=2e-3)


def test_weights_in_shards_are_read(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "shards", seed=2)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2

    np.testing.assert_array_equal(PytorchModel(folder).logits(IDS), PytorchModel(model).logits(IDS))
    assert read_tensors(folder, "model.norm.")["weight"].shape == (64,)


def test_an_unknown_architecture_is_refused_before_its_weights_are_looked_at(
    tmp_path: Path,
) -> None:
    folder = edit_config(tiny_model(tmp_path / "other"), model_type="gemma")
    edit_weights(folder, model__norm__weight=None)

    with pytest.raises(ArchitectureError, match="type 'gemma'; mistill reads llama and mistral"):
        load_pytorch(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"it lacks model\.norm\.weight"),
        ({"lm_head__weight": None}, r"it lacks lm_head\.weight"),
        ({"model__extra__weight": torch.ones(2)}, r"it also holds model\.extra\.weight"),
        (
            {"model__norm__weight": torch.ones(65)},
            r"it holds model\.norm\.weight \(65,\) instead of \(64,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = edit_weights(tiny_model(tmp_path / "broken"), **changes)

    with pytest.raises(FolderError, match=message):
        load_pytorch(folder)


def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(tmp_path: Path) -> None:
    folder = edit_config(tiny_model(tmp_path / "more"), num_hidden_layers=1)

    with pytest.raises(FolderError, match=r"also holds model\.layers\.1\..* and \d+ more"):
        load_pytorch(folder)


def test_tables_that_newer_code_works_out_are_overlooked(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "old")
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))

    check_weights(folder)
    load_pytorch(folder)


def test_a_head_is_not_missed_where_the_embedding_is_the_head(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    loaded = load_pytorch(folder)

    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "many"}, "should be a whole number, not 'many'"),
        ({"hidden_act": "swoosh"}, "'swoosh' is not a value that transformers knows"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edit_config(tiny_model(tmp_path / "odd"), **changes)

    with pytest.raises(FolderError, match=message) as caught:
        load_pytorch(folder)
    assert "\n" not in str(caught.value)


def test_the_rotary_base_of_an_old_config_counts(tmp_path: Path) -> None:
    new = tiny_model(tmp_path / "new", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    old = edit_config(tiny_model(tmp_path / "old"), rope_parameters=None, rope_theta=50.0)

    np.testing.assert_array_equal(PytorchModel(old).logits(IDS), PytorchModel(new).logits(IDS))


def test_the_padding_token_learns_like_any_other(model: Path) -> None:
    loaded = load_pytorch(model)
    assert loaded.config.pad_token_id == 2

    loaded(torch.tensor([[1, 2, 3]])).logits.sum().backward()

    table = loaded.get_input_embeddings().weight
    assert isinstance(table.grad, torch.Tensor)
    assert table.grad[2].count_nonzero()


def test_loading_draws_no_bars(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_pytorch(model)

    assert capfd.readouterr() == ("", "")


def test_threads_are_set_where_asked(model: Path) -> None:
    before = torch.get_num_threads()
    try:
        PytorchModel(model, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
