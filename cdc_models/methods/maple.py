"""MaPLe: deep prompts in both towers, the image prompts projected from the text prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdc_models.clip import ClipBackbone, encode_prompted_image, encode_prompted_text
from cdc_models.methods.base import SoftmaxMethod
from cdc_models.methods.options import check_room
from cdc_models.prompts import CoupledPrompts, default_depth
from cdc_models.seeds import check_seed

__all__ = ["MaPLe"]


class MaPLe(SoftmaxMethod):
    """Coupled deep prompts in text and image tower.

    Args:
        backbone: a CLIP both of whose towers can be prompted.
        class_names: the K classes.
        n_ctx: prompt vectors per layer.
        depth: layers with prompts of their own; None: the published 9, or all layers of shallower towers.
        words: what the first prompt vectors start from.
        seed: of the random start.

    Raises:
        ValueError: for a backbone that takes no prompts, a depth or an n_ctx it does not have room for, or names
            that n_ctx leaves no room for.

    Source: MaPLe (Khattak et al., CVPR 2023). ViT-B/16, n_ctx=2, depth=9 gives the published 3,555,072 parameters.

    Example:
        >>> from cdc_models import MaPLe, load_clip
        >>> model = MaPLe(load_clip("bundled"), ["dog", "teapot"])
        >>> model.text_features().shape
        torch.Size([1, 2, 128])
    """

    name = "maple"

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        n_ctx: int = 2,
        depth: int | None = None,
        words: str | None = "a photo of a",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, class_names)
        check_room(backbone, self.classes, n_ctx)
        check_seed(seed)
        depth = default_depth(backbone) if depth is None else depth
        self.options = {"n_ctx": n_ctx, "depth": depth, "words": words, "seed": seed}
        self.prompts = CoupledPrompts(
            backbone, n_ctx, depth, words=words, generator=torch.Generator().manual_seed(seed)
        )

    def text_features(self) -> Tensor:
        context, deep = self.prompts.text()
        return encode_prompted_text(self.backbone, self.classes, context, deep=deep, chunk=self.class_chunk)

    def image_features(self, images: Tensor) -> Tensor:
        context, deep = self.prompts.image()
        return encode_prompted_image(self.backbone, images, context, deep=deep)
