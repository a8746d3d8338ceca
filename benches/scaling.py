"""How time and memory of the fused operations grow with images B, prompts M and classes K, against plain PyTorch.

    python benches/scaling.py --device cpu --out benches/results/scaling/cpu
    python benches/scaling.py --device cuda --out benches/results/scaling/h100

From B=256 M=4 K=1000 D=512 one size at a time is changed. Every way is compared with float64 first; all ways of a
point are timed in turn; memory is what a call holds at most beyond what it returns. Points that are measured are kept
in results.jsonl, so the script goes on where it stopped. Plain PyTorch is left out, which the table says, where it
would take more than `--limit` GB.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from facts import code_version, device_name
from report import OUR_TOLERANCE, TOLERANCE, forget_kept_memory
from shapes import Shape, make_inputs
from timing import peak_memory, time_interleaved
from ways import (
    Way,
    bare_product,
    bare_products,
    eager_loss,
    eager_opinion,
    our_loss,
    our_opinion,
    relative_error,
    truth,
)
from ways import with_gradients as gradients_of

from cdc_models.rows import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASE = Shape("base", 256, 4, 1000, 512)
SWEEPS = {"B": (16, 64, 256, 1024, 4096), "M": (1, 2, 4, 8, 16), "K": (100, 300, 1000, 3000, 10_000)}
NAMES = {"B": "images", "M": "prompts", "K": "classes"}
OPERATIONS = ("opinion", "loss gradients")
#: Temporaries of [B, M, K] that plain PyTorch holds at once, by operation; for the limit only.
TEMPORARIES = {"opinion": 4, "loss gradients": 8}


def ways_of(operation: str, device: str) -> dict[str, Way]:
    """The floor, plain PyTorch, and our backend of this device."""
    backend = "triton" if device == "cuda" else "blocked"
    if operation == "opinion":
        return {"bare product": bare_product, "eager": eager_opinion, backend: our_opinion(backend)}
    ours = gradients_of(our_loss(backend))
    return {"bare product": bare_products, "eager": gradients_of(eager_loss), backend: ours}


def measure(shape: Shape, operation: str, device: str, seconds: float, limit: float) -> dict[str, dict[str, Any]]:
    """Milliseconds, megabytes and error of each way."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = ways_of(operation, device)
    if TEMPORARIES[operation] * shape.B * shape.M * shape.K * 4 > limit * 1e9:
        del found["eager"]
    inputs = make_inputs(shape, operation, device, dtype)
    exact = truth(shape, operation, inputs)
    errors = {}
    for name, way in found.items():
        error = relative_error(way(*inputs), exact) if name != "bare product" else 0.0
        tolerance = (TOLERANCE if name == "eager" else OUR_TOLERANCE)[dtype]
        if not error <= tolerance:
            raise SystemExit(f"{shape.title}, {operation}: {name} is off by {error:.1e}, more than {tolerance:.0e}")
        errors[name] = error
    del exact
    calls = {name: partial(way, *inputs) for name, way in found.items()}
    times = time_interleaved(calls, device, seconds, rounds=3)
    forget_kept_memory()
    memory = peak_memory(calls, device)
    return {
        name: {"ms": median(ms), "megabytes": (memory[name][0] - memory[name][1]) / 1e6, "error": errors[name]}
        for name, ms in times.items()
    }


def points() -> list[tuple[str, Shape]]:
    """Every sweep's shapes."""
    return [
        (letter, Shape("base", **{**{n: getattr(BASE, n) for n in "BMKD"}, letter: value}))
        for letter, values in SWEEPS.items()
        for value in values
    ]


def table(rows: list[dict[str, Any]], heading: str) -> str:
    lines = [heading, ""]
    ours = next(way for way in rows[0]["ways"] if way not in ("bare product", "eager"))
    for operation in OPERATIONS:
        lines += [
            f"## {operation}", "",
            f"| B | M | K | bare ms | eager ms | {ours} ms | of bare | eager takes | eager MB | {ours} MB |",
            "| " + " | ".join(["---:"] * 10) + " |",
        ]  # fmt: skip
        for row in (r for r in rows if r["operation"] == operation):
            bare, mine, eager = row["ways"]["bare product"], row["ways"][ours], row["ways"].get("eager")
            figures = [
                f"{bare['ms']:.3g}", f"{eager['ms']:.3g}" if eager else "left out", f"{mine['ms']:.3g}",
                f"{mine['ms'] / bare['ms']:.2f}", f"{eager['ms'] / mine['ms']:.2f} x" if eager else "",
                f"{eager['megabytes']:.1f}" if eager else "left out", f"{mine['megabytes']:.1f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join([*(str(row[n]) for n in "BMK"), *figures]) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], operation: str, path: Path, heading: str) -> None:
    """Time above, memory below; a column for each size that grows."""
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(11, 6.4), layout="constrained")
    colours = {"bare product": "#8c8c8c", "eager": "#dd8452"}
    for column, letter in enumerate(SWEEPS):
        own = [r for r in rows if r["operation"] == operation and r["sweep"] == letter]
        for line, (figure_of, unit) in enumerate((("ms", "milliseconds"), ("megabytes", "MB beyond the result"))):
            axis = axes[line][column]
            for name in dict.fromkeys(name for r in own for name in r["ways"]):
                if name == "bare product" and figure_of == "megabytes":
                    continue
                at = [(r[letter], max(r["ways"][name][figure_of], 1e-2)) for r in own if name in r["ways"]]
                axis.plot(*zip(*at, strict=True), marker="o", ms=4, color=colours.get(name, "#4c72b0"), label=name)
            axis.set(xscale="log", yscale="log", xlabel=f"{letter}, {NAMES[letter]}")
            axis.set_xticks(SWEEPS[letter], [f"{value:,}" for value in SWEEPS[letter]])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(unit)
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{operation}; {heading}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each operation of each point")
    parser.add_argument("--limit", type=float, default=6.0, help="GB that plain PyTorch may take")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    arguments = parser.parse_args()
    results = Rows(arguments.out / "results.jsonl")
    at = f"{device_name(arguments.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    rows = []
    for letter, shape in points():
        for operation in OPERATIONS:
            key = f"{letter}: {shape.title}, {operation}; {at}, {code_version()}"
            if key not in results.rows:
                print(f"{shape.title}, {operation}", flush=True)
                found = measure(shape, operation, arguments.device, arguments.seconds, arguments.limit)
                sizes = {n: getattr(shape, n) for n in "BMKD"}
                facts = {"device": at, "commit": code_version(), "date": time.strftime("%Y-%m-%d")}
                command = "python " + " ".join(sys.argv)
                row = {"key": key, "sweep": letter, "operation": operation, **sizes, "ways": found}
                results.add({**row, **facts, "command": command})
                told = "; ".join(f"{n} {w['ms']:.3g} ms, {w['megabytes']:.3g} MB" for n, w in found.items())
                print(f"  {told}", flush=True)
            rows.append(results.rows[key])
    heading = f"D=512, around B=256 M=4 K=1000; {at}, code {rows[-1]['commit']}, {rows[-1]['date']}"
    (arguments.out / "table.md").write_text(table(rows, f"{heading}. `{rows[-1]['command']}`"))
    for operation in OPERATIONS:
        plot(rows, operation, arguments.out / f"{operation.replace(' ', '-')}.png", heading)
    print(f"wrote {arguments.out}/table.md, opinion.png, loss-gradients.png, results.jsonl")


if __name__ == "__main__":
    main()
