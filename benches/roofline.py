"""The roofline: what memory bandwidth and matrix rate allow, measured, and where measured points lie below it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from timing import time_interleaved

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "bare product": "#8c8c8c",
    "pairwise": "#8172b3",
    "eager": "#dd8452",
    "compiled": "#55a868",
    "compiled, chunked": "#64b5cd",
    "reference": "#ccb974",
    "blocked": "#4c72b0",
    "F.linear_cross_entropy": "#da8bc3",
    "F.linear_cross_entropy, chunked": "#8c564b",
    "cut-cross-entropy": "#bcbd22",
    "Liger": "#17becf",
    "triton": "#c44e52",
    "triton, tiles": "#c44e52",
    "triton, chunks": "#937860",
}


def measure_ceilings(device: str, dtype: torch.dtype, tiny: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of a large matrix product."""
    where = "cuda" if device == "cuda" else "cpu"
    side = 64 if tiny else 8192 if device == "cuda" else 2048
    numbers = 2**16 if tiny else 2**28 if device == "cuda" else 2**26
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(numbers, device=where)
    copy = torch.empty_like(source)
    calls = {"matrix": lambda: (torch.mm(a, b, out=out),), "copy": lambda: (copy.copy_(source),)}
    times = time_interleaved(calls, device, 0.05 if tiny else 1.0)
    return {
        "bytes_per_s": 2 * 4 * numbers / (min(times["copy"]) / 1e3),
        "flops_per_s": 2 * side**3 / (min(times["matrix"]) / 1e3),
    }


def least_seconds(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """What the products and the bytes of a row take at least, by the ceilings."""
    return max(row["flops"] / ceilings["flops_per_s"], row["bytes"] / ceilings["bytes_per_s"])


def clusters(places: Iterable[tuple[str, float]], apart: float = 1.3) -> list[tuple[list[str], float]]:
    """Names whose places are too close to be written side by side, together at the mean of their places."""
    found: list[list[tuple[str, float]]] = []
    for name, place in sorted(set(places), key=lambda each: each[1]):
        if found and place < apart * found[-1][0][1]:
            found[-1].append((name, place))
        else:
            found.append([(name, place)])
    return [(sorted({name for name, _ in each}), sum(x for _, x in each) / len(each)) for each in found]


def plot(rows: list[dict[str, Any]], ceilings: dict[str, float], title: str, path: Path) -> None:
    """Operations a second of the products over operations a byte that must move; the ceilings above them."""
    rows = [row for row in rows if row["ms"]]
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    bandwidth, rate = ceilings["bytes_per_s"], ceilings["flops_per_s"]
    knee = rate / bandwidth
    low, high = min(*intensities, knee) / 3, max(*intensities, knee) * 3
    axis.plot([low, knee, high], [low * bandwidth, rate, rate], "k-", linewidth=1)
    axis.annotate(
        f"matrix product {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s",
        (high, rate), textcoords="offset points", xytext=(0, 5), ha="right", fontsize=8,
    )  # fmt: skip
    seen: set[str] = set()
    for row, intensity in zip(rows, intensities, strict=True):
        name = row["way"]
        axis.plot(
            intensity, row["flops"] / (row["median"] / 1e3),
            linestyle="none", marker="^" if "gradients" in row["operation"] else "o", markersize=6,
            color=COLOURS.get(name, "black"), markerfacecolor="none" if name.startswith("triton,") else None,
            label=None if name in seen else name,
        )  # fmt: skip
        seen.add(name)
    for names, intensity in clusters((row["shape"], i) for row, i in zip(rows, intensities, strict=True)):
        axis.annotate("\n".join(names), (intensity, 0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", ha="center", va="bottom", fontsize=7)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(low, high), title=title)
    axis.set_ylim(bottom=axis.get_ylim()[0] / 3)  # room for the shapes' names
    axis.set_xlabel("operations of the products for each byte of inputs, outputs and gradients")
    axis.set_ylabel("operations a second (circle: forward, triangle: with gradients)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)
