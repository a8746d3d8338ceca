"""Write the bundled benchmark: artwork of the artists that pre-training never saw, and the class splits.

    python pretraining/benchmark.py --artwork artwork/ --out cdc_models/bundled/benchmark.zip

Classes are concepts that Twemoji and at least one of the other two unseen artists have drawn. They are shuffled
once; the first 500 make the five reported splits of 50 base and 50 new classes, the next 200 the two splits on
which hyper-parameters are chosen. No class is in two splits.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ARTISTS = ("twemoji", "fxemoji", "streamline-emojis")
TARGET_ARTIST = "twemoji"
TEST_SPLITS, VALIDATION_SPLITS, CLASSES = 5, 2, 50
SEED = 2024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artwork", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    index = json.loads((arguments.artwork / "sprites.json").read_text())
    sprites = np.load(arguments.artwork / "sprites.npy")
    concepts = index["concepts"]
    drawn: dict[str, dict[int, int]] = {artist: {} for artist in ARTISTS}
    for row, sprite in enumerate(index["sprites"]):
        if sprite["style"] in drawn:
            drawn[sprite["style"]][sprite["concept"]] = row
    others = set().union(*(drawn[a] for a in ARTISTS if a != TARGET_ARTIST))
    eligible = sorted(set(drawn[TARGET_ARTIST]) & others)
    random.Random(SEED).shuffle(eligible)

    splits: dict[str, list[dict[str, list[str]]]] = {"test": [], "validation": []}
    chosen: list[int] = []
    for number in range(TEST_SPLITS + VALIDATION_SPLITS):
        part = eligible[number * 2 * CLASSES : (number + 1) * 2 * CLASSES]
        if len(part) < 2 * CLASSES:
            raise SystemExit(f"only {len(eligible)} classes are eligible; split {number} is short")
        names = [concepts[c]["label"] for c in part]
        splits["test" if number < TEST_SPLITS else "validation"].append(
            {"base": sorted(names[:CLASSES]), "new": sorted(names[CLASSES:])}
        )
        chosen += part

    with zipfile.ZipFile(arguments.out, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes) -> None:
            entry = zipfile.ZipInfo(name, date_time=(2024, 1, 1, 0, 0, 0))  # the same bytes at every run
            archive.writestr(entry, content)

        add(
            "index.json",
            json.dumps(
                {
                    "target_artist": TARGET_ARTIST,
                    "splits": splits,
                    "artwork": {
                        artist: {concepts[c]["label"]: f"{artist}/{c:04d}.webp" for c in sorted(chosen) if c in rows}
                        for artist, rows in drawn.items()
                    },
                }
            ).encode(),
        )
        for artist, rows in drawn.items():
            for concept in sorted(c for c in chosen if c in rows):
                image = Image.fromarray(sprites[rows[concept]])
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
                add(f"{artist}/{concept:04d}.webp", buffer.getvalue())
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB, {len(chosen)} classes of {len(eligible)}")


if __name__ == "__main__":
    main()
