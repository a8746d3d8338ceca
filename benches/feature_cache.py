"""What keeping image features on disk saves: CoOp trained from image files, and from cached features.

    python benches/feature_cache.py --out benches/results/feature_cache

800 image files (16 shots of 50 classes of the bundled benchmark, enlarged to `--pixels`) through the test transform
and the bundled CLIP, `--epochs` epochs of the same CoOp. That the features are the same is checked first. What is left
of the time is the text tower's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import facts
import torch
from torchvision.transforms.v2.functional import to_pil_image

from cdc_models import CoOp, fit, load_clip
from cdc_models.data import ImageList, ImageLoader, emoji_benchmark, test_transform
from cdc_models.engine import FeatureLoader, cache_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    clip = load_clip("bundled")
    data = emoji_benchmark(0, 1).train
    with tempfile.TemporaryDirectory() as folder:
        items = []
        for i, (image, target) in enumerate(zip(data.images, data.targets.tolist(), strict=True)):
            size = (arguments.pixels, arguments.pixels)
            to_pil_image(image).resize(size).save(Path(folder) / f"{i}.jpg", quality=90)
            items.append((f"{i}.jpg", target))
        photos = ImageList(folder, items, data.classes, test_transform(clip))

        def train(loader: object) -> CoOp:
            model = CoOp(clip, data.classes, seed=1)
            fit(model, loader, epochs=arguments.epochs, lr=0.01, seed=1, progress=False)
            return model

        def timed(what: Callable[[], object]) -> tuple[float, object]:
            started = time.perf_counter()
            result = what()
            return time.perf_counter() - started, result

        def cache() -> object:
            return cache_features(CoOp(clip, data.classes), photos, Path(folder) / "cache", progress=False)

        first, _ = timed(cache)
        again, cached = timed(cache)
        # parity: features of one order of batches, and images of the same
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0)).split(16)
        with torch.no_grad():
            for rows in order[:10]:
                x = torch.stack([photos[int(i)][0] for i in rows])
                assert torch.allclose(clip.encode_image(x), cached.image[0, rows], atol=1e-4)
        from_features, _ = timed(lambda: train(FeatureLoader(cached, 16, seed=1)))
        from_images, _ = timed(lambda: train(ImageLoader(photos, 16, seed=1)))
    row = {
        "epochs": arguments.epochs,
        "images": len(photos),
        "pixels": arguments.pixels,
        "seconds": {
            "training from image files": from_images,
            "computing and writing the cache, once": first,
            "reading the cache": again,
            "training from cached features": from_features,
        },
        **facts.facts("cpu"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    for what, seconds in row["seconds"].items():
        print(f"{seconds:7.2f} s  {what}")
    print(f"a further run: {from_images / (again + from_features):.1f} times faster from the cache")


if __name__ == "__main__":
    main()
