"""The kernels' two paths against each other by the width D of the features, and what the rule between them picks.

    python benches/paths.py                         on a GPU; some minutes
    python benches/paths.py --device interpreter    tiny sizes in Triton's interpreter: proves the way, not its speed

For each dtype, direction and D it compares "tiles" and "chunks" (kernels/README.md) with float64 and times them in turn
with the bare products (backward: the logits' again, and two for gradients) and, forward, with the other tile sizes of
`configs.CANDIDATES`. Under benches/results/<device>/paths it writes table.md, paths.png and results.jsonl: measured
milliseconds beside those that `configs.seconds` expects, the path that `configs.path` takes, and how much slower that
is than the faster one. Points that are measured are kept in results.jsonl, so the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import matplotlib
import torch
from facts import code_version, device_name, interpret, results_folder
from report import OUR_TOLERANCE
from shapes import SCALE, Inputs, Shape, make_inputs
from timing import time_interleaved
from ways import Outputs, along_path, bare_product, bare_products, our_opinion, relative_error, truth

import cdc_ops
from cdc_models.rows import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (64, 128, 256, 512, 768, 1024)
SIZES = {"B": 1024, "M": 4, "K": 21841}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DIRECTIONS = ("forward", "backward")
COLOURS = {"bare product": "#8c8c8c", "tiles": "#c44e52", "chunks": "#937860"}

Call = Callable[[], Outputs]
Row = dict[str, Any]


def forward_calls(inputs: Inputs, interpreted: bool) -> dict[str, Call]:
    """The opinion along each path, and along "tiles" with each candidate in the default's place."""
    from cdc_kernels import configs

    opinion = our_opinion("triton")
    calls: dict[str, Call] = {path: partial(along_path(path, opinion), *inputs) for path in configs.PATHS}
    if interpreted or inputs.image.element_size() != 2:
        return calls
    arch, M = configs.architecture(inputs.image.device), len(inputs.text)
    kind = configs.forward_kind(M, inputs.image.element_size())

    def tiles_of(config: configs.Config) -> Outputs:
        with patch.dict(configs.DEFAULTS[kind], {arch: (config, config)}):
            return calls["tiles"]()

    for config in configs.CANDIDATES["forward"]:
        if M % config.prompts:
            continue
        tile = f"{config.images} x {config.prompts} {config.classes} x {config.features}"
        calls[f"tiles {tile}, {config.num_warps} warps, {config.num_stages} stages"] = partial(tiles_of, config)
    return calls


def backward_calls(inputs: Inputs) -> dict[str, Call]:
    """The gradients of the loss by image and text along each path; the loss itself is made before, once."""
    from cdc_kernels import configs

    with cdc_ops.value_checks(False):
        loss = cdc_ops.evidential_cross_entropy(*inputs, scale=SCALE, backend="triton")

    def gradients(path: str) -> Outputs:
        with configs.force_path(path):
            return torch.autograd.grad(loss, (inputs.image, inputs.text), retain_graph=True)

    return {path: partial(gradients, path) for path in configs.PATHS}


def measure(shape: Shape, direction: str, dtype: torch.dtype, device: str, seconds: float) -> tuple[Row, Row]:
    """Milliseconds and error of each way; one that does not fit the device is told with its reason."""
    from triton.runtime.errors import OutOfResources

    operation = "opinion" if direction == "forward" else "loss gradients"
    inputs = make_inputs(shape, operation, "cuda" if device == "cuda" else "cpu", dtype)
    exact = truth(shape, operation, inputs)[0 if direction == "forward" else 1 :]
    calls = forward_calls(inputs, device != "cuda") if direction == "forward" else backward_calls(inputs)
    errors, left_out = {}, {}
    for name, call in list(calls.items()):
        try:
            errors[name] = relative_error(call(), exact)
        except OutOfResources as error:
            left_out[name] = str(error)
            del calls[name]
            continue
        if not errors[name] <= OUR_TOLERANCE[dtype]:
            raise SystemExit(
                f"{shape.title} {direction}: {name} is off by {errors[name]:.1e} of {OUR_TOLERANCE[dtype]}"
            )
    del exact
    floor = bare_product if direction == "forward" else bare_products
    calls["bare product"] = partial(floor, inputs.image.detach(), inputs.text.detach(), inputs.target)
    calls["bare product"]()
    times = time_interleaved(calls, device, seconds, rounds=1 if device != "cuda" else 5)
    found = {name: {"ms": median(ms), "error": errors.get(name)} for name, ms in times.items()}
    return found, left_out


def judged(row: Row) -> Row:
    """What the rule expects and takes, and how much slower that is than the faster path."""
    from cdc_kernels import configs

    sizes = [row[name] for name in "BMKD"]
    dtype = DTYPES[row["dtype"]]
    expected = {path: 1e3 * configs.seconds(path, row["direction"], *sizes, dtype) for path in configs.PATHS}
    taken = configs.path(row["direction"], *sizes, dtype)
    measured = {path: row["ways"][path]["ms"] for path in configs.PATHS}
    return {"expected": expected, "taken": taken, "loses": measured[taken] / min(measured.values())}


def table(rows: list[Row], heading: str) -> str:
    lines = [heading, ""]
    for dtype, direction in dict.fromkeys((r["dtype"], r["direction"]) for r in rows):
        own = [r for r in rows if (r["dtype"], r["direction"]) == (dtype, direction)]
        extra = list(dict.fromkeys(n for r in own for n in (*r["ways"], *r["left_out"]) if n.startswith("tiles ")))
        head = ["D", "bare product", "tiles", "expected", "chunks", "expected", "the rule takes", "times the faster"]
        lines += [f"## {direction}, {dtype}, milliseconds", "", "| " + " | ".join([*head, *extra]) + " |"]
        lines += ["|" + " ---: |" * (len(head) + len(extra))]
        for r in own:
            verdict, ms = judged(r), {name: f"{way['ms']:.3g}" for name, way in r["ways"].items()}
            cells = [str(r["D"]), ms["bare product"]]
            for path in ("tiles", "chunks"):
                cells += [ms[path], f"{verdict['expected'][path]:.3g}"]
            cells += [verdict["taken"], f"{verdict['loses']:.2f}", *(ms.get(name, "does not fit") for name in extra)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, heading: str) -> None:
    """Time over D: measured with a line, expected by the rule dotted."""
    pairs = list(dict.fromkeys((r["dtype"], r["direction"]) for r in rows))
    figure, axes = plt.subplots(1, len(pairs), figsize=(1 + 3.4 * len(pairs), 4), layout="constrained", squeeze=False)
    for axis, pair in zip(axes[0], pairs, strict=True):
        own = sorted((r for r in rows if (r["dtype"], r["direction"]) == pair), key=lambda r: r["D"])
        at = [r["D"] for r in own]
        for name, colour in COLOURS.items():
            axis.plot(at, [r["ways"][name]["ms"] for r in own], "o-", ms=4, color=colour, label=name)
            if name != "bare product":
                expected = [judged(r)["expected"][name] for r in own]
                axis.plot(at, expected, ":", color=colour, label=f"{name}, expected by the rule")
        axis.set(xscale="log", yscale="log", xlabel="D, features", title=f"{pair[1]}, {pair[0]}")
        axis.set_xticks(at, [str(d) for d in at])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("milliseconds")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(heading, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing, for each point")
    parser.add_argument("--widths", type=int, nargs="+", help="values of D")
    parser.add_argument("--out", type=Path, help="default: benches/results/<device>/paths")
    arguments = parser.parse_args(argv)
    tiny = arguments.device == "interpreter"
    if tiny:
        interpret()
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU: the kernels run on one, or in Triton's interpreter (--device interpreter)")
    name = "interpreter" if tiny else device_name("cuda")
    out = arguments.out or results_folder(arguments.device) / "paths"
    sizes = {"B": 4, "M": 2, "K": 40} if tiny else SIZES
    results, at = Rows(out / "results.jsonl"), f"{name}, torch {torch.__version__}"
    command = " ".join(["python benches/paths.py", *(sys.argv[1:] if argv is None else argv)])
    rows = []
    for dtype in ("float32",) if tiny else DTYPES:
        for direction in DIRECTIONS:
            for D in arguments.widths or ((16, 48) if tiny else WIDTHS):
                shape = Shape("paths", **sizes, D=D)
                key = f"{shape.title}, {dtype}, {direction}; {at}, {code_version()}"
                if key not in results.rows:
                    print(f"{shape.title}, {dtype}, {direction}", flush=True)
                    seconds = 0.0 if tiny else arguments.seconds
                    ways, left_out = measure(shape, direction, DTYPES[dtype], arguments.device, seconds)
                    row = {"key": key, "dtype": dtype, "direction": direction, **sizes, "D": D, "ways": ways}
                    facts = {"device": at, "commit": code_version(), "date": time.strftime("%Y-%m-%d")}
                    results.add({**row, "left_out": left_out, **facts, "command": command})
                    told = "; ".join(f"{n} {w['ms']:.3g} ms" for n, w in ways.items())
                    print(f"  {told}", flush=True)
                rows.append(results.rows[key])
    heading = f"B={sizes['B']} M={sizes['M']} K={sizes['K']}; {at}, code {rows[-1]['commit']}, {rows[-1]['date']}"
    heading += " (proves the way, not its speed)" if tiny else ""
    (out / "table.md").write_text(table(rows, f"{heading}. `{rows[-1]['command']}`"))
    plot(rows, out / "paths.png", heading)
    print(f"wrote {out}/table.md, paths.png, results.jsonl")


if __name__ == "__main__":
    main()
