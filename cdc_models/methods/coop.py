"""CoOp: learn the words in front of the class name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from cdc_models.clip import ClipBackbone, encode_prompted_text
from cdc_models.clip.text_layout import POSITIONS
from cdc_models.methods.base import SoftmaxMethod
from cdc_models.methods.options import check_flags, check_room
from cdc_models.prompts import PromptContext
from cdc_models.seeds import check_seed
from cdc_ops import checks

__all__ = ["CoOp"]


class CoOp(SoftmaxMethod):
    """A learned text context; the image side is zero-shot CLIP's.

    Args:
        backbone: a CLIP whose text tower can be prompted.
        class_names: the K classes.
        n_ctx: learned vectors per prompt.
        words: start from these words' embeddings; None starts from N(0, 0.02).
        class_specific: a context of its own for every class (then `with_classes` has nothing to offer).
        position: where the class name stands: "end", "middle" or "front" of the context.
        seed: of the random start.

    Raises:
        ValueError: for a backbone whose text tower takes no prompts, an unknown position, an n_ctx its context
            does not hold, or names that n_ctx leaves no room for.

    Source: CoOp (Zhou et al., IJCV 2022).

    Example:
        >>> from cdc_models import CoOp, load_clip
        >>> model = CoOp(load_clip("bundled"), ["dog", "teapot"], n_ctx=4)
        >>> sum(p.numel() for p in model.learned_parameters().values())
        512
    """

    name = "coop"

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        n_ctx: int = 4,
        words: str | None = "a photo of a",
        class_specific: bool = False,
        position: str = "end",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, class_names)
        checks.one_of("position", position, POSITIONS)
        check_flags(class_specific=class_specific)
        check_seed(seed)
        check_room(backbone, self.classes, n_ctx)
        self.class_specific, self.position = class_specific, position
        self.options = {
            "n_ctx": n_ctx,
            "words": words,
            "class_specific": class_specific,
            "position": position,
            "seed": seed,
        }
        self.context = PromptContext(
            backbone,
            n_ctx,
            words=words,
            n_classes=len(self.class_names) if class_specific else None,
            generator=torch.Generator().manual_seed(seed),
        )

    def text_features(self) -> Tensor:
        return encode_prompted_text(
            self.backbone, self.classes, self.context(), position=self.position, chunk=self.class_chunk
        )

    @property
    def frozen_image(self) -> bool:
        return True

    def image_features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone.encode_image(images)

    def with_classes(self, names: Sequence[str]) -> Self:
        if self.class_specific:
            raise ValueError(
                "names: a class-specific context was learned for its own classes and says nothing about others; "
                "train with class_specific=False to transfer"
            )
        return super().with_classes(names)
