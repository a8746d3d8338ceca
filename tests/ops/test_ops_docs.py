"""The package as a newcomer meets it: examples run as printed, every public name is documented, torch suffices."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import is_dataclass

import pytest

import cdc_ops

MODULES = ["cdc_ops", *(m.name for m in pkgutil.walk_packages(cdc_ops.__path__, "cdc_ops."))]
WITH_EXAMPLES = {
    "backends",
    "checks",
    "evidence",
    "frontdoor",
    "fusion",
    "losses",
    "modules",
    "opinion",
    "parallel",
    "similarity",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name.removeprefix("cdc_ops.") not in WITH_EXAMPLES


def members(name):
    """A public function, or a public class with the methods it defines itself: (what it is called, the object)."""
    thing = getattr(cdc_ops, name)
    yield name, thing
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and not key.startswith("_") and key != "extra_repr":
                yield f"{name}.{key}", member


def checks_arguments(function):
    source = inspect.getsource(function)
    return any(sign in source for sign in ("checks.", "make_problem(", "raise ValueError", "conditionals("))


@pytest.mark.parametrize("name", cdc_ops.__all__)
def test_a_public_name_has_an_example_that_runs(name):
    thing = getattr(cdc_ops, name)
    [found] = doctest.DocTestFinder(recurse=False).find(thing, name, globs=vars(cdc_ops))
    assert found.examples


@pytest.mark.parametrize("name", cdc_ops.__all__)
def test_a_public_name_says_its_shapes(name):
    if name not in ("BackendUnavailableError", "NonFiniteError", "value_checks"):  # which have to do with no tensor
        assert re.search(r"\[(\.\.\.|B|M|N)(, \S+)*\]", inspect.getdoc(getattr(cdc_ops, name)))


@pytest.mark.parametrize("name", cdc_ops.__all__)
def test_what_checks_its_arguments_says_what_it_raises(name):
    for called, member in members(name):
        if inspect.isfunction(member) and checks_arguments(member):
            # of a constructor and a call, the class tells
            told = inspect.getdoc(getattr(cdc_ops, name) if called.endswith(".forward") else member)
            assert "Raises:" in told, called
    thing = getattr(cdc_ops, name)
    if inspect.isclass(thing) and not is_dataclass(thing) and checks_arguments(thing):
        assert "Raises:" in inspect.getdoc(thing)


@pytest.mark.parametrize("name", cdc_ops.__all__)
def test_a_formula_has_a_source(name):
    for called, member in members(name):
        told = inspect.getdoc(member)
        assert told, called
        formula = re.search(r"``[^`]*( = |sum_|ln\()[^`]*``", told)
        of_its_class = "Source:" in inspect.getdoc(getattr(cdc_ops, name))
        assert not formula or "Source:" in told or of_its_class, called


def test_our_reading_is_called_so():
    """What is this project's choice and not the paper's formula says so itself."""
    for name in ("decoupling_loss", "consistency_loss", "evidential_cross_entropy", "EvidenceHead", "frontdoor_adjust"):
        assert "our reading" in inspect.getdoc(getattr(cdc_ops, name)), name


def test_import_needs_torch_alone():
    """Nothing optional is imported: with everything else blocked, the package imports and computes."""
    program = """
import sys

blocked = "triton open_clip torchvision einops safetensors torchmetrics rich scipy numpy cdc_models".split()
sys.modules.update(dict.fromkeys(blocked))  # None there makes an import fail
import torch, cdc_ops
image, text = torch.randn(3, 4), torch.randn(2, 5, 4, requires_grad=True)
cdc_ops.evidential_cross_entropy(image, text, torch.tensor([0, 1, 2]), scale=5.0).backward()
assert cdc_ops.fused_topk(image, text, 2, scale=5.0).classes.shape == (3, 2)
assert not any(sys.modules[name] for name in blocked)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
