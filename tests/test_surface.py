"""What users have stays: public names, settings and defaults, commands, options, recipe keys."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.surface import MODULES, commands, public_names, recipe_keys, settings

LIST = json.loads(Path(__file__).with_name("surface.json").read_text("utf-8"))


def test_public_names_are_the_ones_listed():
    assert public_names() == LIST["public names"]


@pytest.mark.parametrize("module", MODULES)
def test_names_that_users_import_from_a_module_are_still_there(module):
    missing = [
        name
        for name in LIST["modules"][module]
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing


def test_settings_and_their_defaults_are_the_ones_listed():
    assert settings() == LIST["settings"]


def test_commands_and_their_options_are_the_ones_listed():
    assert commands() == LIST["commands"]


def test_recipe_keys_are_the_ones_listed():
    assert recipe_keys() == LIST["recipe keys"]
