"""The package as a newcomer meets it: examples run as printed, every public name is documented, torch suffices."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import cdc_ops

MODULES = ["cdc_ops", *(m.name for m in pkgutil.walk_packages(cdc_ops.__path__, "cdc_ops."))]
WITH_EXAMPLES = {"checks", "evidence", "frontdoor", "fusion", "losses", "modules", "opinion", "parallel", "similarity"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name.removeprefix("cdc_ops.") not in WITH_EXAMPLES


def test_public_names_are_documented_with_an_example():
    for name in cdc_ops.__all__:
        documented = inspect.getdoc(getattr(cdc_ops, name))
        assert documented, name
        plain = name in ("BackendUnavailableError", "FusedOpinion", "TopK")  # shown where they are returned
        assert plain or ">>>" in documented, name


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
