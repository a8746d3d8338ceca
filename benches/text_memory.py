"""Memory and time of the text side of one CDC step over many classes, by how many classes are encoded at a time.

    python benches/text_memory.py --out benches/results/text_memory

ViT-B/16's text tower with random weights, ImageNet's 1000 classes, M = 4 templates, n = 2, J = 9, float32: forward and
backward pass of `CDC.text_features`, with `class_chunk` none (everything is kept for the backward pass) down to 50
(only the chunk at hand is; it is encoded a second time in the backward pass). Every row is measured in a process of its
own: peak memory is what a first step adds to a process that holds CLIP and prompts, time the best of that and
`--repeats` further steps. On a CPU memory is measured twice: with freed memory given back to the system at once
(MALLOC_MMAP_THRESHOLD_=65536), which is what the step needs, and as the C library usually does, which keeps holes
between small tensors; time is the latter's. "published" is one template at 77 tokens for every class
(benches/published.py), on a tenth of the classes. Rows that are there already are kept, as long as device, threads,
torch and code are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import facts
import published
import torch
from imagenet_names import imagenet_names

from cdc_models.clip import load_clip
from cdc_models.methods import CDC
from cdc_models.rows import Rows


def measure(backbone_name: str, device: str, classes: int, templates: int, chunk: int, repeats: int, way: str) -> dict:
    """Bytes and seconds of one way, in this process. `chunk` 0: all classes at a time."""
    torch.manual_seed(0)
    backbone = load_clip(backbone_name, device=device)
    model = CDC(backbone, imagenet_names(classes), n_templates=templates, views=None)
    model.class_chunk = chunk or None
    weights = torch.randn(templates, classes, backbone.embed_dim, device=device)
    if way == "published":
        published.prepare(model)

    def step() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        features = model.text_features() if way == "ours" else published.text_features(model)
        features.backward(weights)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first, peak = facts.with_peak(step, device)
    return {**peak, "seconds": min([first, *(step() for _ in range(repeats))])}


def table(rows: list[dict]) -> str:
    first = rows[0]
    fastest = min(row["seconds"] for row in rows if row["way"] == "ours")
    lines = [
        f"Text side of one step, {first['backbone']}, n = 2: {facts.told(first)}",
        "",
        "| way | K | M | classes at a time | peak, GB | malloc as usual, GB | step, s | of the fastest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        least = "at least " if row["at_least"] else ""
        share = f"{row['seconds'] / fastest:.2f}" if row["way"] == "ours" else ""
        lines.append(
            f"| {row['way']} | {row['classes']} | {row['templates']} | {row['chunk'] or 'all'} | "
            f"{least}{row['needed'] / 1e9:.2f} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.1f} | {share} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--templates", type=int, default=4)
    parser.add_argument("--chunks", type=int, nargs="+", default=[50, 100, 250, 500, 0], help="0: all at a time")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/text_memory"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(*json.loads(given.measure))))
        return
    results = Rows(given.out / "results.jsonl")
    cases = [("ours", given.classes, given.templates, chunk) for chunk in given.chunks]
    keys = []
    for way, classes, templates, chunk in [*cases, ("published", max(2, given.classes // 10), 1, 0)]:
        case = {"way": way, "backbone": given.backbone, "classes": classes, "templates": templates, "chunk": chunk}
        key = facts.key(given.device, **case, repeats=given.repeats)
        keys.append(key)
        if key in results.rows:
            continue
        what = [given.backbone, given.device, classes, templates, chunk]
        measured = partial(facts.in_a_process_of_its_own, __file__, "--measure")
        found = measured([*what, given.repeats, way])
        found["needed"] = measured([*what, 0, way], MALLOC_MMAP_THRESHOLD_="65536")["bytes"]
        results.add(
            {
                "key": key,
                **case,
                **found,
                **facts.facts(given.device),
            }
        )
        print(f"{case}: {found['needed'] / 1e9:.2f} GB, {found['seconds']:.1f} s", flush=True)
    document = table([results.rows[key] for key in keys])
    (given.out / "table.md").write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
