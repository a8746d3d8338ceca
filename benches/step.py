"""One training step and one evaluation batch: CDC, MaPLe and CoOp of this library against the published way.

    python benches/step.py --classes 50 100 --memory 14 --repeats 1 --out benches/results/step/cpu
    python benches/step.py --classes 1000 --methods CDC --templates 4 --ways ours --out runs/step
    python benches/step.py --device cuda --classes 50 100 1000 --batch 4 32 --memory 70 --out benches/results/step/h100

ViT-B/16 geometry with random weights, ImageNet's class names, n = 2, J = 9. Before anything is timed, losses and
gradients of both ways, ours with all classes at once and in two pieces, are compared on the fewest classes and images
asked for (100 and 4 at most, and only as many as fit `--memory`); the largest difference is told above the table. Then
each step is measured in a process of its own: peak memory is what the first step adds to a process that holds CLIP,
prompts and images; time the median of `--repeats` further steps, stage by stage (a first step that takes longer than a
minute is not repeated: it is the time, and the table says "first step").
"published" is benches/published.py: 77 tokens, a prefix for every class, one pass of both towers a template, pairwise
K x K fusion (of CDC, whose code was not at hand, our reading). Images come as ready-made views, class names as tokens;
making them is not timed.

A step that would hold more than `--memory` GB (estimated from what it keeps for the backward pass) encodes its classes
some at a time; the table says what all at once would hold. Ours by `class_chunk`, which pays for another forward pass.
The published way is not made to pay: its text tower's forward and backward pass run piece by piece with a stand-in for
the loss's gradient. Where the image tower alone is too much, the step is left out, and the table says so.

Evaluation classifies `--evaluate` images with text features at hand, all methods in turn, round after round; the
quotient is the median over rounds.

Finished rows are kept in results.jsonl, so the script goes on where it stopped, as long as device, threads, torch,
code and settings are the same; what was left out is tried again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import facts
import matplotlib
import published
import timing
import torch
import torch.nn.functional as F
from imagenet_names import imagenet_names
from torch import Tensor

from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.methods import CDC, CoOp, MaPLe, Method, ZeroShot
from cdc_models.rows import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ("text tower", "image tower", "loss", "optimiser")
WAYS = ("published", "ours")
#: Seconds of a first step from which on it is not repeated.
SLOW = 60
#: Numbers that a block keeps for the backward pass, for each token and unit of width (measured: 13 to 19).
KEPT = 19
#: A piece of fewer classes would waste time.
FEWEST = 10
#: The most classes and images on which the ways are compared.
COMPARED, IMAGES = 100, 4
#: Largest relative difference of a loss, and of a gradient (Euclidean norms), that counts as rounding in float32.
LOSS_OFF, GRADIENT_OFF = 1e-5, 1e-4
#: Tokens of a class behind the shared prefix; ImageNet's have 4.2 on average, ours pads and repeats some.
OWN_TOKENS = 6


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
PLAIN = "zero-shot, open_clip's own"


def build(case: Case, backbone: ClipBackbone, classes: int) -> Method:
    names = imagenet_names(classes)
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
    case: Case,
    model: Method,
    images: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer | None,
    piece: int | None = None,
) -> tuple[dict[str, float], float]:
    """Seconds of each stage, forward and backward, of one training step, and its loss.

    `piece`: the published way's text tower runs so many classes at a time, with a stand-in for their gradient.
    """

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    make_text, make_image, objective = forward(case, model, images)
    model.zero_grad(set_to_none=True)
    ticks = [now()]
    text = make_text() if piece is None else published.text_in_pieces(model, piece)
    ticks.append(now())
    image = make_image()
    ticks.append(now())
    # The loss's gradients stop at the features, so that each tower's backward pass can be timed by itself.
    text_leaf = text.detach().requires_grad_()
    image_leaf = image.detach().requires_grad_(image.requires_grad)
    loss = objective(image_leaf, text_leaf, targets)
    loss.backward()
    ticks.append(now())
    if piece is None:
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


def assert_parity(case: Case, backbone: ClipBackbone, classes: int, batch: int) -> float | None:
    """Largest relative difference of a gradient between the ways, ours also in two pieces; loud if it is no rounding.

    None where the published way's gradients are not finite: products of the evidence of many templates overflow.
    """
    model = build(case, backbone, classes)
    images, targets = inputs(case, backbone, classes, batch)

    def result(way: str, chunk: int | None) -> tuple[float, dict[str, Tensor]]:
        model.class_chunk = chunk
        _, loss = step(Case(case.method, case.templates, way), model, images, targets, None)
        return loss, {n: p.grad.clone() for n, p in model.learned_parameters().items() if p.grad is not None}

    loss, gradients = result("published", None)
    off = []
    for chunk in (None, -(-classes // 2)):
        own_loss, own = result("ours", chunk)
        assert math.isfinite(own_loss), f"{case}: our loss is {own_loss}"
        assert abs(loss - own_loss) <= LOSS_OFF * abs(own_loss), f"{case}: losses {loss} and {own_loss}"
        assert gradients.keys() == own.keys() == model.learned_parameters().keys()
        assert all(g.isfinite().all() for g in own.values()), f"{case}: our gradients are not finite"
        off += [float((own[n] - g).norm() / g.norm()) for n, g in gradients.items()]
    if not all(g.isfinite().all() for g in gradients.values()):
        return None
    assert max(off) < GRADIENT_OFF, f"{case}: a gradient is off by {max(off):.1e}"
    return max(off)


def kept_bytes(case: Case, backbone: ClipBackbone, batch: int) -> tuple[int, int]:
    """About what a text pass keeps of a class for its backward pass, and what all image passes keep of all images."""
    tokens = backbone.context_length if case.way == "published" else OWN_TOKENS * case.templates
    text = tokens * KEPT * 4 * backbone.text_width * backbone.text_depth
    patches = len(backbone.clip.visual.positional_embedding) + 2
    prompted = 0 if case.method == "CoOp" else batch * case.templates * patches
    return text, prompted * KEPT * 4 * backbone.image_width * backbone.image_depth


def measure(case: Case, device: str, classes: int, batch: int, repeats: int, limit: float, name: str) -> dict[str, Any]:
    """Peak memory and seconds of each stage of one case in this process; or why it is left out."""
    backbone = load_backbone(device, name)
    text, image = kept_bytes(case, backbone, batch)
    whole, room = text * classes * (case.templates if case.way == "published" else 1), limit * 1e9 - image
    if room < FEWEST * text:
        least = (image + FEWEST * text) / 1e9
        return {"left out": f"would hold {least:.0f} GB with {FEWEST} classes at a time, --memory is {limit:g}"}
    piece = None if whole <= room else min(classes, int(room // text))
    model = build(case, backbone, classes)
    if isinstance(model, CDC):
        model.anchor  # noqa: B018  # made once, before training
    if case.way == "ours":
        model.class_chunk = piece
    else:
        published.prepare(model)
    optimizer = torch.optim.SGD(model.parameter_groups(5e-4), lr=1e-5, momentum=0.9)
    given = (
        case,
        model,
        *inputs(case, backbone, classes, batch),
        optimizer,
        piece if case.way == "published" else None,
    )
    (first, _), peak = facts.with_peak(lambda: step(*given), device)
    once = sum(first.values()) > SLOW
    taken = [first] if once else [step(*given)[0] for _ in range(repeats)]
    seconds = {stage: median(each[stage] for each in taken) for stage in STAGES}
    return {"seconds": seconds, "first": once, "memory": peak, "piece": piece, "at once": whole + image}


def evaluation(device: str, classes: int, batch: int, repeats: int, name: str) -> dict[str, Any]:
    """Seconds to classify one batch, text features cached: image tower, fusion, prediction; and of plain CLIP's."""
    backbone = load_backbone(device, name)
    names = imagenet_names(classes)
    images, _ = inputs(CASES[0], backbone, classes, batch)
    zero_shot = ZeroShot(backbone, names)
    text = F.normalize(zero_shot.cached_text_features()[0], dim=-1)

    @torch.no_grad()
    def open_clips_own() -> Tensor:
        image = backbone.clip.encode_image(images, normalize=True)
        return (backbone.scale * image @ text.T).softmax(-1)

    late = backbone.image_depth - backbone.image_depth // 4
    models: dict[str, Method] = {
        "ZeroShot": zero_shot,
        "CoOp": CoOp(backbone, names),
        "MaPLe": MaPLe(backbone, names),
        "CDC, M = 4, text prompts only": CDC(backbone, names, image_prompts=False),
        f"CDC, M = 4, image prompts from block {late}": CDC(backbone, names, image_start=late),
        "CDC, M = 4": CDC(backbone, names),
    }
    calls = {PLAIN: open_clips_own} | {
        label: lambda model=model: model.predict(images).prob for label, model in models.items()
    }
    taken = timing.time_interleaved({n: lambda f=f: (f(),) for n, f in calls.items()}, device, 0, max(3, repeats))
    return {
        "seconds": {label: median(ms) / 1e3 for label, ms in taken.items()},
        "of plain": {label: timing.ratios(ms, taken[PLAIN]) for label, ms in taken.items()},
    }


def load_backbone(device: str, name: str = "ViT-B-16-quickgelu") -> ClipBackbone:
    torch.manual_seed(0)
    return load_clip(name, device=device)


def heading(row: dict[str, Any]) -> str:
    return f"K = {row['classes']} classes, batch {row['batch']}: {facts.told(row)}\n"


def parity_line(row: dict[str, Any]) -> str:
    """What the comparison before all timing found."""
    found = ", ".join(
        f"{label} {'not comparable (the published way overflows)' if off is None else f'{off:.0e}'} ({classes} classes)"
        for label, (off, classes) in row["differences"].items()
    )
    return f"Largest relative difference of a gradient between the ways (at most {GRADIENT_OFF:.0e}): {found}."


def step_table(rows: list[dict[str, Any]]) -> str:
    """The steps of one size."""
    totals = {row["label"]: sum(row["seconds"].values()) for row in rows if "seconds" in row}
    lines = [
        heading(rows[0]),
        "| step | " + " | ".join(STAGES) + " | total s | of MaPLe, published | peak MB |",
        "| --- |" + " ---: |" * (len(STAGES) + 3),
    ]
    for row in rows:
        label = row["label"]
        if label not in totals:
            lines.append(f"| {label} | left out: {row['left out']} |" + " |" * (len(STAGES) + 2))
            continue
        figures = [f"{row['seconds'][stage]:.3f}" for stage in STAGES] + [f"{totals[label]:.3f}"]
        figures.append(f"{totals[label] / totals[BASELINE]:.2f}" if BASELINE in totals else "")
        figures.append(f"{'at least ' if row['memory']['at_least'] else ''}{row['memory']['bytes'] / 1e6:.0f}")
        how = "" if row["piece"] is None else f", {row['piece']} classes at a time (all: {row['at once'] / 1e9:.0f} GB)"
        how += ", first step" if row["first"] else ""
        lines.append(f"| {label}{how} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def evaluation_table(row: dict[str, Any]) -> str:
    lines = [heading(row), "| evaluation of one batch | seconds | of plain CLIP |", "| --- | ---: | ---: |"]
    lines += [f"| {label} | {took:.3f} | {row['of plain'][label]:.2f} |" for label, took in row["seconds"].items()]
    return "\n".join(lines)


def plot(sizes: list[list[dict[str, Any]]], path: Path) -> None:
    """Stacked bars: where the time of a step goes."""
    figure, axes = plt.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.6), squeeze=False, layout="constrained")
    for axis, rows in zip(axes[0], sizes, strict=True):
        steps = [row for row in rows if "seconds" in row][::-1]
        labels = [row["label"] for row in steps]
        left = [0.0] * len(labels)
        for stage, colour in zip(STAGES, ("#4c72b0", "#dd8452", "#55a868", "#8c8c8c"), strict=True):
            width = [row["seconds"][stage] for row in steps]
            axis.barh(labels, width, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for row in steps:
            if row["label"] == BASELINE:
                axis.axvline(sum(row["seconds"].values()), color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{rows[0]['classes']} classes, batch {rows[0]['batch']}")
        axis.set_xlabel("seconds a step (dotted: MaPLe, published)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def chosen(methods: list[str], templates: list[int], ways: list[str]) -> list[Case]:
    """The cases asked for."""
    return [
        case
        for case in CASES
        if case.method in methods and case.way in ways and (case.method != "CDC" or case.templates in templates)
    ]


def compare(cases: list[list[Any]], device: str, classes: int, batch: int, limit: float, name: str) -> dict[str, Any]:
    """What `assert_parity` finds of methods with M templates, and on how many classes."""
    backbone, found = load_backbone(device, name), {}
    for method, templates in cases:
        case = Case(method, templates, "published")
        text, image = kept_bytes(case, backbone, batch)
        fit = int((limit * 1e9 - image) // (text * templates))
        count = max(2, min(classes, fit, COMPARED))
        found[case.label.removesuffix(", published")] = assert_parity(case, backbone, count, batch), count
    return {"differences": found}


def only(what: str, *arguments: Any) -> dict[str, Any]:
    """What a process of its own does."""
    if what == "parity":
        return compare(*arguments)
    if what == "evaluation":
        return evaluation(*arguments)
    method, templates, way, *rest = arguments
    return measure(Case(method, templates, way), *rest)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--classes", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--evaluate", type=int, default=32, help="images in a batch of evaluation; 0: none")
    parser.add_argument("--methods", nargs="+", choices=("CoOp", "MaPLe", "CDC"), default=["CoOp", "MaPLe", "CDC"])
    parser.add_argument("--templates", type=int, nargs="+", default=[1, 2, 4, 8], help="of CDC")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory", type=float, default=10, help="GB that a step may hold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.only:
        print(json.dumps(only(*json.loads(given.only))))
        return
    results = Rows(given.out / "results.jsonl")

    def row(what: str, label: str, classes: int, batch: int, settings: tuple[Any, ...]) -> dict[str, Any]:
        """A row from results.jsonl, or measured now by what `only` does with the settings, and added."""
        about = {"what": what, "label": label, "classes": classes, "batch": batch}
        key = facts.key(given.device, **about, settings=settings)
        if key not in results.rows or "left out" in results.rows[key]:
            found = facts.in_a_process_of_its_own(__file__, "--only", [what, *settings])
            results.add({"key": key, **about, **found, **facts.facts(given.device)})
            print(f"{what} K = {classes}, batch {batch}, {label}: {found}", flush=True)
        return results.rows[key]

    cases = chosen(given.methods, given.templates, given.ways)
    smallest = min(given.classes), min(*given.batch, IMAGES)
    pairs = list(dict.fromkeys((case.method, case.templates) for case in cases))
    compared = row("parity", "all", *smallest, (pairs, given.device, *smallest, given.memory, given.backbone))
    sizes = []
    for batch in given.batch:
        for classes in given.classes:
            size = (given.device, classes, batch, given.repeats, given.memory, given.backbone)
            each = [
                row("step", case.label, classes, batch, (case.method, case.templates, case.way, *size))
                for case in cases
            ]
            sizes.append(each)
    evaluations = [
        row(
            "evaluation",
            "evaluation",
            classes,
            given.evaluate,
            (given.device, classes, given.evaluate, given.repeats, given.backbone),
        )
        for classes in (given.classes if given.evaluate else [])
    ]
    tables = [parity_line(compared), *map(step_table, sizes), *map(evaluation_table, evaluations)]
    (given.out / "table.md").write_text("\n\n".join(tables) + "\n")
    plot(sizes, given.out / "steps.png")


if __name__ == "__main__":
    main()
