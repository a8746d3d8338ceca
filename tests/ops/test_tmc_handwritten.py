"""Trusted Multi-View Classification built from cdc_ops parts, on the data its paper reports."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Dirichlet, kl_divergence

EXAMPLE = Path(__file__).parents[2] / "examples" / "tmc_handwritten.py"
spec = importlib.util.spec_from_file_location("tmc_handwritten", EXAMPLE)
tmc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tmc)

DATA = tmc.BESIDE_THE_CHECKOUT
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs the six-view handwritten data at {DATA}")


def pairwise_dempster(e1, e2):
    """Dempster's rule for two opinions the long way: all K x K products, conflict taken out."""
    K = e1.shape[-1]
    (b1, u1), (b2, u2) = ((e / (e.sum(-1, True) + K), K / (e.sum(-1, True) + K)) for e in (e1, e2))
    products = b1.unsqueeze(2) * b2.unsqueeze(1)
    agreement = 1 - (products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1))
    b = (b1 * b2 + b1 * u2 + b2 * u1) / agreement[:, None]
    u = u1 * u2 / agreement[:, None]
    return K * b / u


def textbook_loss(evidence, target, kl_weight):
    """The published objective, view by view, with torch's own Dirichlet."""
    fused = evidence[:, 0]
    for v in range(1, evidence.shape[1]):
        fused = pairwise_dempster(fused, evidence[:, v])
    total = 0
    for e in (*evidence.unbind(1), fused):
        alpha, one_hot = e + 1, F.one_hot(target, e.shape[-1])
        fit = torch.digamma(alpha.sum(-1)) - (one_hot * torch.digamma(alpha)).sum(-1)
        others = one_hot + (1 - one_hot) * alpha
        total = total + fit + kl_weight * kl_divergence(Dirichlet(others), Dirichlet(torch.ones_like(others)))
    return total.mean()


def test_objective_and_its_gradient_are_the_published_ones():
    torch.manual_seed(0)
    model = tmc.TrustedMultiView([7, 3, 5], 4).double()
    views = [torch.rand(6, size, dtype=torch.float64) for size in (7, 3, 5)]
    target = torch.arange(6) % 4
    ours, theirs = model.loss(views, target, 0.6), textbook_loss(model(views), target, 0.6)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@needs_data
def test_reads_and_scales_the_data():
    train_views, train_target, test_views, test_target = tmc.read_views(DATA)
    assert [x.shape[1] for x in train_views] == [240, 76, 216, 47, 64, 6]
    assert len(train_target) == 1600 and len(test_target) == 400
    assert train_target.unique().tolist() == list(range(10))
    assert all(x.min() == 0 and x.max() == 1 for x in (*train_views, *test_views))


@pytest.mark.slow
@needs_data
def test_reaches_the_published_accuracy():
    """98.51 % published; the test set has 400 images, so one accuracy is good to +- 1.19 (1.96 standard errors).

    The published formulas, trained here from the same weights on the same batches, end at the same loss to
    five digits and the same accuracy, 98.00 %: within that interval, and not 98.51 either.
    """
    accuracy = tmc.train(DATA, seed=1)
    standard_error = 100 * (0.9851 * (1 - 0.9851) / 400) ** 0.5
    assert abs(accuracy - 98.51) < 1.96 * standard_error
