"""What the fused operations are to reach, as far as the report can judge it by its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timing import ratios

KERNELS = ("triton", "triton, tiles", "triton, chunks")
PEERS = ("F.linear_cross_entropy", "F.linear_cross_entropy, chunked", "cut-cross-entropy", "Liger")
COMPILED = ("compiled", "compiled, chunked")


@dataclass(frozen=True)
class Target:
    """The best of ``ours`` against the best of ``others`` in time, peak memory, or memory beyond what is returned."""

    devices: tuple[str, ...]
    shape: str
    operation: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    most: float
    what: str = "time"  # or "peak memory", "memory beyond results"


TARGETS = (
    Target(("cuda",), "S2", "opinion", KERNELS, ("bare product",), 1.3),
    Target(("cuda",), "S1", "opinion", KERNELS, ("eager",), 1 / 6),
    Target(("cuda",), "S1", "opinion", KERNELS, COMPILED, 1 / 2.5),
    Target(("cuda",), "S2", "opinion", KERNELS, ("eager",), 1 / 5),
    Target(("cuda",), "S2", "opinion", KERNELS, COMPILED, 1 / 2),
    Target(("cuda",), "S2", "loss gradients", KERNELS, ("eager",), 1 / 3),
    Target(("cuda",), "S2", "loss gradients", KERNELS, COMPILED, 1 / 1.5),
    Target(("cuda",), "S3", "loss gradients", KERNELS, ("eager",), 1 / 3),
    Target(("cuda",), "S3", "loss gradients", KERNELS, COMPILED, 1 / 1.5),
    Target(("cuda",), "S3", "loss gradients", KERNELS, ("eager",), 1 / 50, "memory beyond results"),
    Target(("cuda",), "S4", "opinion", KERNELS, ("eager",), 1 / 5),
    Target(("cuda",), "S6", "softmax gradients", KERNELS, PEERS, 1),
    Target(("cuda",), "S6", "softmax gradients", KERNELS, PEERS, 1, "memory beyond results"),
    Target(("cpu",), "S1", "opinion", ("blocked",), ("bare product",), 1.25),
    Target(("cpu",), "S1", "opinion", ("blocked",), ("eager",), 1 / 1.4),
    Target(("cpu",), "S1", "opinion", ("blocked",), ("pairwise",), 1 / 100),
    Target(("cpu",), "S1", "opinion", ("blocked",), ("eager",), 1 / 4, "peak memory"),
)


def measure(row: dict[str, Any], what: str) -> float:
    """The figure of a row that is compared."""
    if what == "time":
        return float(row["median"])
    return float(max(1, row["peak"] - (row["kept"] if what == "memory beyond results" else 0)))


def judged(rows: list[dict[str, Any]], device: str) -> list[str]:
    """A Markdown table of the targets of this device that the rows can judge."""
    lines = []
    for target in TARGETS:
        here = {
            r["way"]: r for r in rows if (r["shape"], r["operation"]) == (target.shape, target.operation) and r["ms"]
        }
        ours, others = ([here[name] for name in names if name in here] for names in (target.ours, target.others))
        if device not in target.devices or not ours or not others:
            continue
        mine, theirs = (min(each, key=lambda row: measure(row, target.what)) for each in (ours, others))
        if target.what == "time":
            ratio = ratios(mine["ms"], theirs["ms"])
        else:
            ratio = measure(mine, target.what) / measure(theirs, target.what)
        lines.append(
            f"| {target.shape} {target.operation} | {target.what} of {mine['way']} against {theirs['way']} "
            f"| {ratio:.3g} | {target.most:.3g} | {'met' if ratio <= target.most else '**missed**'} |"
        )
    if not lines:
        return []
    return ["| shape | what | ratio | at most | |", "| --- | --- | ---: | ---: | --- |", *lines]
