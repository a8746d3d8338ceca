"""Zero-shot CLIP: hand-crafted templates, nothing learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdc_models.clip import ClipBackbone
from cdc_models.methods.base import SoftmaxMethod
from cdc_models.prompts.templates import fill_templates

__all__ = ["ZeroShot"]


class ZeroShot(SoftmaxMethod):
    """CLIP with one hand-crafted template, or the averaged features of several.

    Works with every open_clip backbone, prompts or not.

    Args:
        backbone: a CLIP from `load_clip`.
        class_names: the K classes.
        templates: one template or a sequence of them, each with one "{}".

    Raises:
        ValueError: no template, or one without exactly one "{}".

    Source: CLIP (Radford et al., ICML 2021), zero-shot prediction and prompt ensembling.

    Example:
        >>> from cdc_models import load_clip, ZeroShot
        >>> model = ZeroShot(load_clip("bundled"), ["dog", "teapot"])
        >>> model.text_features().shape
        torch.Size([1, 2, 128])
    """

    name = "zero_shot"
    prompted = False

    def __init__(
        self, backbone: ClipBackbone, class_names: Sequence[str], templates: str | Sequence[str] = "a photo of a {}."
    ) -> None:
        super().__init__(backbone, class_names)
        templates = (templates,) if isinstance(templates, str) else templates
        fill_templates(templates, self.class_names)  # which checks them
        self.templates = tuple(templates)
        self.options = {"templates": list(self.templates)}

    def text_features(self) -> Tensor:
        filled = fill_templates(self.templates, self.class_names)
        with torch.no_grad():
            return torch.stack([self.backbone.encode_text(self.backbone.tokenize(texts)) for texts in filled])

    @property
    def frozen_image(self) -> bool:
        return True

    def image_features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone.encode_image(images)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        raise TypeError("ZeroShot learns nothing: evaluate it as it is, or train CoOp, MaPLe or CDC")
