"""The fused operations against every baseline: parity, time, peak memory, roofline. One command.

    python benches/report.py                        on a GPU: S1 to S6 in less than ten minutes
    python benches/report.py --device cpu           on a CPU: S2, S3, S5, S6 made smaller, which the table says
    python benches/report.py --device interpreter   the GPU's kernels on tiny shapes in Triton's interpreter: no speed

Writes results.jsonl, table.md and roofline.png under benches/results/<device>/. Every shape is appended to
results.jsonl as soon as it is measured; killed and started again, the script goes on with the next shape, unless
device, versions, settings or the measured code changed. Reading the table: benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import roofline
import targets
import torch
from facts import code_version, device_name, interpret, results_folder
from shapes import SCALE, SHAPES, Inputs, Shape, make_inputs, shape_for
from timing import launches, peak_memory, ratios, time_interleaved
from ways import Way, relative_error, truth, ways

#: Seconds for which one operation of one shape is timed.
SECONDS = {"cuda": 6.0, "cpu": 10.0, "interpreter": 0.0}
#: Largest relative error against float64. Baselines in half precision round their logits; our backends do not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
OUR_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3}
OURS = ("reference", "blocked", "triton")

Row = dict[str, Any]


def key_of(arguments: argparse.Namespace, dtype: torch.dtype) -> Row:
    """What must agree for an earlier result to be kept."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(arguments.device),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": code_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "scale": SCALE,
        "tiny": arguments.tiny,
        "seconds": arguments.seconds,
        "compile": arguments.compile,
        "ways": arguments.ways,
    }


def attempt(way: Way, inputs: Inputs, exact: list[torch.Tensor] | None, ours: bool) -> tuple[float | None, str | None]:
    """Run a way once: its error against the truth, or why it cannot run. Ours must run."""
    try:
        results = way(*inputs)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, "out of memory"
    except Exception as error:
        if ours:
            raise
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.120}"
    return (None if exact is None else relative_error(results, exact)), None


def measure(shape: Shape, operation: str, arguments: argparse.Namespace, dtype: torch.dtype) -> list[Row]:
    """All ways of one operation on one shape: first parity, then time in turn, then peak memory.

    Wrong numbers of ours end the report; a baseline that is wrong is not timed.
    """
    where = "cuda" if arguments.device == "cuda" else "cpu"
    found, left_out = ways(shape, operation, arguments.device, arguments.compile)
    found = {name: way for name, way in found.items() if arguments.ways is None or name in arguments.ways}
    inputs = make_inputs(shape, operation, where, dtype)
    exact = truth(shape, operation, inputs)
    errors: dict[str, float | None] = {}
    for name, way in list(found.items()):
        ours = name.split(",")[0] in OURS
        error, reason = attempt(way, inputs, None if name == "bare product" else exact, ours)
        if reason is not None:
            left_out[name] = reason
            del found[name]
            continue
        limit = (OUR_TOLERANCE if ours else TOLERANCE)[dtype]
        if error is not None and not error <= limit:
            left_out[name] = f"off by {error:.1e}, more than {limit:.0e}"
            if ours:
                raise SystemExit(f"{shape.name} {operation}: {name} is {left_out[name]}")
            del found[name]
            continue
        errors[name] = error
        print(f"  {name}: {'floor' if error is None else f'agrees with float64 to {error:.1e}'}", flush=True)
    del exact
    if not found:
        raise SystemExit(f"{shape.name} {operation}: nothing to time of {arguments.ways}; left out: {left_out}")
    calls = {name: partial(way, *inputs) for name, way in found.items()}
    rounds = 1 if arguments.tiny else 5
    times = time_interleaved(calls, arguments.device, arguments.seconds, rounds, wall=shape.name == "S4")
    forget_kept_memory()
    memory = peak_memory(calls, arguments.device)
    flops, size = shape.work(operation, dtype.itemsize)
    rows = []
    for name, ms in times.items():
        peak, kept = memory[name]
        tenths = quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms
        rows.append({
            "shape": shape.name, "title": shape.title, "operation": operation, "way": name, "median": median(ms),
            "low": tenths[0], "high": tenths[-1], "ms": [float(f"{t:.4g}") for t in ms], "peak": peak, "kept": kept,
            "error": errors[name], "flops": flops, "bytes": size,
            "launches": launches(calls[name]) if arguments.device == "cuda" else None,
        })  # fmt: skip
    rows += [
        {"shape": shape.name, "title": shape.title, "operation": operation, "way": name, "ms": [], "why": why}
        for name, why in left_out.items()
    ]
    return rows


def kept_lines(results: Path, key: Row) -> list[Row]:
    """What an earlier run measured of the same key. A line cut short, where that run was killed, counts for nothing."""
    kept = []
    for text in results.read_text().splitlines() if results.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["key"] == key:
            kept.append(line)
    return kept


def forget_kept_memory() -> None:
    """What the blocked backend keeps between calls: its next call's peak shall include it."""
    from cdc_ops.backends import blocks

    blocks._idle.clear()


def section(rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """The table of one operation on one shape, fastest first."""
    timed = sorted((r for r in rows if r["ms"]), key=lambda r: r["median"])
    by_name = {r["way"]: r for r in timed}
    bare, eager = by_name.get("bare product"), by_name.get("eager")
    with_launches = any(r["launches"] for r in timed)
    least = roofline.least_seconds(timed[0], ceilings) * 1e3
    lines = [f"### {rows[0]['title']}, {rows[0]['operation']}", "", f"At least {least:.3g} ms by the roofline.", ""]
    head = ["way", "ms", "10 to 90 %", "of bare product", "eager takes", "peak MB", "beyond result MB", "error"]
    head += ["launches"] if with_launches else []
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for r in timed:
        cells = [
            r["way"], f"{r['median']:.3g}", f"{r['low']:.3g} to {r['high']:.3g}",
            f"{ratios(r['ms'], bare['ms']):.2f}" if bare else "",
            f"{ratios(eager['ms'], r['ms']):.2f} x" if eager else "",
            f"{r['peak'] / 1e6:.1f}", f"{(r['peak'] - r['kept']) / 1e6:.1f}",
            "" if r["error"] is None else f"{r['error']:.0e}",
        ]  # fmt: skip
        cells += [str(r["launches"])] if with_launches else []
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\nNot measured: {r['way']} ({r['why']})." for r in rows if not r["ms"]]
    return [*lines, ""]


def document(rows: list[Row], key: Row, ceilings: dict[str, float], date: str, arguments: argparse.Namespace) -> str:
    """The whole Markdown page."""
    lines = [
        f"# Fused operations on {key['device']}", "",
        f"{date}. torch {key['torch']}, Triton {key['triton']}, code {key['commit']}, {key['dtype']}, "
        f"{key['threads']} CPU threads. Made by `{arguments.command}`; "
        "how to read it: `benches/README.md`.", "",
        f"Measured ceilings: matrix product {ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s, copy "
        f"{ceilings['bytes_per_s'] / 1e9:.3g} GB/s.", "",
    ]  # fmt: skip
    if not arguments.tiny and (verdicts := targets.judged(rows, arguments.device)):
        lines += ["## Targets (`benches/targets.py`)", "", *verdicts, ""]
    lines += ["## Measurements", "", "![roofline](roofline.png)", ""]
    for pair in dict.fromkeys((r["shape"], r["operation"]) for r in rows):
        lines += section([r for r in rows if (r["shape"], r["operation"]) == pair], ceilings)
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu", "interpreter"), default=default)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", help="only these rows of the table")
    parser.add_argument("--seconds", type=float, help="of timing, for each operation of each shape")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: proves the way, not its speed")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="default: benches/results/<device>")
    arguments = parser.parse_args(argv)
    arguments.command = " ".join(["python benches/report.py", *(sys.argv[1:] if argv is None else argv)])
    if arguments.device == "interpreter":
        arguments.tiny, arguments.compile = True, False
    if arguments.seconds is None:
        arguments.seconds = 0.0 if arguments.tiny else SECONDS[arguments.device]
    if arguments.out is None:
        arguments.out = results_folder(arguments.device)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "interpreter":
        interpret()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    key = key_of(arguments, dtype)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    kept = kept_lines(results, key)
    results.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def keep(line: Row) -> Row:
        kept.append({"key": key, "date": time.strftime("%Y-%m-%d"), **line})
        with results.open("a") as file:
            file.write(json.dumps(kept[-1]) + "\n")
        return kept[-1]

    ceilings = next((line["ceilings"] for line in kept if "ceilings" in line), None)
    if ceilings is None:
        ceilings = keep({"ceilings": roofline.measure_ceilings(arguments.device, dtype, arguments.tiny)})["ceilings"]
    print(f"{key['device']}: {ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:.3g} GB/s")
    started = time.perf_counter()
    for name in arguments.shapes:
        shape = shape_for(name, "cuda" if arguments.device == "cuda" else "cpu", arguments.tiny)
        for operation in shape.operations:
            if any((line.get("shape"), line.get("operation")) == (name, operation) for line in kept):
                print(f"{shape.title}, {operation}: measured before")
                continue
            print(f"{shape.title}, {operation} ({time.perf_counter() - started:.0f} s)", flush=True)
            torch.compiler.reset()
            rows = measure(shape, operation, arguments, dtype)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            keep({"shape": name, "operation": operation, "rows": rows})
            print("\n".join(section(rows, ceilings)), flush=True)
    wanted = sorted((line for line in kept if "rows" in line), key=lambda line: line["shape"])
    rows = [row for line in wanted for row in line["rows"]]
    date = max(line["date"] for line in kept)
    (arguments.out / "table.md").write_text(document(rows, key, ceilings, date, arguments))
    roofline.plot(rows, ceilings, f"Roofline, {key['device']}, {key['dtype']}", arguments.out / "roofline.png")
    print(f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}/table.md, roofline.png, results.jsonl")


if __name__ == "__main__":
    main()
