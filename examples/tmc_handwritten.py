"""Trusted Multi-View Classification from parts of cdc_ops, on handwritten digits seen through six kinds of features.

Every view has a linear layer whose softplus gives evidence; Dempster's rule fuses the six opinions; the loss is the
evidential cross-entropy of each view and of the fusion, with a KL term annealed in over 50 epochs. This is
the model and the training of Han, Zhang, Fu, Zhou, "Trusted Multi-View Classification", ICLR 2021, which
reports 98.51 +- 0.15 % on this data. Here every seed gives 98.00 % (392 of 400 test images; the standard error of
such a figure is 0.6), and so do the published formulas, trained from the same weights on the same batches.

    python examples/tmc_handwritten.py --data handwritten_6views.mat --seeds 1 2 3 4 5

Needs scipy to read the data: UCI "Multiple Features" as a .mat file with x1_train .. x6_test, gt_train, gt_test.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from cdc_ops import EvidenceFusion, Opinion, dirichlet_cross_entropy, evidence_from_logits

BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data" / "handwritten_6views.mat"


class TrustedMultiView(nn.Module):
    """One evidential linear classifier for each view, fused by Dempster's rule."""

    def __init__(self, sizes: list[int], classes: int) -> None:
        super().__init__()
        self.views = nn.ModuleList(nn.Linear(size, classes) for size in sizes)
        self.fuse = EvidenceFusion("dempster", dim=1)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Evidence [B, V, K] of each view."""
        logits = [layer(x) for layer, x in zip(self.views, views, strict=True)]
        return evidence_from_logits(torch.stack(logits, dim=1), "softplus")

    def loss(self, views: list[Tensor], target: Tensor, kl_weight: float) -> Tensor:
        """Sum of the losses of all views and of the fusion."""
        evidence = self(views)
        opinions = torch.cat([evidence, self.fuse(evidence).unsqueeze(1)], dim=1)
        targets = target.unsqueeze(1).expand(opinions.shape[:2])
        return dirichlet_cross_entropy(opinions, targets, kl_weight=kl_weight, reduction="none").sum(1).mean()

    @torch.no_grad()
    def predict(self, views: list[Tensor]) -> Opinion:
        """The fused opinion."""
        return Opinion.from_evidence(self.fuse(self(views)))


def read_views(path: Path) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Training views and labels, test views and labels; each split scaled to [0, 1] by feature, as published."""
    from scipy.io import loadmat

    data = loadmat(path)

    def split(name: str) -> tuple[list[Tensor], Tensor]:
        views = [torch.from_numpy(data[f"x{v}_{name}"].astype("float32")) for v in range(1, 7)]
        labels = torch.from_numpy(data[f"gt_{name}"].astype("int64")).flatten()
        return [scale_to_unit(x) for x in views], labels - labels.min()

    return *split("train"), *split("test")


def scale_to_unit(x: Tensor) -> Tensor:
    """Each column to [0, 1]; a constant column to 0."""
    low, high = x.amin(0), x.amax(0)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def train(path: Path, seed: int, epochs: int = 500) -> float:
    """Train with one seed; returns the test accuracy in percent."""
    train_views, train_target, test_views, test_target = read_views(path)
    torch.manual_seed(seed)
    model = TrustedMultiView([x.shape[1] for x in train_views], int(train_target.max()) + 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-5)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(train_target)).split(200):
            loss = model.loss([x[batch] for x in train_views], train_target[batch], min(1.0, epoch / 50))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    predicted = model.predict(test_views).prob.argmax(-1)
    return 100 * (predicted == test_target).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=BESIDE_THE_CHECKOUT, help="handwritten_6views.mat")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=500)
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"no such file: {options.data}; give the data with --data")
    accuracies = []
    for seed in options.seeds:
        accuracies.append(train(options.data, seed, options.epochs))
        print(f"seed {seed}: {accuracies[-1]:.2f} %", flush=True)
    spread = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    print(f"mean: {statistics.mean(accuracies):.2f}{spread} % (published: 98.51 +- 0.15 %)")


if __name__ == "__main__":
    main()
