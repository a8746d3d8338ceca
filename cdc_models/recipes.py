"""How a method is built and trained on a dataset: the steps that `cdc train` and the protocols share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cdc_models import processes
from cdc_models.clip import ClipBackbone
from cdc_models.clip.checks import check_count
from cdc_models.data import (
    ImageDataset,
    ImageList,
    ImageLoader,
    ImageReport,
    SkippedImage,
    test_transform,
    train_transform,
)
from cdc_models.engine import CachedFeatures, FeatureLoader, FitResult, cache_features, fit
from cdc_models.methods import METHODS, Method, ZeroShot

__all__ = [
    "Recipe",
    "Training",
    "build",
    "cached_training",
    "check_cached",
    "on_dataset",
    "reader",
    "recipe",
    "recipes_of",
    "report_of",
    "train_on",
]


@dataclass(frozen=True)
class Training:
    """How a method is trained.

    The defaults are MaPLe's published base-to-new settings.

    Args:
        epochs: passes over the training images, those of the warm-up among them: with no others, lr is never used.
        lr: learning rate of SGD after the warm-up, falling as a cosine.
        batch: images a step.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup_epochs: epochs at warmup_lr.
        warmup_lr: learning rate of the warm-up.
        crop: smallest area of a training crop, as a part of the image.
        autocast: number format of the towers' arithmetic; what is learned stays float32.
    """

    epochs: int = 5
    lr: float = 0.0035
    batch: int = 4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    crop: float = 0.08
    autocast: Literal["no", "bfloat16"] = "no"


@dataclass(frozen=True)
class Recipe:
    """A method with its options and its training."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)


def recipe(label: str, changes: dict[str, Any], training: Training) -> Recipe:
    """The recipe of a label: a method's name, or any label whose changes name the "method".

    Args:
        label: for example "maple".
        changes: "method", "options", and fields of `Training`.
        training: what holds where `changes` says nothing.

    Raises:
        ValueError: for an unknown method, or a change of something that is not there.

    Example:
        >>> recipe("CDC, slow", {"method": "cdc", "lr": 0.001}, Training()).training.lr
        0.001
    """
    changes = dict(changes)
    method, options = changes.pop("method", label), changes.pop("options", {})
    if method not in METHODS:
        raise ValueError(f"methods: {label!r} is none of {sorted(METHODS)}, nor do the settings give it a method")
    if unknown := sorted(changes.keys() - {f.name for f in fields(Training)}):
        raise ValueError(f"settings: {label!r} changes {unknown}; expected method, options or fields of the training")
    if method == ZeroShot.name:
        return Recipe(method, dict(options))  # how others are trained makes it no other
    return Recipe(method, dict(options), replace(training, **changes))


def build(method: str, options: dict[str, Any], backbone: ClipBackbone, data: ImageDataset, seed: int) -> Method:
    """A method over the classes of a dataset, untrained.

    Unless the options say otherwise, hand-crafted templates are the dataset's, and a random start has this seed.

    Raises:
        ValueError: for an option that the method does not have, or one out of range.
    """
    cls = METHODS[method]
    known = list(inspect.signature(cls).parameters)[2:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"options: {method} has no {', '.join(unknown)}; it has {', '.join(known)}")
    defaults = {"templates": [data.template], "hand_crafted": data.template, "seed": seed}
    chosen = {**{name: value for name, value in defaults.items() if name in known}, **options}
    try:
        return cls(backbone, data.classes, **chosen).to(backbone.device)
    except TypeError as error:
        raise ValueError(f"options: {method} cannot be built with {options}: {error}") from error


def on_dataset(model: Method, data: ImageDataset, options: dict[str, Any] | None = None) -> Method:
    """What a method has learned, over the classes of another dataset; zero-shot CLIP also takes its template."""
    if isinstance(model, ZeroShot):
        other = build("zero_shot", options or {}, model.backbone, data, 0)
        other.load_state_dict({"temperature": model.temperature}, strict=False)
        return other
    return model if model.class_names == data.classes else model.with_classes(data.classes)


def reader(images: ImageList, backbone: ClipBackbone, batch: int, workers: int) -> ImageLoader:
    """Images in order, under the test transform; of several processes, each reads its share.

    Raises:
        ValueError: if there are none.
    """
    if not len(images):
        raise ValueError(f"data: expected images to look at, {images.root} lists none for this split")
    return ImageLoader(
        images.with_transform(test_transform(backbone)),
        batch,
        num_workers=workers,
        pin_memory=backbone.device.type == "cuda",
        part=processes.part(),
    )


def report_of(loader: ImageLoader | FeatureLoader) -> ImageReport:
    """What a loader has skipped; of several processes, what all have."""
    skipped = processes.gather_json([asdict(image) for image in loader.report.skipped])
    return ImageReport(loader.report.total, [SkippedImage(**image) for each in skipped for image in each])


def check_cached(model: Method, draws: int) -> None:
    """Raise ValueError unless a method can be trained on image features that are computed once."""
    if not model.frozen_image:
        raise ValueError(
            f"feature_cache: {model.name} with these options learns on its image side, which changes the features of "
            "images at every step; leave feature_cache out, or take a method that learns on texts alone, such as coop"
        )
    check_count("feature_draws", draws)
    if (count := processes.part()[1]) > 1:
        raise ValueError(f"feature_cache: training on cached features is the work of one process, got {count}")


def cached_training(
    model: Method,
    data: ImageDataset,
    training: Training,
    folder: Path,
    *,
    draws: int,
    seed: int,
    batch: int,
    workers: int = 0,
    progress: bool = True,
) -> CachedFeatures:
    """Features of the training images under so many random crops and flips, from a folder where they are there already.

    Raises:
        ValueError: for a method that learns on its image side, several processes, or no training images.
    """
    check_cached(model, draws)
    return cache_features(
        model,
        _training_images(model, data, training),
        folder,
        draws=draws,
        seed=seed,
        batch_size=batch,
        num_workers=workers,
        progress=progress,
    )


def _training_images(model: Method, data: ImageDataset, training: Training) -> ImageList:
    if not len(data.train):
        raise ValueError(f"data: {data.name} has no training images")
    if not 0 < training.crop <= 1:
        raise ValueError(f"crop: expected an area in (0, 1], got {training.crop}")
    return data.train.with_transform(train_transform(model.backbone, scale=(training.crop, 1.0)))


def train_on(
    model: Method,
    data: ImageDataset,
    training: Training,
    *,
    seed: int,
    workers: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 0,
    compile: bool = False,
    cached: CachedFeatures | None = None,
    progress: bool = True,
) -> tuple[FitResult, ImageReport]:
    """Train a method on the training images of a dataset, as published: shuffled, cropped, flipped, whole batches.

    Several processes share each batch, and take the steps that one would: only what `Views` draw differs.

    Args:
        model, data, training: what is trained on what, and how.
        seed: of order, crops and flips. compile: run the step through torch.compile.
        cached: from `cached_training`: what is trained on instead of the images.
        workers, checkpoint, checkpoint_every, progress: as the arguments of `ImageLoader` and `fit`.

    Returns:
        What `fit` returns, and which images were skipped.

    Raises:
        ValueError: for a dataset without training images; and what `fit` raises.
    """
    images = _training_images(model, data, training)
    loader: ImageLoader | FeatureLoader
    if cached is not None:
        loader = FeatureLoader(cached, training.batch, seed, drop_last=True)
    else:
        loader = ImageLoader(
            images,
            training.batch,
            seed=seed,
            num_workers=workers,
            drop_last=True,
            pin_memory=model.backbone.device.type == "cuda",
            part=processes.part(),
        )
    if compile:
        model.compile(fullgraph=True)
    result = fit(
        model,
        loader,
        epochs=training.epochs,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        warmup_epochs=training.warmup_epochs,
        warmup_lr=training.warmup_lr,
        seed=seed,
        autocast=torch.bfloat16 if training.autocast == "bfloat16" else None,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return result, report_of(loader)


def recipes_of(methods: Sequence[str], settings: dict[str, dict[str, Any]], training: Training) -> dict[str, Recipe]:
    """Label -> recipe, for the methods wanted.

    Raises:
        ValueError: for none, a label twice, or settings of a label that is not among them and no method either.
    """
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods: expected distinct names, at least one, got {list(methods)}")
    if unknown := sorted(settings.keys() - set(methods) - set(METHODS)):
        raise ValueError(f"settings: {unknown} are not among the methods {list(methods)}")
    return {label: recipe(label, settings.get(label, {}), training) for label in methods}
