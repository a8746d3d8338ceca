"""From settings to the objects of the library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from cdc_models import processes
from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.commands.settings import Backbone, Compute, Data, Draw, Model, RunFailed
from cdc_models.data import ImageDataset, load_dataset
from cdc_models.engine import adapter_info, load_adapter
from cdc_models.methods import Method, ZeroShot

__all__ = ["backbone_of", "dataset_of", "learned_hash", "model_of"]


def backbone_of(name: str, pretrained: str | None, compute: Compute) -> ClipBackbone:
    """The CLIP of these settings, on its device.

    Raises:
        ValueError: for settings that `load_clip` refuses, or a device that is not there, or not for each process.
        RunFailed: for weights that cannot be had.
    """
    device = compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_clip(name, None if name == "bundled" else pretrained, device=processes.own_device(device))
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


def dataset_of(data: Data, draw: Draw | None = None) -> ImageDataset:
    """The dataset of these settings: drawn over all classes, then halved, as published."""
    dataset = load_dataset(
        data.data,
        data.root,
        classes=data.classes,
        template=data.template,
        test=data.test_part,
        val=data.val_part,
        split_seed=data.split_seed,
    )
    if draw is not None and draw.shots:
        dataset = dataset.few_shot(draw.shots, draw.seed)
    return dataset if data.half == "all" else dataset.half(data.half)


def model_of(model: Model, compute: Compute, classes: Sequence[str] | None, template: str) -> Method:
    """An adapter, or zero-shot CLIP, over these classes; None: those that the adapter was trained on.

    Raises:
        ValueError: for zero-shot CLIP without classes, and for what `load_clip` and `load_adapter` refuse.
    """
    if model.adapter is not None:
        origin = adapter_info(model.adapter)["backbone"]
        name, pretrained = origin["name"], origin["pretrained"]
    elif classes:
        name, pretrained = Backbone.backbone, Backbone.pretrained
    else:
        raise ValueError("classes: expected class names for zero-shot CLIP; an adapter has its own")
    backbone = backbone_of(model.backbone or name, model.pretrained or pretrained, compute)
    if model.adapter is None:
        assert classes is not None
        return ZeroShot(backbone, classes, template).to(backbone.device).eval()
    adapter = load_adapter(model.adapter, backbone)
    return adapter if classes is None or tuple(classes) == adapter.class_names else adapter.with_classes(classes)


def learned_hash(model: Method) -> str:
    """SHA-256 over what a method adds to its backbone: tells whether two classifiers are the same."""
    digest = hashlib.sha256(json.dumps([model.name, model.options, list(model.class_names)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("backbone."):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()
