"""The examples in the docstrings run as printed."""

import doctest
import importlib

import pytest

MODULES = [
    "cdc_models.clip.backbone",
    "cdc_models.clip.classes",
    "cdc_models.clip.image_tower",
    "cdc_models.clip.text_tower",
    "cdc_models.prompts.context",
    "cdc_models.prompts.coupled",
    "cdc_models.prompts.templates",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
