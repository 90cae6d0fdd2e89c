"""Bytes go where they lower KL most, and no further than the limit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantize
from mistill.errors import SettingsError
from mistill.folders.folder import open_folder, read_json
from mistill.folders.lineage import read_lineage
from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import ModuleFormat
from quantize.calibration_text import draw_blocks
from quantize.folders.float_model import open_float
from quantize.mixed import mixed_folder
from quantize.mixed.budget import Choice, fill_budget, fill_budget_alike, lower_hull
from quantize.mixed.q4_k_m import q4_k_m_bytes
from quantize.settings import GptqSettings

FORMATS = ("bits=4, group_size=64", "bits=4, group_size=32", "bits=8, group_size=64")
SMALL: dict[str, Any] = {
    "samples": 12,
    "block_length": 64,
    "sensitivity_samples": 12,
    "formats": FORMATS,
}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_the_greedy_walk_finds_what_trying_everything_finds() -> None:
    """Over random choices and budgets, against all combinations; but for the last change."""
    generator = np.random.default_rng(0)
    exact = 0
    for _ in range(60):
        choices = {
            str(name): [
                Choice(ModuleFormat(bits=4, group_size=place + 1), int(size), float(cost))
                for place, (size, cost) in enumerate(
                    zip(generator.integers(1, 30, 4), generator.random(4), strict=True)
                )
            ]
            for name in range(4)
        }
        least = sum(min(c.size for c in options) for options in choices.values())
        budget = least + int(generator.integers(0, 60))
        found = fill_budget(choices, budget)
        assert sum(choice.size for choice in found.values()) <= budget
        cost = sum(choice.cost for choice in found.values())
        best = min(
            sum(choice.cost for choice in some)
            for some in itertools.product(*choices.values())
            if sum(choice.size for choice in some) <= budget
        )
        widest = max(
            (
                a.cost - b.cost
                for hull in map(lower_hull, choices.values())
                for a, b in itertools.pairwise(hull)
            ),
            default=0.0,
        )
        assert best - 1e-12 <= cost <= best + widest + 1e-12
        exact += cost == pytest.approx(best)
    assert exact > 30


def test_bytes_go_where_each_of_them_brings_most() -> None:
    """By hand: a large gain at ten times the bytes waits for a smaller one."""
    choices = {
        "large": [Choice(None, 10, 1.0), Choice(None, 110, 0.4)],
        "small": [Choice(None, 10, 0.5), Choice(None, 20, 0.3)],
    }
    found = fill_budget(choices, 120)
    assert [found[name].size for name in ("large", "small")] == [10, 20]
    found = fill_budget(choices, 130)
    assert [found[name].size for name in ("large", "small")] == [110, 20]


def test_a_group_gets_the_format_that_is_worth_most_to_it_as_a_whole() -> None:
    """By hand: what helps one matrix much is not worth the bytes of all three."""
    few, many = (ModuleFormat(bits=bits, group_size=64) for bits in (4, 8))
    choices = {
        "0.q": [Choice(few, 10, 1.0), Choice(many, 20, 0.0)],
        "0.k": [Choice(few, 10, 0.1), Choice(many, 20, 0.0)],
        "0.v": [Choice(few, 10, 0.1), Choice(many, 20, 0.0), Choice(None, 5, 2.0)],
        "1.q": [Choice(few, 10, 0.5), Choice(many, 20, 0.0)],
    }
    apart = fill_budget_alike(choices, lambda name: name, 60)
    assert {name for name, choice in apart.items() if choice.form == many} == {"0.q", "1.q"}
    together = fill_budget_alike(choices, lambda name: name[0], 60)
    assert [choice.form for choice in together.values()] == [few, few, few, many]
    together = fill_budget_alike(choices, lambda name: name[0], 80)
    assert [choice.form for choice in together.values()] == [many, many, many, many]


def test_matrices_that_are_multiplied_as_one_have_one_format(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    mixed = quantize.to_mixed(
        model, tmp_path / "mixed", texts=chats, bits_per_weight=7, fused=True, **SMALL
    )
    forms = read_json(mixed / "mixed.json")["modules"]
    for layer in range(2):
        name = f"model.layers.{layer}"
        attention = [forms[f"{name}.self_attn.{matrix}_proj"] for matrix in "qkv"]
        assert attention[0] == attention[1] == attention[2]
        assert forms[f"{name}.mlp.gate_proj"] == forms[f"{name}.mlp.up_proj"]
    assert len({str(form) for form in forms.values()}) > 1


def test_a_choice_that_two_others_beat_is_skipped() -> None:
    sizes_and_costs = [(10, 1.0), (20, 0.9), (30, 0.1), (25, 0.95), (40, 0.2)]
    options = [Choice(None, size, cost) for size, cost in sizes_and_costs]
    assert [(c.size, c.cost) for c in lower_hull(options)] == [(10, 1.0), (30, 0.1)]


@pytest.mark.parametrize("bits_per_weight", [5.4, 6.5, 9.0])
def test_the_folder_is_no_larger_than_asked_for_and_hardly_smaller(
    model: Path, chats: Path, tmp_path: Path, bits_per_weight: float
) -> None:
    target = quantize.to_mixed(
        model, tmp_path / "small", texts=chats, bits_per_weight=bits_per_weight, **SMALL
    )
    info = open_folder(target)
    assert info.form == "gptq"
    budget = bits_per_weight * info.parameters / 8
    chosen = read_json(target / "mixed.json")
    # The widest change of this model is from a table of 8 bits to one of floats.
    assert weight_bytes(target) <= budget
    if bits_per_weight < 9:
        assert weight_bytes(target) > 0.9 * budget
    assert chosen["weight_bytes"] == weight_bytes(target)
    assert 0 <= chosen["expected_bytes"] - chosen["weight_bytes"] < 4000
    report = {m["name"]: m for m in read_json(target / "quantize_report.json")["modules"]}
    for name, form in chosen["modules"].items():
        if form is None:
            assert name not in report
        else:
            assert (report[name]["bits"], report[name]["group_size"]) == tuple(form.values())
    assert read_lineage(target)[-1]["step"] == "gptq"


def test_mixing_beats_one_precision_of_the_same_bytes(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    uniform = quantize.to_gptq(
        model, tmp_path / "uniform", texts=chats, group_size=32, samples=12, block_length=64,
        head_bits=4, embedding_bits=4,
    )  # fmt: skip
    size_mb = weight_bytes(uniform) / 1e6
    mixed = quantize.to_mixed(model, tmp_path / "mixed", texts=chats, size_mb=size_mb, **SMALL)
    assert weight_bytes(mixed) <= weight_bytes(uniform)
    blocks = draw_blocks(chats, model, GptqSettings(samples=30, block_length=64, seed=1))
    found = compare(
        {"model": predict(load_pytorch(model), blocks)},
        {folder.name: predict(load_pytorch(folder), blocks) for folder in (uniform, mixed)},
        blocks,
    )
    assert found["mixed"]["model"].kl < found["uniform"]["model"].kl


def test_where_no_size_is_asked_for_it_is_that_of_q4_k_m(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    mixed = quantize.to_mixed(model, tmp_path / "mixed", texts=chats, **SMALL)
    summary = read_json(mixed / "mixed.json")
    whole = open_float(model)
    tables = {"embed_tokens": (64, 384), "lm_head": (64, 384)}
    norms = 64 * (2 * whole.config.num_hidden_layers + 1)
    assert summary["budget_bytes"] == q4_k_m_bytes(whole.matrices, tables, norms)
    assert weight_bytes(mixed) <= summary["budget_bytes"]


def test_what_cannot_be_that_small_is_refused_with_what_can(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"takes at least .*bits per weight.*raise the size"):
        quantize.to_mixed(model, tmp_path / "small", texts=chats, size_mb=0.05, **SMALL)
    with pytest.raises(SettingsError, match="either size_mb or bits_per_weight"):
        quantize.to_mixed(model, tmp_path / "small", texts=chats, size_mb=1, bits_per_weight=5)
    with pytest.raises(SettingsError, match="no format fits"):
        formats = ("bits=4, group_size=48",)
        quantize.to_mixed(model, tmp_path / "small", texts=chats, size_mb=1, formats=formats)
    assert list(tmp_path.iterdir()) == []


def test_tables_stay_float_where_they_must(model: Path, chats: Path, tmp_path: Path) -> None:
    target = quantize.to_mixed(
        model, tmp_path / "small", texts=chats, bits_per_weight=20, tables=False, **SMALL
    )
    kept = read_json(target / "quantize_report.json")["kept"]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(kept)


def test_a_matrix_costs_what_gptaq_leaves_and_a_table_all_that_rounding_costs() -> None:
    four = ModuleFormat(bits=4, group_size=64)
    sizes = {name: {None: 100, four: 30} for name in ("model.embed_tokens", "layer.q_proj")}
    costs = {name: {four: 0.2} for name in sizes}
    choices = mixed_folder._choices(sizes, costs, 0.3)
    assert {name: [one.cost for one in some] for name, some in choices.items()} == {
        "model.embed_tokens": [0.0, 0.2],
        "layer.q_proj": [0.0, pytest.approx(0.06)],
    }
