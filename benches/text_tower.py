"""The text tower, forward and backward: what each step of docs/mathematics.md, 6, saves against 77 tokens.

    python benches/text_tower.py --out benches/results/text_tower

100 of ImageNet's names, n = 2 context vectors, prompts in J = 9 layers, ViT-B/16's text tower with random weights, M
templates. Features and gradients of every way are compared with those of the first before anything is timed ("off": the
larger relative difference, Euclidean norms); then all ways run in turn, and the ratios are medians over rounds.

| way | what it is |
| --- | --- |
| 77 tokens | open_clip's own modules, every prompt at full length, one template after the other: the published way |
| truncated | the same, cut to the longest prompt |
| shared prefix | this library with all classes in one rectangle: start and context once for each template |
| packed | this library as it is: classes of like length in rectangles of their own |
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import facts
import published
import timing
import torch
from imagenet_names import imagenet_names
from torch import Tensor

from cdc_models.clip import encode_prompted_text, load_clip, text_layout, tokenize_classes
from cdc_models.prompts import CoupledPrompts
from cdc_models.rows import Rows

#: Rectangles join whatever padding that takes.
ONE_RECTANGLE = 10**9
#: Largest relative difference that counts as rounding in float32.
OFF = 1e-5


def ways(backbone, names: list[str], prompts: CoupledPrompts) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Ways to the features [M, K, D], and how many tokens each puts through every block."""
    m, n = prompts.text()[0].shape[:2]
    packed, one = tokenize_classes(backbone, names), tokenize_classes(backbone, names)
    longest = max(packed.token_lengths) + n + 2

    def open_clips(length: int | None) -> Tensor:
        context, deep = prompts.text()
        return torch.stack([published.text_tower(backbone, names, context[i], deep[i], length) for i in range(m)])

    def ours(classes) -> Tensor:
        context, deep = prompts.text()
        return encode_prompted_text(backbone, classes, context, deep=deep)

    usual = text_layout.SLACK_CPU, text_layout.SLACK_ACCELERATOR
    try:
        text_layout.SLACK_CPU = text_layout.SLACK_ACCELERATOR = ONE_RECTANGLE
        with torch.no_grad():
            ours(one)  # its layout is kept with the classes
    finally:
        text_layout.SLACK_CPU, text_layout.SLACK_ACCELERATOR = usual
    with torch.no_grad():
        ours(packed)
    tokens = [m * layout.tokens.numel() for classes in (one, packed) for layout in classes.layouts.values()]
    found = {
        "77 tokens": lambda: open_clips(None),
        "truncated": lambda: open_clips(longest),
        "shared prefix": lambda: ours(one),
        "packed": lambda: ours(packed),
    }
    counts = [m * len(names) * backbone.context_length, m * len(names) * longest, *tokens]
    return found, dict(zip(found, counts, strict=True))


def step(features: Callable[[], Tensor], prompts: CoupledPrompts, weights: Tensor) -> list[Tensor]:
    """Features, and the gradient of a weighted sum of them by the text prompts."""
    y = features()
    return [y.detach(), *torch.autograd.grad(y, [prompts.text_prompts], weights)]


def assert_parity(got: list[Tensor], want: list[Tensor], name: str) -> float:
    off = max(float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True))
    assert off < OFF, f"{name}: off by {off:.1e}"
    return off


def measure(device: str, count: int, m: int, seconds: float, model: str) -> dict:
    torch.manual_seed(0)
    backbone = load_clip(model, device=device)
    depth = min(9, backbone.text_depth, backbone.image_depth)
    prompts = CoupledPrompts(backbone, n=2, depth=depth, m=m, noise=0.02, generator=torch.Generator().manual_seed(0))
    found, tokens = ways(backbone, imagenet_names(count), prompts)
    weights = torch.randn(m, count, backbone.embed_dim, generator=torch.Generator().manual_seed(1)).to(device)
    calls = {name: lambda features=features: step(features, prompts, weights) for name, features in found.items()}
    want = calls["77 tokens"]()
    off = {name: assert_parity(call(), want, name) for name, call in calls.items()}
    taken = timing.time_interleaved(calls, device, seconds)
    return {
        "key": facts.key(device, backbone=model, names=count, templates=m, seconds=seconds),
        "title": f"{model}, {count} names, M = {m}",
        "off": off,
        "ms": {name: median(times) for name, times in taken.items()},
        "ratio": {name: timing.ratios(taken["77 tokens"], times) for name, times in taken.items()},
        "rounds": {name: len(times) for name, times in taken.items()},
        "tokens": tokens,
        **facts.facts(device),
    }


def table(row: dict) -> str:
    lines = [
        f"{row['title']}: {facts.told(row)}",
        "",
        "| way | tokens | forward and backward, ms | times faster than 77 tokens | off |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, ms in row["ms"].items():
        lines.append(
            f"| {name} | {row['tokens'][name]} | {ms:.0f} | {row['ratio'][name]:.1f} | {row['off'][name]:.0e} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--templates", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each M, at least five rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/text_tower"))
    given = parser.parse_args(arguments)
    results, rows = Rows(given.out / "results.jsonl"), []
    for m in given.templates:
        row = measure(given.device, given.names, m, given.seconds, given.backbone)
        results.add(row)
        rows.append(row)
        print(table(row), flush=True)
    (given.out / "table.md").write_text("\n\n".join(table(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
