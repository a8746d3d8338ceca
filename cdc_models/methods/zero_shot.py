"""Zero-shot CLIP: hand-crafted templates, nothing learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdc_models.clip import ClipBackbone
from cdc_models.clip.classes import check_distinct
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
        ValueError: no template, one without exactly one "{}", or names that are empty, alike or too long.
        RuntimeError: a tokenizer that cannot be had.

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
        self.templates = (templates,) if isinstance(templates, str) else templates
        self._tokens = self._tokenize()
        self.options = {"templates": list(self.templates)}

    def _tokenize(self) -> list[Tensor]:
        """Token ids [K, context length] of the classes in each template."""
        tokens = [self.backbone.tokenize(texts) for texts in fill_templates(self.templates, self.class_names)]
        check_distinct(self.class_names, tokens[0].tolist())
        return tokens

    def _changed_classes(self) -> None:
        super()._changed_classes()
        self._tokens = self._tokenize()

    def text_features(self) -> Tensor:
        with torch.no_grad():
            return torch.stack([self.backbone.encode_text(tokens) for tokens in self._tokens])

    @property
    def frozen_image(self) -> bool:
        return True

    def image_features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone.encode_image(images)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        raise TypeError("ZeroShot learns nothing: evaluate it as it is, or train CoOp, MaPLe or CDC")
