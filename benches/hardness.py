"""How hard the scenes of the bundled benchmark should be, seen on the two validation splits.

    python benches/hardness.py --out benches/results/hardness

For each hardness: zero-shot CLIP, CoOp and MaPLe with the settings of `cdc demo`, on classes that no reported number
uses. A benchmark is worth having where the methods neither all fail nor all succeed: the hardness wanted is the one
that leaves the most room above zero-shot CLIP and above the trained methods. Finished runs are kept in results.jsonl,
so the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from cdc_models import evaluate, fit, load_clip
from cdc_models.clip import ClipBackbone
from cdc_models.data import emoji_benchmark, harmonic_mean, test_transform, train_transform
from cdc_models.experiment import SETTINGS, Setting, batches, build
from cdc_models.rows import Rows

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("zero-shot", "CoOp", "MaPLe")


def run(setting: Setting, backbone: ClipBackbone, split: int, hardness: float) -> dict[str, float]:
    """Base, new and harmonic mean of one method on a validation split."""
    seed = split + 1
    data = emoji_benchmark(split, seed, partition="validation", hardness=hardness)
    model = build(setting, backbone, data.train.classes, seed)
    if setting.epochs:
        loader = batches(data.train, train_transform(backbone, scale=(0.9, 1.0)), setting.batch, seed)
        fit(model, loader, epochs=setting.epochs, lr=setting.lr, seed=seed, progress=False)
    transform = test_transform(backbone)
    base = evaluate(model, batches(data.base_test, transform, 200), progress=False).accuracy
    others = model.with_classes(data.new_test.classes)
    new = evaluate(others, batches(data.new_test, transform, 200), progress=False).accuracy
    return {"base": base, "new": new, "H": harmonic_mean(base, new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hardness"))
    arguments = parser.parse_args()
    backbone = load_clip("bundled")
    results = Rows(arguments.out / "results.jsonl")
    lines = ["| hardness | " + " | ".join(f"{name}: base, new, H" for name in METHODS) + " |"]
    lines += ["| ---: |" + " ---: |" * len(METHODS)]
    for hardness in LEVELS:
        cells = []
        for name in METHODS:
            rows = []
            for split in (0, 1):
                key = f"{backbone.fingerprint[:16]}, {SETTINGS[name]}, split {split}, hardness {hardness}"
                if key not in results.rows:
                    figures = run(SETTINGS[name], backbone, split, hardness)
                    results.add({"key": key, "method": name, "split": split, "hardness": hardness, **figures})
                rows.append(results.rows[key])
                print(f"{name}, split {split}, hardness {hardness}: H {rows[-1]['H']:.3f}", flush=True)
            cells.append(", ".join(f"{100 * fmean(row[k] for row in rows):.1f}" for k in ("base", "new", "H")))
        lines.append(f"| {hardness} | " + " | ".join(cells) + " |")
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
