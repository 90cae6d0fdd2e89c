from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.engine.pytorch_model import PytorchModel
from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from quantize import GptqSettings, dequantize, merge_lora, to_gptq, to_nf4
from tests.reference import supervised
from tests.tiny import tiny_model

SETTINGS = GptqSettings(group_size=32, samples=8, block_length=64)


def make_adapter(folder: Path, target: Path, modules: tuple[str, ...], scale: float = 0.1) -> Path:
    """A LoRA that says something, saved by peft."""
    from peft import LoraConfig, get_peft_model

    model: Any = load_pytorch(folder)
    torch.manual_seed(3)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape))
    adapted.save_pretrained(str(target), save_embedding_layers=False)
    return target


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("lora") / "a", ("q_proj", "down_proj"))


def merged_by_hand(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha / r B A, written out."""
    lora = load_file(adapter / "adapter_model.safetensors")
    merged = dict(weights)
    for name, A in lora.items():
        if ".lora_A." in name:
            B = lora[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + 8 / 4 * B @ A
    return merged


def test_a_float_base_becomes_the_sum(model: Path, adapter: Path, tmp_path: Path) -> None:
    made = merge_lora(model, adapter, tmp_path / "merged")
    expected = merged_by_hand(load_file(model / "model.safetensors"), adapter)
    found = load_file(made / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    changed = {
        name
        for name, weight in load_file(model / "model.safetensors").items()
        if not torch.equal(weight, found[name])
    }
    assert changed == {name for name in found if "q_proj" in name or "down_proj" in name}
    step = read_lineage(made)[-1]
    assert (step["step"], step["settings"]) == ("merge", {"adapter": adapter.name})
    assert len(step["adapter_fingerprint"]) == 64
    assert step["source"] == model.name
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(model, tmp_path / "base")
    weights = {
        name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = load_file(merge_lora(base, adapter, tmp_path / "merged") / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    floats = {name: weight.float() for name, weight in weights.items()}
    expected = merged_by_hand(floats, adapter)
    for name, weight in found.items():
        # One rounding of 8 bits; the sum itself may differ in its last bit, across a boundary.
        torch.testing.assert_close(weight.float(), expected[name], rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("form", ["gptq", "nf4"])
def test_a_quantized_base_is_merged_into_the_weights_it_computes_with(
    form: str, model: Path, adapter: Path, chats: Path, tmp_path: Path
) -> None:
    if form == "gptq":
        base = to_gptq(model, tmp_path / "base", texts=chats, settings=SETTINGS)
    else:
        base = to_nf4(model, tmp_path / "base")
    made = merge_lora(base, adapter, tmp_path / "merged")
    assert open_folder(made).form == "model"
    plain = load_file(dequantize(base, tmp_path / "plain") / "model.safetensors")
    expected = merged_by_hand(plain, adapter)
    for name, weight in load_file(made / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def kl_to(reference: Path, other: Path, ids: np.ndarray) -> float:
    first, second = (
        torch.log_softmax(torch.from_numpy(PytorchModel(folder).logits(ids)).double(), -1)
        for folder in (reference, other)
    )
    return float((first.exp() * (first - second)).sum(-1).mean())


def cost_of(folder: Path, chats: Path) -> float:
    """Mean -log p over all tokens to be learnt, conversation by conversation."""
    documents = list(read_documents(chats, load_vocabulary(folder)))
    return float(supervised.loss(load_pytorch(folder), documents).item())


def test_both_orders_are_measured_and_the_one_that_the_text_costs_less_is_kept(
    model: Path, adapter: Path, chats: Path, tmp_path: Path
) -> None:
    made = merge_lora(model, adapter, tmp_path / "small", texts=chats, settings=SETTINGS)
    assert open_folder(made).form == "gptq"
    report = json.loads((made / "merge_report.json").read_text())
    orders = report["orders"]
    assert set(orders) == {"merge_then_quantize", "quantize_then_merge"}
    costs = report["cross_entropy"]
    assert report["chosen_by"] == "cross_entropy"
    assert report["chosen"] == min(orders, key=lambda name: costs[name])
    assert costs["base"] == pytest.approx(cost_of(model, chats), rel=1e-4)
    assert costs[report["chosen"]] == pytest.approx(cost_of(made, chats), rel=1e-4)
    step = read_lineage(made)[-1]
    assert (step["orders"], step["chosen"]) == (orders, report["chosen"])

    # The same by hand, measured on other text: two roundings are further away than one.
    merged = merge_lora(model, adapter, tmp_path / "merged")
    once = to_gptq(merged, tmp_path / "once", texts=chats, settings=SETTINGS)
    base = to_gptq(model, tmp_path / "base", texts=chats, settings=SETTINGS)
    again = merge_lora(dequantize(base, tmp_path / "plain"), adapter, tmp_path / "again")
    twice = to_gptq(again, tmp_path / "twice", texts=chats, settings=SETTINGS)
    ids = np.random.default_rng(0).integers(5, 300, (4, 64))
    assert kl_to(merged, once, ids) < kl_to(merged, twice, ids)
    assert costs["trained"] == pytest.approx(cost_of(merged, chats), rel=1e-4)
    learnt, kept = costs["base"] - costs["trained"], cost_of(base, chats) - cost_of(made, chats)
    assert report["share_kept"] == pytest.approx(kept / learnt, rel=1e-3)
    best = {"merge_then_quantize": once, "quantize_then_merge": twice}[report["chosen"]]
    files = (folder / "model.safetensors" for folder in (made, best))
    assert len({file.read_bytes() for file in files}) == 1
    assert not list(tmp_path.glob(".merge-*"))


def test_a_gptq_base_is_quantized_again_as_it_was_and_finds_its_original(
    model: Path, adapter: Path, chats: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    base = to_gptq(source, tmp_path / "base", texts=chats, bits=8, group_size=64, sym=False)
    made = merge_lora(base, adapter, tmp_path / "small", texts=chats)
    said = json.loads((made / "config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["sym"]) == (8, 64, False)
    assert json.loads((made / "merge_report.json").read_text())["float_base"] == source.name

    shutil.rmtree(source)
    with pytest.raises(
        FolderError, match=r"was not found as source beside it; give it as float_base"
    ):
        merge_lora(base, adapter, tmp_path / "other", texts=chats)
    again = merge_lora(base, adapter, tmp_path / "other", texts=chats, float_base=model)
    assert json.loads((again / "merge_report.json").read_text())["float_base"] == model.name


def adapted(base: Path, target: Path, **options: Any) -> tuple[Path, Any]:
    """An adapter of any kind whose every trained number was moved, and what both compute."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj"], **options})
    model: Any = get_peft_model(plain, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(target, save_embedding_layers=False)
    with torch.inference_mode():
        return target, model.eval()(torch.from_numpy(IDS)).logits.numpy()


IDS = np.arange(5, 29)[None]


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [10, 11]},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_any_kind_that_peft_merges_is_the_sum(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    folder, expected = adapted(model, tmp_path / "a", **options)
    merged = merge_lora(model, folder, tmp_path / "merged")
    np.testing.assert_allclose(PytorchModel(merged).logits(IDS), expected, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_cannot_merge_or_would_leave_out_is_refused(model: Path, tmp_path: Path) -> None:
    def config(folder: Path, **changes: Any) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    target = tmp_path / "out" / "merged"
    biased, _ = adapted(model, tmp_path / "biased", lora_bias=True)
    with pytest.raises(FolderError, match=r"cannot be merged.*the base layer has no bias"):
        merge_lora(model, biased, target)
    rows, _ = adapted(model, tmp_path / "rows", trainable_token_indices=[10])
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(FolderError, match="which are one table"):
        merge_lora(tied, rows, target)
    config(rows, trainable_token_indices=None)
    with pytest.raises(FolderError, match=r"also holds .*token_adapter"):
        merge_lora(model, rows, target)
    dora, _ = adapted(model, tmp_path / "dora", use_dora=True)
    config(dora, use_dora=False)
    with pytest.raises(FolderError, match=r"also holds .*magnitude"):
        merge_lora(model, dora, target)
    plain, _ = adapted(model, tmp_path / "plain")
    config(plain, use_dora=True)
    with pytest.raises(FolderError, match=r"lacks .*magnitude"):
        merge_lora(model, plain, target)
    config(plain, use_dora=False, from_the_future={"rank": 3})
    with pytest.raises(FolderError, match=r"newer version of peft.* does not know from_the_future"):
        merge_lora(model, plain, target)
    config(plain, from_the_future=None, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(FolderError, match="repeats layers of its base"):
        merge_lora(model, plain, target)
    config(plain, layer_replication=None)
    merge_lora(model, plain, target)
    assert [path.name for path in target.parent.iterdir()] == ["merged"]


OWN_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}[assistant] "


@pytest.mark.parametrize("place", ["inline", "inline by name", "file", "nowhere"])
@pytest.mark.parametrize("base_place", ["file", "inline"])
def test_a_merged_model_has_the_template_of_its_adapter(
    base_place: str, place: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    bases = (base / "chat_template.jinja").read_text()
    if base_place == "inline":
        (base / "chat_template.jinja").unlink()
        inline = {**settings, "chat_template": bases}
        (base / "tokenizer_config.json").write_text(json.dumps(inline))
    templates: dict[str, Any] = {
        "inline": {"chat_template": OWN_TEMPLATE},
        "inline by name": {
            "chat_template": [
                {"name": "tool_use", "template": "tools"},
                {"name": "default", "template": OWN_TEMPLATE},
            ]
        },
    }
    config = {**settings, "eos_token": "</s>", **templates.get(place, {})}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    if place == "file":
        (own / "chat_template.jinja").write_text(OWN_TEMPLATE)
    merged = load_vocabulary(merge_lora(base, own, tmp_path / "merged"))
    assert merged.chat_template == (bases if place == "nowhere" else OWN_TEMPLATE)
    assert merged.special_tokens["eos_token"] == "</s>"


def test_what_cannot_be_merged_is_refused(
    model: Path, adapter: Path, chats: Path, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    with pytest.raises(FolderError, match=r"is not a peft adapter: it has no adapter_config\.json"):
        merge_lora(model, tmp_path, target)
    with pytest.raises(SettingsError, match="give texts"):
        merge_lora(model, adapter, target, settings=SETTINGS)
    with pytest.raises(SettingsError, match="group_size 128 does not divide the 64 inputs"):
        merge_lora(model, adapter, target, texts=chats)
    other = tiny_model(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(FolderError, match=r"changes model\.layers\.1\..*, which .* does not have"):
        merge_lora(other, adapter, target)
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    untied = tiny_model(tmp_path / "untied")
    head = make_adapter(untied, tmp_path / "head", ("lm_head",))
    with pytest.raises(FolderError, match="which are one table"):
        merge_lora(tied, head, target)
    merge_lora(untied, head, target)
    wide = tiny_model(tmp_path / "wide", intermediate_size=160)
    with pytest.raises(FolderError, match="does not fit"):
        merge_lora(wide, adapter, tmp_path / "wide-merged")
    kind = shutil.copytree(adapter, tmp_path / "ia3")
    (kind / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(FolderError, match="of type IA3; mistill merges type LORA only"):
        merge_lora(model, kind, tmp_path / "no")
