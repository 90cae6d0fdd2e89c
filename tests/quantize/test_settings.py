from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from mistill.cli.quantize_commands import app
from mistill.errors import SettingsError
from quantize import GptqSettings, MixedSettings, SweepSettings, TuningSettings

COMMANDS = [name for name in app if not name.startswith("-")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help_text(command: str) -> None:
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    # Without a text of its own an option has that of the settings it belongs to.
    borrowed = {argument.parameter.help for argument in arguments if not argument.show}
    options = {argument.name: argument.parameter.help for argument in arguments if argument.show}
    assert len(options) > 3
    assert [name for name, text in options.items() if not text or text in borrowed] == []


def test_options_stand_in_the_order_of_their_use() -> None:
    assert [field.name for field in fields(GptqSettings)] == [
        *("bits", "group_size", "symmetric", "scale_type", "overrides"),
        *("head_bits", "embedding_bits", "method", "order", "scale_search", "damp_percent"),
        *("true_sequential", "samples", "block_length", "seed", "skip_bad_rows"),
        "model_file_base_name",
    ]
    assert [field.name for field in fields(SweepSettings)][:2] == ["variants", "held_out_samples"]
    assert [field.name for field in fields(MixedSettings)][:2] == ["size_mb", "bits_per_weight"]


def test_a_mix_hands_its_own_options_to_gptq() -> None:
    mixed = MixedSettings(method="gptaq", order="none", samples=3, seed=7, scale_type="float32")
    expected = GptqSettings(method="gptaq", order="none", samples=3, seed=7, scale_type="float32")
    assert mixed.gptq() == expected


@pytest.mark.parametrize("settings", [GptqSettings, MixedSettings, SweepSettings])
def test_what_several_ways_share_is_checked_in_each(settings: type) -> None:
    with pytest.raises(SettingsError, match="samples must be at least 1, not 0"):
        settings(samples=0)
    with pytest.raises(SettingsError, match="seed must be at least 0, not -1"):
        settings(seed=-1)
    if settings is not SweepSettings:
        with pytest.raises(SettingsError, match="scale_search must be at least 1, not 0"):
            settings(scale_search=0)
        with pytest.raises(SettingsError, match="scale_type must be float16, bfloat16 or float32"):
            settings(scale_type="int8")


def test_a_number_that_is_none_lies_in_no_range() -> None:
    with pytest.raises(SettingsError, match="must be above 0 and below 1, not nan"):
        TuningSettings(learning_rate=float("nan"))


def test_settings_are_read_without_torch() -> None:
    program = "import sys, quantize.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
