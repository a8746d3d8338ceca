"""What an open_clip network is made of, read from its public attributes, and whether it can be prompted.

Everything the towers need to know about the differences between open_clip's network classes is in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn

OpenClip = Any
"""An open_clip module. open_clip ships no types, and nn.Module hides those of attributes."""


@dataclass(frozen=True)
class TextParts:
    """The parts of a text tower, the same for open_clip's flat CLIP and for its classes with a `.text` module."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # [context_length, W]
    blocks: Sequence[OpenClip]
    ln_final: nn.Module
    projection: Tensor | nn.Linear | None
    causal: bool
    pool_type: str
    eos_id: int | None

    @property
    def width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def embed_dim(self) -> int:
        if isinstance(self.projection, nn.Linear):
            return self.projection.out_features
        return self.width if self.projection is None else self.projection.size(1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype open_clip's own forward runs the residual stream in (that of the block weights)."""
        return self.blocks[0].get_weight_dtype()

    def project(self, x: Tensor) -> Tensor:
        """Map pooled states [..., W] to the shared space [..., D]."""
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Module) else x @ self.projection


def text_parts(clip: OpenClip) -> TextParts | None:
    """The text tower's parts, or None where the tower is not one of open_clip's own transformers."""
    tower = getattr(clip, "text", clip)
    if tower is not clip and not isinstance(tower, TextTransformer):
        return None
    flat = tower is clip
    if flat and not hasattr(clip, "token_embedding"):
        return None
    return TextParts(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tower.transformer.resblocks,
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        causal=tower.attn_mask is not None,
        pool_type=tower.text_pool_type if flat else tower.pool_type,
        eos_id=tower.text_eos_id if flat else tower.eos_id,
    )


def block_obstacle(blocks: Iterable[OpenClip]) -> str | None:
    """Why blocks of this kind are not supported, or None if they are."""
    for block in blocks:
        if isinstance(block, ResidualAttentionBlock):
            if hasattr(block, "ln_1_kv"):
                return "it has cross-attention blocks"
        elif isinstance(block, CustomResidualAttentionBlock) and isinstance(block.attn, Attention):
            if block.attn.scaled_cosine:
                return "its blocks use scaled cosine attention"
        else:
            return f"its blocks are {type(block).__name__}"
    return None


def text_obstacle(clip: OpenClip) -> str | None:
    """Why the text tower cannot be prompted, or None if it can."""
    parts = text_parts(clip)
    if parts is None:
        return f"it is a {type(getattr(clip, 'text', clip)).__name__}, not one of open_clip's own text transformers"
    tower = getattr(clip, "text", clip)
    if getattr(tower, "cls_emb", None) is not None:
        return "it reads an appended class token instead of the end-of-text token (CoCa)"
    if parts.pool_type not in ("argmax", "eos"):
        return f"it pools by {parts.pool_type!r} instead of reading the end-of-text token"
    if getattr(tower, "use_pad_mask", False):
        return "it is bidirectional with a padding mask"
    return block_obstacle(parts.blocks)


def image_obstacle(clip: OpenClip) -> str | None:
    """Why the image tower cannot be prompted, or None if it can."""
    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        return f"it is a {type(visual).__name__}, not open_clip's own VisionTransformer"
    if getattr(visual, "attn_pool_contrastive", None) is not None:
        return f"it pools by a {visual.attn_pool_type!r} pair of attentional poolers"
    if visual.pool_type not in ("tok", "avg"):
        return f"it pools by {visual.pool_type!r}: it returns tokens instead of one feature"
    return block_obstacle(visual.transformer.resblocks)
