"""What `model.compile()` saves of a training step, and how long compiling takes.

    python benches/compiled_step.py --out benches/results/compiled_step
    python benches/compiled_step.py --backbone bundled --out benches/results/compiled_step
    python benches/compiled_step.py --methods CDC --classes 20 --seconds 40 --out benches/results/compiled_step

CoOp, MaPLe and CDC (M = 4, ready-made views) on ImageNet's names: loss and backward pass, eager and compiled in turn,
after losses and gradients have been compared ("off": the largest relative difference, Euclidean norms). Rows that are
there already are kept, and in the table, as long as device, threads, torch and code are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import facts
import timing
import torch
from step import Case, build, inputs
from torch import Tensor

from cdc_models.clip import load_clip
from cdc_models.methods import Method
from cdc_models.rows import Rows

#: Largest relative difference that counts as rounding in float32.
OFF = 1e-4
CASES = (Case("CoOp", 1, "ours"), Case("MaPLe", 1, "ours"), Case("CDC", 4, "ours"))


def step(model: Method, images: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and the gradients of everything that is learned."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(images, targets)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.learned_parameters().values() if p.grad is not None)]


def measure(case: Case, backbone_name: str, device: str, classes: int, batch: int, seconds: float) -> dict:
    torch.manual_seed(0)
    backbone = load_clip(backbone_name, device=device)
    images, targets = inputs(case, backbone, classes, batch)
    eager, compiled = (build(case, backbone, classes) for _ in range(2))
    want = step(eager, images, targets)
    started = time.perf_counter()
    compiled.compile(fullgraph=True)
    got = step(compiled, images, targets)
    compiling = time.perf_counter() - started
    off = max(float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True))
    assert off < OFF, f"{case}: off by {off:.1e}"
    calls = {
        "eager": lambda: step(eager, images, targets),
        "compiled": lambda: step(compiled, images, targets),
    }
    taken = timing.time_interleaved(calls, device, seconds)
    return {
        "ms": {name: median(times) for name, times in taken.items()},
        "ratio": timing.ratios(taken["eager"], taken["compiled"]),
        "rounds": len(taken["eager"]),
        "compiling": compiling,
        "off": off,
    }


def table(rows: list[dict]) -> str:
    lines = [
        f"Loss and backward pass: {facts.told(rows[-1])}",
        "",
        "| CLIP | method | K | batch | eager, ms | compiled, ms | times faster | compiling, s | off |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        eager, compiled = row["ms"]["eager"], row["ms"]["compiled"]
        lines.append(
            f"| {row['backbone']} | {row['method']} | {row['classes']} | {row['batch']} | {eager:.0f} | "
            f"{compiled:.0f} | {row['ratio']:.2f} | {row['compiling']:.0f} | {row['off']:.0e} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    names = [case.method for case in CASES]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each method")
    parser.add_argument("--out", type=Path, default=Path("runs/compiled_step"))
    given = parser.parse_args(arguments)
    results = Rows(given.out / "results.jsonl")
    for case in (case for case in CASES if case.method in given.methods):
        what = {"backbone": given.backbone, "classes": given.classes, "batch": given.batch}
        key = facts.key(given.device, method=case.label, **what, seconds=given.seconds)
        if key in results.rows:
            continue
        found = measure(case, given.backbone, given.device, given.classes, given.batch, given.seconds)
        results.add(
            {
                "key": key,
                "method": case.label,
                **what,
                **found,
                **facts.facts(given.device),
            }
        )
        print(f"{case.label}: {found}", flush=True)
    document = table(facts.of_one_making(results.rows.values(), given.device))
    (given.out / "table.md").write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
