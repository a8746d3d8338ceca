"""MaPLe's coupled prompts: text prompts are learned, image prompts are projected from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdc_models.clip.backbone import ClipBackbone, check_backbone
from cdc_models.prompts.context import start_vectors

PUBLISHED_DEPTH = 9


def default_depth(backbone: ClipBackbone, image_start: int = 0) -> int:
    """MaPLe's 9 layers of prompts, or as many as the shallower tower has, the image tower from `image_start` on.

    Raises UnsupportedBackboneError if a tower takes no prompts.

    Example:
        >>> from cdc_models.clip import load_clip
        >>> backbone = load_clip("bundled")
        >>> default_depth(backbone) == min(backbone.text_depth, backbone.image_depth)
        True
    """
    return min(PUBLISHED_DEPTH, backbone.text_depth, backbone.image_depth - image_start)


class CoupledPrompts(nn.Module):
    """Coupled text and image prompts for M templates, J layers deep. Always float32.

    Learned: text prompts [M, J, n, Wt] (layer 0 is the shallow context) and, per template and layer, a linear map
    Wt -> Wv: weight [M, J, Wv, Wt], bias [M, J, Wv]. With ViT-B/16, n = 2, J = 9, M = 1 that is 3,555,072
    parameters, the published number.

    Args:
        backbone: gives the widths and depths, and the embeddings of `words`.
        n: prompt vectors per layer.
        depth: J, layers with prompts of their own, 1..min(depth of the two towers), the image tower from `image_start`.
        m: templates.
        words: the shallow text context starts from the first n token embeddings of this text (or of one text per
            template); None: N(0, std).
        shared_projection: one set of linear maps for all templates instead of M.
        noise: standard deviation of what is added to `words`, to tell templates apart that start from one text.
        std: standard deviation of the deep prompts' random start.
        image_start: the first block of the image tower that sees prompts (`start` of `encode_prompted_image`).
        generator: source of randomness; None: torch's global one.

    Raises:
        ValueError: n or m below 1, a depth that the shallower tower does not have, words of fewer than n tokens or
            not one text per template, a negative deviation.
        UnsupportedBackboneError: a tower that cannot be prompted.

    The start is MaPLe's: linear maps as torch's Linear, those of the deep layers all alike. With M > 1 every
    template draws its own (our reading; MaPLe has one template).

    Source: MaPLe, "Multi-modal Prompt Learning" (Khattak et al., CVPR 2023).

    Example:
        >>> from cdc_models.clip import load_clip
        >>> from cdc_models.prompts import CoupledPrompts
        >>> prompts = CoupledPrompts(load_clip("bundled"), n=2, depth=3, m=4)
        >>> context, deep = prompts.image()
        >>> context.shape[:2], deep.shape[:3]
        (torch.Size([4, 2]), torch.Size([4, 2, 2]))
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        n: int = 2,
        depth: int = 9,
        m: int = 1,
        *,
        words: str | Sequence[str] | None = "a photo of a",
        shared_projection: bool = False,
        noise: float = 0.0,
        std: float = 0.02,
        image_start: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        backbone.require_promptable_text()
        backbone.require_promptable_image()
        last = backbone.image_depth - 1
        if isinstance(image_start, bool) or not isinstance(image_start, int) or not 0 <= image_start <= last:
            raise ValueError(f"image_start: expected a block, 0..{last}, got {image_start!r}")
        deepest = min(backbone.text_depth, backbone.image_depth - image_start)
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= deepest:
            raise ValueError(f"depth: expected 1..{deepest} (the shallower tower), got {depth!r}")
        self.image_start = image_start
        shallow = start_vectors(backbone, n, m, words, noise, std, generator)
        wide, out, device = backbone.text_width, backbone.image_width, backbone.device
        source = generator.device if generator is not None else torch.device("cpu")

        deep = torch.randn(m, depth - 1, n, wide, generator=generator, device=source) * std
        self.text_prompts = nn.Parameter(torch.cat([shallow[:, None], deep.to(device)], dim=1))

        # torch's Linear starts weight and bias uniformly in +-1/sqrt(fan in); one draw for all deep layers.
        sets, bound = 1 if shared_projection else m, wide**-0.5
        layer = [0] + [1] * (depth - 1)
        weight = torch.empty(sets, 2, out, wide, device=source).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(sets, 2, out, device=source).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight[:, layer].to(device))
        self.bias = nn.Parameter(bias[:, layer].to(device))

    def text(self) -> tuple[Tensor, Tensor]:
        """Shallow context [M, n, Wt] and deep prompts [M, J-1, n, Wt] for the text tower."""
        return self.text_prompts[:, 0], self.text_prompts[:, 1:]

    def image(self) -> tuple[Tensor, Tensor]:
        """Shallow context [M, n, Wv] and deep prompts [M, J-1, n, Wv] for the image tower."""
        prompts = self.text_prompts @ self.weight.transpose(-1, -2) + self.bias[:, :, None]
        return prompts[:, 0], prompts[:, 1:]
