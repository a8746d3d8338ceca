"""The datasets of the papers' protocols: where CoOp's users keep them, and in which layout.

Eleven for base-to-new, cross-dataset and few-shot runs, and four variants of ImageNet for domain generalisation.
Templates are in `cdc_models.prompts.templates`, under the same names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cdc_models.data.layouts import AircraftLists, Layout, SplitFile, SynsetFolders

__all__ = ["BASE_TO_NEW", "IMAGENET_VARIANTS", "Published", "find_published"]


@dataclass(frozen=True)
class Published:
    """A dataset of the protocols.

    Attributes:
        name: CoOp's name for it. folder: its folder below the root of all datasets.
        classes: how many it has when it is whole.
        layout: how it lies in its folder.
        alias: another name in common use, if there is one that is not the folder's.
    """

    name: str
    folder: str
    classes: int
    layout: Layout
    alias: str = ""


BASE_TO_NEW = (
    Published("ImageNet", "imagenet", 1000, SynsetFolders(train="images/train", test="images/val")),
    Published("Caltech101", "caltech-101", 100, SplitFile("101_ObjectCategories", "split_zhou_Caltech101.json")),
    Published("OxfordPets", "oxford_pets", 37, SplitFile("images", "split_zhou_OxfordPets.json"), "Pets"),
    Published(
        "StanfordCars",
        "stanford_cars",
        196,
        SplitFile("", "split_zhou_StanfordCars.json", folders=("cars_train", "cars_test")),
        "Cars",
    ),
    Published("OxfordFlowers", "oxford_flowers", 102, SplitFile("jpg", "split_zhou_OxfordFlowers.json"), "Flowers102"),
    Published("Food101", "food-101", 101, SplitFile("images", "split_zhou_Food101.json")),
    Published("FGVCAircraft", "fgvc_aircraft", 100, AircraftLists(), "Aircraft"),
    Published("SUN397", "sun397", 397, SplitFile("SUN397", "split_zhou_SUN397.json")),
    Published("DescribableTextures", "dtd", 47, SplitFile("images", "split_zhou_DescribableTextures.json")),
    Published("EuroSAT", "eurosat", 10, SplitFile("2750", "split_zhou_EuroSAT.json")),
    Published("UCF101", "ucf101", 101, SplitFile("UCF-101-midframes", "split_zhou_UCF101.json")),
)
"""The datasets of the base-to-new protocol."""

IMAGENET_VARIANTS = (
    Published(
        "ImageNetV2", "imagenetv2", 1000, SynsetFolders("imagenetv2-matched-frequency-format-val", numbered=True)
    ),
    Published("ImageNetSketch", "imagenet-sketch", 1000, SynsetFolders("images")),
    Published("ImageNetA", "imagenet-adversarial", 200, SynsetFolders("imagenet-a")),
    Published("ImageNetR", "imagenet-rendition", 200, SynsetFolders("imagenet-r")),
)
"""The test sets of the domain generalisation protocol, whose source is ImageNet."""


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


_BY_NAME = {_plain(n): d for d in BASE_TO_NEW + IMAGENET_VARIANTS for n in (d.name, d.folder, d.alias) if n}


def find_published(name: str) -> Published | None:
    """The dataset of that name, folder or alias, whatever its capitals, dashes and underscores; None for a path.

    Example:
        >>> find_published("oxford-pets").name, find_published("Flowers102").folder, find_published("dtd").classes
        ('OxfordPets', 'oxford_flowers', 47)
    """
    return None if "/" in name or os.sep in name else _BY_NAME.get(_plain(name))
