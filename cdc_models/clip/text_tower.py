"""CLIP's text tower with learned prompts, shallow and deep, without waste (docs/mathematics.md, 6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cdc_models.clip.anatomy import text_parts
from cdc_models.clip.backbone import ClipBackbone, check_backbone
from cdc_models.clip.blocks import run_block
from cdc_models.clip.checks import check_count, check_prompts
from cdc_models.clip.classes import ClassTokens, tokenize_classes
from cdc_models.clip.text_layout import POSITIONS, text_layout

__all__ = ["ClassTokens", "encode_prompted_text", "tokenize_classes"]


def encode_prompted_text(
    backbone: ClipBackbone,
    classes: ClassTokens,
    context: Tensor,
    *,
    deep: Tensor | None = None,
    position: str = "end",
    chunk: int | None = None,
) -> Tensor:
    """Text features of K classes under M prompts, unnormalised: [M, K, D].

    A prompt is [SOS][v_1..v_n][class tokens . EOT][padding], without SOS where the tokenizer has none. In causal
    towers that read the end of the text, padding is dropped and the prefix that all classes share is computed once per
    prompt; both are exact. Other towers (SigLIP, CLIPA, CoCa) are given every prompt at full length, and are read where
    open_clip reads them. Gradients flow to `context` and `deep`.

    Args:
        backbone: a CLIP whose text tower is open_clip's own.
        classes: from `tokenize_classes`.
        context: [M, n, W], shared by the classes, or [M, K, n, W], class-specific.
        deep: [M, J-1, n, W], takes the place of the n context tokens before blocks 1..J-1, without position
            embedding (MaPLe); only with a shared context at position "end".
        position: where the class name stands: "end" (behind the context), "middle" (between its halves) or "front".
        chunk: encode at most so many classes at a time and, where gradients are wanted, compute their activations
            again in the backward pass: memory for `chunk` classes instead of K, for one more forward pass of time.

    Raises:
        ValueError: wrong shapes, dtypes, devices, position or chunk, class names that leave no room for the context.
        UnsupportedBackboneError: a tower that cannot be prompted.

    Source: CoOp (Zhou et al., IJCV 2022) for context and position; MaPLe (Khattak et al., CVPR 2023), Section 3.2,
    for deep prompts.

    Example:
        >>> import torch
        >>> from cdc_models.clip import encode_prompted_text, load_clip, tokenize_classes
        >>> backbone = load_clip("bundled")
        >>> classes = tokenize_classes(backbone, ["cat", "dog", "fire engine"])
        >>> encode_prompted_text(backbone, classes, torch.zeros(4, 2, backbone.text_width)).shape[:2]
        torch.Size([4, 3])
    """
    check_backbone(backbone)
    backbone.require_promptable_text()
    if not isinstance(classes, ClassTokens):
        raise ValueError(f"classes: expected what tokenize_classes gives, got {type(classes).__name__}")
    parts = text_parts(backbone.clip)
    assert parts is not None  # promptable
    if position not in POSITIONS:
        raise ValueError(f"position: expected one of {POSITIONS}, got {position!r}")
    depth = len(parts.blocks)
    check_prompts(context, deep, width=parts.width, depth=depth, device=backbone.device, classes=len(classes))
    if deep is not None and position != "end":
        raise ValueError(f"deep: deep prompts need position='end', got position={position!r}")
    classes.require_room(backbone.text_room, context.size(-2), "classes")
    if chunk is not None:
        check_count("chunk", chunk)
    if chunk is None or chunk >= len(classes):
        return _encode(backbone, classes, context, deep, position)
    pieces, back = classes.chunks(chunk)
    features = []
    for places, piece in pieces:
        own = context[:, places] if context.ndim == 4 else context
        features.append(
            checkpoint(_encode, backbone, piece, own, deep, position, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(features, dim=1)[:, back]


def _encode(
    backbone: ClipBackbone, classes: ClassTokens, context: Tensor, deep: Tensor | None, position: str
) -> Tensor:
    """The tower itself, all classes at once; arguments are checked."""
    parts = text_parts(backbone.clip)
    assert parts is not None  # promptable
    depth = len(parts.blocks)
    layout = text_layout(
        classes,
        context.size(-2),
        class_specific=context.ndim == 4,
        position=position,
        frame=backbone.text_frame,
        reading=parts.reading,
        length=backbone.context_length,
        device=backbone.device,
    )
    embedded = parts.token_embedding(layout.tokens).to(parts.dtype)
    if parts.class_embedding is not None:
        appended = (layout.positions == backbone.context_length)[:, None]
        embedded = torch.where(appended, parts.class_embedding.to(parts.dtype), embedded)
    x = layout.place(embedded.expand(context.size(0), -1, -1), context)
    x = x + parts.positional_embedding.to(x.dtype)[layout.positions]
    for i, block in enumerate(parts.blocks):
        if deep is not None and 1 <= i <= deep.size(1):
            x = layout.place(x, deep[:, i - 1])
        if i < depth - 1:
            x = run_block(block, x, layout.attend)
        else:
            x = run_block(block, x, layout.attend_ends, queries=lambda t: t.index_select(1, layout.ends))
    return parts.project(parts.ln_final(x)).index_select(1, layout.restore)
