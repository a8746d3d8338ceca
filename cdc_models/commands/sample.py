"""`cdc sample`: a folder of labelled pictures and one of unlabelled ones, to try the other commands on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.utils import save_image

from cdc_models.commands.settings import Output
from cdc_models.data import ImageSet, emoji_benchmark

__all__ = ["Pictures", "sample"]


@dataclass(frozen=True)
class Pictures:
    """How many, and where to.

    Args:
        out: folder for labelled/<class>/, unlabelled/ and truth.csv; must not exist yet.
        classes: how many, at most 50.
        images: labelled pictures of each.
        seed: of the pictures.
    """

    out: Path = Path("photos")
    classes: int = 20
    images: int = 24
    seed: int = 1


def sample(what: Pictures, output: Output) -> None:
    """Write some pictures of the bundled benchmark as files, to try the other commands on.

    labelled/ is a folder of class-named folders. In unlabelled/ are two further pictures of each of these classes, and
    as many of classes that are not among them; truth.csv says which is which.
    """
    if not 1 <= what.classes <= 50 or what.images < 1:
        raise ValueError(f"classes, images: expected 1 to 50 and at least 1, got {what.classes}, {what.images}")
    if what.out.exists():
        raise ValueError(f"out: {what.out} exists; give another folder, or delete it")
    data = emoji_benchmark(0, what.seed, partition="validation", shots=what.images, val_shots=2, test_per_class=2)
    for k, name in enumerate(data.train.classes[: what.classes]):
        _save(data.train, k, what.out / "labelled" / name)
    rest = [(part, k) for part in (data.val, data.new_test) for k in range(what.classes)]
    order = torch.randperm(2 * len(rest), generator=torch.Generator().manual_seed(what.seed)).tolist()
    folder = what.out / "unlabelled"
    folder.mkdir(parents=True)
    truth = []
    for (part, k), places in zip(rest, zip(order[::2], order[1::2], strict=True), strict=True):
        for image, place in zip(_of(part, k), places, strict=True):
            save_image(image / 255, folder / f"{place:03d}.png")
            truth.append((f"{place:03d}.png", part.classes[k], part is data.val))
    with (what.out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "known"), *sorted(truth)])
    labelled = what.classes * what.images
    output.result({"folder": str(what.out), "labelled": labelled, "unlabelled": len(truth)})
    output.say(
        f"{what.out}: {labelled} labelled pictures of {what.classes} classes, {len(truth)} unlabelled, half of them of "
        "other classes"
    )


def _of(part: ImageSet, k: int) -> torch.Tensor:
    return part.images[part.targets == k]


def _save(part: ImageSet, k: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(_of(part, k)):
        save_image(image / 255, folder / f"{i:02d}.png")
