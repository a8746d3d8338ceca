"""The docstrings of cdc_models: examples run as printed, and every public name says what a user must know."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import cdc_models

MODULES = ["cdc_models", *(m.name for m in pkgutil.walk_packages(cdc_models.__path__, "cdc_models."))]
ROOMS = ["cdc_models", *(f"cdc_models.{room}" for room in ("clip", "data", "engine", "methods", "prompts"))]
PUBLIC = {
    f"{room}.{name}": getattr(importlib.import_module(room), name)
    for room in ROOMS
    for name in importlib.import_module(room).__all__
}
CALLED = {name: thing for name, thing in PUBLIC.items() if callable(thing)}  # the others are tables and numbers
# Shown where they are returned, raised or read from: what nobody makes himself.
SHOWN_ELSEWHERE = {
    *("AdapterError", "BadImageError", "CheckpointError", "DatasetError", "UnsupportedBackboneError"),
    *("CachedFeatures", "ClassTokens", "EmojiBenchmark", "Evaluation", "Features", "FitResult"),
    *("ImageDataset", "ImageReport", "ImageSet", "Published", "SkippedImage"),
}
REFUSE_NOTHING = {"Prediction", "find_published", "scan"}
WITH_SOURCE = ["CDC", "CoOp", "CoupledPrompts", "MaPLe", "PromptContext", "Views", "ZeroShot"]
WITH_SOURCE += ["calibrate", "fit", "harmonic_mean", "test_transform", "train_transform"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", CALLED)
def test_public_names_are_documented_with_an_example(name):
    documented = CALLED[name].__doc__
    assert documented and not documented.startswith(f"{name.rsplit('.')[-1]}(")  # which dataclass writes by itself
    assert ">>>" in documented or name.rsplit(".")[-1] in SHOWN_ELSEWHERE


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_says_what_it_refuses(name):
    assert "Raises" in CALLED[name].__doc__ or name.rsplit(".")[-1] in SHOWN_ELSEWHERE | REFUSE_NOTHING


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_what_others_thought_of_says_so(name):
    (thing,) = {CALLED[known] for known in CALLED if known.endswith(f".{name}")}
    assert "Source: " in inspect.getdoc(thing)
