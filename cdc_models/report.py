"""Tables and pictures of a base-to-new comparison."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from cdc_models.console_table import ConsoleTable
from cdc_models.experiment import FIGURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "paired_difference",
    "plot_bars",
    "plot_coverage",
    "plot_reliability",
    "plot_sheet",
    "summarise",
    "tables",
    "write_comparison",
]

# Student's t at 97.5 % for 1 to 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# Okabe and Ito's colour-blind safe palette.
COLOURS = ("#999999", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#000000")


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean by Student's t; nan for a single value."""
    if len(values) < 2:
        return math.nan
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return t * stdev(values) / math.sqrt(len(values))


def by_split(rows: Sequence[dict[str, Any]], figure: str) -> dict[int, float]:
    """Mean of a figure over the seeds of each class split."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row["run"]["split"]].append(row[figure])
    return {split: fmean(v) for split, v in sorted(values.items())}


def paired_difference(
    rows: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], figure: str
) -> tuple[float, float]:
    """Mean difference of a figure, paired by class split, and half its 95 % interval.

    Seeds of one split share their classes and test images, so only splits count as independent.

    Raises:
        ValueError: if the two were not run on the same splits.
    """
    ours, theirs = by_split(rows, figure), by_split(reference, figure)
    if ours.keys() != theirs.keys():
        raise ValueError(f"rows, reference: expected the same splits, got {sorted(ours)} and {sorted(theirs)}")
    differences = [ours[s] - theirs[s] for s in ours]
    return fmean(differences), half_width(differences)


def summarise(rows: Sequence[dict[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Per label: means over runs, spread over runs, and H against a reference label, paired by split."""
    labels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        labels[row["label"]].append(row)
    summary = {}
    for label, own in labels.items():
        figures: dict[str, Any] = {name: fmean(r[name] for r in own) for name in FIGURES}
        figures["ece_base_uncalibrated"] = fmean(r["uncalibrated"]["ece_base"] for r in own)
        for name in ("base", "new", "H"):
            figures[f"{name}_std"] = stdev([r[name] for r in own]) if len(own) > 1 else None
        figures["runs"], figures["splits"] = len(own), len({r["run"]["split"] for r in own})
        if reference in labels and label != reference:
            figures["H_gain"], half = paired_difference(own, labels[reference], "H")
            figures["H_gain_half_width"] = None if math.isnan(half) else half  # JSON has no nan
        summary[label] = figures
    return summary


def _percent(value: float, spread: float | None = None) -> str:
    text = f"{100 * value:.1f}"
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def tables(summary: dict[str, dict[str, Any]], reference: str, title: str) -> tuple[RenderableType, str]:
    """The same table for a terminal and in Markdown."""
    header = [
        "method",
        "base",
        "new",
        "H",
        f"H − {reference}",
        "ECE raw",
        "ECE fitted",
        "AURC prob.",
        "AURC unc.",
        "AUROC prob.",
        "AUROC unc.",
        "train s",
    ]
    body = []
    for label, s in summary.items():
        gain = "" if "H_gain" not in s else f"{100 * s['H_gain']:+.1f}"
        if gain and s["H_gain_half_width"] is not None:
            gain += f" ± {100 * s['H_gain_half_width']:.1f}"
        body.append(
            [
                label,
                _percent(s["base"], s["base_std"]),
                _percent(s["new"], s["new_std"]),
                _percent(s["H"], s["H_std"]),
                gain,
                _percent(s["ece_base_uncalibrated"]),
                _percent(s["ece_base"]),
                _percent(s["aurc_base"]),
                _percent(s["aurc_uncertainty_base"]),
                _percent(s["unknown_auroc_prob"]),
                _percent(s["unknown_auroc"]),
                f"{s['seconds_train']:.1f}",
            ]
        )
    rule = ["---", *["---:"] * (len(header) - 1)]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])
    return ConsoleTable(title, header, body), markdown


def write_comparison(
    rows: Sequence[dict[str, Any]], title: str, folder: Path, facts: dict[str, Any]
) -> tuple[dict[str, Any], RenderableType, list[Path]]:
    """Write summary.json, table.md and the pictures of finished runs.

    Args:
        rows: of `compare`; the first one's label is what the others' H is set against.
        folder: must exist.
        facts: further entries of the summary.

    Returns:
        The summary, the table for a terminal, and the pictures.
    """
    reference = rows[0]["label"]
    summary = {"title": title, **facts, "rows": summarise(rows, reference)}
    table, text = tables(summary["rows"], reference, title)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    (folder / "table.md").write_text(text + "\n")
    pictures = [folder / "accuracy.png", folder / "reliability.png", folder / "coverage.png"]
    plot_bars(summary["rows"], pictures[0], title)
    plot_reliability(rows, pictures[1])
    plot_coverage(rows, pictures[2])
    return summary, table, pictures


# -- pictures -------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Axes]]:
    # Agg without touching the caller's backend: a Figure of its own, never pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def plot_bars(summary: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Base, new and H of every label as bars, with the spread over runs."""
    figure, (ax,) = _figure(9, 4.2)
    labels = list(summary)
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        s = summary[label]
        heights = [100 * s[name] for name in ("base", "new", "H")]
        errors = [100 * (s[f"{name}_std"] or 0) for name in ("base", "new", "H")]
        at = [x + (i - (len(labels) - 1) / 2) * width for x in range(3)]
        bars = ax.bar(at, heights, width * 0.92, yerr=errors, capsize=2, color=COLOURS[i % len(COLOURS)], label=label)
        size = 7 if len(labels) <= 5 else 5.5
        ax.bar_label(bars, fmt="%.1f", fontsize=size, padding=2)
    ax.set_ylim(0, None)
    ax.margins(y=0.12)
    ax.set_xticks(range(3), ["base classes", "new classes", "harmonic mean"])
    ax.set_ylabel("accuracy (%)")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, ncols=min(len(labels), 5), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path)


def _of_label(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    labels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        labels[row["label"]].append(row)
    return labels


def plot_reliability(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against confidence on base and new classes, all runs pooled."""
    figure, axes = _figure(9, 4.7, columns=2)  # high enough for what stands around two squares
    for ax, half in zip(axes, ("base", "new"), strict=True):
        ax.plot([0, 1], [0, 1], color="#bbbbbb", linestyle="--", linewidth=1)
        for i, (label, own) in enumerate(_of_label(rows).items()):
            pooled = [
                [sum(column) for column in zip(*(r["curves"][half][name] for r in own), strict=True)]
                for name in ("bin_count", "bin_confidence", "bin_correct")
            ]
            shown = [(c / n, k / n) for n, c, k in zip(*pooled, strict=True) if n >= 20]
            ax.plot(*zip(*shown, strict=True), marker="o", ms=3, color=COLOURS[i % len(COLOURS)], label=label)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="stated probability", ylabel="part that was right", aspect="equal")
        ax.set_title(f"{half} classes", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path)


def plot_coverage(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of what is still answered when the least probable answers are refused."""
    figure, axes = _figure(9, 4, columns=2)
    for ax, half in zip(axes, ("base", "new"), strict=True):
        for i, (label, own) in enumerate(_of_label(rows).items()):
            runs = [r["curves"][half]["accuracy_at_coverage"] for r in own]
            mean = [100 * fmean(column) for column in zip(*runs, strict=True)]
            coverage = [100 * (j + 1) / len(mean) for j in range(len(mean))]
            ax.plot(coverage, mean, color=COLOURS[i % len(COLOURS)], label=label)
        ax.set(xlim=(100, 5), xlabel="images answered (%), least probable refused first", ylabel="accuracy (%)")
        ax.set_title(f"{half} classes", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path)


def plot_sheet(examples: Sequence[dict[str, Any]], path: Path, columns: int = 4) -> None:
    """Images with what the method says about them.

    Args:
        examples: each {"image": uint8 [3, H, W], "truth": str, "known": bool, "predicted": str, "belief": float,
            "uncertainty": float, "templates": [(class name, probability), ...]}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(examples) / columns)
    figure = Figure(figsize=(2.9 * columns, 3.15 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, example in zip(figure.subplots(rows, columns, squeeze=False).flat, examples, strict=False):
        ax.imshow(example["image"].permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        right = example["known"] and example["predicted"] == example["truth"]
        colour = "#009E73" if right else "#D55E00"
        for spine in ax.spines.values():
            spine.set(color=colour, linewidth=2.5)
        kind = "" if example["known"] else " (unknown class)"
        ax.set_title(f"{example['truth']}{kind}", fontsize=8, color="#333333")
        says = (
            f"says: {example['predicted']}\nbelief {example['belief']:.2f}   uncertainty {example['uncertainty']:.2f}"
        )
        each = "\n".join(f"t{m + 1}: {name} {p:.2f}" for m, (name, p) in enumerate(example["templates"]))
        ax.set_xlabel(f"{says}\n{each}", fontsize=7, color="#333333", linespacing=1.35)
    for ax in figure.axes[len(examples) :]:
        ax.set_visible(False)
    figure.savefig(path)
