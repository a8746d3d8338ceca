"""What an open_clip network is made of, read from its public attributes, and whether it can be prompted.

Everything the towers need to know about the differences between open_clip's network classes is in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
class Reading:
    """Which tokens of a text a tower sees, and where it is read.

    causal: no token sees a later one.
    at: the token that is read: the end of the text, or the first or last of the whole length, padding and all; None:
        all of them.
    hidden: the id of padding that no token sees; None: padding is seen like everything else.
    appended: a class embedding stands behind the whole length and is read (CoCa).
    shifted: what is hidden lies one token too far to the right, as the published CoCa weights were trained.
    """

    causal: bool
    at: Literal["end", "first", "last"] | None
    hidden: int | None
    appended: bool
    shifted: bool

    @property
    def only_up_to_the_end(self) -> bool:
        """Whether nothing behind the end of the text matters, nor anything to what stands before it."""
        return self.causal and self.at == "end"


@dataclass(frozen=True)
class TextParts:
    """The parts of a text tower, the same for open_clip's flat CLIP and for its classes with a `.text` module."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # [context_length, W]
    blocks: Sequence[OpenClip]
    ln_final: nn.Module
    projection: Tensor | nn.Linear | None
    class_embedding: Tensor | None  # [W], where a tower appends one
    reading: Reading
    eos_id: int | None  # the id that a tower looks for to find the end, where it does

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
    pool_type = tower.text_pool_type if flat else tower.pool_type
    appended = getattr(tower, "cls_emb", None)
    if appended is not None:
        pool_type = "last"
    hides = appended is not None or getattr(tower, "use_pad_mask", False)
    places: dict[str, Literal["end", "first", "last"]]
    places = {"argmax": "end", "eos": "end", "first": "first", "last": "last"}
    return TextParts(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tower.transformer.resblocks,
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        class_embedding=appended,
        reading=Reading(
            causal=tower.attn_mask is not None,
            at=places.get(pool_type),
            hidden=tower.pad_id if hides else None,
            appended=appended is not None,
            shifted=appended is not None and not tower.correct_cls_mask,
        ),
        eos_id=(tower.text_eos_id if flat else tower.eos_id) if pool_type == "eos" else None,
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
    if parts.reading.at is None:
        return "it returns tokens instead of one feature"
    if parts.reading.causal and parts.reading.at == "first":
        return "it reads the first token, which sees nothing of the name behind it"
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
