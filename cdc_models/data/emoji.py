"""The bundled benchmark: seen concepts, drawn by artists that the bundled CLIP never saw.

`benchmark.zip` holds lossless WebP artwork (64 x 64, RGBA) of three artists and `index.json`:

    target_artist   the artist of all test images
    splits          {"test": [...], "validation": [...]}, each split {"base": [50 names], "new": [50 names]}
    artwork         artist -> {class name: member of the archive}

No class is in two splits. Hyper-parameters are chosen on the validation splits only. What an image is: artwork
under a drawn rotation, scale, shift, flip and colour change, on a drawn background, with distractors and
occlusion (`compose_scenes`). What this benchmark is not: photographs, or variety within a class; 16 shots of the
target artist are 16 scenes of one drawing. The task "transfer" is the harder one: its shots come from the other
two artists, its test images are the same.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cdc_models.data.scenes import compose_scenes

__all__ = ["TASKS", "EmojiBenchmark", "ImageSet", "emoji_benchmark"]

TASKS = ("artist", "transfer")
SIZE = 48


class ImageSet(Dataset[tuple[Any, int]]):
    """Images in memory with their labels.

    Args:
        images: uint8, [N, 3, H, W].
        targets: int64 labels, [N].
        classes: the K class names.
        transform: applied to the uint8 tensor [3, H, W] of an item, such as a torchvision v2 transform.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a target names no class.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        classes: Sequence[str],
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if targets.shape != images.shape[:1] or targets.dtype != torch.int64:
            raise ValueError(f"targets: expected int64 [{len(images)}], got {targets.dtype} {tuple(targets.shape)}")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(classes):
            raise ValueError(
                f"targets: expected labels in [0, {len(classes)}), got {int(targets.min())} to {int(targets.max())}"
            )
        self.images, self.targets, self.classes, self.transform = images, targets, tuple(classes), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), int(self.targets[index])

    def with_transform(self, transform: Callable[[Tensor], Any] | None) -> ImageSet:
        """The same images under another transform."""
        return ImageSet(self.images, self.targets, self.classes, transform)


@dataclass(frozen=True)
class EmojiBenchmark:
    """One class split: shots of the base classes, further shots to fit a head on, and tests of both halves.

    Labels count from 0 within each half, as in CoCoOp's base-to-new protocol.
    """

    train: ImageSet
    val: ImageSet
    base_test: ImageSet
    new_test: ImageSet


@lru_cache(maxsize=1)
def _archive() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    data = files("cdc_models").joinpath("bundled/benchmark.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        index = json.loads(archive.read("index.json"))
        art = {
            member: np.asarray(Image.open(io.BytesIO(archive.read(member))).convert("RGBA"))
            for names in index["artwork"].values()
            for member in names.values()
        }
    return index, art


def emoji_benchmark(
    split: int = 0,
    seed: int = 1,
    *,
    task: str = "artist",
    partition: str = "test",
    shots: int = 16,
    val_shots: int = 4,
    test_per_class: int = 16,
    hardness: float = 1.0,
) -> EmojiBenchmark:
    """One split of the bundled benchmark.

    Args:
        split: which class split (test: 0 to 4, validation: 0 to 1).
        seed: draws the shots; the test images depend on the split alone, so that methods and seeds are paired.
        task: "artist" (shots by the target artist) or "transfer" (shots by the two other unseen artists).
        partition: "test" (reported) or "validation" (to choose hyper-parameters on).
        shots, val_shots, test_per_class: images per class.
        hardness: of the scenes, see `compose_scenes`; the benchmark's own is 1, chosen on the validation splits
            (benches/hardness.py).

    Raises:
        ValueError: for an unknown task, partition or split, counts below one, or a hardness outside [0, 1].

    Example:
        >>> data = emoji_benchmark(split=0, seed=1, shots=2, test_per_class=1)
        >>> len(data.train), len(data.train.classes), data.train[0][0].shape
        (100, 50, torch.Size([3, 48, 48]))
    """
    index, art = _archive()
    if task not in TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {task!r}")
    if partition not in index["splits"]:
        raise ValueError(f"partition: expected one of {tuple(index['splits'])}, got {partition!r}")
    splits = index["splits"][partition]
    if not 0 <= split < len(splits):
        raise ValueError(f"split: expected 0 to {len(splits) - 1} for partition {partition!r}, got {split}")
    if not 0 <= seed < 1000:
        raise ValueError(f"seed: expected 0 to 999, got {seed}")
    for name, count in (("shots", shots), ("val_shots", val_shots), ("test_per_class", test_per_class)):
        if count < 1:
            raise ValueError(f"{name}: expected a positive number, got {count}")
    base, new = splits[split]["base"], splits[split]["new"]
    target = index["target_artist"]
    artists = [target] if task == "artist" else [a for a in index["artwork"] if a != target]
    root = ("test", "validation").index(partition) * 1000 + split

    def scenes(classes: Sequence[str], artists: Sequence[str], count: int, seed: int) -> ImageSet:
        """`count` scenes per class; a class drawn by several artists alternates between them."""
        members = [
            (k, drawings[i % len(drawings)])
            for k, name in enumerate(classes)
            for drawings in [[index["artwork"][a][name] for a in artists if name in index["artwork"][a]]]
            for i in range(count)
        ]
        sprites = torch.from_numpy(np.stack([art[member] for _, member in members])).permute(0, 3, 1, 2)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(members), generator=generator)  # distractors come from neighbours in the batch
        drawn = torch.empty(len(members), 3, SIZE, SIZE, dtype=torch.uint8)
        for rows in order.split(256):
            images = compose_scenes(sprites[rows], size=SIZE, hardness=hardness, generator=generator)
            drawn[rows] = (images * 255).round().to(torch.uint8)
        return ImageSet(drawn, torch.tensor([k for k, _ in members]), classes)

    def stream(seed: int, kind: int) -> int:  # one random stream per (split, seed, kind of images)
        return (root * 1000 + seed) * 4 + kind

    return EmojiBenchmark(
        train=scenes(base, artists, shots, stream(seed, 0)),
        val=scenes(base, artists, val_shots, stream(seed, 1)),
        base_test=scenes(base, [target], test_per_class, stream(0, 2)),
        new_test=scenes(new, [target], test_per_class, stream(0, 3)),
    )
