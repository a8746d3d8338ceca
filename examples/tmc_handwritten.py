"""Trusted Multi-View Classification from parts of cdc_ops, on handwritten digits seen through six kinds of features.

Every view has a linear layer whose softplus gives evidence; Dempster's rule fuses the six opinions; the loss is the
evidential cross-entropy of each view and of the fusion, with a KL term annealed in over 50 epochs. This is the model
and the training of Han, Zhang, Fu, Zhou, "Trusted Multi-View Classification", ICLR 2021.

    python examples/tmc_handwritten.py --data handwritten_6views.mat --seeds 1 2 3 4 5 6 7 8 9 10

prints the accuracy over seeds beside the published ones: benches/results/tmc/table.md, which also says what differs
(printed for these seeds and the default settings only: of others it is not known to hold).
From the same weights on the same batches the published formulas take the same path to the same answers:
tests/ops/test_tmc_handwritten.py.

Needs scipy to read the data: UCI "Multiple Features" as a .mat file with x1_train .. x6_test, gt_train, gt_test.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import date
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


Data = tuple[list[Tensor], Tensor, list[Tensor], Tensor]
Loss = Callable[[TrustedMultiView, list[Tensor], Tensor, float], Tensor]


def read_views(path: Path, dtype: torch.dtype = torch.float32) -> Data:
    """Training views and labels, test views and labels; each split scaled to [0, 1] by feature, as published."""
    from scipy.io import loadmat

    data = loadmat(path)

    def split(name: str) -> tuple[list[Tensor], Tensor]:
        views = [torch.from_numpy(data[f"x{v}_{name}"].astype("float64")) for v in range(1, 7)]
        labels = torch.from_numpy(data[f"gt_{name}"].astype("int64")).flatten()
        return [scale_to_unit(x).to(dtype) for x in views], labels - labels.min()

    return *split("train"), *split("test")


def scale_to_unit(x: Tensor) -> Tensor:
    """Each column to [0, 1]; a constant column to 0."""
    low, high = x.amin(0), x.amax(0)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def fit(
    model: TrustedMultiView,
    views: list[Tensor],
    target: Tensor,
    *,
    epochs: int = 500,
    learning_rate: float = 3e-4,
    annealing: int = 50,
    batch: int = 200,
    loss: Loss = TrustedMultiView.loss,
) -> list[float]:
    """Train the model as published; returns the mean loss of each epoch.

    The weight of the KL term grows to 1 over ``annealing`` epochs. ``loss`` is for those who doubt ours.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=1e-5)
    losses = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(target)).split(batch):
            value = loss(model, [x[rows] for x in views], target[rows], min(1.0, epoch / annealing))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            total += value.item() * len(rows)
        losses.append(total / len(target))
    return losses


def accuracy(data: Data, seed: int, *, epochs: int, learning_rate: float) -> float:
    """Test accuracy in percent after training with one seed."""
    views, target, test_views, test_target = data
    torch.manual_seed(seed)
    model = TrustedMultiView([x.shape[1] for x in views], int(target.max()) + 1)
    fit(model, views, target, epochs=epochs, learning_rate=learning_rate)
    right = model.predict(test_views).prob.argmax(-1) == test_target
    return 100 * right.double().mean().item()


#: The run that the conclusion below is about.
CONCLUDED = {"seeds": list(range(1, 11)), "epochs": 500, "lr": [3e-4, 3e-3]}
#: 97.75 was measured by us with the published code; the rest is from the paper and from the two repositories' pages.
PUBLISHED = """\
| published code, after 200 epochs | 0.0003 | 97.75 |
| published code, as two ports of it to PaddlePaddle report (jiaohuix/TMC_Paddle, kjf4096/TMC) | 0.003 | 98.25 |
| those two ports themselves | 0.003 | 98.25 and 98.50 |
| the paper | | 98.51 +- 0.15 |\
"""
CONCLUSION = """
What differs: the published script's learning rate is 0.0003. At 0.003 cdc_ops ends where others report the published
code to end, one test image (0.25 %) short of the paper. From the same weights and batches the published formulas
answer every test image as cdc_ops does (tests/ops/test_tmc_handwritten.py): the image is not lost in our
arithmetic; which setting of the paper's runs gives it is not known here.\
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=BESIDE_THE_CHECKOUT, help="handwritten_6views.mat")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 3e-3], help="learning rates")
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"no such file: {options.data}; give the data with --data")
    data = read_views(options.data)
    command = " ".join(["python examples/tmc_handwritten.py", *sys.argv[1:]])
    seeds = " ".join(map(str, options.seeds))
    print("# Trusted Multi-View Classification from cdc_ops parts, six-view handwritten digits\n")
    print(f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, CPU. Made by `{command}`:")
    print(f"{options.epochs} epochs, seeds {seeds}; {len(data[1])} training and {len(data[3])} test images.\n")
    print("| who | learning rate | accuracy, % |\n| --- | ---: | ---: |")
    for lr in options.lr:
        figures = [accuracy(data, seed, epochs=options.epochs, learning_rate=lr) for seed in options.seeds]
        spread = f" +- {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
        print(f"| cdc_ops | {lr:g} | {statistics.mean(figures):.2f}{spread} |", flush=True)
    print(PUBLISHED)
    if all(vars(options)[name] == value for name, value in CONCLUDED.items()):
        print(CONCLUSION)


if __name__ == "__main__":
    main()
