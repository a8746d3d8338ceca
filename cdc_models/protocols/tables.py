"""Means and deviations over seeds, the gap to the published figures, and the same table as text, Markdown and LaTeX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from cdc_models.data import harmonic_mean
from cdc_models.protocols.published_figures import published_figure

__all__ = ["latex", "lines", "markdown", "summarise"]

AVERAGE = "average"

BySeed = dict[int, float]


def summarise(
    protocol: str, rows: Sequence[Mapping[str, Any]], whole: Sequence[str] = (), source: str | None = None
) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of every cell of the table, beside what was published.

    H of a dataset is the harmonic mean of its mean base and mean new accuracy, and so is H of the average, as published
    tables have it; its deviation is that of the seeds' own H. The average over datasets leaves out the source.

    Args:
        protocol: see `plan`.
        rows: of `Runner.run`.
        whole: the datasets of the published average; over others there is no published average.
        source: what was trained on, where the protocol has a source.

    Returns:
        A mapping per cell: dataset ("average" over several), method, shots, figure ("base", "new", "H", "test"; or
        "ECE", "calibrated ECE", as parts of one, of the base or test images), mean, std (None with one seed), seeds,
        and for accuracies, all in percent: published, gap (mean - published), paper; None where none is known.
    """
    accuracy: dict[tuple[str, str, int, str], BySeed] = defaultdict(dict)
    others: dict[tuple[str, str, int, str], BySeed] = defaultdict(dict)
    datasets: list[str] = []
    for row in rows:
        at = (row["dataset"], row["method"], row["shots"])
        accuracy[(*at, row["split"])][row["seed"]] = 100 * row["accuracy"]
        if row["split"] != "new":
            for figure, name in (("ECE", "ece"), ("calibrated ECE", "calibrated_ece")):
                if row[name] is not None:
                    others[(*at, figure)][row["seed"]] = row[name]
        if row["dataset"] not in datasets:
            datasets.append(row["dataset"])
    averaged = [dataset for dataset in datasets if dataset != source]
    if len(averaged) > 1:
        datasets.append(AVERAGE)
        for tests in (accuracy, others):
            _add_average(tests, averaged)
    known = set(whole) <= set(averaged) and len(whole) == len(averaged)
    variants = list(dict.fromkeys((row["method"], row["shots"]) for row in rows))
    of_label = {row["method"]: row["recipe"]["method"] for row in rows}

    table: list[dict[str, Any]] = []
    for dataset in datasets:
        for label, shots in variants:
            at = (dataset, label, shots)
            figures = {name: accuracy[(*at, name)] for name in ("base", "new", "test") if (*at, name) in accuracy}
            means = {name: fmean(values.values()) for name, values in figures.items()}
            if "base" in figures and "new" in figures:
                both = sorted(figures["base"].keys() & figures["new"].keys())
                figures["H"] = {s: harmonic_mean(figures["base"][s], figures["new"][s]) for s in both}
                means["H"] = harmonic_mean(means["base"], means["new"])
            comparable = shots == 16 and label == of_label[label] and (dataset != AVERAGE or known)
            for name, values in figures.items():
                paper = published_figure(protocol, label, dataset, name) if comparable else None
                table.append(
                    {
                        "dataset": dataset,
                        "method": label,
                        "shots": shots,
                        "figure": name,
                        "mean": means[name],
                        **_spread(values),
                        "published": None if paper is None else paper.percent,
                        "gap": None if paper is None else means[name] - paper.percent,
                        "paper": None if paper is None else paper.source,
                    }
                )
            for name in ("ECE", "calibrated ECE"):
                if of_seed := others.get((*at, name)):
                    cell = {"dataset": dataset, "method": label, "shots": shots, "figure": name}
                    table.append({**cell, "mean": fmean(of_seed.values()), **_spread(of_seed)})
    return table


def _spread(values: BySeed) -> dict[str, Any]:
    """Deviation over seeds (n - 1), and the seeds."""
    return {"std": stdev(values.values()) if len(values) > 1 else None, "seeds": sorted(values)}


def _add_average(values: dict[tuple[str, str, int, str], BySeed], datasets: Sequence[str]) -> None:
    """The average over datasets of every figure, seed by seed, where every dataset has the seed."""
    for _, label, shots, name in list(values):
        each = [values.get((dataset, label, shots, name), {}) for dataset in datasets]
        if seeds := sorted(set.intersection(*(set(of_seed) for of_seed in each))):
            values[(AVERAGE, label, shots, name)] = {s: fmean(of_seed[s] for of_seed in each) for s in seeds}


def lines(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of a table: accuracies in percent, deviation, and in brackets the published figure and the gap.

    Example:
        >>> cell = {"dataset": "a", "method": "m", "shots": 16, "figure": "base", "mean": 80.0, "std": 0.5}
        >>> lines([{**cell, "published": 82.0, "gap": -2.0}])
        (['dataset', 'method', 'base'], [['a', 'm', '80.00 ± 0.50 (82.00: -2.00)']])
    """
    shots = list(dict.fromkeys(cell["shots"] for cell in summary))

    def heading(cell: Mapping[str, Any]) -> str:
        return f"{cell['shots']} shots {cell['figure']}" if len(shots) > 1 else str(cell["figure"])

    columns = list(dict.fromkeys(heading(cell) for cell in summary))
    body: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for cell in summary:
        text = f"{cell['mean']:.3f}" if "ECE" in cell["figure"] else f"{cell['mean']:.2f}"
        if cell["std"] is not None:
            text += f" ± {cell['std']:.3f}" if "ECE" in cell["figure"] else f" ± {cell['std']:.2f}"
        if cell.get("published") is not None:
            text += f" ({cell['published']:.2f}: {cell['gap']:+.2f})"
        body[(cell["dataset"], cell["method"])][heading(cell)] = text
    return ["dataset", "method", *columns], [[*at, *(cells.get(c, "") for c in columns)] for at, cells in body.items()]


def note(summary: Sequence[Mapping[str, Any]], backbone: str) -> str:
    """What the table shows, and whose the figures in brackets are."""
    seeds = sorted({seed for cell in summary for seed in cell["seeds"]})
    text = (
        f"Accuracy in %, mean ± deviation over the seeds {', '.join(map(str, seeds))}, with {backbone}. ECE: "
        "calibration error of the base or test images, as trained and with one temperature fitted on validation shots."
    )
    if papers := sorted({cell["paper"] for cell in summary if cell.get("paper")}):
        text += (
            " In brackets: the published figure (ViT-B/16 with OpenAI's weights, 16 shots) and the gap to it. "
            f"Published: {'; '.join(papers)}."
        )
    return text


def markdown(summary: Sequence[Mapping[str, Any]], title: str, backbone: str) -> str:
    """The table in Markdown."""
    head, body = lines(summary)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    table = "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in [head, rule, *body])
    return f"## {title}\n\n{table}\n\n{note(summary, backbone)}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def latex(summary: Sequence[Mapping[str, Any]], title: str, backbone: str) -> str:
    """The table in LaTeX, for the package booktabs."""
    head, body = lines(summary)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_escape, cells)) + r" \\"

    parts = [
        r"\begin{table}",
        rf"\caption{{{_escape(title)}. {_escape(note(summary, backbone))}}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
        r"\toprule",
        line(head),
        r"\midrule",
        *map(line, body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(parts) + "\n"


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(c, c) for c in text)
