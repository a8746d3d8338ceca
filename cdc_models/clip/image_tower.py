"""CLIP's image tower with learned prompts, shallow and deep."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from cdc_models.clip.anatomy import OpenClip
from cdc_models.clip.backbone import ClipBackbone, check_backbone
from cdc_models.clip.blocks import attention, run_block
from cdc_models.clip.checks import check_images, check_prompts


def encode_prompted_image(
    backbone: ClipBackbone, images: Tensor, context: Tensor, *, deep: Tensor | None = None, start: int = 0
) -> Tensor:
    """Image features under M prompts, unnormalised: [B, M, D].

    What does not depend on the prompt is computed once for images that the prompts share: the patch embedding, and
    the blocks before `start`.

    Args:
        backbone: a CLIP whose image tower is open_clip's own VisionTransformer.
        images: [B, 3, H, W], shared by the prompts, or [B, M, 3, H, W], one image per prompt; normalised as by
            `backbone.preprocess`.
        context: [M, n, Wv], appended at the end of the sequence, after the position embedding and before ln_pre;
            with `start`, before that block, as it is. n = 0 gives the unprompted features M times.
        deep: [M, J-1, n, Wv], takes the place of the last n tokens before blocks start+1..start+J-1.
        start: the first block that sees prompts.

    The feature is read where the backbone reads it: at the class token, or, for towers that average or pool by
    attention, over the image's own tokens; the prompt tokens are never pooled (our reading for the latter, which
    the paper does not treat).

    Raises:
        ValueError: wrong shapes, dtypes or devices, non-finite images, a start that is no block.
        UnsupportedBackboneError: a tower that cannot be prompted.

    Source: MaPLe (Khattak et al., CVPR 2023), Section 3.2; `start` is ours.

    Example:
        >>> import torch
        >>> from cdc_models.clip import encode_prompted_image, load_clip
        >>> backbone = load_clip("bundled")
        >>> images = torch.zeros(2, 3, backbone.image_size, backbone.image_size)
        >>> encode_prompted_image(backbone, images, torch.zeros(4, 2, backbone.image_width)).shape[:2]
        torch.Size([2, 4])
    """
    check_backbone(backbone)
    backbone.require_promptable_image()
    visual: OpenClip = backbone.clip.visual
    blocks = visual.transformer.resblocks
    if not 0 <= start < len(blocks):
        raise ValueError(f"start: expected a block of the tower, 0..{len(blocks) - 1}, got {start}")
    check_prompts(context, deep, width=backbone.image_width, depth=len(blocks) - start, device=backbone.device)
    m = context.size(0)
    check_images(images, backbone.image_shape, backbone.device, prompts=m)

    own = images.ndim == 5  # one image per prompt
    # ln_pre is per token, so normalising image and prompts apart is the same and is done once for shared images.
    x = visual.ln_pre(_embed(visual, rearrange(images, "b m c h w -> (b m) c h w") if own else images))
    for block in blocks[:start]:
        x = run_block(block, x, attention)
    x = x if own else repeat(x, "b l w -> (b m) l w", m=m)
    b, length = images.size(0), x.size(1)

    context = context.to(x.dtype)
    prompts = repeat(visual.ln_pre(context) if start == 0 else context, "m n w -> (b m) n w", b=b)
    x = torch.cat([x, prompts], dim=1)  # [B*M, L + n, W]
    read_class = visual.attn_pool is None and visual.pool_type == "tok"
    wanted = 1 if read_class else length
    for i, block in enumerate(blocks[start:]):
        if deep is not None and 1 <= i <= deep.size(1):
            prompts = repeat(deep[:, i - 1].to(x.dtype), "m n w -> (b m) n w", b=b)
            x = torch.cat([x[:, :length], prompts], dim=1)
        last = start + i == len(blocks) - 1
        x = run_block(block, x, attention, (lambda t: t[:, :wanted]) if last else None)

    x = _pool(visual, x)
    if visual.proj is not None:
        x = x @ visual.proj
    return rearrange(x, "(b m) d -> b m d", m=m)


def _embed(visual: OpenClip, images: Tensor) -> Tensor:
    """Class token and patches with their position embedding, before ln_pre: [N, L, W]."""
    x = rearrange(visual.conv1(images.to(visual.conv1.weight.dtype)), "n w i j -> n (i j) w")
    token = visual.class_embedding.to(x.dtype).expand(x.size(0), 1, -1)
    return torch.cat([token, x], dim=1) + visual.positional_embedding.to(x.dtype)


def _pool(visual: OpenClip, x: Tensor) -> Tensor:
    """One vector per image from the class token and, where the tower reads them, the patches: [N, L, W] -> [N, W]."""
    if visual.attn_pool is not None:
        x = visual.ln_post(visual.attn_pool(x))
        return x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(dim=1)
    if not visual.final_ln_after_pool:
        x = visual.ln_post(x)
    x = x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(dim=1)
    return visual.ln_post(x) if visual.final_ln_after_pool else x
