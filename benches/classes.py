"""How time and memory grow with the number of classes, and what ten million of them take on N GPUs, on paper.

    python benches/classes.py --out benches/results/classes

One process, backend "blocked" on a CPU and "triton" on a GPU, random features, exp evidence, Dempster's rule. For each
number of classes: results and gradients against float64 first (up to 10,000 classes), then all operations timed in
turn, then the most bytes each holds beyond its inputs. Finished numbers of classes are kept in results.jsonl, so the
script goes on where it stopped, unless device, threads, versions, shapes or the measured code changed. The defaults
take 5 GB of memory. Writes table.md and classes.png.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import roofline
import torch
from facts import code_version, device_name
from report import forget_kept_memory
from shapes import SCALE, Inputs, Shape, make_inputs
from timing import peak_memory, time_interleaved
from torch import Tensor
from ways import relative_error

import cdc_ops
from cdc_models.rows import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARITY_UP_TO = 10_000
TOLERANCE = 2e-5
TOP = 10
Outputs = tuple[Tensor, ...]
Row = dict[str, Any]


def opinion(inputs: Inputs, backend: str | None) -> Outputs:
    result = cdc_ops.fused_opinion(inputs.image, inputs.text, scale=SCALE, backend=backend)
    return result.log_ratio, result.log_partition, result.prompt_log_partition


def topk(inputs: Inputs, backend: str | None) -> Outputs:
    top = cdc_ops.fused_topk(inputs.image, inputs.text, TOP, scale=SCALE, backend=backend)
    return top.prob, top.belief, top.uncertainty, top.prompt_uncertainty


def loss_gradients(inputs: Inputs, backend: str | None) -> Outputs:
    image, text = inputs.image.detach().requires_grad_(), inputs.text.detach().requires_grad_()
    loss = cdc_ops.evidential_cross_entropy(image, text, inputs.target, scale=SCALE, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, (image, text)))


def image_gradient(inputs: Inputs, backend: str | None) -> Outputs:
    image = inputs.image.detach().requires_grad_()
    loss = cdc_ops.evidential_cross_entropy(image, inputs.text, inputs.target, scale=SCALE, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, image))


#: What is measured, and the products of all features that each makes: a backward pass makes the logits again.
OPERATIONS: dict[str, tuple[Callable[[Inputs, str | None], Outputs], int]] = {
    "fused_opinion": (opinion, 1),
    f"fused_topk, k = {TOP}": (topk, 1),
    "evidential_cross_entropy, forward and backward": (loss_gradients, 4),
    "the same, text frozen": (image_gradient, 3),
}


def assert_parity(inputs: Inputs) -> float:
    """Largest relative error against float64 by the reference backend; loud if it is more than rounding."""
    exact = Inputs(inputs.image.double(), inputs.text.double(), inputs.target)
    worst = max(relative_error(run(inputs, None), run(exact, "reference")) for run, _ in OPERATIONS.values())
    assert worst < TOLERANCE, f"off by {worst:.1e}"
    return worst


def measure(shape: Shape, arguments: argparse.Namespace) -> Row:
    """Times and memory of every operation at one number of classes."""
    inputs = make_inputs(shape, "opinion", arguments.device, torch.float32)
    worst = assert_parity(inputs) if shape.K <= PARITY_UP_TO else None
    calls = {name: lambda run=run: run(inputs, None) for name, (run, _) in OPERATIONS.items()}
    times = time_interleaved(calls, arguments.device, arguments.seconds, rounds=3)
    forget_kept_memory()
    memory = peak_memory(calls, arguments.device)
    return {
        "classes": shape.K,
        "error": worst,
        "ms": {name: median(ms) for name, ms in times.items()},
        "peak": {name: peak for name, (peak, _) in memory.items()},
        "kept": {name: kept for name, (_, kept) in memory.items()},
    }


# ---- on paper ---------------------------------------------------------------------------------------------------

#: An NVIDIA H100 SXM by its data sheet: a second bf16 operations, bytes of memory, bytes over NVLink in one direction;
#: and the bytes it holds.
H100_FLOPS, H100_BYTES, H100_LINK, H100_MEMORY = 989e12, 3.35e12, 450e9, 80e9
#: Bytes of cdc_kernels.configs.WORKSPACE, which holds a chunk of classes in the backward pass.
WORKSPACE = 64 * 2**20


def on_paper(B: int, M: int, K: int, D: int, ranks: int) -> dict[str, float]:
    """What one of N ranks holds, computes, moves and sends for one class-parallel training step, text in bf16."""
    logits, features = B * M * K / ranks, M * K * D / ranks
    chunks = logits * (6 + 4 * D / B) / WORKSPACE
    row_sums, gradient = 4 * 2 * B * (M + 1), 4 * (B * D + 2 * M)
    return {
        "text": 2 * features,
        "lengths": 4 * M * K / ranks,
        "flops": 8 * logits * D,
        "moved text": (5 * 2 + 2 * 4 + 2) * features,
        "moved workspace": 18 * logits,
        "moved image": chunks * 4 * B * D * (2 * M + 2),
        "sent": row_sums * (ranks - 1) + 2 * gradient * (ranks - 1) / ranks,
    }


def paper() -> list[str]:
    """The section on ten million classes."""
    B, M, K, D = 1024, 4, 10_000_000, 512
    lines = [
        "## Ten million classes on N GPUs, on paper", "",
        f"One training step by `cdc_ops.parallel.evidential_cross_entropy`, B = {B} images in all, M = {M}, K = {K:,}, "
        f"D = {D}, text features in bf16, both sides learned, the Triton backend: forward by tiles, backward over "
        "chunks of classes (benches/NOTES.md). The rates are those of the data sheet of an H100 SXM, which no kernel "
        f"reaches: {H100_FLOPS / 1e12:.0f} TFLOP/s in bf16, {H100_BYTES / 1e12:.2f} TB/s of memory, "
        f"{H100_LINK / 1e9:.0f} GB/s over NVLink. **Nothing of this was measured on a GPU.** For each GPU:", "",
        "- held: text features, 2 M K D / N bytes; their gradient as much again, nothing where they are frozen; if "
        "they themselves are trained by Adam, 12 M K D / N more (two moments and a float32 copy).",
        "- held beyond these: the lengths of text features in float32, 4 M K / N bytes; partial sums of 16 MB and a "
        f"workspace of {WORKSPACE / 2**20:.0f} MB, which do not grow with K.",
        "- products: 2 B M K D / N operations forward, 8 B M K D / N with the backward pass (logits again, and the "
        "gradients of image and text).",
        "- moved, text: read for lengths, forward, logits again, image gradient and normalisation, 5 x 2 bytes; the "
        "gradient written and read in float32, 2 x 4, and written in bf16, 2: 20 M K D / N bytes.",
        "- moved, workspace: logits written, and read twice, in float32, their gradients written once and read twice "
        "in bf16: 3 x 4 + 3 x 2 = 18 bytes of each of the B M K / N logits. What of a chunk stays in the L2 cache of "
        "50 MB need not be moved.",
        "- moved, image: after each chunk the gradients by M templates, [M, B, D] in float32, are written, read and "
        "added to their sum: 4 B D (2 M + 2) bytes a chunk. A class takes M (6 B + 4 D) bytes of the workspace, so "
        f"there are K M (6 B + 4 D) / N / {WORKSPACE / 2**20:.0f} MB chunks. In the L2 cache, too, as far as it holds.",
        "- exchanged: row sums, 4 x 2 B (M + 1) bytes from each other GPU (form \"digamma\"), and the gradient of "
        "image, scale and bias, 2 (N - 1) / N x 4 (B D + 2 M) bytes around a ring. K is not in it.", "",
        "| GPUs | text GB | with gradient | with Adam | lengths MB | TFLOP | ms | text moved GB | ms | workspace GB "
        "| ms | image GB | ms | exchanged MB | ms |",
        "| ---: |" + " ---: |" * 14,
    ]  # fmt: skip
    for ranks in (1, 8, 32, 128):
        p = on_paper(B, M, K, D, ranks)
        moved = [f"{x:.1f}" for n in ("text", "workspace", "image") for x in (
            p[f"moved {n}"] / 1e9, p[f"moved {n}"] / H100_BYTES * 1e3,
        )]  # fmt: skip
        cells = [
            ranks, f"{p['text'] / 1e9:.1f}", f"{2 * p['text'] / 1e9:.1f}", f"{8 * p['text'] / 1e9:.1f}",
            f"{p['lengths'] / 1e6:.1f}", f"{p['flops'] / 1e12:.1f}", f"{p['flops'] / H100_FLOPS * 1e3:.1f}", *moved,
            f"{p['sent'] / 1e6:.2f}", f"{p['sent'] / H100_LINK * 1e3:.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    whole = on_paper(B, M, K, D, 1)
    products = whole["flops"] / H100_FLOPS * 1e3
    everything = products + sum(whole[f"moved {n}"] for n in ("text", "workspace", "image")) / H100_BYTES * 1e3
    enough, with_adam = (
        math.ceil((copies * whole["text"] + whole["lengths"]) / H100_MEMORY) for copies in (2, 8)
    )  # fmt: skip
    return [
        *lines, "",
        f"So a step takes between {products:.0f} / N ms, if all that is moved hides behind the products, and "
        f"{everything:.0f} / N ms, if nothing does and nothing stays in a cache, and what is exchanged. "
        f"{H100_MEMORY / 1e9:.0f} GB each hold text features and gradient from {enough} GPUs on, Adam's state too from "
        f"{with_adam}.",
    ]  # fmt: skip


# ---- table and plot ---------------------------------------------------------------------------------------------


def growth(before: float, after: float, factor: float) -> float:
    """x where the quantity grows like K^x."""
    return math.log(after / before) / math.log(factor)


def table(rows: list[Row]) -> list[str]:
    lines = []
    for name in OPERATIONS:
        lines += [
            f"### {name}", "",
            "| K | ms | grows like | beyond inputs, MB | of it results and gradients | the rest |",
            "| ---: |" + " ---: |" * 5,
        ]  # fmt: skip
        for before, row in zip([None, *rows], rows, strict=False):
            ms, peak, kept = (row[what][name] for what in ("ms", "peak", "kept"))
            x = f"K^{growth(before['ms'][name], ms, row['classes'] / before['classes']):.2f}" if before else ""
            cells = f"{row['classes']:,}", f"{ms:.3g}", x, *(f"{n / 1e6:.2f}" for n in (peak, kept, peak - kept))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def document(rows: list[Row], key: Row, command: str) -> str:
    B, M, D, last = key["B"], key["M"], key["D"], rows[-1]
    largest = list(OPERATIONS)[2]
    flops = OPERATIONS[largest][1] * 2 * B * M * last["classes"] * D / (last["ms"][largest] / 1e3)
    errors = [row["error"] for row in rows if row["error"] is not None]
    return "\n".join([
        "# Time and memory over the number of classes", "",
        f"{last['date']}. {key['device']}, {key['threads']} CPU threads, torch {key['torch']}, code {key['code']}. "
        f"Made by `{command}`.", "",
        f"One process, B = {B} images, M = {M} prompts, D = {D}, float32, exp evidence, Dempster's rule, loss of form "
        f"\"digamma\". The text features take 4 M K D bytes: {4 * M * D * last['classes'] / 1e9:.2f} GB at K = "
        f"{last['classes']:,}. Medians; memory is every allocation of PyTorch. Relative error against float64 at most "
        f"{max(errors, default=math.nan):.0e} (K up to {PARITY_UP_TO:,}).", "",
        "![time and memory over K](classes.png)", "",
        *table(rows),
        f"Products at K = {last['classes']:,}, forward and backward: {flops / 1e12:.3g} TFLOP/s; "
        f"a large product in the same run: {last['ceiling'] / 1e12:.3g} TFLOP/s.", "",
        *paper(), "",
    ])  # fmt: skip


def plot(rows: list[Row], key: Row, path: Path) -> None:
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    classes = [row["classes"] for row in rows]
    for name, colour in zip(OPERATIONS, ("#4c72b0", "#55a868", "#c44e52", "#dd8452"), strict=True):
        label = name.replace("evidential_cross_entropy, ", "evidential_cross_entropy,\n")
        time_axis.plot(classes, [row["ms"][name] for row in rows], "o-", color=colour, label=label)
        memory_axis.plot(classes, [row["peak"][name] / 1e6 for row in rows], "o-", color=colour)
        rest = [(row["peak"][name] - row["kept"][name]) / 1e6 for row in rows]
        memory_axis.plot(classes, rest, "o:", color=colour, markersize=3)
    text = [4 * key["M"] * key["D"] * K / 1e6 for K in classes]
    memory_axis.plot(classes, text, color="black", linewidth=0.8, label="the text features themselves")
    slowest = list(OPERATIONS)[2]
    line = [rows[-1]["ms"][slowest] * K / classes[-1] for K in classes]
    time_axis.plot(classes, line, color="black", linewidth=0.8, linestyle="--", label="in proportion to K")
    memory_axis.plot([], [], "o-", color="grey", label="held beyond the inputs")
    memory_axis.plot([], [], "o:", color="grey", markersize=3, label="of it, not results or gradients")
    for axis, what in ((time_axis, "ms"), (memory_axis, "MB")):
        axis.set(xscale="log", yscale="log", xlabel="classes K", ylabel=what)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"B = {key['B']}, M = {key['M']}, D = {key['D']}, float32, {key['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each number of classes, about")
    parser.add_argument("--out", type=Path, default=Path("runs/classes"))
    arguments = parser.parse_args(argv)
    command = " ".join(["python benches/classes.py", *(sys.argv[1:] if argv is None else argv)])
    key = {
        "B": arguments.batch, "M": arguments.prompts, "D": arguments.features, "device": device_name(arguments.device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "code": code_version(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    results, rows, started = Rows(arguments.out / "results.jsonl"), [], time.perf_counter()
    ceiling = None
    for K in sorted(arguments.classes):
        name = f"K = {K}, {key}"
        if name not in results.rows:
            print(f"K = {K:,} ({time.perf_counter() - started:.0f} s)", flush=True)
            if ceiling is None:
                ceiling = roofline.measure_ceilings(arguments.device, torch.float32, arguments.seconds == 0)
            shape = Shape(f"K = {K}", arguments.batch, arguments.prompts, K, arguments.features)
            row = measure(shape, arguments) | {"ceiling": ceiling["flops_per_s"], "date": time.strftime("%Y-%m-%d")}
            results.add({"key": name, **row})
        rows.append(results.rows[name])
    (arguments.out / "table.md").write_text(document(rows, key, command))
    plot(rows, key, arguments.out / "classes.png")
    print("\n".join(table(rows)))
    print(f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}/table.md, classes.png, results.jsonl")


if __name__ == "__main__":
    main()
