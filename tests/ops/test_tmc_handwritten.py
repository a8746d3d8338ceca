"""Trusted Multi-View Classification built from cdc_ops parts against its published formulas, trained side by side."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise_dempster

EXAMPLE = Path(__file__).parents[2] / "examples" / "tmc_handwritten.py"
spec = importlib.util.spec_from_file_location("tmc_handwritten", EXAMPLE)
tmc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tmc)

DATA = tmc.BESIDE_THE_CHECKOUT
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs the six-view handwritten data at {DATA}")


def published_alphas(model, views):
    """Dirichlet parameters of each view, and of all by Dempster's rule two at a time, K x K products each."""
    alphas = [F.softplus(layer(x)) + 1 for layer, x in zip(model.views, views, strict=True)]
    fused = alphas[0]
    for alpha in alphas[1:]:
        fused = pairwise_dempster(fused, alpha)
    return alphas, fused


def published_loss(model, views, target, kl_weight):
    """The paper's objective, opinion by opinion: expected cross-entropy by digammas, and the KL to ignorance."""
    alphas, fused = published_alphas(model, views)
    K = fused.shape[-1]
    one_hot = F.one_hot(target, K)
    total = 0
    for alpha in (*alphas, fused):
        S = alpha.sum(-1, keepdim=True)
        total += (one_hot * (S.digamma() - alpha.digamma())).sum(-1)
        other = one_hot + (1 - one_hot) * alpha
        S = other.sum(-1, keepdim=True)
        kl = ((other - 1) * (other.digamma() - S.digamma())).sum(-1) + S.lgamma().squeeze(-1) - other.lgamma().sum(-1)
        total += kl_weight * (kl - torch.tensor(float(K), dtype=kl.dtype).lgamma())
    return total.mean()


def trained(data, loss, seed, **schedule):
    """The loss of every epoch, and the fused Dirichlet parameters of the test images [B, K] at the end.

    Weights and order of the batches depend on the seed alone; the fusion is the loss's own.
    """
    views, target, test_views, _ = data
    torch.manual_seed(seed)
    model = tmc.TrustedMultiView([x.shape[1] for x in views], int(target.max()) + 1).double()
    losses = tmc.fit(model, views, target, loss=loss, **schedule)
    with torch.no_grad():
        alpha = published_alphas(model, test_views)[1] if loss is published_loss else model.predict(test_views).alpha
    return torch.tensor(losses, dtype=torch.float64), alpha


def assert_trains_as_published(data, **schedule):
    """To rounding, which is torch's trigamma's: the published formulas' gradients pass through it, ours do not."""
    losses, alpha = trained(data, tmc.TrustedMultiView.loss, seed=1, **schedule)
    published_losses, published_alpha = trained(data, published_loss, seed=1, **schedule)
    torch.testing.assert_close(losses, published_losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(alpha, published_alpha, rtol=1e-7, atol=0)
    assert torch.equal(alpha.argmax(-1), published_alpha.argmax(-1))


def six_synthetic_views():
    """Ten classes as noisy points around their centres, in six views of different sizes; training and test images."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(10).repeat(20)
    views = []
    for size in (24, 8, 21, 5, 6, 3):
        centres, noise = (torch.rand(n, size, dtype=torch.float64, generator=generator) for n in (10, len(target)))
        views.append(centres[target] + noise / 2)
    return [x[:150] for x in views], target[:150], [x[150:] for x in views], target[150:]


def test_training_takes_the_published_path_on_synthetic_views():
    assert_trains_as_published(six_synthetic_views(), epochs=8, learning_rate=0.05, annealing=6, batch=50)


@pytest.mark.parametrize(("more", "told"), [([], True), (["--epochs", "3"], False), (["--lr", "0.003"], False)])
def test_the_conclusion_stands_under_the_run_it_belongs_to_only(more, told, monkeypatch, capsys):
    monkeypatch.setattr(tmc, "read_views", lambda path: six_synthetic_views())
    monkeypatch.setattr(tmc, "accuracy", lambda *_, **__: 98.0)
    seeds = ["--seeds", *map(str, range(1, 11))]
    monkeypatch.setattr("sys.argv", ["tmc_handwritten.py", "--data", __file__, *seeds, *more])
    tmc.main()
    out = capsys.readouterr().out
    assert "| the paper | | 98.51 +- 0.15 |" in out and ("What differs" in out) is told


@needs_data
def test_reads_and_scales_the_data():
    train_views, train_target, test_views, test_target = tmc.read_views(DATA)
    assert [x.shape[1] for x in train_views] == [240, 76, 216, 47, 64, 6]
    assert len(train_target) == 1600 and len(test_target) == 400
    assert train_target.unique().tolist() == list(range(10))
    assert all(x.min() == 0 and x.max() == 1 for x in (*train_views, *test_views))


@needs_data
def test_training_takes_the_published_path():
    assert_trains_as_published(tmc.read_views(DATA, torch.float64), epochs=4, learning_rate=3e-3, annealing=3)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("learning_rate", "right"), [(3e-4, 392), (3e-3, 393)])
def test_full_training_gives_the_published_formulas_answers(learning_rate, right):
    """All 400 test images answered alike after 500 epochs; ``right`` of them right, 98.00 and 98.25 %.

    These three seeds ended with the same number; one image (0.25 %) is left to the rounding of other machines.
    98.25 % is also what others report of the published code at 0.003.
    """
    data = tmc.read_views(DATA, torch.float64)
    counts = []
    for seed in (1, 2, 3):
        ours, published = (
            trained(data, loss, seed, epochs=500, learning_rate=learning_rate)[1].argmax(-1)
            for loss in (tmc.TrustedMultiView.loss, published_loss)
        )
        assert torch.equal(ours, published)
        counts.append((ours == data[3]).sum().item())
    assert all(abs(count - right) <= 1 for count in counts), counts
