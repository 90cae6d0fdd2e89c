"""Ways to merge are compared by what held-out text costs, where it shows what was learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import quantize
import tune
from mistill.errors import FolderError, TextError, TrainingError
from mistill.folders.lineage import read_lineage
from mistill.measures.kl import Fidelity
from quantize import GptqSettings, merge_lora
from quantize.conversions import merging
from quantize.conversions.merge_measuring import Measured, better_way, require_kept, share_kept
from tests.quantize.conversions.test_merging import cost_of

SETTINGS = GptqSettings(group_size=32, samples=8, block_length=64)


def said(losses: Sequence[Sequence[float]], kl: float = 0.1) -> Measured:
    figures = Fidelity(
        kl=kl,
        kl_standard_error=None,
        kl_p99=kl,
        agreement=1.0,
        perplexity=1.0,
        reference_perplexity=1.0,
        tokens=4,
    )
    return Measured(figures, [np.array(one) for one in losses])


BASE = said([[2.0, 2.2], [1.8, 2.0]])
TRAINED = said([[1.0, 1.2], [0.8, 1.0]])


def test_the_way_with_the_lower_cost_is_taken_though_the_other_is_closer() -> None:
    ways = {"faithful": said([[1.0, 1.2], [0.8, 1.0]], kl=0.0), "better": said([[0.7], [0.9]], 0.3)}
    chosen, facts = better_way(ways, BASE, TRAINED)
    assert chosen == facts["chosen"] == "better"
    assert facts["chosen_by"] == "cross_entropy"
    assert facts["cross_entropy"] == pytest.approx(
        {"base": 2.0, "trained": 1.0, "faithful": 1.0, "better": 0.8}
    )


@pytest.mark.parametrize(
    "trained",
    [said([[2.1, 2.3], [1.9, 2.1]]), said([[1.0, 1.0], [2.7, 2.7]])],
    ids=["costs more", "is not sure to cost less"],
)
def test_where_the_text_shows_nothing_learnt_the_closer_way_is_taken(
    trained: Measured, caplog: pytest.LogCaptureFixture
) -> None:
    ways = {"faithful": said([[3.0], [3.0]], kl=0.0), "cheaper": said([[0.7], [0.9]], kl=0.3)}
    chosen, facts = better_way(ways, BASE, trained)
    assert chosen == "faithful"
    assert facts["chosen_by"] == "kl"
    assert "does not show what was learnt" in caplog.text


def test_the_share_that_is_kept_is_worked_by_hand() -> None:
    # 1 nat was learnt; 2.5 is the cost of the quantized base, 2.1 that of the quantized merge.
    share = share_kept(BASE, TRAINED, said([[2.5], [2.5]]), said([[2.1], [2.1]]))
    assert share == pytest.approx(0.4)
    with pytest.raises(TrainingError, match=r"40% .* is left; give more bits or smaller groups"):
        require_kept(share)
    require_kept(0.51)


@pytest.fixture(scope="module")
def trained_over_four_bits(
    tmp_path_factory: pytest.TempPathFactory, model: Path, chats: Path
) -> tuple[Path, Path]:
    """An NF4 base, and an adapter that was trained over it."""
    home = tmp_path_factory.mktemp("qlora")
    # The lineage of a folder names its source, which is looked for beside it.
    base = quantize.to_nf4(Path(shutil.copytree(model, home / "model")), home / "nf4")
    made = tune.supervised(
        base, home / "tuned", texts=chats, base="nf4", block_length=128, batch_size=2,
        lora_rank=4, learning_rate=3e-3, replies=0,
    )  # fmt: skip
    return base, made / "adapter"


def test_an_adapter_of_four_bit_weights_is_merged_into_the_ones_that_text_costs_less(
    tmp_path: Path, trained_over_four_bits: tuple[Path, Path], model: Path, chats: Path
) -> None:
    base, adapter = trained_over_four_bits
    made = merge_lora(base, adapter, tmp_path / "made", held_out=chats, float_base=model)
    step = read_lineage(made)[-1]
    assert step["ways"].keys() == {"dequantized", "float"}
    costs = step["cross_entropy"]
    assert step["chosen"] == min(step["ways"], key=lambda name: costs[name])
    assert Path(step["float_base"]).name == "model"
    assert json.loads((made / "merge_report.json").read_text())["cross_entropy"] == costs
    assert costs[step["chosen"]] == pytest.approx(cost_of(made, chats), rel=1e-4)
    assert costs["base"] == pytest.approx(cost_of(base, chats), rel=1e-4)
    ways = {
        "dequantized": merge_lora(base, adapter, tmp_path / "dequantized"),
        "float": merge_lora(model, adapter, tmp_path / "float"),
    }
    for name, folder in ways.items():
        assert costs[name] == pytest.approx(cost_of(folder, chats), rel=1e-4), name
    expected, found = (
        load_file(folder / "model.safetensors") for folder in (ways[step["chosen"]], made)
    )
    assert all(expected[name].equal(found[name]) for name in expected)


def test_a_quantized_merge_that_loses_what_was_learnt_leaves_nothing(
    tmp_path: Path,
    trained_over_four_bits: tuple[Path, Path],
    model: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = trained_over_four_bits
    monkeypatch.setattr(merging, "share_kept", lambda *_: 0.02)
    with pytest.raises(TrainingError, match=r"2% of what it takes"):
        merge_lora(
            base, adapter, tmp_path / "made", texts=chats, settings=SETTINGS, float_base=model
        )
    assert list(tmp_path.iterdir()) == []


def test_a_lost_original_and_text_that_is_none_are_refused_before_anything_is_merged(
    tmp_path: Path, trained_over_four_bits: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = trained_over_four_bits
    monkeypatch.setattr(merging, "_merge", None)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(TextError, match=r"empty\.jsonl"):
        merge_lora(base, adapter, tmp_path / "made", held_out=empty)
    with pytest.raises(FolderError, match="float folder as float_base"):
        merge_lora(base, adapter, tmp_path / "made", held_out="@demo-train", float_base=base)
