"""One training step and one evaluation batch: CDC, MaPLe and CoOp of this library against the published way.

    python benches/step.py --device cpu --classes 50 100 --batch 4 --out benches/results/step/cpu
    python benches/step.py --device cuda --classes 50 100 1000 --batch 4 32 --out benches/results/step/h100

ViT-B/16 geometry with random weights, ImageNet's class names, n = 2, J = 9. For each size: losses and gradients of
both ways are compared first; then all steps are timed in turn, `--repeats` rounds, and the medians kept; then each step
runs once in a process of its own for its peak memory. "published" is benches/published.py: 77 tokens, a prefix for
every class, one pass of both towers a template, pairwise K x K fusion. Images come as ready-made views; making them is
not timed. Finished sizes are kept in results.jsonl, so the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import published
import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from cdc_models import provenance
from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.methods import CDC, CoOp, MaPLe, Method, ZeroShot
from cdc_models.rows import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ("text tower", "image tower", "loss", "optimiser")
WAYS = ("published", "ours")


@dataclass(frozen=True)
class Case:
    """A method with M templates, computed one way."""

    method: str
    templates: int
    way: str

    @property
    def label(self) -> str:
        name = f"CDC, M = {self.templates}" if self.method == "CDC" else self.method
        return f"{name}, {self.way}"


CASES = [Case(name, m, way) for name, m in (("CoOp", 1), ("MaPLe", 1)) for way in WAYS] + [
    Case("CDC", m, way) for m in (1, 2, 4, 8) for way in WAYS
]
BASELINE = Case("MaPLe", 1, "published").label


def build(case: Case, backbone: ClipBackbone, classes: int) -> Method:
    names = IMAGENET_CLASSNAMES[:classes]
    if case.method == "CDC":
        return CDC(backbone, names, n_templates=case.templates, views=None)
    return {"CoOp": CoOp, "MaPLe": MaPLe}[case.method](backbone, names)


def inputs(case: Case, backbone: ClipBackbone, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = (case.templates,) if case.method == "CDC" else ()
    images = torch.randn(batch, *views, 3, *backbone.image_shape, generator=generator)
    return images.to(backbone.device), torch.randint(classes, (batch,), generator=generator).to(backbone.device)


def forward(case: Case, model: Method, images: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Any]:
    """What makes text and image features, and the objective, of this way."""
    if case.way == "ours":
        return model.text_features, lambda: model.image_features(images), model.objective
    return (
        lambda: published.text_features(model),
        lambda: published.image_features(model, images),
        lambda *given: published.objective(model, *given),
    )


def step(
    case: Case, model: Method, images: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, float], float]:
    """Seconds of each stage, forward and backward, of one training step, and its loss."""

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    make_text, make_image, objective = forward(case, model, images)
    model.zero_grad(set_to_none=True)
    ticks = [now()]
    text = make_text()
    ticks.append(now())
    image = make_image()
    ticks.append(now())
    # The loss's gradients stop at the features, so that each tower's backward pass can be timed by itself.
    text_leaf = text.detach().requires_grad_()
    image_leaf = image.detach().requires_grad_(image.requires_grad)
    loss = objective(image_leaf, text_leaf, targets)
    loss.backward()
    ticks.append(now())
    text.backward(text_leaf.grad)
    ticks.append(now())
    if image_leaf.grad is not None:
        image.backward(image_leaf.grad)
    ticks.append(now())
    if optimizer is not None:
        optimizer.step()
    ticks.append(now())
    spans = [b - a for a, b in pairwise(ticks)]
    seconds = (spans[0] + spans[3], spans[1] + spans[4], spans[2], spans[5])
    return dict(zip(STAGES, seconds, strict=True)), loss.item()


def assert_parity(case: Case, backbone: ClipBackbone, classes: int, batch: int) -> float:
    """Largest relative difference of a gradient between the two ways; loud if it is more than rounding."""
    model = build(case, backbone, classes)
    images, targets = inputs(case, backbone, classes, batch)
    results = []
    for way in WAYS:
        _, loss = step(Case(case.method, case.templates, way), model, images, targets, None)
        results.append((loss, {n: p.grad.clone() for n, p in model.learned_parameters().items() if p.grad is not None}))
    (loss, gradients), (own_loss, own_gradients) = results
    assert abs(loss - own_loss) <= 1e-4 * abs(loss), f"{case}: losses {loss} and {own_loss}"
    assert gradients.keys() == own_gradients.keys() == model.learned_parameters().keys()
    worst = max(float((own_gradients[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items())
    assert worst < 2e-3, f"{case}: a gradient differs by {worst:.1e} of its largest entry"
    return worst


def time_steps(cases: list[Case], backbone: ClipBackbone, classes: int, batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds of each stage of each case, all cases in turn."""
    prepared = []
    for case in cases:
        model = build(case, backbone, classes)
        optimizer = torch.optim.SGD(model.parameter_groups(5e-4), lr=1e-5, momentum=0.9)
        prepared.append((case, model, *inputs(case, backbone, classes, batch), optimizer))
    rounds: dict[str, list[dict[str, float]]] = {case.label: [] for case in cases}
    for number in range(repeats + 1):  # the first warms up
        for case, *rest in prepared:
            seconds, _ = step(case, *rest)
            if number:
                rounds[case.label].append(seconds)
            print(f"  round {number}/{repeats}  {case.label}: {sum(seconds.values()):.3f} s", flush=True)
    return {label: {s: median(r[s] for r in taken) for s in STAGES} for label, taken in rounds.items()}


def time_evaluation(backbone: ClipBackbone, classes: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds to classify one batch, text features cached: image tower, fusion, prediction."""
    names = IMAGENET_CLASSNAMES[:classes]
    models: dict[str, Method] = {
        "zero-shot": ZeroShot(backbone, names),
        "CoOp": CoOp(backbone, names),
        "MaPLe": MaPLe(backbone, names),
        "CDC, M = 4, text prompts only": CDC(backbone, names, image_prompts=False),
        "CDC, M = 4": CDC(backbone, names),
    }
    images, _ = inputs(CASES[0], backbone, classes, batch)
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.predict(images).prob.sum().item()
            if number:
                rounds[name].append(time.perf_counter() - started)
    return {name: median(taken) for name, taken in rounds.items()}


def peak_memory(case: Case, device: str, classes: int, batch: int) -> int:
    """Bytes that one step adds to a process that holds backbone and model, measured in a process of its own."""
    arguments = [case.method, str(case.templates), case.way, device, str(classes), str(batch)]
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def print_peak_memory(case: Case, device: str, classes: int, batch: int) -> None:
    backbone = load_backbone(device)
    model = build(case, backbone, classes)
    if isinstance(model, CDC):
        model.anchor  # noqa: B018  # made once, before training
    images, targets = inputs(case, backbone, classes, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # from here on, the peak starts at what is held now
    before = provenance.peak_memory(device)
    step(case, model, images, targets, None)
    print(provenance.peak_memory(device) - before)


def load_backbone(device: str, name: str = "ViT-B-16-quickgelu") -> ClipBackbone:
    torch.manual_seed(0)
    return load_clip(name, device=device)


def table(row: dict[str, Any]) -> str:
    lines = [
        f"K = {row['classes']} classes, batch {row['batch']}",
        "",
        "| step | " + " | ".join(STAGES) + " | total s | of MaPLe, published | peak MB |",
        "| --- |" + " ---: |" * (len(STAGES) + 3),
    ]
    base = sum(row["steps"][BASELINE].values())
    for label, seconds in row["steps"].items():
        total = sum(seconds.values())
        figures = [*(f"{seconds[s]:.3f}" for s in STAGES), f"{total:.3f}", f"{total / base:.2f}"]
        lines.append(f"| {label} | " + " | ".join([*figures, f"{row['memory'][label] / 1e6:.0f}"]) + " |")
    lines += ["", "| evaluation of one batch | seconds | of zero-shot |", "| --- | ---: | ---: |"]
    base = row["evaluation"]["zero-shot"]
    lines += [f"| {name} | {seconds:.3f} | {seconds / base:.2f} |" for name, seconds in row["evaluation"].items()]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars: where the time of a step goes."""
    figure, axes = plt.subplots(1, len(rows), figsize=(6.2 * len(rows), 4.6), squeeze=False, layout="constrained")
    for axis, row in zip(axes[0], rows, strict=True):
        labels = list(row["steps"])[::-1]
        left = [0.0] * len(labels)
        for stage, colour in zip(STAGES, ("#4c72b0", "#dd8452", "#55a868", "#8c8c8c"), strict=True):
            width = [row["steps"][label][stage] for label in labels]
            axis.barh(labels, width, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, width, strict=True)]
        base = sum(row["steps"][BASELINE].values())
        axis.axvline(base, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{row['classes']} classes, batch {row['batch']}")
        axis.set_xlabel("seconds a step (dotted: MaPLe, published)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--memory-of", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        method, templates, way, device, classes, batch = arguments.memory_of
        print_peak_memory(Case(method, int(templates), way), device, int(classes), int(batch))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Rows(arguments.out / "results.jsonl")
    backbone = load_backbone(arguments.device)
    for batch in arguments.batch:
        for classes in arguments.classes:
            key = f"K = {classes}, batch {batch}"
            if key in results.rows:
                continue
            print(key, flush=True)
            worst = max(assert_parity(case, backbone, classes, batch) for case in CASES if case.way == "ours")
            print(f"  loss and gradients of both ways agree (largest relative difference {worst:.1e})", flush=True)
            cuda = arguments.device == "cuda"
            row = {
                "key": key,
                "classes": classes,
                "batch": batch,
                "parity": worst,
                "steps": time_steps(CASES, backbone, classes, batch, arguments.repeats),
                "evaluation": time_evaluation(backbone, classes, batch, arguments.repeats),
                "memory": {case.label: peak_memory(case, arguments.device, classes, batch) for case in CASES},
                "device": torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "command": "python " + " ".join(sys.argv),
            }
            results.add(row)
            print(table(row), flush=True)
    rows = list(results.rows.values())
    (arguments.out / "table.md").write_text("\n\n".join(table(row) for row in rows) + "\n")
    plot(rows, arguments.out / "steps.png")


if __name__ == "__main__":
    main()
